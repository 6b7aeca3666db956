"""Early-exit neural networks in JAX.

A network is a backbone cut into stages with a head after each (`network`); a policy says when to
stop (`policies`); thresholds come from a held-out trace (`routing`, `thresholds`); an executor
stops every sample at its own exit (`inference`).
"""

from eejax import guarantees, losses, metrics, scheduler, significance, thresholds
from eejax.calibration import fit_temperatures
from eejax.cascade import cascade, cascade_variables
from eejax.compaction import compact, loop, stack
from eejax.cost import Costs, macs, seconds
from eejax.deadline import anytime
from eejax.dispatch import host
from eejax.ensembles import fit_ztw, mean_of_experts, product_of_experts, vote, ztw
from eejax.guarantees import certify, control_risk
from eejax.inference import Prediction, cond, full, predictor, sharded
from eejax.network import EarlyExitNetwork, ExitOutput, Module, keep_variables, normalise
from eejax.placement import choose_exits
from eejax.policies import (
    Policy,
    entropy,
    fixed,
    gate,
    margin,
    max_prob,
    patience,
    random,
    with_temperatures,
)
from eejax.routing import (
    Routed,
    Scored,
    Trace,
    collect,
    read_trace,
    recorded,
    route,
    save_trace,
    score,
)
from eejax.selection import auto
from eejax.streaming import rebatched, stream
from eejax.thresholds import Choice, for_budget, for_drop, geometric

__version__ = "0.1.0"

__all__ = [
    "Choice",
    "Costs",
    "EarlyExitNetwork",
    "ExitOutput",
    "Module",
    "Policy",
    "Prediction",
    "Routed",
    "Scored",
    "Trace",
    "anytime",
    "auto",
    "cascade",
    "cascade_variables",
    "certify",
    "choose_exits",
    "collect",
    "compact",
    "cond",
    "control_risk",
    "entropy",
    "fit_temperatures",
    "fit_ztw",
    "fixed",
    "for_budget",
    "for_drop",
    "full",
    "gate",
    "geometric",
    "guarantees",
    "host",
    "keep_variables",
    "loop",
    "losses",
    "macs",
    "margin",
    "max_prob",
    "mean_of_experts",
    "metrics",
    "normalise",
    "patience",
    "predictor",
    "product_of_experts",
    "random",
    "read_trace",
    "rebatched",
    "recorded",
    "route",
    "save_trace",
    "scheduler",
    "score",
    "seconds",
    "sharded",
    "significance",
    "stack",
    "stream",
    "thresholds",
    "vote",
    "with_temperatures",
    "ztw",
]
