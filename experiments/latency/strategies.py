"""The strategies that `experiments.latency` times, by name, as `predict(thresholds, images)`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array

import eejax
from eejax.inference import EXECUTORS, Predictor, compaction
from experiments.latency.workload import Workload

STRATEGIES = (*EXECUTORS, "host", "stream", "auto")
TILED = ("compact", "loop", "host", "stream")


def split_strategy(strategy: str) -> tuple[str, dict[str, Any]]:
    """`"compact:32,8"` as `("compact", {"tiles": (32, 8)})`.

    Raises:
      ValueError: if there is no such strategy, or it takes no such tiles.
    """
    name, _, sizes = strategy.partition(":")
    if name not in STRATEGIES:
        raise ValueError(f"strategies: {name!r} is none; give some of {', '.join(STRATEGIES)}.")
    if not sizes:
        return name, {}
    if name not in TILED or not all(size.isdigit() for size in sizes.split(",")):
        raise ValueError(
            f"strategies: {strategy!r}; give {', '.join(TILED)} with tiles as in compact:32,8."
        )
    return name, {"tiles": tuple(map(int, sizes.split(",")))}


def is_stream(strategy: str) -> bool:
    """Whether a strategy, with tiles or without, serves a stream and not single batches."""
    return split_strategy(strategy)[0] == "stream"


def note(strategy: str, workload: Workload) -> str:
    """What a reader of the strategy's rows should know, or ""."""
    runs = compaction.runs(workload.network)
    if split_strategy(strategy)[0] == "loop" and all(b - a == 1 for a, b in runs):
        return "loop: no two neighbouring stages of this network are equal; it runs as compact"
    return ""


def compiled_strategy(
    strategy: str, workload: Workload, thresholds: Array, images: np.ndarray, repeats: int
) -> tuple[Callable[[Any, Any], Any], dict[str, Any]]:
    """`predict(thresholds, images) -> Prediction` of any strategy but `stream`.

    Args:
      strategy: with its tiles.
      workload: network, policy and variables.
      thresholds: `[E - 1]`; `auto` alone depends on them.
      images: as large as a call.
      repeats: timed runs of each candidate of `auto`.

    Returns:
      The function, and more columns of its rows.
    """
    name, tiles = split_strategy(strategy)
    network, policy, variables = workload.network, workload.policy, workload.variables
    if name == "auto":
        chosen = eejax.auto(network, policy, variables, thresholds, images, repeats=min(repeats, 7))
        return chosen.predict, {"chosen": chosen.name, "explanation": chosen.explanation}
    largest = 1 << (len(images) - 1).bit_length()
    if name == "host":
        return eejax.host(network, policy, variables, **tiles, max_batch=largest), {}
    executor = functools.partial(EXECUTORS[name], **tiles)
    bound: Any = eejax.stack(network, variables) if name == "loop" else variables
    return eejax.predictor(network, policy, bound, executor, max_batch=largest), {}


def program_bytes(predict: Any, thresholds: Array, images: np.ndarray) -> int | None:
    """The memory that the program for these images needs, by the compiler's account: arguments,
    results, and intermediate values, without variables that are constants of the program.

    None if `predict` is not one program.
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
    analysis = compiled.lower(*bound, thresholds, shape, count).compile().memory_analysis()
    if analysis is None:
        return None
    parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return sum(int(getattr(analysis, part)) for part in parts)


def peak_bytes() -> int:
    """The most memory that was ever in use on the first device; 0 if the device does not tell."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
