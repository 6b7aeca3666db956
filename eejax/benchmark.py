"""Measured time: interleaved runs, what each stage and head adds, and how near to ideal a run is.

All programs that are compared run in turn in one process, and everything that a user pays for is
inside the timer: the transfer of the images, dispatch, stages, heads, scores, gathering, and
fetching the labels.

**Efficiency** is defined once, here, for every report. With the plain network's time `P` for a
batch (no early heads, the fastest of its compiled forms, the same batch size), `t_e` the measured
time of stage e with its head at that batch size (`stage_seconds`), and `x_n` the exit that sample n
of N takes,

    ideal = P * sum_n (t_1 + ... + t_{x_n}) / (N * (t_1 + ... + t_E)),    efficiency = ideal / time.

An ideal executor runs each sample through its own stages at the speed of the plain network, and
stopping, scoring and gathering cost it nothing. `P` is at the same batch size because that is what
early exits replace. Measured times weigh the stages because multiply-accumulates do not: early
stages on large feature maps take more time for each of them. Efficiency can pass 1 where the plain
network is faster at another batch size than the one served, and an executor works in tiles of that
size; `experiments.latency` reports that stricter reference in columns of its own.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eejax.compiling import bound, compiler_options
from eejax.cost import Costs, exit_inputs
from eejax.network import EarlyExitNetwork, PyTree, Variables

# A call shorter than this runs several times in a row, so that it is not timed with the caches that
# the other calls leave behind.
BURST_SECONDS = 0.01


def paired_seconds(calls: Sequence[Callable[[], Any]], repeats: int, warmup: int = 2) -> np.ndarray:
    """Seconds of each call, `[len(calls), repeats]`, interleaved: A B C A B C ...

    A machine whose speed drifts is then unfair to no call. Every result is waited for. Calls of a
    few milliseconds run in bursts, A A A B B B ..., as in a service; the first call of a burst is
    not timed, and the mean of the others counts.

    Args:
      calls: each is run `warmup + 1` times before anything is timed.
      repeats: timed rounds.
      warmup: untimed calls, beside the one that sets the length of a burst.
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


class BenchmarkEntry(NamedTuple):
    """A program to be timed, on images that are fixed beforehand.

    Attributes:
      strategy: its name in the rows.
      calls: the same work in one or more forms (other compiler options); the fastest form counts.
        A call serves `images` images, from host arrays to fetched labels.
      images: N.
      exits: `[N]`, the exit that each image takes, from 0; None without early exits.
      stage_seconds: `[E]` of the network that is served, in any unit; None for no ideal.
    """

    strategy: str
    calls: Sequence[Callable[[], Any]]
    images: int
    exits: np.ndarray | None = None
    stage_seconds: np.ndarray | None = None


def plain_entry(
    programs: Sequence[Callable[[Any], Any]], batches: Sequence[np.ndarray]
) -> BenchmarkEntry:
    """The plain network on `batches` of host images, `[B, ...]` each.

    Args:
      programs: forms of it, of `plain_programs` or `fastest_plain`.
      batches: all are served in one call.
    """

    def serve(program: Callable[[Any], Any]) -> Callable[[], Any]:
        return lambda: [np.asarray(program(images)) for images in batches]

    return BenchmarkEntry("plain", [serve(p) for p in programs], sum(map(len, batches)))


def predictor_entry(
    strategy: str,
    predict: Callable[[Any, Any], Any],
    thresholds: Any,
    batches: Sequence[np.ndarray],
    stage_seconds: np.ndarray | None,
) -> BenchmarkEntry:
    """A compiled executor `predict(thresholds, images) -> Prediction`; it runs once here.

    Args:
      strategy: its name in the rows.
      predict: for example an `eejax.predictor`.
      thresholds: `[E - 1]`.
      batches: host images, `[B, ...]` each.
      stage_seconds: `[E]`, or None where no ideal is to be computed.
    """
    exits = np.concatenate([np.asarray(predict(thresholds, images).exits) for images in batches])

    def serve() -> list[np.ndarray]:
        return [np.asarray(predict(thresholds, images).labels) for images in batches]

    return BenchmarkEntry(strategy, [serve], len(exits), exits, stage_seconds)


def benchmark_rows(
    entries: Sequence[BenchmarkEntry],
    batch: int,
    repeats: int,
    whole_seconds: float | None = None,
    warmup: int = 2,
) -> list[dict[str, Any]]:
    """Times all entries, interleaved, and returns a row for each.

    The columns of a row: `strategy`; `batch`; `ms`, the median time for `batch` images; `spread`,
    the interquartile range as a fraction of `ms`; `plain_ms`, the first entry's `ms`; `speedup`,
    `plain_ms / ms`; `ideal_ms` and `efficiency = ideal_ms / ms`, None without early exits; and
    `exit_fractions` `[E]`, None without early exits.

    Args:
      entries: the first is the plain network.
      batch: the number of images that times are stated for.
      repeats: timed rounds.
      whole_seconds: of the whole network, in the unit of `stage_seconds`, for entries that serve a
        part of it (some exits removed); None: the sum of each entry's `stage_seconds`.
      warmup: as `paired_seconds` takes it.
    """
    times = iter(paired_seconds([call for e in entries for call in e.calls], repeats, warmup))
    rows: list[dict[str, Any]] = []
    for entry in entries:
        fastest = min(itertools.islice(times, len(entry.calls)), key=np.median)
        low, ms, high = np.quantile(1e3 * batch / entry.images * fastest, (0.25, 0.5, 0.75))
        plain_ms = rows[0]["ms"] if rows else float(ms)
        ideal_ms = fractions = None
        if entry.exits is not None and entry.stage_seconds is not None:
            ideal_ms = ideal_seconds(plain_ms, entry.stage_seconds, entry.exits, whole_seconds)
            counts = np.bincount(entry.exits, minlength=len(entry.stage_seconds))
            fractions = (counts / len(entry.exits)).tolist()
        rows.append(
            {
                "strategy": entry.strategy,
                "batch": batch,
                "ms": float(ms),
                "spread": float((high - low) / ms),
                "plain_ms": plain_ms,
                "ideal_ms": ideal_ms,
                "speedup": plain_ms / float(ms),
                "efficiency": None if ideal_ms is None else ideal_ms / float(ms),
                "exit_fractions": fractions,
            }
        )
    return rows


def ideal_seconds(
    plain_seconds: float,
    stage_seconds: np.ndarray,
    exits: np.ndarray,
    whole_seconds: float | None = None,
) -> float:
    """The plain network's time, times the work that the samples need over the work of all stages.

    `plain * mean_n(sum_{e <= x_n} t_e) / sum_e t_e`; the docstring of this module has the reasons.

    Args:
      plain_seconds: of the plain network, for any number of images, in any unit.
      stage_seconds: `[E]`, t: each stage with its head, in any unit.
      exits: `[N]`, x: the exit that each sample takes, from 0.
      whole_seconds: the sum of the whole network's t, where `stage_seconds` is of a part of it.

    Returns:
      The ideal time in the unit of `plain_seconds`, for as many images.

    Raises:
      ValueError: if there are no exits, or a sample's exit is not one of the E.
    """
    taken, stages = np.asarray(exits), np.asarray(stage_seconds, np.float64)
    if taken.size == 0 or taken.min() < 0 or taken.max() >= len(stages):
        raise ValueError(
            f"exits of {taken.size} samples, for {len(stages)} stages; give at least one sample, "
            f"and exits from 0 to {len(stages) - 1}."
        )
    cumulative = np.cumsum(stages)
    whole = cumulative[-1] if whole_seconds is None else whole_seconds
    return float(plain_seconds * cumulative[taken].mean() / whole)


def plain_programs(
    network: EarlyExitNetwork, variables: Variables
) -> list[Callable[[Any], jax.Array]]:
    """The plain network, images to labels `[B]`, in each compiled form that may be the fastest.

    The variables are bound as `predictor` binds them, so that neither side pays for passing them.
    """

    def labels(variables: Variables, images: jax.Array) -> jax.Array:
        return network.apply_plain(variables, images).argmax(-1).astype(jnp.int32)

    tuned = bound(labels, variables)
    return [tuned, jax.jit(functools.partial(labels, variables))] if compiler_options() else [tuned]


def fastest_plain(
    network: EarlyExitNetwork, variables: Variables, images: np.ndarray, repeats: int = 10
) -> Callable[[Any], jax.Array]:
    """The fastest of `plain_programs` on these images.

    Args:
      network, variables: as for `plain_programs`.
      images: `[B, ...]` on the host.
      repeats: interleaved runs of each program.
    """
    programs = plain_programs(network, variables)
    if len(programs) == 1:
        return programs[0]
    times = paired_seconds(
        [lambda p=p: np.asarray(p(images)) for p in programs], repeats, min(repeats, 2)
    )
    return programs[int(np.median(times, axis=1).argmin())]


def stage_seconds(
    network: EarlyExitNetwork, variables: Variables, images: jax.Array, repeats: int = 20
) -> np.ndarray:
    """Measured seconds of each stage with its head, `[E]`: what it adds to the stages before it.

    Programs that end at exit 1, 2, ... E, with all heads on the way, are timed in turn; the result
    is the difference of their medians. So the stages add up to the network. Stages in separate
    programs do not: each pays a dispatch, which for a single small image is a third of the time.

    Arguments are those of `seconds`.
    """
    programs = [(e, range(e + 1)) for e in range(network.num_exits)]
    return _increments(_program_seconds(network, variables, images, repeats, programs))


def seconds(
    network: EarlyExitNetwork, variables: Variables, images: jax.Array, repeats: int = 20
) -> Costs:
    """Measured seconds of each stage and of each head *for the whole batch*, not for a sample.

    With `Q_e` the time of a program of the stages up to e with all heads up to e, and `A_e` the
    same with head e alone, `Q_e - A_e` is the time of the heads before e. Its increase from exit to
    exit is one head, and the rest of `Q_e - Q_{e-1}` is the stage. The last head is what the last
    `A_e` adds to the stages without heads. `Q_e` and `A_e` are timed right after each other, and
    the median of their difference counts, because a head is shorter than the drift of a machine's
    speed during a round. No time is below zero, and a stage and its head add up to
    `stage_seconds`. A head shorter than the clock's noise can come out as zero.

    The first stage includes the dispatch of a program. Times do not scale to another batch size.

    Args:
      network: E exits. A head whose predecessor is left out reads zeros as its memory.
      variables: as `network.init` gives.
      images: `[B, ...]`, on the device.
      repeats: interleaved runs of each of the 2 E programs.

    Returns:
      Seconds for B images; `cumulative` is that of a batch in which all samples leave at e.
    """
    pairs = [((e, range(e + 1)), (e, [e])) for e in range(1, network.num_exits)]
    headless = (network.num_exits - 1, [])
    programs = [(0, [0]), *itertools.chain.from_iterable(pairs), headless]
    times = _program_seconds(network, variables, images, repeats, programs)
    both = _increments(times[[0, *range(1, len(times) - 1, 2)]])
    # Of all heads before e; each head adds to it.
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
    """`[P, repeats]` of programs `(last, heads)`: the stages up to `last`, and some of their heads.

    All outputs of the heads are returned, or the features if there are no heads, so that XLA
    removes no computation.
    """
    shapes = [memory for _, _, _, (_, memory) in exit_inputs(network, variables, images)]
    # Memory of heads whose predecessor is left out: arguments, or XLA would fold the constants.
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


def _increments(times: np.ndarray) -> np.ndarray:
    """What each of several nested programs, timed `[P, repeats]`, adds to the one before."""
    return np.maximum(np.diff(np.median(times, axis=1), prepend=0.0), 0.0)
