"""Early-exit neural networks in JAX.

A network is a backbone cut into stages with a head after each (`network`); a policy says when to
stop (`policies`); thresholds come from a held-out trace (`routing`, `thresholds`); an executor
stops every sample at its own exit (`inference`).
"""

from eejax import training
from eejax.benchmark import seconds
from eejax.cascades import cascade, cascade_variables
from eejax.cost import Costs, macs, xla_macs
from eejax.evaluation import metrics, significance
from eejax.evaluation.routing import Routed, Scored, route, score
from eejax.inference.automatic import auto
from eejax.inference.compaction import compact, loop, stack
from eejax.inference.deadline import anytime
from eejax.inference.dispatch import host
from eejax.inference.executors import cond, full
from eejax.inference.predictors import predictor, sharded
from eejax.inference.step import Prediction
from eejax.inference.streaming import rebatched, stream
from eejax.network import EarlyExitNetwork, ExitOutput, Module, keep_variables, normalise
from eejax.policies import scheduler
from eejax.policies.agreement import patience
from eejax.policies.base import Policy
from eejax.policies.baselines import fixed, random
from eejax.policies.confidence import entropy, gate, margin, max_prob
from eejax.policies.ensembles import fit_ztw, mean_of_experts, product_of_experts, vote, ztw
from eejax.policies.temperature import fit_temperatures, with_temperatures
from eejax.selection import guarantees, thresholds
from eejax.selection.guarantees import certify, control_risk
from eejax.selection.placement import choose_exits
from eejax.selection.thresholds import Choice, for_budget, for_drop, geometric
from eejax.trace import Trace, collect, read_trace, recorded, save_trace

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
    "training",
    "vote",
    "with_temperatures",
    "xla_macs",
    "ztw",
]
