"""The public names of `eejax`, which `__init__.py` imports when they are first used."""

from eejax import training
from eejax.artifact import Artifact, export, load
from eejax.benchmark import seconds
from eejax.bundle import Bundle
from eejax.cascades import cascade, cascade_variables
from eejax.cost import Costs, macs, xla_macs
from eejax.evaluation import Routed, Scored, metrics, route, score, significance
from eejax.inference.automatic import auto
from eejax.inference.compaction import compact, loop, stack
from eejax.inference.deadline import anytime
from eejax.inference.dispatch import host
from eejax.inference.executors import cond, full
from eejax.inference.predictors import predictor, sharded
from eejax.inference.step import Prediction
from eejax.inference.streaming import rebatched, stream
from eejax.keeping import keep_exits
from eejax.network import EarlyExitNetwork, ExitOutput, Module, keep_variables, normalise
from eejax.policies import (
    Policy,
    entropy,
    fit_temperatures,
    fit_ztw,
    fixed,
    gate,
    margin,
    max_prob,
    mean_of_experts,
    patience,
    product_of_experts,
    random,
    scheduler,
    vote,
    with_temperatures,
    ztw,
)
from eejax.selection import (
    Choice,
    certify,
    choose_exits,
    control_risk,
    for_budget,
    for_drop,
    geometric,
    guarantees,
    thresholds,
)
from eejax.trace import Trace, collect, read_trace, recorded, save_trace

__version__: str

__all__ = [
    "Artifact",
    "Bundle",
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
    "export",
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
    "keep_exits",
    "keep_variables",
    "load",
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
