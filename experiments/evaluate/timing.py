"""Compiled inference against the plain network, in wall-clock time."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from eejax import benchmark
from eejax.inference import Executor
from eejax.inference.predictors import predictor
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
    """One row of the report's `inference`: the columns of `benchmark_rows`, and `stage_ms` `[E]`.

    Args:
      strategy: the executor's name.
      executor, network, variables, policy, thresholds: as for `eejax.predictor`.
      images: `[N, ...]` on the host; the first `batches * batch` are served.
      batch: images a call.
      batches: how many different batches.
      repeats: interleaved passes over the batches; the median counts.

    Raises:
      ValueError: if there are fewer images than one batch.
    """
    batches = min(batches, len(images) // batch)
    if batches == 0:
        raise ValueError(f"{len(images)} images for batches of {batch}; give a smaller batch.")
    largest = max(256, 1 << (batch - 1).bit_length())
    predict = predictor(network, policy, variables, executor, max_batch=largest)
    pieces = [images[i * batch : (i + 1) * batch] for i in range(batches)]
    stages = benchmark.stage_seconds(network, variables, jnp.asarray(pieces[0]), max(repeats, 10))
    entries = [
        benchmark.plain_entry(benchmark.plain_programs(network, variables), pieces),
        benchmark.predictor_entry(strategy, predict, jnp.asarray(thresholds), pieces, stages),
    ]
    row = benchmark.benchmark_rows(entries, batch, repeats)[1]
    return {**row, "stage_ms": (1e3 * stages).tolist()}
