"""What each stage and head costs: multiply-accumulates by XLA's analysis, and measured time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from eejax.compiling import compiler_options
from eejax.network import EarlyExitNetwork, ExitOutput, PyTree, Variables


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
    """Measured seconds of each stage with its head, `[E]`: what it adds to those before it.

    Programs that end at exit 1, 2, ... E, heads on the way included, are timed in turn, and the
    differences of their medians taken. So the stages add up to the network; stages in programs of
    their own do not, because each pays a dispatch, which for a single small image is a third of the
    time and is charged to the late, cheap stages most of all.

    Args:
      network: E exits.
      variables: as `network.init` gives.
      images: `[B, ...]`, on the device.
      repeats: interleaved runs of each program.
    """

    def until(last: int) -> Callable[[], Any]:
        def run(variables: Variables, images: jax.Array) -> list[ExitOutput]:
            features, memory, outputs = images, (), []
            for e in range(last + 1):
                features, _ = network.apply_stage(variables, e, features)
                output, _ = network.apply_head(variables, e, features, memory)
                memory = output.memory
                outputs.append(output)
            return outputs

        compiled = jax.jit(run, compiler_options=compiler_options())
        return lambda: compiled(variables, images)

    times = paired_seconds([until(e) for e in range(network.num_exits)], repeats)
    return np.maximum(np.diff(np.median(times, axis=1), prepend=0.0), 0.0)


# A call shorter than this is run several times in a row, so that it is not timed on the caches that
# the others have left behind.
BURST_SECONDS = 0.01


def paired_seconds(calls: Sequence[Callable[[], Any]], repeats: int, warmup: int = 2) -> np.ndarray:
    """Seconds of each call, `[len(calls), repeats]`: A B C A B C ..., so that a machine whose speed
    drifts is unfair to none. A call's result is waited for.

    Calls of a few milliseconds are run in bursts, A A A B B B ..., and a burst's mean taken,
    without the first call: that is how a service would run them.
    """
    times = np.zeros((len(calls), repeats))
    bursts = []
    for call in calls:
        for _ in range(warmup):
            jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        bursts.append(min(max(int(BURST_SECONDS / (time.perf_counter() - start)), 1), 100))
    for r in range(repeats):
        for i, (call, burst) in enumerate(zip(calls, bursts, strict=True)):
            if burst > 1:
                jax.block_until_ready(call())
            start = time.perf_counter()
            for _ in range(burst):
                jax.block_until_ready(call())
            times[i, r] = (time.perf_counter() - start) / burst
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
