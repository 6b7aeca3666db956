"""Which executor is the quickest here: measured, for one network, policy, batch and device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eejax import benchmark
from eejax.inference import compaction
from eejax.inference.compaction import compact, loop, stack
from eejax.inference.dispatch import host
from eejax.inference.executors import Prediction, cond, full
from eejax.inference.predictors import bound, predictor
from eejax.network import EarlyExitNetwork, Variables
from eejax.policies.base import Policy


@dataclasses.dataclass(frozen=True)
class Selection:
    """What `auto` found.

    Attributes:
      name: the quickest executor.
      predict: it, `predict(thresholds, images) -> Prediction`.
      milliseconds: median time of each candidate for the batch, and of the plain network.
      explanation: the choice in words.
    """

    name: str
    predict: Callable[..., Prediction]
    milliseconds: dict[str, float]
    explanation: str


def auto(
    network: EarlyExitNetwork,
    policy: Policy,
    variables: Variables,
    thresholds: Iterable[float] | Array,
    images: Any,
    *,
    repeats: int = 7,
) -> Selection:
    """Compiles the executors that could be the quickest, times them in turn, and picks.

    It depends on the network, on the policy and its thresholds, by the share of images that leaves
    at each exit, on the batch and on the device, so it is measured with all of them: give images
    that are like those to come, as many as a call will have.

    Args:
      network, policy, variables: as for `inference.full`.
      thresholds: E - 1.
      images: `[B, ...]` on the host.
      repeats: timed calls of each candidate, interleaved.

    Raises:
      ValueError: no images, a wrong number of thresholds, or one that is NaN.
    """
    batch = len(images)
    size = 1 << max(batch - 1, 0).bit_length()
    limits = jnp.asarray(thresholds if isinstance(thresholds, Array) else list(thresholds))
    limits = limits.astype(jnp.float32)

    def program(executor: Any, variables: Any = variables) -> Callable[..., Prediction]:
        return predictor(network, policy, variables, executor, max_batch=size)

    candidates = {"full": program(full), "cond": program(cond)}
    if batch > 1:
        candidates["compact"] = program(compact)
        candidates["host"] = host(network, policy, variables, max_batch=size)
        if any(b - a > 1 for a, b in compaction.runs(network)):
            candidates["loop"] = program(loop, stack(network, variables))
    found = candidates["full"](limits, images)  # refuses what does not fit

    def plain(variables: Variables, images: Array) -> Array:
        return network.apply_plain(variables, images).argmax(-1)

    whole = bound(plain, variables)
    calls: list[Callable[[], Any]] = [lambda: np.asarray(whole(images))]
    calls += [functools.partial(p, limits, images) for p in candidates.values()]
    medians = 1e3 * np.median(benchmark.paired_seconds(calls, repeats), axis=1)
    times = dict(zip(["plain network", *candidates], medians.tolist(), strict=True))
    name = min(candidates, key=lambda n: times[n])
    return Selection(name, candidates[name], times, _explain(name, times, found, network))


def _explain(
    name: str, times: dict[str, float], found: Prediction, network: EarlyExitNetwork
) -> str:
    device = jax.devices()[0]
    shares = np.bincount(np.asarray(found.exits), minlength=network.num_exits) / len(found.exits)
    left = ", ".join(f"{100 * share:.0f} %" for share in shares)
    others = ", ".join(
        f"{n} {ms:.3g} ms" for n, ms in sorted(times.items(), key=lambda t: t[1]) if n != name
    )
    words = (
        f"{name}: {times[name]:.3g} ms for {len(found.exits)} images on {device.platform} "
        f"({device.device_kind}), against {others}. At these thresholds the exits take {left}."
    )
    if times["plain network"] < times[name]:
        words += " The plain network is quicker: here early exit does not pay."
    return words
