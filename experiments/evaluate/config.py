"""Configuration of the policies that are compared, and of timing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from eejax.policies import POLICIES
from experiments.checks import require, require_all, require_not_negative, require_positive

if TYPE_CHECKING:
    PolicyName = str
else:
    PolicyName = Literal[tuple(POLICIES)]


@dataclass(frozen=True)
class PoliciesConfig:
    """When to stop, and to which targets the thresholds are chosen."""

    names: tuple[PolicyName, ...] = ("max_prob", "entropy", "margin", "gate")
    """Policies to compare. The gate takes part only where the regime trains it."""
    budgets: tuple[float, ...] = (0.5, 0.6, 0.75)
    """Mean cost, as fractions of the whole network's multiply-accumulates."""
    drops: tuple[float, ...] = (0.01,)
    """Accuracy that may be lost against the last exit, as fractions: 0.01 is one point."""
    thresholds: tuple[float, ...] = ()
    """Thresholds of your own, reported beside the chosen ones: one for each exit but the last."""
    curve: int = 20
    """Points of the cost curve."""


@dataclass(frozen=True)
class InferenceConfig:
    """How compiled inference is timed."""

    policy: PolicyName = "max_prob"
    """Policy that decides."""
    budget: float = 0.6
    """Budget that its thresholds are chosen for."""
    batch: int = 256
    """Batch of the executor `compact`; `cond` is timed at batch 1."""
    repeats: int = 30
    """Timed passes over the batches: 4 of them, or 50 single images."""


def check(
    policies: PoliciesConfig, inference: InferenceConfig, exits: int, trains_gate: bool
) -> None:
    """Raises ValueError if a value does not fit.

    Args:
      policies: policies and targets.
      inference: timing.
      exits: E of the network.
      trains_gate: whether the regime trains the gates.
    """
    thresholds = policies.thresholds
    if thresholds and len(thresholds) != exits - 1:
        raise ValueError(
            f"policies.thresholds: {len(thresholds)} thresholds for {exits} exits; give "
            f"{exits - 1}, one for each exit but the last."
        )
    fraction = "fractions of the whole network, in (0, 1]"
    require_all("policies", policies, "budgets", lambda budget: 0 < budget <= 1, fraction)
    require_not_negative("policies", policies, "drops")
    require(policies.curve >= 2, "policies.curve", policies.curve, "at least 2 points")
    policy, expected = inference.policy, "another, because the regime trains no gate"
    usable = trains_gate or not POLICIES[policy].needs_gate
    require(usable, "inference.policy", policy, expected)
    require_positive("inference", inference, "batch repeats budget")
