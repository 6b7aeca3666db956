"""The cuts and codecs that are worth trying, and what a plan is judged by."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from eejax.planning.machines import Device, Link, Times
from eejax.planning.model import Costs, Forecast, costs

Objective = Literal["mean", "p99", "energy", "price"]
OBJECTIVES: tuple[Objective, ...] = ("mean", "p99", "energy", "price")


class Problem(NamedTuple):
    """What plans are made for.

    Attributes:
      times, links, devices: as for `predict`.
      objective: what is made small.
    """

    times: Sequence[Times]
    links: Sequence[Link]
    devices: Sequence[Device]
    objective: Objective


class Option(NamedTuple):
    """Cuts and codecs, and what leaving at each exit costs with them."""

    cuts: tuple[int, ...]
    codecs: tuple[str, ...]
    cost: Costs


def value(forecast: Forecast, objective: Objective) -> float:
    """The objective of a plan."""
    return {
        "mean": forecast.mean_seconds,
        "p99": forecast.p99_seconds,
        "energy": forecast.device_joules,
        "price": forecast.price_per_million,
    }[objective]


def known_codecs(times: Sequence[Times], codecs: Sequence[str] | None) -> list[str]:
    """The codecs to try; by default all that were measured on every machine.

    Raises:
      ValueError: if one was not measured.
    """
    known = [name for name in times[0].codecs if all(name in own.codecs for own in times)]
    wrong = [name for name in codecs or () if name not in known]
    if wrong or not known:
        raise ValueError(
            f"codecs {wrong}; measured on every machine: {', '.join(known) or 'none'}."
        )
    return known if codecs is None else list(codecs)


def exit_costs(cost: Costs, objective: Objective) -> np.ndarray:
    """`[E]`, whose mean is the objective; for the 0.99 quantile, that of the latency."""
    return {"energy": cost.energy, "price": cost.price}.get(objective, cost.latency)


def options(problem: Problem, names: Sequence[str]) -> list[Option]:
    """All cuts, those that send least first, each with the codecs that are worth trying.

    A codec is not if another one at the same cut is as cheap and changes no more labels. What it
    adds to a mean does not depend on the codecs at other cuts.
    """
    exits, found = problem.times[0].stages.shape[2], []
    every = list(itertools.combinations_with_replacement(range(exits + 1), len(problem.links)))
    for cuts in reversed(every):
        at_cut = {c: _worthwhile(problem, cuts, c, names) for c in cuts if c < exits}
        for used in itertools.product(*at_cut.values()):
            codec = dict(zip(at_cut, used, strict=True))
            codecs = tuple(codec.get(c, names[0]) for c in cuts)
            found.append(Option(cuts, codecs, _costs(problem, cuts, codecs)))
    return found


def _worthwhile(
    problem: Problem, cuts: tuple[int, ...], cut: int, names: Sequence[str]
) -> list[str]:
    added = []
    for name in names if cut else names[:1]:  # an image is sent as it is
        cost = _costs(problem, cuts, [name if c == cut else names[0] for c in cuts])
        adds = exit_costs(cost, problem.objective)[-1], cost.latency[-1]
        added.append((*adds, name, cost.changed))
    kept: list[tuple[str, np.ndarray]] = []
    for _, _, name, changed in sorted(added, key=lambda a: a[:2]):
        if not any((before <= changed).all() for _, before in kept):
            kept.append((name, changed))
    return [name for name, _ in kept]


def _costs(problem: Problem, cuts: tuple[int, ...], codecs: Sequence[str]) -> Costs:
    return costs(cuts, codecs, problem.times, problem.links, problem.devices)
