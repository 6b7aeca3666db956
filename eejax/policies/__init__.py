"""When to stop: a score for each exit, and a threshold that it must reach.

`POLICIES` is the table of rules. A new policy is one file with its `Rule`, and one line there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_type_hints

import numpy as np
from numpy.typing import ArrayLike

from eejax.policies import optimal_stopping, scheduler
from eejax.policies.agreement import patience
from eejax.policies.base import NoParams, Policy, Rule, check_costs, check_thresholds, make
from eejax.policies.baselines import RANDOM, fixed, random
from eejax.policies.confidence import confidence_threshold, entropy, gate, margin, max_prob
from eejax.policies.ensembles import (
    MEAN_OF_EXPERTS,
    PRODUCT_OF_EXPERTS,
    VOTE,
    ZTW,
    fit_ztw,
    mean_of_experts,
    product_of_experts,
    vote,
    ztw,
)
from eejax.policies.temperature import TEMPERATURE, fit_temperatures, with_temperatures
from eejax.trace import Trace

__all__ = [
    "POLICIES",
    "NoParams",
    "Policy",
    "Rule",
    "check_costs",
    "check_thresholds",
    "confidence_threshold",
    "entropy",
    "fit",
    "fit_temperatures",
    "fit_ztw",
    "fixed",
    "from_arrays",
    "gate",
    "make",
    "margin",
    "max_prob",
    "mean_of_experts",
    "optimal_stopping",
    "patience",
    "product_of_experts",
    "random",
    "scheduler",
    "to_arrays",
    "vote",
    "with_temperatures",
    "ztw",
]

_TABLE = (
    max_prob.rule,
    entropy.rule,
    margin.rule,
    gate.rule,
    patience.rule,
    VOTE,
    MEAN_OF_EXPERTS,
    PRODUCT_OF_EXPERTS,
    ZTW,
    scheduler.SCHEDULER,
    optimal_stopping.OPTIMAL_STOPPING,
    fixed.rule,
    RANDOM,
)
POLICIES: dict[str, Rule] = {rule.name: rule for rule in _TABLE}
"""The rules that `fit` accepts, by name."""

# Every fitted policy is wrapped in this rule.
_ALL = {**POLICIES, TEMPERATURE.name: TEMPERATURE}


def fit(name: str, trace: Trace, cost: ArrayLike) -> Policy:
    """A policy fitted after training: a temperature for each exit, then the rule's parameters.

    The rule is fitted on the logits divided by the temperatures.

    Args:
      name: in `POLICIES`.
      trace: N samples of a split that serves no other purpose; E exits.
      cost: `[E]`, increasing: the cost of leaving at each exit, in any unit.

    Returns:
      The policy, wrapped in `with_temperatures`.

    Raises:
      ValueError: if the name is unknown, or the trace or the costs do not fit.
    """
    if name not in POLICIES:
        raise ValueError(f"no policy {name!r}; give one of {', '.join(POLICIES)}.")
    rule, temperatures = POLICIES[name], fit_temperatures(trace)
    divided = trace.logits / np.asarray(temperatures, np.float32)[None, :, None]
    params = rule.fit(trace._replace(logits=divided), np.asarray(cost))
    return with_temperatures(Policy(rule, params), temperatures)


def to_arrays(policy: Policy) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A policy as a description, which JSON can hold, and its arrays, by name.

    The description names the rule and, for each parameter, the shape of the array or the
    description of the policy that it is:

        {"rule": "temperature", "temperatures": [3], "policy": {"rule": "max_prob"}}

    An array's name is its path in the description, such as `policy.weights`.

    Raises:
      ValueError: if a rule is not in `POLICIES`, so that `from_arrays` could not look it up.
    """
    if _ALL.get(policy.name) is not policy.rule:
        raise ValueError(
            f"the rule {policy.name!r} is not in eejax.policies.POLICIES, so it cannot be saved; "
            f"use one of {', '.join(_ALL)}, or add it there."
        )
    description: dict[str, Any] = {"rule": policy.name}
    arrays: dict[str, np.ndarray] = {}
    for name, value in policy.params._asdict().items():
        if isinstance(value, Policy):
            description[name], inner = to_arrays(value)
            arrays |= {f"{name}.{key}": array for key, array in inner.items()}
        else:
            arrays[name] = np.asarray(value)
            description[name] = list(arrays[name].shape)
    return description, arrays


def from_arrays(
    description: Mapping[str, Any], arrays: Mapping[str, ArrayLike], prefix: str = ""
) -> Policy:
    """The policy that `to_arrays` took apart; its scores are the same, bit for bit.

    Args:
      description: as `to_arrays` returned it.
      arrays: by name; others may be among them.
      prefix: comes before the names in `arrays`.

    Raises:
      ValueError: if a rule is unknown, or parameters are missing, unknown or of the wrong shape.
    """
    rule = description.get("rule") if isinstance(description, Mapping) else None
    if rule not in _ALL:
        raise ValueError(
            f"no policy rule {rule!r}; expected one of {', '.join(_ALL)}. Load it with the version "
            "of eejax that saved it."
        )
    names = getattr(_ALL[rule].params, "_fields", ())
    given = [name for name in description if name != "rule"]
    if sorted(given) != sorted(names):
        raise ValueError(
            f"the policy {rule!r} has the parameters {given}; expected {list(names)}. Save it "
            "again with to_arrays."
        )
    kinds, params = get_type_hints(_ALL[rule].params), []
    for name in names:
        path, shape = prefix + name, description[name]
        if kinds[name] is Policy:
            params.append(from_arrays(shape, arrays, f"{path}."))
            continue
        given = list(np.shape(arrays[path])) if path in arrays else "no array"
        if given != shape:
            raise ValueError(
                f"the parameter {path!r} has the shape {shape}, and {given} came; give the arrays "
                "that to_arrays returned with this description."
            )
        params.append(np.asarray(arrays[path]))
    try:
        return make(_ALL[rule], *params)
    except ValueError as error:
        raise ValueError(f"the policy {rule!r} cannot be read: {error}") from error
