"""The measurements of `experiments.latency` as rows of plain data.

A row has the columns of `eejax.benchmark.benchmark_rows`, whose reference is the plain network at
the batch served. There is a stricter one, the plain network at its best batch: `plain_best_ms` is
its time for as many images at the best of the batches up to the one served (`plain_best_batch`; a
larger one would need images that are not there), and `ideal_best_ms`, `efficiency_best` and
`speedup_best` follow from it. It is searched once, and the best few batches are timed again in
every round, so that a bad moment in the search does not spoil the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

import eejax
from eejax import benchmark
from eejax.benchmark import BenchmarkEntry
from eejax.network import EarlyExitNetwork, ExitOutput, Module
from experiments.latency import strategies
from experiments.latency.arguments import Arguments
from experiments.latency.workload import Workload, thresholds_of

Row = dict[str, Any]
T = TypeVar("T")

# At batch 1 every call serves another of so many images, so that there can be a distribution.
SINGLES = 64
# A stream repeats so many images, in chunks of CHUNK, in so many timed passes.
STREAMED, CHUNK, PASSES = 1024, 256, 2
# So many of the plain network's best batches are timed in every round.
BEST_BATCHES = 3


class Progress(NamedTuple):
    """Where progress is shown.

    Attributes:
      status: takes the current step.
      failed: takes a strategy without rows, and the reason.
    """

    status: Callable[[str], None]
    failed: Callable[[str], None]


class Plain(NamedTuple):
    """The plain network at one batch size: its time an image in the search, and its program."""

    ms: float
    program: Callable[[Any], Any]


def count_images(arguments: Arguments) -> int:
    """How many images the flags need."""
    streamed = min(STREAMED, arguments.images) if _streams(arguments) else 0
    return max(SINGLES, *arguments.batches, streamed)


def measured(workload: Workload, arguments: Arguments, progress: Progress) -> Iterator[list[Row]]:
    """The rows of each batch size as soon as they are known, and those of `stream` at the end."""
    streams = _streams(arguments)
    direct = [s for s in dict.fromkeys(arguments.strategies) if not strategies.is_stream(s)]
    batches = sorted(set(arguments.batches)) if direct else []
    chunk = 1 << min(CHUNK, arguments.images).bit_length() - 1 if streams else 0
    largest = max([chunk, *batches])
    tried = {*batches, chunk, *(b for b in arguments.plain_batches if b <= largest)} - {0}
    plain = _search(workload, sorted(tried), min(arguments.repeats, 5), progress)

    def batch_rows(batch: int) -> list[Row]:
        pieces = _split(workload.images[: SINGLES if batch == 1 else batch], batch)
        stages = _stage_seconds(workload, pieces[0], arguments.repeats, progress)
        timed = []
        for name in direct:
            progress.status(f"batch {batch}: compiling {name}")
            what = f"{name} at batch {batch}"
            entries = functools.partial(_direct, name, workload, arguments, pieces, stages)
            timed += _attempt(what, entries, progress)
        progress.status(f"batch {batch}: timing {len(timed)} calls, {arguments.repeats} times each")
        rows = _rows(workload, plain, pieces, batch, timed, arguments.repeats)
        for row in rows:
            if batch == 1 and row["strategy"] == "cond":
                row["overhead_ms"] = overhead_ms(workload, arguments.repeats)
        return rows

    def stream_rows(name: str) -> list[Row]:
        progress.status(f"{name}: compiling")
        pool = workload.images[: min(STREAMED, arguments.images)]
        pieces = _split(pool, chunk)
        stages = _stage_seconds(workload, pieces[0], arguments.repeats, progress)
        timed = list(_streamed(name, workload, arguments, pool, chunk, stages))
        passes = min(PASSES, arguments.repeats)
        progress.status(f"{name}: timing {passes} passes")
        return _rows(workload, plain, pieces, arguments.images, timed, passes)

    for batch in batches:
        yield _attempt(f"batch {batch}", functools.partial(batch_rows, batch), progress)
    for name in streams:
        yield _attempt(name, functools.partial(stream_rows, name), progress)


def overhead_ms(workload: Workload, repeats: int) -> float:
    """The median time of a call of `cond` on one image, with stages that return their input and
    heads that return zeros: what a call costs before anything is computed."""
    network, image = workload.network, workload.images[:1]
    exits = network.num_exits
    logits = jax.eval_shape(network.apply_plain, workload.variables, image)
    zeros = ExitOutput(jnp.zeros(logits.shape, jnp.float32), jnp.zeros(1), ())
    stage = Module(lambda *_: {}, lambda variables, x, **_: (x, {}))
    head = Module(lambda *_: {}, lambda variables, x, memory, **_: (zeros, {}))
    empty = EarlyExitNetwork((stage,) * exits, (head,) * exits)
    nothing = {"params": {"stages": ({},) * exits, "heads": ({},) * exits}}
    predict = eejax.predictor(empty, workload.policy, nothing, eejax.cond, max_batch=1)
    call = functools.partial(predict, jnp.full(exits - 1, jnp.inf), image)
    return 1e3 * float(np.median(benchmark.paired_seconds([call], max(repeats, 10))))


def break_even(first: float, last: float, plain: float) -> float | None:
    """The share of images that must leave at the first exit, the others leaving at the last, for a
    strategy to take as long as the plain network; None if no share is enough.

    Args:
      first, last: its time with all images at the first exit, and at the last.
      plain: the plain network's, at its best batch.
    """
    if last <= plain:
        return 0.0
    return (last - plain) / (last - first) if first <= plain else None


def _streams(arguments: Arguments) -> list[str]:
    """The strategies that serve a stream, if there are images for it."""
    names = dict.fromkeys(arguments.strategies) if arguments.images else ()
    return [name for name in names if strategies.is_stream(name)]


def _split(images: np.ndarray, batch: int) -> list[np.ndarray]:
    return [images[i : i + batch] for i in range(0, len(images) - batch + 1, batch)]


def _attempt(what: str, work: Callable[[], Iterable[T]], progress: Progress) -> list[T]:
    """The results, or none and one line about the reason."""
    try:
        return list(work())
    except Exception as error:
        words = str(error).strip().splitlines() or [""]
        progress.failed(f"{what}: {type(error).__name__}: {words[0][:300]}".rstrip(": "))
        return []


def _stage_seconds(
    workload: Workload, images: np.ndarray, repeats: int, progress: Progress
) -> np.ndarray:
    progress.status(f"batch {len(images)}: timing the stages")
    on_device = jnp.asarray(images)
    return benchmark.stage_seconds(workload.network, workload.variables, on_device, repeats)


def _search(
    workload: Workload, batches: Sequence[int], repeats: int, progress: Progress
) -> dict[int, Plain]:
    """The plain network at each batch size, timed in turn."""
    entries, programs = [], []
    for batch in batches:
        progress.status(f"the plain network's best batch: compiling {batch}")
        images = workload.images[:batch]
        program = benchmark.fastest_plain(workload.network, workload.variables, images, 3)
        programs.append(program)
        entries.append(benchmark.plain_entry([program], [images]))
    progress.status("the plain network's best batch: timing")
    rows = benchmark.benchmark_rows(entries, 1, repeats, warmup=0)
    times = [row["ms"] for row in rows]
    return dict(zip(batches, map(Plain, times, programs), strict=True))


def _direct(
    name: str,
    workload: Workload,
    arguments: Arguments,
    pieces: Sequence[np.ndarray],
    stages: np.ndarray,
) -> Iterator[tuple[BenchmarkEntry, Row]]:
    """A strategy that serves batches, which has run once, and columns, for each distribution."""
    predict, columns = None, {}
    auto = strategies.split_strategy(name)[0] == "auto"
    for distribution in arguments.long() if auto else dict.fromkeys(arguments.distributions):
        count = sum(map(len, pieces))
        thresholds = jnp.asarray(thresholds_of(workload, distribution, count))
        before = strategies.peak_bytes()
        if predict is None or auto:
            predict, columns = strategies.compiled_strategy(
                name, workload, thresholds, pieces[0], arguments.repeats
            )
        entry = benchmark.predictor_entry(name, predict, thresholds, pieces, stages)
        memory = strategies.program_bytes(predict, thresholds, pieces[0])
        # Where the peak was higher before, nothing is known.
        memory = memory or strategies.peak_bytes() - before or None
        yield entry, {"distribution": distribution, "peak_bytes": memory, **columns}


def _streamed(
    name: str,
    workload: Workload,
    arguments: Arguments,
    pool: np.ndarray,
    chunk: int,
    stages: np.ndarray,
) -> Iterator[tuple[BenchmarkEntry, Row]]:
    """A stream of `arguments.images` images, which repeats the pool, and columns, for each long
    distribution."""
    network, policy, variables = workload.network, workload.policy, workload.variables
    tiles = strategies.split_strategy(name)[1]
    serve = eejax.stream(network, policy, variables, chunk=chunk, **tiles)
    order = np.resize(np.arange(len(pool)), arguments.images)
    batches = [pool[order[i : i + chunk]] for i in range(0, len(order), chunk)]
    for distribution in arguments.long():
        thresholds = jnp.asarray(thresholds_of(workload, distribution, len(pool)))
        # This compiles it, too. An image's exit does not depend on the images beside it.
        exits = np.concatenate([np.asarray(p.exits) for p in serve(thresholds, [pool])])

        def call(thresholds: Any = thresholds) -> list[np.ndarray]:
            return [np.asarray(p.labels) for p in serve(thresholds, batches)]

        entry = BenchmarkEntry(name, [call], len(order), exits[order], stages)
        yield entry, {"distribution": distribution, "peak_bytes": None}


def _rows(
    workload: Workload,
    plain: dict[int, Plain],
    pieces: Sequence[np.ndarray],
    count: int,
    timed: Sequence[tuple[BenchmarkEntry, Row]],
    repeats: int,
) -> list[Row]:
    """Times strategies and the plain network in turn.

    Args:
      workload: what is served.
      plain: by batch size.
      pieces: batches that the plain network serves.
      count: the number of images that times are stated for.
      timed: entries of strategies, and columns of their rows.
      repeats: rounds.
    """
    size = len(pieces[0])
    fastest = sorted((b for b in plain if b < size), key=lambda b: plain[b].ms)[:BEST_BATCHES]
    entries = [benchmark.plain_entry([plain[size].program], pieces)]
    entries += [benchmark.plain_entry([plain[b].program], [workload.images[:b]]) for b in fastest]
    sizes = [size, *fastest]
    rows = benchmark.benchmark_rows(
        [*entries, *(entry for entry, _ in timed)], count, repeats, warmup=0
    )
    best = min(range(len(sizes)), key=lambda i: rows[i]["ms"])
    plain_best = {"plain_best_ms": rows[best]["ms"], "plain_best_batch": sizes[best]}
    ratio = rows[best]["ms"] / rows[0]["ms"]
    strategy_rows = [
        {
            "network": workload.name,
            **row,
            **columns,
            **plain_best,
            "ideal_best_ms": ratio * row["ideal_ms"],
            "efficiency_best": ratio * row["efficiency"],
            "speedup_best": ratio * row["speedup"],
        }
        for row, (_, columns) in zip(rows[len(sizes) :], timed, strict=True)
    ]
    at = {(row["strategy"], row["distribution"]): row["ms"] for row in strategy_rows}
    for row in strategy_rows:
        ends = [(row["strategy"], name) for name in ("first", "last")]
        known = [at[end] for end in ends if end in at]
        row["break_even"] = break_even(*known, plain=rows[best]["ms"]) if len(known) == 2 else None
    return strategy_rows
