"""Measured time: paired, interleaved runs, and what each stage and head adds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eejax.compiling import compiler_options
from eejax.cost import Costs, exit_inputs
from eejax.network import EarlyExitNetwork, PyTree, Variables


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

    until = [(e, range(e + 1)) for e in range(network.num_exits)]
    return _added(_program_seconds(network, variables, images, repeats, until))


def seconds(
    network: EarlyExitNetwork, variables: Variables, images: jax.Array, repeats: int = 20
) -> Costs:
    """Measured seconds of each stage and of each head *for the whole batch*, not for a sample.

    With `Q_e` the time of a program of the stages up to e with all heads up to e, and `A_e` of the
    same with head e alone, `Q_e - A_e` is what the heads before e take in a network that goes on.
    Its rise from exit to exit is one head, and what is left of `Q_e - Q_{e-1}` is the stage. The
    last head is what the last `A_e` takes beyond the bare stages. `Q_e` and `A_e` are timed right
    after each other and the median of their difference taken: a head is so short that what the
    machine's speed drifts by in a round would hide it. Nothing is below zero, and a stage and its
    head add up to what `stage_seconds` measures. A head within the clock's noise can come out as
    nothing.

    The first stage has the dispatch of a program in it, and a batch of another size, or one of
    which a part has left, takes another time: XLA's kernels do not cost in proportion.

    Args:
      network: E exits. A head that reads memory is given zeros where the one before is left out.
      variables: as `network.init` gives.
      images: `[B, ...]`, on the device.
      repeats: interleaved runs of each of the 2 E programs.

    Returns:
      Seconds for B images; `cumulative` is that of a batch which leaves at e as a whole.
    """
    later = [((e, range(e + 1)), (e, [e])) for e in range(1, network.num_exits)]
    bare = (network.num_exits - 1, [])
    programs = [(0, [0]), *itertools.chain.from_iterable(later), bare]
    times = _program_seconds(network, variables, images, repeats, programs)
    both = _added(times[[0, *range(1, len(times) - 1, 2)]])
    # Of the heads before e, which are none before the first. Each head adds to it.
    before = np.median(times[1:-1:2] - times[2:-1:2], axis=1)
    before = np.maximum.accumulate(np.append(0.0, before))
    last = max(float(np.median(times[-2] - times[-1])), 0.0)
    heads = np.minimum(np.append(np.diff(before), last), both)
    return Costs(both - heads, heads)


def _program_seconds(
    network: EarlyExitNetwork,
    variables: Variables,
    images: jax.Array,
    repeats: int,
    programs: Sequence[tuple[int, Sequence[int]]],
) -> np.ndarray:
    """`[P, repeats]` of programs `(last, heads)`: stages up to `last`, and these of their heads.

    All that the heads say is returned, and the features where there is no head, so that XLA leaves
    nothing out.
    """
    shapes = [memory for _, _, _, (_, memory) in exit_inputs(network, variables, images)]
    # For heads whose predecessor is left out. As arguments, or XLA would compute with them ahead.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def call(last: int, heads: Sequence[int]) -> Callable[[], Any]:
        def run(variables: Variables, images: jax.Array, zeros: list[PyTree]) -> Any:
            features, memory, outputs = images, (), []
            for e in range(last + 1):
                features, _ = network.apply_stage(variables, e, features)
                if e in heads:
                    read = memory if e - 1 in heads else zeros[e]
                    output, _ = network.apply_head(variables, e, features, read)
                    memory = output.memory
                    outputs.append(output)
            return outputs or features

        compiled = jax.jit(run, compiler_options=compiler_options())
        return lambda: compiled(variables, images, zeros)

    calls = [call(last, heads) for last, heads in programs]
    return paired_seconds(calls, repeats)


def _added(times: np.ndarray) -> np.ndarray:
    """What each of several nested programs, timed `[P, repeats]`, takes beyond the one before."""
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
