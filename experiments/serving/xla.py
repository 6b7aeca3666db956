"""A bundle's stages and its whole network in XLA, as engines: for tiles of powers of two."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eejax.bundle import Bundle
from eejax.compiling import bound
from eejax.inference.executors import full
from eejax.inference.step import bind_exits, exit_step, first_samples, output_shapes, pad_batch
from eejax.network import keep_variables
from eejax.policies import max_prob
from eejax.runtime.engine import Stage


class Programs(NamedTuple):
    """What a service runs.

    Attributes:
      run_stage: runs stage e on n samples.
    """

    run_stage: Callable[[int, Sequence[np.ndarray], np.ndarray], Stage]


def early(bundle: Bundle) -> Programs:
    """Every stage with its head, policy and decision."""
    exits = bind_exits(
        bundle.network, bundle.policy, bundle.variables, jnp.asarray(bundle.thresholds)
    )
    image = jax.ShapeDtypeStruct((1, *bundle.image), jnp.uint8)
    samples = jax.eval_shape(functools.partial(first_samples, bundle.policy), image)
    programs, trees = [], []
    for exit in exits:
        trees.append(jax.tree.structure(samples))
        programs.append(bound(functools.partial(_step, exit), exit.variables))
        samples, _ = output_shapes(exit, samples)

    def run(e: int, arrays: Sequence[np.ndarray], thresholds: np.ndarray) -> Stage:
        count = len(arrays[0])
        size = _size(count)
        if e == 0:
            samples = first_samples(bundle.policy, pad_batch(arrays[0], size))
        else:
            samples = jax.tree.unflatten(trees[e], [pad_batch(a, size) for a in arrays])
        after, logits, leaves = programs[e](samples, thresholds)
        rows = tuple(np.asarray(a)[:count] for a in jax.tree.leaves(after))
        return Stage(np.asarray(logits)[:count], np.asarray(leaves)[:count], rows)

    return Programs(run)


def plain(bundle: Bundle) -> Programs:
    """The whole network as one stage."""
    last = bundle.network.num_exits - 1
    network, none = bundle.network.keeping([last]), jnp.zeros(0)
    program = bound(
        lambda variables, images: full(network, max_prob, variables, none, images),
        keep_variables(bundle.variables, [last]),
    )

    def run(e: int, arrays: Sequence[np.ndarray], thresholds: np.ndarray) -> Stage:
        del e, thresholds
        count = len(arrays[0])
        logits = np.asarray(program(pad_batch(arrays[0], _size(count))).logits)[:count]
        return Stage(logits, np.ones(count, bool), ())

    return Programs(run)


def _step(exit: Any, variables: Any, samples: Any, thresholds: Any) -> Any:
    return exit_step(exit._replace(variables=variables, thresholds=thresholds), samples)


def _size(count: int) -> int:
    return 1 << (count - 1).bit_length()
