"""Which of a trained network's exits to keep, at a budget that is counted or measured.

Every exit costs its head, and an exit that few samples can use well is worth less than that. A
threshold of +inf switches it off and still pays for its head; dropping it does not. And a network
trained with many exits is a family of networks with fewer, `EarlyExitNetwork.keeping`, and one
trace of it has what all of them say. So each subset's thresholds are searched on the trace
restricted to it, at its own costs.

How many exits a backbone gets, and where, is one of the design steps of Laskaridis, Kouris, Lane,
*Adaptive inference through early-exit networks: design, challenges and directions*, EMDL 2021,
https://arxiv.org/abs/2106.05022. The search here is this project's own.

Not for heads that read each other's `memory`: their trace was recorded with all of them, and
`keeping` refuses to run them with one missing.
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
    """Exits to keep and their thresholds, and what they come to on the data they were chosen on.

    Attributes:
      exits: those kept, 0-based and increasing; the network's last one is always among them.
      thresholds: `[len(exits) - 1]` float32, for the kept network.
      accuracy: on the held-out trace, never a result.
      mean_cost: on the held-out trace, in the unit of the costs.
      whole: what all exits come to at the same budget; None where the first exit of all is over it.
      search: `"exhaustive"` or `"greedy"`.
      looked_at: how many subsets were tried.
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

    The last exit is always kept. With few exits all subsets of the others are tried. With many the
    search climbs from the last exit alone, one exit added at a time, and where that gains nothing
    one dropped or exchanged; should all exits together be better than what it finds, it climbs on
    from there. Of equally accurate subsets the smaller one wins, then the cheaper one. Nothing is
    random, and the result is never worse on the trace than all exits are.

    With measured costs (`benchmark.seconds`) the budget is in seconds for their batch, and the mean
    cost that of batches which leave as a whole; how near an executor comes to it is to be measured.

    Args:
      trace: N held-out samples, E exits.
      policy: `policy(exits)` makes the policy for these exits; `unchanged(max_prob)`, say, or
        `lambda exits: with_temperatures(max_prob, temperatures[list(exits)])`.
      costs: of the whole network, in any unit.
      budget: in that unit.
      exhaustive_up_to: how many subsets there may be for all to be tried: 64 is seven exits.

    Raises:
      ValueError: a bare policy, costs for another number of exits, or a budget that no subset can
        keep.
    """
    if isinstance(policy, Policy):
        # It would be right for some policies, and silently wrong for one that counts the exits.
        raise ValueError("a policy by itself; give `unchanged(policy)`, or a function of exits.")
    exits = trace.logits.shape[1]
    if len(costs.stages) != exits or len(costs.heads) != exits:
        raise ValueError(
            f"costs of {len(costs.stages)} stages and {len(costs.heads)} heads for a trace of "
            f"{exits} exits; give one of each an exit."
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
    """The same policy whichever exits are kept; for one that has no number of its own an exit."""
    return lambda exits: policy


def keep_trace(trace: Trace, exits: Sequence[int]) -> Trace:
    """The trace that `network.keeping(exits)` would give, out of the whole network's.

    Args:
      trace: N samples, E exits.
      exits: 0-based and increasing.

    Raises:
      ValueError: none, one that does not exist, or not in order.
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
    """The best thresholds for some exits; None where leaving at the first is over the budget."""
    cumulative = costs.keeping(kept).cumulative
    if not budget >= cumulative[0]:
        return None
    scored = score(policy(kept), keep_trace(trace, kept))
    correct = scored.predictions == trace.labels[:, None]
    return for_budget(scored.scores, correct, cumulative, budget)


def _subsets(exits: int) -> list[tuple[int, ...]]:
    """All subsets of the exits that hold the last one."""
    early = range(exits - 1)
    chosen = (itertools.combinations(early, count) for count in range(exits))
    return [(*some, exits - 1) for some in itertools.chain.from_iterable(chosen)]


def _climb(
    start: tuple[int, ...], exits: int, order: Callable[[tuple[int, ...]], tuple]
) -> tuple[int, ...]:
    """From subset to subset, by the best change of one exit, until none is for the better."""
    best = start
    while True:
        early = set(best[:-1])
        others = set(range(exits - 1)) - early
        added = [early | {e} for e in others]
        dropped = [early - {e} for e in early]
        exchanged = [early - {out} | {into} for out in early for into in others]
        for changes in (added, dropped + exchanged):
            found = min([(*sorted(c), exits - 1) for c in changes] + [best], key=order)
            if found != best:
                best = found
                break
        else:
            return best
