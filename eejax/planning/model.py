"""What a network that is cut into tiers costs: latency, bytes, energy and price of a request.

E stages, each with an exit, are divided among T tiers. Cut `c_k` lies between tiers k and k + 1:
tier k runs stages `c_{k-1} .. c_k` (with `c_0 = 0`, `c_T = E`), answers the samples that leave, and
sends the features of the others over link k. At a cut of 0 the image itself is sent, at a cut of E
nothing is. A tier between two equal cuts runs nothing and passes on what it receives.

One request at a time, one sample each; nobody waits for a busy machine. A sample that leaves at
exit e takes

    sum over its tiers:  overhead + decode + run stages + encode,
    sum over the links it crosses:  overhead + (features + 200 bytes) / up + half a round trip,
    and back over the same links:  500 bytes / down + half a round trip.

So the cost of leaving at each exit is a vector `[E]` for every quantity, and its mean over a trace
is exact. Quantiles of the latency are those of the mixture over the exits: the times of a tier
come from measured passes through its stages, jitter is uniform, and different machines are
independent. Not modelled: queues, batches, loss, TCP's slow start, a radio that wakes up.

Neurosurgeon (Kang et al., ASPLOS 2017, https://doi.org/10.1145/3037697.3037698) cuts a network
between device and cloud by predictions of latency or of the device's energy; Edgent (Li, Zhou,
Chen 2018, https://arxiv.org/abs/1806.07840) also chooses the exit at which the network ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eejax.planning.machines import Device, Link, Times
from eejax.runtime.manifest import HeldOut

REQUEST_BYTES = 200  # of the protocol, beside the features
ANSWER_BYTES = 500
_POINTS = 500  # equally likely values that stand for a distribution
_JITTER = 32  # of them for a uniform one


class Plan(NamedTuple):
    """Where to cut, in which codecs to send, and when to leave.

    Attributes:
      cuts: T - 1, not decreasing, from 0 to E.
      codecs: of each link; the links around a tier without stages have the same.
      thresholds: `[E - 1]` float32; +inf switches an exit off.
    """

    cuts: tuple[int, ...]
    codecs: tuple[str, ...]
    thresholds: np.ndarray


class Forecast(NamedTuple):
    """What a plan is expected to come to, per request.

    Attributes:
      mean_seconds: latency.
      p50_seconds: its median.
      p99_seconds: its 0.99 quantile.
      link_bytes: of each link, both ways.
      tier_shares: of the requests, answered in each tier.
      device_joules: of the first tier, computing and sending.
      server_seconds: of computing in the other tiers.
      price_per_million: of requests; computing and traffic of all tiers.
      accuracy: on the trace, less the share of answers that codecs were measured to change.
    """

    mean_seconds: float
    p50_seconds: float
    p99_seconds: float
    link_bytes: tuple[float, ...]
    tier_shares: tuple[float, ...]
    device_joules: float
    server_seconds: float
    price_per_million: float
    accuracy: float


class Costs(NamedTuple):
    """What leaving at each exit costs, with the cuts and codecs of a plan.

    Attributes:
      latency: `[E]` seconds, the mean.
      link_bytes: `[T - 1, E]`, both ways.
      tiers: `[E]` int, the tier of each exit.
      energy: `[E]` joules of the first tier.
      server: `[E]` seconds of the other tiers.
      price: `[E]` of a million requests.
      changed: `[E]`, the share of labels that the codecs change.
    """

    latency: np.ndarray
    link_bytes: np.ndarray
    tiers: np.ndarray
    energy: np.ndarray
    server: np.ndarray
    price: np.ndarray
    changed: np.ndarray


def predict(
    plan: Plan,
    trace: HeldOut,
    times: Sequence[Times],
    links: Sequence[Link],
    devices: Sequence[Device],
) -> Forecast:
    """What a plan is expected to come to.

    Args:
      plan: T tiers, E exits.
      trace: N samples that stand for the requests.
      times: as measured for each tier, before `scale`.
      links: T - 1, from each tier to the next.
      devices: T.

    Raises:
      ValueError: if numbers of tiers, cuts, codecs, links or exits do not fit, or a codec was not
        measured.
    """
    cost = costs(plan.cuts, plan.codecs, times, links, devices)
    count = len(cost.latency)
    if plan.thresholds.shape != (count - 1,) or trace.scores.shape[1:] != (count,):
        raise ValueError(
            f"thresholds {plan.thresholds.shape} and scores {trace.scores.shape}; give "
            f"[{count - 1}] and [N, {count}], as many exits as were measured."
        )
    exits = leaving(trace.scores, plan.thresholds)
    share = np.bincount(exits, minlength=count) / len(exits)
    correct = trace.correct[np.arange(len(exits)), exits].mean()
    values = latencies(plan.cuts, plan.codecs, times, links, devices)
    tiers = np.bincount(cost.tiers, share, minlength=len(devices))
    return Forecast(
        float(share @ cost.latency),
        float(quantile(values, share, 0.5)),
        float(quantile(values, share, 0.99)),
        tuple((cost.link_bytes @ share).tolist()),
        tuple(tiers.tolist()),
        float(share @ cost.energy),
        float(share @ cost.server),
        float(share @ cost.price),
        float(correct - share @ cost.changed),
    )


def costs(
    cuts: Sequence[int],
    codecs: Sequence[str],
    times: Sequence[Times],
    links: Sequence[Link],
    devices: Sequence[Device],
) -> Costs:
    """What leaving at each exit costs; arguments and errors as for `predict`."""
    _check(cuts, codecs, times, links, devices)
    reach = _reach(cuts, times)
    exits = reach.shape[1]
    busy = np.stack([t.mean(0) for t in _computing(cuts, codecs, times, devices)])
    sent, changed = np.zeros((len(links), exits)), np.zeros(exits)
    for k, (cut, crossed) in enumerate(zip(cuts, reach[1:], strict=True)):
        if cut < exits:
            crossing = times[k].crossing(cut, codecs[k])
            sent[k] = crossed * (crossing.size + REQUEST_BYTES)
            if not k or cuts[k - 1] < cut:  # not only passed on
                changed += crossed * crossing.changed
    link_bytes = sent + ANSWER_BYTES * reach[1:]
    hourly = np.array([device.price_per_hour for device in devices]) / 3600
    traffic = np.array([link.price_per_gb for link in links]) / 1e9
    energy = devices[0].watts * busy[0]
    if links:
        energy = energy + links[0].joules_per_byte * sent[0]
    return Costs(
        busy.sum(0) + _fixed_seconds(cuts, codecs, times, links, devices),
        link_bytes,
        reach.sum(0) - 1,
        energy,
        busy[1:].sum(0),
        1e6 * (hourly @ busy + traffic @ link_bytes),
        np.minimum(changed, 1),
    )


def latencies(
    cuts: Sequence[int],
    codecs: Sequence[str],
    times: Sequence[Times],
    links: Sequence[Link],
    devices: Sequence[Device],
) -> np.ndarray:
    """`[E, K]` seconds, K equally likely latencies of leaving at each exit; as `costs`."""
    _check(cuts, codecs, times, links, devices)
    reach = _reach(cuts, times)
    total = _fixed_seconds(cuts, codecs, times, links, devices)[:, None]
    for seconds in _computing(cuts, codecs, times, devices):
        total = _sums(total, seconds.T)
    for link, crossed in zip(links, reach[1:], strict=True):
        if link.jitter_seconds and crossed.any():
            way = link.jitter_seconds * ((2 * np.arange(_JITTER) + 1) / _JITTER - 1)
            for _ in range(2):
                total = _sums(total, crossed[:, None] * way)
    return total


def quantile(values: np.ndarray, share: np.ndarray, q: float) -> np.ndarray:
    """The smallest of the values that at least a share q of the samples does not exceed.

    Args:
      values: `[E, M]`, M equally likely values of leaving at each exit.
      share: `[..., E]` of the samples.
      q: in (0, 1).

    Returns:
      `[...]` float64.
    """
    order = np.argsort(values, axis=None)
    exits = order // values.shape[1]

    def at(share: np.ndarray) -> np.ndarray:
        total = np.cumsum(share[exits])
        return values.flat[order[np.searchsorted(total, q * total[-1] * (1 - 1e-12))]]

    return np.apply_along_axis(at, -1, share)


def _reach(cuts: Sequence[int], times: Sequence[Times]) -> np.ndarray:
    """`[T, E]` bool: whether a sample that leaves at an exit comes to a tier."""
    return np.arange(times[0].stages.shape[2]) >= np.array([0, *cuts])[:, None]


def _fixed_seconds(
    cuts: Sequence[int],
    codecs: Sequence[str],
    times: Sequence[Times],
    links: Sequence[Link],
    devices: Sequence[Device],
) -> np.ndarray:
    """`[E]`: of links, from encoded to decoded and back with the answer, and of overheads."""
    reach = _reach(cuts, times)
    exits = reach.shape[1]
    edges = [0, *cuts, exits]
    seconds = np.zeros(exits)
    for k, device in enumerate(devices):
        if edges[k] < edges[k + 1]:
            seconds += reach[k] * device.overhead_seconds
    for k, link in enumerate(links):
        if cuts[k] < exits:
            up = 8 * (times[k].crossing(cuts[k], codecs[k]).size + REQUEST_BYTES)
            once = up / link.up_bits_per_second + 8 * ANSWER_BYTES / link.down_bits_per_second
            seconds += reach[k + 1] * (link.overhead_seconds + link.round_trip_seconds + once)
    return seconds


def _computing(
    cuts: Sequence[int],
    codecs: Sequence[str],
    times: Sequence[Times],
    devices: Sequence[Device],
) -> list[np.ndarray]:
    """`[R, E]` seconds of each tier in repeated passes, for samples that leave at each exit."""
    reach = _reach(cuts, times)
    exits = reach.shape[1]
    edges, tiers = [0, *cuts, exits], []
    for k, (own, device) in enumerate(zip(times, devices, strict=True)):
        first, end = edges[k], edges[k + 1]
        seconds = np.zeros((len(own.stages), exits))
        if first < end:
            seconds[:, first:end] = own.stages[:, first, first:end]
        seconds = seconds.cumsum(1)
        if k and first < end:
            seconds += reach[k] * own.crossing(first, codecs[k - 1]).decode.mean()
        if end < exits and (first < end or not k):
            seconds += reach[k + 1] * own.crossing(end, codecs[k]).encode.mean()
        tiers.append(device.scale * seconds)
    return tiers


def leaving(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """`[N]`, the first exit whose score `[N, E]` reaches its threshold, else the last."""
    last = np.ones((len(scores), 1), bool)
    return np.concatenate([scores[:, :-1] >= thresholds, last], axis=1).argmax(1)


def _sums(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`[E, K]` equally likely values of the sums of independent ones, `[E, A]` and `[E, B]`."""
    sums = np.sort((a[:, :, None] + b[:, None, :]).reshape(len(a), -1), axis=1)
    if sums.shape[1] <= _POINTS:
        return sums
    return sums[:, ((np.arange(_POINTS) + 0.5) / _POINTS * sums.shape[1]).astype(int)]


def _check(
    cuts: Sequence[int],
    codecs: Sequence[str],
    times: Sequence[Times],
    links: Sequence[Link],
    devices: Sequence[Device],
) -> None:
    tiers, exits = len(devices), times[0].stages.shape[2]
    if not len(times) == len(links) + 1 == len(cuts) + 1 == len(codecs) + 1 == tiers:
        raise ValueError(
            f"{len(cuts)} cuts, {len(codecs)} codecs, {len(links)} links and {len(times)} measured "
            f"times for {tiers} tiers; give {tiers - 1}, {tiers - 1}, {tiers - 1} and {tiers}."
        )
    others = [t.stages.shape[2] for t in times]
    if others != [exits] * tiers:
        raise ValueError(f"times of {others} stages; measure the same artifact everywhere.")
    if list(cuts) != sorted(cuts) or (cuts and not 0 <= cuts[0] <= cuts[-1] <= exits):
        raise ValueError(f"cuts {list(cuts)}; give numbers from 0 to {exits}, not decreasing.")
    for k, (cut, codec) in enumerate(zip(cuts, codecs, strict=True)):
        if cut == exits:
            continue
        if k and 0 < cut == cuts[k - 1] and codecs[k - 1] != codec:
            raise ValueError(
                f"codecs {codecs[k - 1]!r} and {codec!r} around a tier without stages; give the "
                "same, since it passes on what it receives."
            )
