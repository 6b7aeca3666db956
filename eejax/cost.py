"""What each stage and head costs: multiply-accumulates by XLA's analysis, and measured time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from eejax.compiling import compiler_options
from eejax.network import EarlyExitNetwork, PyTree, Variables


class Costs(NamedTuple):
    """Cost of each stage and each head, in one unit.

    Attributes:
      stages: `[E]` float64.
      heads: `[E]` float64.
    """

    stages: np.ndarray
    heads: np.ndarray

    @property
    def cumulative(self) -> np.ndarray:
        """`[E]`: the cost of leaving at each exit, every head on the way counted."""
        return np.cumsum(self.stages + self.heads)

    @property
    def fractions(self) -> np.ndarray:
        """`[E]`: `cumulative` as fractions of the whole network."""
        return self.cumulative / self.cumulative[-1]


def macs(network: EarlyExitNetwork, variables: Variables, images: Any) -> Costs:
    """Multiply-accumulates of each stage and each head for one sample.

    XLA's analysis of the program before optimisation counts two operations for a
    multiply-accumulate and one for every elementwise one; half of the total is what is returned.
    Products with a convolution's zero padding are not counted. Nothing is compiled or run, so that
    the answer is the same on every device.

    Args:
      network: E exits.
      variables: as `network.init` gives, or their shapes.
      images: `[B, ...]`, or their shape and dtype; B divides out.
    """
    batch = images.shape[0]
    stages, heads = [], []
    for stage, head, features, memory in _inputs(network, variables, images):
        stages.append(_operations(stage, variables, features) / 2 / batch)
        heads.append(_operations(head, variables, *memory) / 2 / batch)
    return Costs(np.array(stages), np.array(heads))


def stage_seconds(
    network: EarlyExitNetwork, variables: Variables, images: jax.Array, repeats: int = 20
) -> np.ndarray:
    """Measured seconds of each stage with its head, `[E]`: medians of interleaved runs.

    Each is a program of its own over the whole batch `images`.
    """
    calls = []
    features, memory = images, ()
    for e in range(network.num_exits):

        def run(variables: Variables, features: PyTree, memory: PyTree, e: int = e) -> PyTree:
            features, _ = network.apply_stage(variables, e, features)
            output, _ = network.apply_head(variables, e, features, memory)
            return features, output

        compiled = jax.jit(run, compiler_options=compiler_options())
        calls.append((compiled, (variables, features, memory)))
        features, output = compiled(variables, features, memory)
        memory = output.memory
    times = paired_seconds([lambda c=c, a=a: c(*a) for c, a in calls], repeats)
    return np.median(times, axis=1)


def paired_seconds(calls: Sequence[Callable[[], Any]], repeats: int, warmup: int = 2) -> np.ndarray:
    """Seconds of each call, `[len(calls), repeats]`: A B C A B C ..., so that a machine whose speed
    drifts is unfair to none. A call's result is waited for."""
    times = np.zeros((len(calls), repeats))
    for call in calls:
        for _ in range(warmup):
            jax.block_until_ready(call())
    for r in range(repeats):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[i, r] = time.perf_counter() - start
    return times


def _inputs(network: EarlyExitNetwork, variables: Variables, images: Any):
    """For each exit: its stage and head as functions, and the shapes of what they read."""
    features, memory = images, ()
    for e in range(network.num_exits):

        def stage(variables: Variables, features: PyTree, e: int = e) -> PyTree:
            return network.apply_stage(variables, e, features)[0]

        def head(variables: Variables, features: PyTree, memory: PyTree, e: int = e) -> PyTree:
            return network.apply_head(variables, e, features, memory)[0]

        after = jax.eval_shape(stage, variables, features)
        yield stage, head, features, (after, memory)
        memory = jax.eval_shape(head, variables, after, memory).memory
        features = after


def _operations(function: Callable[..., Any], *args: Any) -> float:
    analysis = jax.jit(function).lower(*args).cost_analysis()
    return float((analysis or {}).get("flops", 0.0))
