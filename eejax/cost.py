"""What each stage and head costs: multiply-accumulates by XLA's analysis, and measured time."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from eejax.compiling import compiler_options
from eejax.network import EarlyExitNetwork, PyTree, Variables, kept_groups


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

    def keeping(self, exits: Sequence[int]) -> Costs:
        """Costs of `network.keeping(exits)`: stages added up, heads of the kept exits only.

        Args:
          exits: 0-based and increasing.

        Raises:
          ValueError: none, one that does not exist, or not in order.
        """
        groups = kept_groups(exits, len(self.stages))
        return Costs(
            np.array([self.stages[a:b].sum() for a, b in groups]),
            np.array([self.heads[b - 1] for _, b in groups]),
        )


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


def layer_macs(network: EarlyExitNetwork, variables: Variables, images: Any) -> Costs:
    """Multiply-accumulates of convolutions and matrix products alone, as papers count them.

    Products with a convolution's zero padding count, what is elementwise does not. For standing
    beside published figures; `macs` is nearer to what a device does. Where a program has branches,
    the dearest counts; a `while` loop counts once.

    Args:
      network: E exits.
      variables: as `network.init` gives, or their shapes.
      images: `[B, ...]`, or their shape and dtype; B divides out.
    """
    batch = images.shape[0]
    stages, heads = [], []
    for stage, head, features, memory in _inputs(network, variables, images):
        stages.append(_products(jax.make_jaxpr(stage)(variables, features)) / batch)
        heads.append(_products(jax.make_jaxpr(head)(variables, *memory)) / batch)
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
    shapes = [memory for _, _, _, (_, memory) in _inputs(network, variables, images)]
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


def _products(jaxpr: Any) -> int:
    """Multiply-accumulates of the convolutions and products in a jaxpr and in those inside it."""
    total = 0
    for equation in jaxpr.eqns:
        kind, params = equation.primitive.name, equation.params
        if kind == "conv_general_dilated":
            kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval
            outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += out.size * math.prod(kernel) // outputs
        elif kind == "dot_general":
            (over, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * math.prod(left[i] for i in over)
        else:
            inner = [_products(each) for each in jaxprs_in_params(params)]
            times = params["length"] if kind == "scan" else 1
            total += times * (max(inner, default=0) if kind == "cond" else sum(inner))
    return total
