"""The strategies that `experiments.latency` times, by name, as `predict(thresholds, images)`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

import eejax
from eejax.inference import Executor, compaction
from eejax.inference.predictors import Predictor
from experiments.latency.flags import tiles_of
from experiments.latency.subject import Subject


class Serving(NamedTuple):
    """A strategy, ready to serve.

    Attributes:
      predict: `predict(thresholds, images) -> Prediction`, in NumPy arrays.
      extra: what else its rows say.
    """

    predict: Callable[[Any, Any], Any]
    extra: dict[str, Any]


def serving(
    strategy: str, subject: Subject, limits: Array, images: np.ndarray, repeats: int
) -> Serving:
    """A strategy for batches like `images`; only `auto` looks at the thresholds."""
    name, tiles = tiles_of(strategy)
    if name == "auto":
        return _auto(subject, limits, images, repeats)
    largest = 1 << (len(images) - 1).bit_length()
    return Serving(_tiled(name, tiles, subject, largest), {})


def depends_on_thresholds(strategy: str) -> bool:
    """Whether a strategy must be made anew for other thresholds."""
    return strategy == "auto"


def remark(strategy: str, subject: Subject) -> str:
    """What a reader of the strategy's rows should know, or ""."""
    if tiles_of(strategy)[0] == "loop" and all(
        b - a == 1 for a, b in compaction.runs(subject.network)
    ):
        return "loop: no two neighbouring stages of this network are equal; it runs as compact"
    return ""


def stream(strategy: str, subject: Subject, chunk: int) -> Any:
    """`streamer(thresholds, batches)`."""
    tiles = tiles_of(strategy)[1]
    return eejax.stream(
        subject.network, subject.policy, subject.variables, chunk=chunk, tiles=tiles
    )


def program_bytes(predict: Any, limits: Array, images: np.ndarray) -> int | None:
    """What the program for such images holds at once, in bytes, by the compiler's account:
    arguments, results, and everything in between, without variables that are constants of it; None
    for what is not one program.
    """
    if not isinstance(predict, Predictor):
        return None
    function, bound = predict._compiled, ()
    if isinstance(function, functools.partial):
        function, bound = function.func, function.args
    size = 1 << (len(images) - 1).bit_length()
    shape = jax.ShapeDtypeStruct((size, *images.shape[1:]), images.dtype)
    count = jax.ShapeDtypeStruct((), np.int32)
    # It is compiled already, and JAX finds that program again.
    compiled: Any = function
    analysis = compiled.lower(*bound, limits, shape, count).compile().memory_analysis()
    if analysis is None:
        return None
    parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return sum(int(getattr(analysis, part)) for part in parts)


def bytes_at_peak() -> int | None:
    """The most that was ever in use on the first device; None where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _tiled(name: str, tiles: tuple[int, ...] | None, subject: Subject, largest: int) -> Any:
    """All but `auto` and `stream`, for batches up to `largest`."""
    network, policy, variables = subject.network, subject.policy, subject.variables
    if name == "host":
        return eejax.host(network, policy, variables, tiles=tiles, max_batch=largest)
    executors: dict[str, Executor] = {"full": eejax.full, "cond": eejax.cond}
    executors |= {
        "compact": functools.partial(eejax.compact, tiles=tiles),
        "loop": functools.partial(eejax.loop, tiles=tiles),
    }
    bound: Any = eejax.stack(network, variables) if name == "loop" else variables
    return eejax.predictor(network, policy, bound, executors[name], max_batch=largest)


def _auto(subject: Subject, limits: Array, images: np.ndarray, repeats: int) -> Serving:
    chosen = eejax.auto(
        subject.network, subject.policy, subject.variables, limits, images, repeats=min(repeats, 7)
    )
    return Serving(chosen.predict, {"chosen": chosen.name, "explanation": chosen.explanation})
