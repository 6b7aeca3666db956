"""The strategies that `experiments.latency` times, by name, as `predict(thresholds, images)`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

import eejax
from eejax import compaction
from eejax.inference import Executor, Predictor
from experiments.latency_subject import Subject


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
    return _MAKERS[strategy](subject, limits, images, repeats)


def depends_on_thresholds(strategy: str) -> bool:
    """Whether a strategy must be made anew for other thresholds."""
    return strategy == "auto"


def remark(strategy: str, subject: Subject) -> str:
    """What a reader of the strategy's rows should know, or ""."""
    if strategy == "loop" and all(b - a == 1 for a, b in compaction.runs(subject.network)):
        return "loop: no two neighbouring stages of this network are equal; it runs as compact"
    return ""


def stream(subject: Subject, chunk: int) -> Any:
    """`streamer(thresholds, batches)`."""
    return eejax.stream(subject.network, subject.policy, subject.variables, chunk=chunk)


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


def _program(
    executor: Executor, subject: Subject, limits: Array, images: np.ndarray, repeats: int
) -> Serving:
    del limits, repeats
    variables: Any = subject.variables
    if executor is eejax.loop:
        variables = eejax.stack(subject.network, variables)
    largest = 1 << (len(images) - 1).bit_length()
    return Serving(
        eejax.predictor(subject.network, subject.policy, variables, executor, max_batch=largest),
        {},
    )


def _host(subject: Subject, limits: Array, images: np.ndarray, repeats: int) -> Serving:
    del limits, repeats
    largest = 1 << (len(images) - 1).bit_length()
    return Serving(
        eejax.host(subject.network, subject.policy, subject.variables, max_batch=largest), {}
    )


def _auto(subject: Subject, limits: Array, images: np.ndarray, repeats: int) -> Serving:
    chosen = eejax.auto(
        subject.network, subject.policy, subject.variables, limits, images, repeats=min(repeats, 7)
    )
    return Serving(chosen.predict, {"chosen": chosen.name, "explanation": chosen.explanation})


_MAKERS: dict[str, Callable[[Subject, Array, np.ndarray, int], Serving]] = {
    "full": functools.partial(_program, eejax.full),
    "cond": functools.partial(_program, eejax.cond),
    "compact": functools.partial(_program, eejax.compact),
    "loop": functools.partial(_program, eejax.loop),
    "host": _host,
    "auto": _auto,
}
