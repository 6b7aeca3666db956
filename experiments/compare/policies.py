"""The policies of a comparison: fitted on the calibration split, by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from eejax import policies
from eejax.policies import ensembles
from eejax.policies import learned as scheduler
from eejax.policies.base import Policy
from eejax.policies.temperature import fit_temperatures, with_temperatures
from eejax.trace import Trace

# Each from the calibration trace, with temperatures already applied, and the costs of its exits.
_MAKERS: dict[str, Callable[[Trace, np.ndarray], Policy]] = {
    "max_prob": lambda trace, cost: policies.max_prob,
    "entropy": lambda trace, cost: policies.entropy,
    "margin": lambda trace, cost: policies.margin,
    "gate": lambda trace, cost: policies.gate,
    "patience": lambda trace, cost: policies.patience,
    "vote": lambda trace, cost: ensembles.vote(trace.logits.shape[-1]),
    "mean_of_experts": lambda trace, cost: ensembles.mean_of_experts(trace.logits.shape[-1]),
    "product_of_experts": lambda trace, cost: ensembles.product_of_experts(trace.logits.shape[-1]),
    "ztw": lambda trace, cost: ensembles.ztw(*ensembles.fit_ztw(trace)),
    "scheduler": lambda trace, cost: scheduler.scheduler(scheduler.fit(trace, cost)),
    "fixed": lambda trace, cost: policies.fixed,
    "random": lambda trace, cost: policies.random(0),
}


def fitted(name: str, calibrate: Trace, cost: np.ndarray) -> Policy:
    """A policy with a temperature for each exit, and whatever else it learns after training.

    Args:
      name: which one.
      calibrate: the split that all of this is fitted on, and nothing else is.
      cost: `[E]`, of leaving at each exit.
    """
    temperatures = fit_temperatures(calibrate)
    warm = np.asarray(temperatures, np.float32)[None, :, None]
    policy = _MAKERS[name](calibrate._replace(logits=calibrate.logits / warm), cost)
    return with_temperatures(policy, temperatures)
