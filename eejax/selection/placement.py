"""Which exits of a trained network to keep, for a budget in counted or measured cost.

Every exit costs its head, and an exit that few samples can use well is not worth that cost. A
threshold of +inf switches an exit off but still pays for its head; dropping the exit does not. A
network trained with many exits contains the networks with fewer (`EarlyExitNetwork.keeping`), and
one trace of it holds the outputs of all of them. So thresholds are searched for every subset of the
exits, on the trace restricted to the subset and at the costs of the subset.

The number and the places of the exits are among the design steps of Laskaridis, Kouris, Lane,
*Adaptive inference through early-exit networks: design, challenges and directions*, EMDL 2021,
https://arxiv.org/abs/2106.05022. The search here is not from a paper.

The heads must not read each other's `memory`: their trace was recorded with all of them, and
`keeping` raises an error if one is missing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from eejax.cost import Costs
from eejax.evaluation.routing import score
from eejax.network import kept_groups
from eejax.policies.base import Policy
from eejax.selection.thresholds import Choice, for_budget
from eejax.trace import Trace


class Placement(NamedTuple):
    """Exits to keep, with thresholds, accuracy and cost on the data they were chosen on.

    Attributes:
      exits: 0-based and increasing; the last exit of the network is always kept.
      thresholds: `[len(exits) - 1]` float32, for the kept network.
      accuracy: on the held-out trace, never a result.
      mean_cost: on the held-out trace, in the unit of the costs.
      whole: the choice with all exits at the same budget; None if the first exit is over budget.
      search: `"exhaustive"` or `"greedy"`.
      looked_at: the number of subsets tried.
    """

    exits: tuple[int, ...]
    thresholds: np.ndarray
    accuracy: float
    mean_cost: float
    whole: Choice | None
    search: str
    looked_at: int


def choose_exits(
    trace: Trace,
    policy: Callable[[tuple[int, ...]], Policy],
    costs: Costs,
    budget: float,
    *,
    exhaustive_up_to: int = 64,
) -> Placement:
    """The exits to keep, with thresholds, of highest held-out accuracy at a mean cost of `budget`.

    The last exit is always kept. With few exits all subsets of the others are tried. With many, a
    greedy search starts from the last exit alone and adds one exit at a time; where that gains
    nothing, it drops or exchanges one. If all exits together are better than its result, it starts
    again from there. Of equally accurate subsets the smaller one wins, then the cheaper one.
    Nothing is random, and on the trace the result is never worse than all exits.

    With measured costs (`benchmark.seconds`) the budget is in seconds for a batch, and the mean
    cost is that of batches that leave as a whole; measure how close an executor comes to it.

    Args:
      trace: N held-out samples, E exits.
      policy: `policy(exits)` is the policy for these exits: `unchanged(max_prob)`, say, or
        `lambda exits: with_temperatures(max_prob, temperatures[list(exits)])`.
      costs: of the whole network, in any unit.
      budget: in that unit.
      exhaustive_up_to: the largest number of subsets of which all are tried: 64 is seven exits.

    Raises:
      ValueError: if `policy` is a policy itself, the costs are for another number of exits, or no
        subset can keep the budget.
    """
    if isinstance(policy, Policy):
        # It would be correct for some policies, and silently wrong for one that counts exits.
        raise ValueError("a policy by itself; give `unchanged(policy)`, or a function of exits.")
    exits = trace.logits.shape[1]
    if len(costs.stages) != exits or len(costs.heads) != exits:
        raise ValueError(
            f"costs of {len(costs.stages)} stages and {len(costs.heads)} heads for a trace of "
            f"{exits} exits; give one of each for every exit."
        )
    cheapest = (np.cumsum(costs.stages) + costs.heads).min()
    if not budget >= cheapest:
        raise ValueError(
            f"a budget of {budget:.4g}; leaving at the cheapest exit, with no head before it, "
            f"costs {cheapest:.4g}; give at least that."
        )
    seen: dict[tuple[int, ...], Choice | None] = {}

    def order(kept: tuple[int, ...]) -> tuple:
        """Of two subsets the smaller value is the better."""
        if kept not in seen:
            seen[kept] = _thresholds(trace, policy, costs, budget, kept)
        choice = seen[kept]
        if choice is None:
            return np.inf, len(kept), np.inf, kept
        return -choice.accuracy, len(kept), choice.mean_cost, kept

    every = tuple(range(exits))
    exhaustive = 2 ** (exits - 1) <= exhaustive_up_to
    if exhaustive:
        best = min(_subsets(exits), key=order)
    else:
        best = _climb(every[-1:], exits, order)
        if order(every) < order(best):
            best = _climb(every, exits, order)
    choice = seen[best]
    assert choice is not None
    return Placement(
        best, *choice, seen[every], "exhaustive" if exhaustive else "greedy", len(seen)
    )


def unchanged(policy: Policy) -> Callable[[tuple[int, ...]], Policy]:
    """The same policy for all subsets, for a policy without parameters for each exit."""
    return lambda exits: policy


def keep_trace(trace: Trace, exits: Sequence[int]) -> Trace:
    """The trace that `network.keeping(exits)` would record, from that of the whole network.

    Args:
      trace: N samples, E exits.
      exits: 0-based and increasing.

    Raises:
      ValueError: if there are no exits, one does not exist, or they are not in order.
    """
    kept = [b - 1 for _, b in kept_groups(exits, trace.logits.shape[1])]
    return trace._replace(logits=trace.logits[:, kept], gates=trace.gates[:, kept])


def _thresholds(
    trace: Trace,
    policy: Callable[[tuple[int, ...]], Policy],
    costs: Costs,
    budget: float,
    kept: tuple[int, ...],
) -> Choice | None:
    """The best thresholds for some exits; None if leaving at the first is over the budget."""
    cumulative = costs.keeping(kept).cumulative
    if not budget >= cumulative[0]:
        return None
    scored = score(policy(kept), keep_trace(trace, kept))
    correct = scored.predictions == trace.labels[:, None]
    return for_budget(scored.scores, correct, cumulative, budget)


def _subsets(exits: int) -> list[tuple[int, ...]]:
    """All subsets of the exits that hold the last one."""
    early = range(exits - 1)
    subsets = (itertools.combinations(early, count) for count in range(exits))
    return [(*subset, exits - 1) for subset in itertools.chain.from_iterable(subsets)]


def _climb(
    start: tuple[int, ...], exits: int, order: Callable[[tuple[int, ...]], tuple]
) -> tuple[int, ...]:
    """From subset to subset, by the best change of one exit, until no change is better."""
    best = start
    while True:
        early = set(best[:-1])
        others = set(range(exits - 1)) - early
        added = [early | {e} for e in others]
        dropped = [early - {e} for e in early]
        exchanged = [early - {out} | {into} for out in early for into in others]
        for changes in (added, dropped + exchanged):
            better = min([(*sorted(c), exits - 1) for c in changes] + [best], key=order)
            if better != best:
                best = better
                break
        else:
            return best
