"""Early-exit neural networks in JAX.

A network is a backbone cut into stages with a head after each (`network`); a policy says when to
stop (`policies`); thresholds come from a held-out trace (`routing`, `thresholds`); an executor
stops every sample at its own exit (`inference`).
"""

from eejax import losses
from eejax.calibration import fit_temperatures
from eejax.compaction import compact, loop, stack
from eejax.cost import Costs, macs
from eejax.deadline import anytime
from eejax.dispatch import host
from eejax.inference import Prediction, cond, full, predictor, sharded
from eejax.network import EarlyExitNetwork, ExitOutput, Module, normalise
from eejax.policies import Policy, entropy, gate, margin, max_prob, with_temperatures
from eejax.routing import Routed, Scored, Trace, collect, recorded, route, score
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
    "collect",
    "compact",
    "cond",
    "entropy",
    "fit_temperatures",
    "for_budget",
    "for_drop",
    "full",
    "gate",
    "geometric",
    "host",
    "loop",
    "losses",
    "macs",
    "margin",
    "max_prob",
    "normalise",
    "predictor",
    "rebatched",
    "recorded",
    "route",
    "score",
    "sharded",
    "stack",
    "stream",
    "with_temperatures",
]
