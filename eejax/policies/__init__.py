"""When to stop: a score for each exit, and a threshold that it must reach."""

from eejax.policies.agreement import patience
from eejax.policies.base import Policy, check_thresholds
from eejax.policies.baselines import fixed, random
from eejax.policies.confidence import (
    confidence_threshold,
    entropy,
    gate,
    margin,
    max_prob,
    threshold_confidence,
)
from eejax.policies.ensembles import fit_ztw, mean_of_experts, product_of_experts, vote, ztw
from eejax.policies.temperature import fit_temperatures, with_temperatures

__all__ = [
    "Policy",
    "check_thresholds",
    "confidence_threshold",
    "entropy",
    "fit_temperatures",
    "fit_ztw",
    "fixed",
    "gate",
    "margin",
    "max_prob",
    "mean_of_experts",
    "patience",
    "product_of_experts",
    "random",
    "threshold_confidence",
    "vote",
    "with_temperatures",
    "ztw",
]
