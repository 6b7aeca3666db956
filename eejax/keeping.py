"""A bundle with fewer exits: one that few samples take costs its head and a program's start.

`selection.choose_exits` searches for the exits to keep before there is a bundle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from eejax.bundle import Bundle
from eejax.evaluation.routing import first_exit
from eejax.network import keep_variables
from eejax.policies import Policy, with_temperatures
from eejax.policies.temperature import TEMPERATURE
from eejax.runtime.manifest import HeldOut
from eejax.selection.thresholds import for_budget


def keep_exits(bundle: Bundle, exits: Sequence[int]) -> Bundle:
    """The bundle with some of its exits, and thresholds for the same mean cost.

    The new thresholds are those of highest accuracy on the bundle's held-out samples, at the mean
    cost that the old ones have on them. A certificate of the old ones is not one of these.

    Args:
      bundle: with `held_out`, and a policy whose score at an exit depends on that exit alone
        (`max_prob`, `margin`, `entropy`, with or without temperatures).
      exits: of the bundle's, 0-based and increasing; the last one is among them.

    Raises:
      ValueError: if the bundle has lost exits before; there are no held-out samples; the policy has
        a state, or parameters other than temperatures; the exits are not in order, or the last is
        missing; or leaving at the first of them is dearer than the mean cost.
    """
    last = bundle.network.num_exits - 1
    if not exits or exits[-1] != last:
        raise ValueError(f"exits {list(exits)} to keep; the last, {last}, has to be among them.")
    if bundle.exits is not None:
        raise ValueError(f"a bundle with exits {bundle.exits} alone; give the one they are from.")
    if bundle.held_out is None:
        raise ValueError("the bundle keeps no held-out samples, on which to choose thresholds.")
    costs = bundle.costs.keeping(exits)
    scores, correct = bundle.held_out
    taken = first_exit(scores, bundle.thresholds)
    held_out = HeldOut(scores[:, list(exits)], correct[:, list(exits)])
    choice = for_budget(*held_out, costs.cumulative, bundle.costs.cumulative[taken].mean())
    return dataclasses.replace(
        bundle,
        variables=keep_variables(bundle.variables, exits),
        policy=_policy(bundle.policy, exits),
        thresholds=choice.thresholds,
        costs=costs,
        held_out=held_out,
        exits=tuple(exits),
    )


def _policy(policy: Policy, exits: Sequence[int]) -> Policy:
    if policy.rule is TEMPERATURE:
        inner, temperatures = policy.params.policy, np.asarray(policy.params.temperatures)
        return with_temperatures(_policy(inner, exits), temperatures[list(exits)])
    if jax.tree.leaves(policy.params) or jax.tree.leaves(policy.init(1)):
        raise ValueError(
            f"the policy {policy.name} looks at more than one exit; its scores with fewer exits "
            "would be others. Fit it to the network with fewer exits instead."
        )
    return policy
