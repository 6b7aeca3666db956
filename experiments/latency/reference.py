"""What `experiments.latency` compares with: the plain network, and its prefixes, as the ideal.

The whole network's best, `full_best_ms`, is its time an image at the best of the batches that are
at most as large as the batch served, times that batch: a larger one would need images that are not
there. So at batch 1 it is `full_ms`. The ideal is measured likewise: for each exit the network that
ends there (of earlier heads only what hands memory on), at that same batch, times the share of
images that leaves there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from eejax import benchmark
from eejax.benchmark import fastest_plain
from eejax.network import EarlyExitNetwork
from experiments.latency.subject import Subject

Row = dict[str, Any]
Plain = Callable[[int, int], Callable[[Any], jax.Array]]


class Reference(NamedTuple):
    """What a batch is compared with, in ms for as many images.

    Attributes:
      full: the plain network at this batch.
      prefixes: `[E]`, networks that end at each exit, at `batch`; the last is the plain network.
      batch: the plain network's best.
    """

    full: float
    prefixes: np.ndarray
    batch: int


def plains(subject: Subject) -> Plain:
    """`plain(e, batch)`: the static network that ends at exit e, with its quickest options."""

    @functools.cache
    def plain(e: int, batch: int) -> Callable[[Any], jax.Array]:
        network = subject.network
        prefix = EarlyExitNetwork(network.stages[: e + 1], network.heads[: e + 1])
        return fastest_plain(prefix, subject.variables, subject.images[:batch], repeats=3)

    return plain


def search(
    plain: Plain,
    subject: Subject,
    batches: Sequence[int],
    repeats: int,
    status: Callable[[str], None],
) -> dict[int, float]:
    """The plain network's seconds an image, by batch."""
    last = subject.network.num_exits - 1
    calls = []
    for batch in batches:
        status(f"the whole network's best batch: compiling {batch}")
        call, images = plain(last, batch), subject.images[:batch]
        calls.append(lambda call=call, images=images: np.asarray(call(images)))
    status("the whole network's best batch: timing")
    times = np.median(benchmark.paired_seconds(calls, repeats, 1), axis=1)
    return {batch: float(t) / batch for batch, t in zip(batches, times, strict=True)}


def reference_calls(
    plain: Plain, subject: Subject, pieces: Sequence[np.ndarray], best: int
) -> tuple[list[Callable[[], Any]], Callable[[np.ndarray, int], Reference]]:
    """Calls to be timed, and what makes a `Reference` for so many images of their seconds."""
    exits = subject.network.num_exits
    size = len(pieces[0])
    # One image after the other also where early exits have nothing but that.
    some = list(pieces) if best == size else [subject.images[:best]]

    def swept(function: Callable[[Any], jax.Array], batches: Sequence[np.ndarray]) -> Any:
        return lambda: [np.asarray(function(images)) for images in batches]

    calls = [swept(plain(e, best), some) for e in range(exits)]
    if best != size:
        calls.append(swept(plain(exits - 1, size), pieces))

    def reference(seconds: np.ndarray, count: int) -> Reference:
        prefixes = 1e3 * seconds[:exits] / (best * len(some)) * count
        full = 1e3 * seconds[-1] / (size * len(pieces)) * count
        return Reference(float(full), prefixes, best)

    return calls, reference


def numbers(times: np.ndarray, fractions: np.ndarray, against: Reference) -> Row:
    """What a row says of its times `[repeats]`, in ms."""
    low, middle, high = (float(q) for q in np.quantile(times, (0.25, 0.5, 0.75)))
    best, ideal = float(against.prefixes[-1]), float(fractions @ against.prefixes)
    return {
        "ms": middle,
        "spread": (high - low) / middle,
        "full_ms": against.full,
        "full_best_ms": best,
        "full_best_batch": against.batch,
        "ideal_ms": ideal,
        "efficiency": ideal / middle,
        "speedup": against.full / middle,
        "speedup_best": best / middle,
    }


def add_break_even(rows: list[Row]) -> None:
    """Puts `break_even` into rows of one batch, None where `first` and `last` were not timed."""
    times = {(row["strategy"], row["distribution"]): row["ms"] for row in rows}
    for row in rows:
        ends = [times.get((row["strategy"], name)) for name in ("first", "last")]
        known = [time for time in ends if time is not None]
        row["break_even"] = (
            break_even(known[0], known[1], row["full_best_ms"]) if len(known) == 2 else None
        )


def break_even(first: float, last: float, whole: float) -> float | None:
    """The share of images that must leave at the first exit, the others leaving at the last, for a
    strategy to take as long as the whole network; None where it never does.

    Args:
      first, last: its time with all images at the first exit, and at the last.
      whole: the whole network's, at its best.
    """
    if last <= whole:
        return 0.0
    return None if first > whole else (last - whole) / (last - first)
