"""Compiled inference against the plain network, in wall-clock time.

Everything a user pays for is inside the timer on both sides: the transfer of the images, dispatch,
heads, scores, gathering, and fetching the answer. Runs are paired and interleaved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eejax import benchmark
from eejax.compiling import compiler_options
from eejax.inference.executors import Executor
from eejax.inference.predictors import bound, predictor
from eejax.network import EarlyExitNetwork, Variables
from eejax.policies.base import Policy


def inference_row(
    strategy: str,
    executor: Executor,
    network: EarlyExitNetwork,
    variables: Variables,
    policy: Policy,
    thresholds: np.ndarray,
    images: np.ndarray,
    *,
    batch: int,
    batches: int,
    repeats: int,
) -> dict[str, Any]:
    """One row of the report's `inference`.

    The time-ideal is the plain network's time, times work needed over whole work, where a stage
    with its head weighs its own measured time and counts for the samples that reach it.

    Args:
      strategy: the executor's name.
      images: `[N, ...]` on the host, from the front of which `batches` batches are taken.
      batch: images a call.
      batches: how many different batches.
      repeats: interleaved passes over the batches; the median counts.

    Raises:
      ValueError: fewer images than one batch.
    """
    batches = min(batches, len(images) // batch)
    if batches == 0:
        raise ValueError(f"{len(images)} images for batches of {batch}; give a smaller batch.")
    largest = max(256, 1 << (batch - 1).bit_length())
    predict = predictor(network, policy, variables, executor, max_batch=largest)
    limits = jnp.asarray(thresholds)
    plain = fastest_plain(network, variables, images[:batch])
    pieces = [images[i * batch : (i + 1) * batch] for i in range(batches)]
    exits = np.concatenate([np.asarray(predict(limits, piece).exits) for piece in pieces])
    reach = np.array([(exits >= e).sum() for e in range(network.num_exits)])
    times = benchmark.paired_seconds(
        [
            lambda: [np.asarray(plain(piece)) for piece in pieces],
            lambda: [np.asarray(predict(limits, piece).labels) for piece in pieces],
        ],
        repeats,
    )
    times /= batches
    stages = benchmark.stage_seconds(network, variables, jnp.asarray(pieces[0]), max(repeats, 10))
    plain_ms, early_ms = (1e3 * float(t) for t in np.median(times, axis=1))
    needed = (stages * reach).sum() / (stages.sum() * batch * batches)
    low, high = 1e3 * np.quantile(times[1], (0.25, 0.75))
    return {
        "strategy": strategy,
        "batch": batch,
        "ms": early_ms,
        "full_ms": plain_ms,
        "ideal_ms": plain_ms * needed,
        "speedup": plain_ms / early_ms,
        "efficiency": plain_ms * needed / early_ms,
        "spread": float(high - low) / early_ms,
        "stage_ms": (1e3 * stages).tolist(),
        "exit_fractions": (-np.diff(np.append(reach, 0)) / (batch * batches)).tolist(),
    }


def fastest_plain(
    network: EarlyExitNetwork, variables: Variables, images: np.ndarray, repeats: int = 10
) -> Callable[[Any], jax.Array]:
    """The plain network, images to labels `[B]`, compiled with whichever options are quicker here.

    Args:
      images: `[B, ...]` on the host, what the options are compared on.
      repeats: interleaved runs for that.
    """
    candidates = plain_programs(network, variables)
    if len(candidates) == 1:
        return candidates[0]
    times = benchmark.paired_seconds(
        [lambda c=c: np.asarray(c(images)) for c in candidates], repeats, min(repeats, 2)
    )
    return candidates[int(np.median(times, axis=1).argmin())]


def plain_programs(
    network: EarlyExitNetwork, variables: Variables
) -> list[Callable[[Any], jax.Array]]:
    """The plain network, images to labels `[B]`, compiled in each way that may be the quicker.

    The variables are bound to it as `predictor` binds them, so that neither side pays for handing
    them over.
    """

    def labels(variables: Variables, images: jax.Array) -> jax.Array:
        return network.apply_plain(variables, images).argmax(-1).astype(jnp.int32)

    ours = bound(labels, variables)
    return [ours, jax.jit(functools.partial(labels, variables))] if compiler_options() else [ours]
