"""The measurements of `experiments.latency` as rows of plain data.

A row has the columns of `eejax.benchmark.benchmark_rows`, of which the plain network at the batch
served is the reference. Beside it there is a stricter one, the plain network at its best batch:
`plain_best_ms` is its time for as many images at the best of the batches up to the one served
(`plain_best_batch`; a larger one would need images that are not there), and `ideal_best_ms`,
`efficiency_best` and `speedup_best` follow from it. It is searched once, and the few best batches
are timed again in every round, so that a bad moment in the search does not spoil the reference.
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
from eejax.network import EarlyExitNetwork, ExitOutput, Module, PyTree, Variables
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
    """The plain network at one batch size.

    Attributes:
      ms: an image takes, as far as the search measured it.
      program: images to labels, in its fastest form.
    """

    ms: float
    program: Callable[[Any], Any]


class Timed(NamedTuple):
    """A strategy with one distribution, ready to be timed.

    Attributes:
      entry: what is timed.
      columns: of its row, besides the times.
    """

    entry: BenchmarkEntry
    columns: Row


def count_images(arguments: Arguments) -> int:
    """How many images the flags need."""
    streams = bool(_streams(arguments))
    return max(SINGLES, *arguments.batches, streams * min(STREAMED, arguments.images))


def measured(workload: Workload, arguments: Arguments, progress: Progress) -> Iterator[list[Row]]:
    """The rows of each batch size as soon as they are known, and those of `stream` at the end."""
    streams = _streams(arguments)
    direct = [name for name in dict.fromkeys(arguments.strategies) if name not in streams]
    batches = sorted(set(arguments.batches)) if direct else []
    chunk = 1 << min(CHUNK, arguments.images).bit_length() - 1 if streams else 0
    served = [*batches, *[chunk][: len(streams)]]
    if not served:
        return
    tried = {*served, *(b for b in arguments.plain_batches if b <= max(served))}
    plain = _search(workload, sorted(tried), min(arguments.repeats, 5), progress)

    def batch_rows(batch: int) -> list[Row]:
        pool = workload.images[: SINGLES if batch == 1 else batch]
        pieces = _split(pool, batch)
        stages = _stage_seconds(workload, pieces[0], arguments.repeats, progress)
        timed = []
        for name in direct:
            progress.status(f"batch {batch}: compiling {name}")
            what = f"{name} at batch {batch}"
            prepare = functools.partial(_direct, name, workload, arguments, pieces, stages)
            timed += _attempt(what, prepare, progress)
        progress.status(f"batch {batch}: timing {len(timed)} calls, {arguments.repeats} times each")
        rows = _rows(workload, plain, pieces, batch, timed, arguments.repeats)
        if batch == 1:
            for row in rows:
                if row["strategy"] == "cond":
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
    network, policy, variables = workload.network, workload.policy, workload.variables
    image, exits = workload.images[:1], network.num_exits
    classes = jax.eval_shape(network.apply_plain, variables, image).shape[-1]

    def stage(variables: Variables, features: PyTree, **_: Any) -> tuple[PyTree, PyTree]:
        del variables
        return features, {}

    def head(
        variables: Variables, features: PyTree, memory: PyTree, **_: Any
    ) -> tuple[ExitOutput, PyTree]:
        del variables, memory
        count = features.shape[0]
        return ExitOutput(jnp.zeros((count, classes)), jnp.zeros(count), ()), {}

    empty = EarlyExitNetwork(
        (Module(lambda *_: {}, stage),) * exits, (Module(lambda *_: {}, head),) * exits
    )
    nothing = {"params": {"stages": ({},) * exits, "heads": ({},) * exits}}
    predict = eejax.predictor(empty, policy, nothing, eejax.cond, max_batch=1)
    thresholds = jnp.full(exits - 1, jnp.inf)
    call = functools.partial(predict, thresholds, image)
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
    programs = []
    for batch in batches:
        progress.status(f"the plain network's best batch: compiling {batch}")
        images = workload.images[:batch]
        programs.append(benchmark.fastest_plain(workload.network, workload.variables, images, 3))
    progress.status("the plain network's best batch: timing")
    entries = [
        benchmark.plain_entry([program], [workload.images[:batch]])
        for batch, program in zip(batches, programs, strict=True)
    ]
    rows = benchmark.benchmark_rows(entries, 1, repeats, warmup=0)
    return {
        batch: Plain(row["ms"], program)
        for batch, row, program in zip(batches, rows, programs, strict=True)
    }


def _direct(
    name: str,
    workload: Workload,
    arguments: Arguments,
    pieces: Sequence[np.ndarray],
    stages: np.ndarray,
) -> Iterator[Timed]:
    """A strategy that serves batches, with each distribution; it has run once."""
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
        yield Timed(entry, {"distribution": distribution, "peak_bytes": memory, **columns})


def _streamed(
    name: str,
    workload: Workload,
    arguments: Arguments,
    pool: np.ndarray,
    chunk: int,
    stages: np.ndarray,
) -> Iterator[Timed]:
    """A stream of `arguments.images` images, which repeats the pool, with long distributions."""
    serve = strategies.stream(name, workload, chunk)
    order = np.resize(np.arange(len(pool)), arguments.images)
    batches = [pool[order[i : i + chunk]] for i in range(0, len(order), chunk)]
    for distribution in arguments.long():
        thresholds = jnp.asarray(thresholds_of(workload, distribution, len(pool)))
        # This compiles it, too. An image's exit does not depend on the images beside it.
        exits = np.concatenate([np.asarray(p.exits) for p in serve(thresholds, [pool])])

        def call(thresholds: Any = thresholds) -> list[np.ndarray]:
            return [np.asarray(p.labels) for p in serve(thresholds, batches)]

        entry = BenchmarkEntry(name, [call], len(order), exits[order], stages)
        yield Timed(entry, {"distribution": distribution, "peak_bytes": None})


def _rows(
    workload: Workload,
    plain: dict[int, Plain],
    pieces: Sequence[np.ndarray],
    count: int,
    timed: Sequence[Timed],
    repeats: int,
) -> list[Row]:
    """Times strategies and the plain network in turn.

    Args:
      workload: what is served.
      plain: by batch size.
      pieces: batches that the plain network serves.
      count: the number of images that times are stated for.
      timed: strategies with their distributions.
      repeats: rounds.
    """
    size = len(pieces[0])
    fastest = sorted((b for b in plain if b < size), key=lambda b: plain[b].ms)[:BEST_BATCHES]
    plains = [benchmark.plain_entry([plain[size].program], pieces)]
    plains += [benchmark.plain_entry([plain[b].program], [workload.images[:b]]) for b in fastest]
    entries = [*plains, *(t.entry for t in timed)]
    rows = benchmark.benchmark_rows(entries, count, repeats, warmup=0)
    times = [row["ms"] for row in rows[: len(plains)]]
    best = int(np.argmin(times))
    ratio = times[best] / times[0]
    rows = [
        {
            "network": workload.name,
            **row,
            **t.columns,
            "plain_best_ms": times[best],
            "plain_best_batch": [size, *fastest][best],
            "ideal_best_ms": ratio * row["ideal_ms"],
            "efficiency_best": ratio * row["efficiency"],
            "speedup_best": ratio * row["speedup"],
        }
        for row, t in zip(rows[len(plains) :], timed, strict=True)
    ]
    at = {(row["strategy"], row["distribution"]): row["ms"] for row in rows}
    for row in rows:
        ends = [(row["strategy"], name) for name in ("first", "last")]
        known = [at[end] for end in ends if end in at]
        row["break_even"] = break_even(*known, plain=times[best]) if len(known) == 2 else None
    return rows
