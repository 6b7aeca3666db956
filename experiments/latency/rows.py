"""The measurements of `experiments.latency`, paired and interleaved, as rows of plain data.

Everything a user pays for is inside the timer on both sides: images come from the host, and labels
are fetched as NumPy arrays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eejax import benchmark
from eejax.inference.executors import cond
from eejax.inference.predictors import predictor
from eejax.network import EarlyExitNetwork, ExitOutput, Module, PyTree, Variables
from experiments.latency import strategies
from experiments.latency.flags import Arguments, is_stream
from experiments.latency.reference import (
    Plain,
    Row,
    add_break_even,
    numbers,
    plains,
    reference_calls,
    search,
)
from experiments.latency.subject import SINGLES, STREAMED, Subject, thresholds

# Batch of the plain network, and of what comes in, where a stream is timed.
CHUNK = 256
PASSES = 2


class Show(NamedTuple):
    """Where progress goes.

    Attributes:
      status: what is being done now.
      line: what stays.
      failed: a strategy that gives no rows, and why.
    """

    status: Callable[[str], None]
    line: Callable[[str], None]
    failed: Callable[[str], None]


def groups(subject: Subject, arguments: Arguments, show: Show) -> Iterator[list[Row]]:
    """The rows of each batch size as soon as they are known, and those of `stream` at the end."""
    names = list(dict.fromkeys(arguments.strategies))
    for note in filter(None, (strategies.remark(name, subject) for name in names)):
        show.line(note)
    batches = sorted(set(arguments.batches))
    streams = [name for name in names if is_stream(name)]
    streamed = streams and arguments.images > 0
    size = 1 << min(CHUNK, arguments.images).bit_length() - 1 if streamed else 0
    plain = plains(subject)
    served = {*batches, *([size] if streamed else [])}
    tried = sorted({b for b in arguments.full_best_batches if b <= max(served)} | served)
    seconds = search(plain, subject, tried, min(arguments.repeats, 5), show.status)

    def best(batch: int) -> int:
        return min((b for b in seconds if b <= batch), key=lambda b: seconds[b])

    direct = [name for name in names if name not in streams]
    for batch in batches if direct else ():
        try:
            yield _batch_rows(subject, arguments, batch, best(batch), plain, direct, show)
        except Exception as error:
            show.failed(f"batch {batch}: {reason(error)}")
    for name in streams if streamed else ():
        try:
            yield _stream_rows(name, subject, arguments, size, best(size), plain, show)
        except Exception as error:
            show.failed(f"{name}: {reason(error)}")


def reason(error: Exception) -> str:
    """An error in one line."""
    words = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {words[0][:300]}".rstrip(": ")


def overhead_ms(subject: Subject, repeats: int) -> float:
    """Median time of `cond` on one image where stages hand it on and heads say zero: what a call
    costs before anything is computed."""
    image = subject.images[:1]
    exits, classes = subject.scores.shape[1], _classes(subject)

    def stage(
        variables: Variables, features: PyTree, *, train: bool, key: jax.Array | None = None
    ) -> tuple[PyTree, PyTree]:
        del variables, train, key
        return features, {}

    def head(
        variables: Variables,
        features: PyTree,
        memory: PyTree,
        *,
        train: bool,
        key: jax.Array | None = None,
    ) -> tuple[ExitOutput, PyTree]:
        del variables, memory, train, key
        count = features.shape[0]
        return ExitOutput(jnp.zeros((count, classes)), jnp.zeros(count), ()), {}

    nothing = EarlyExitNetwork(
        (Module(lambda *_: {}, stage),) * exits, (Module(lambda *_: {}, head),) * exits
    )
    variables = {"params": {"stages": ({},) * exits, "heads": ({},) * exits}}
    predict = predictor(nothing, subject.policy, variables, cond, max_batch=1)
    limits = jnp.full(exits - 1, jnp.inf)
    times = benchmark.paired_seconds([lambda: predict(limits, image).labels], max(repeats, 10))
    return 1e3 * float(np.median(times))


def _classes(subject: Subject) -> int:
    logits = jax.eval_shape(subject.network.apply_plain, subject.variables, subject.images[:1])
    return logits.shape[-1]


def _batch_rows(
    subject: Subject,
    arguments: Arguments,
    batch: int,
    best: int,
    plain: Plain,
    names: Sequence[str],
    show: Show,
) -> list[Row]:
    """Every strategy and distribution at one batch size, with the plain network, in turn."""
    pool = subject.images[: SINGLES if batch == 1 else batch]
    pieces = [pool[i : i + batch] for i in range(0, len(pool), batch)]
    rows, calls = [], []
    for i, name in enumerate(names):
        show.status(f"batch {batch}: compiling {name} ({i + 1} of {len(names)})")
        try:
            for row, call in _prepared(subject, arguments, name, pool, pieces):
                rows.append(row)
                calls.append(call)
        except Exception as error:
            show.failed(f"{name} at batch {batch}: {reason(error)}")
            known = [row["strategy"] != name for row in rows]
            rows = [row for row, keep in zip(rows, known, strict=True) if keep]
            calls = [call for call, keep in zip(calls, known, strict=True) if keep]
    show.status(f"batch {batch}: compiling the plain network")
    plain_calls, reference = reference_calls(plain, subject, pieces, best)
    total = len(calls) + len(plain_calls)
    show.status(f"batch {batch}: timing {total} calls, {arguments.repeats} times each")
    times = benchmark.paired_seconds([*plain_calls, *calls], arguments.repeats, 0)
    against = reference(np.median(times[: len(plain_calls)], axis=1), batch)
    for row, each in zip(rows, times[len(plain_calls) :], strict=True):
        row |= numbers(1e3 * each / len(pieces), np.asarray(row["exit_fractions"]), against)
    add_break_even(rows)
    if batch == 1 and "cond" in names:
        show.status("a call's fixed overhead")
        overhead = overhead_ms(subject, arguments.repeats)
        for row in rows:
            if row["strategy"] == "cond":
                row["overhead_ms"] = overhead
    return rows


def _prepared(
    subject: Subject,
    arguments: Arguments,
    name: str,
    pool: np.ndarray,
    pieces: Sequence[np.ndarray],
) -> Iterator[tuple[Row, Callable[[], Any]]]:
    """For each distribution a row without its times, and the call to be timed; it has run once."""
    made = None
    anew = strategies.depends_on_thresholds(name)
    for distribution in dict.fromkeys(arguments.distributions):
        if anew and distribution not in arguments.long():
            continue
        limits = jnp.asarray(thresholds(subject, distribution, len(pool)))
        before = strategies.bytes_at_peak()
        if made is None or anew:
            made = strategies.serving(name, subject, limits, pieces[0], arguments.repeats)
        exits = np.concatenate([made.predict(limits, piece).exits for piece in pieces])
        peak = strategies.program_bytes(made.predict, limits, pieces[0])
        if peak is None and before is not None:
            grown = (strategies.bytes_at_peak() or 0) - before
            # A peak that was higher before says nothing.
            peak = grown or None
        row = {
            "network": subject.name,
            "strategy": name,
            "batch": len(pieces[0]),
            "distribution": distribution,
            "peak_bytes": peak,
            "exit_fractions": _fractions(exits, subject),
            **made.extra,
        }

        def call(predict: Any = made.predict, limits: Any = limits) -> list[np.ndarray]:
            return [np.asarray(predict(limits, piece).labels) for piece in pieces]

        yield row, call


def _stream_rows(
    name: str,
    subject: Subject,
    arguments: Arguments,
    size: int,
    best: int,
    plain: Plain,
    show: Show,
) -> list[Row]:
    """A pass of `stream` over many images, against the plain network in batches of `size`.

    The plain network is timed on at most 1,024 of them between the passes, and its time scaled.
    """
    show.status(f"{name}: compiling")
    pool = subject.images[: min(STREAMED, arguments.images)]
    order = np.arange(arguments.images) % len(pool)
    batches = [pool[order[i : i + size]] for i in range(0, len(order), size)]
    pieces = [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
    plain_calls, reference = reference_calls(plain, subject, pieces, best)
    streamer = strategies.stream(name, subject, size)
    rows = []
    for distribution in dict.fromkeys(arguments.distributions):
        if distribution not in arguments.long():
            continue
        limits = jnp.asarray(thresholds(subject, distribution, len(pool)))
        for _ in streamer(limits, batches[:1]):
            pass
        seconds, references, exits = [], [], []
        passes = min(PASSES, arguments.repeats)
        for i in range(passes):
            show.status(f"{name}: {distribution}, pass {i + 1} of {passes}")
            references.append(benchmark.paired_seconds(plain_calls, 4, 1))
            start = time.perf_counter()
            exits = [np.asarray(p.exits) for p in streamer(limits, batches)]
            seconds.append(time.perf_counter() - start)
        against = reference(np.median(np.concatenate(references, 1), axis=1), len(order))
        fractions = _fractions(np.concatenate(exits), subject)
        rows.append(
            {
                "network": subject.name,
                "strategy": name,
                "batch": len(order),
                "distribution": distribution,
                "peak_bytes": None,
                "exit_fractions": fractions,
                **numbers(1e3 * np.asarray(seconds), np.asarray(fractions), against),
            }
        )
    add_break_even(rows)
    return rows


def _fractions(exits: np.ndarray, subject: Subject) -> list[float]:
    counts = np.bincount(exits, minlength=subject.network.num_exits)
    return (counts / len(exits)).tolist()
