"""Chooses the fastest executor by measurement, for one network, policy, batch and device."""

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
from eejax.inference import EXECUTORS, Prediction, compact, loop, predictor
from eejax.inference.compaction import runs, stack
from eejax.inference.dispatch import host
from eejax.inference.step import check_images
from eejax.network import EarlyExitNetwork, Variables
from eejax.policies.base import Policy, check_thresholds

PLAIN = "plain network"


@dataclasses.dataclass(frozen=True)
class Selection:
    """The result of `auto`.

    Attributes:
      name: the fastest executor.
      predict: its `predict(thresholds, images) -> Prediction`.
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
    """Compiles the executors that could be the fastest, times them in turn, and picks one.

    The fastest depends on the network, on the share of images that leaves at each exit, on the
    batch size and on the device. So give images like those to come, as many as a call will have.

    `network`, `policy` and `variables` are those of `Executor`.

    Args:
      thresholds: E - 1.
      images: `[B, ...]` on the host.
      repeats: timed calls of each candidate, interleaved.

    Raises:
      ValueError: if there are no images, if the number of thresholds is wrong, or one is NaN.
    """
    on_device = jnp.asarray(check_thresholds(thresholds, network.num_exits))
    check_images(images)
    size = 1 << (len(images) - 1).bit_length()
    candidates: dict[str, Callable[..., Prediction]] = {}
    for name, executor in EXECUTORS.items():
        # A single image cannot be packed, and without equal stages `loop` is `compact`.
        packs_one = len(images) == 1 and executor in (compact, loop)
        loops_none = executor is loop and all(b - a == 1 for a, b in runs(network))
        if not packs_one and not loops_none:
            given = stack(network, variables) if executor is loop else variables
            candidates[name] = predictor(network, policy, given, executor, max_batch=size)
    if len(images) > 1:
        candidates["host"] = host(network, policy, variables, max_batch=size)

    plain = benchmark.plain_programs(network, variables)[0]
    calls: list[Callable[[], Any]] = [lambda: np.asarray(plain(images))]
    calls += [functools.partial(predict, on_device, images) for predict in candidates.values()]
    medians = 1e3 * np.median(benchmark.paired_seconds(calls, repeats), axis=1)
    times = dict(zip([PLAIN, *candidates], medians.tolist(), strict=True))
    name = min(candidates, key=lambda n: times[n])
    exits = np.asarray(candidates[name](on_device, images).exits)
    shares = np.bincount(exits, minlength=network.num_exits) / len(exits)
    return Selection(name, candidates[name], times, _explain(name, times, shares, len(exits)))


def _explain(name: str, times: dict[str, float], shares: np.ndarray, batch: int) -> str:
    device = jax.devices()[0]
    others = ", ".join(
        f"{n} {ms:.3g} ms" for n, ms in sorted(times.items(), key=lambda t: t[1]) if n != name
    )
    explanation = (
        f"{name}: {times[name]:.3g} ms for {batch} images on {device.platform} "
        f"({device.device_kind}), against {others}. At these thresholds the exits take "
        f"{', '.join(f'{100 * share:.0f} %' for share in shares)}."
    )
    if times[PLAIN] < times[name]:
        explanation += " The plain network is faster: early exit does not pay here."
    return explanation
