"""Soft gates as published: the cross-entropy of the prediction that the gates mix.

    CE(f_1, y) + lambda sum_e pi_e c_e,    f_1 = sum_e pi_e p_e

with the exit distribution `pi` of `eejax.gates`. An exit with `pi_e` near zero gets no gradient,
neither its head nor its gate: that is how gates collapse to one exit. Scardapane, Comminiello,
Scarpiniti, Baccarelli, Uncini, *Differentiable branching in deep networks for fast inference*,
ICASSP 2020, https://sigport.org/documents/differentiable-branching-deep-networks-fast-inference.
"""

from __future__ import annotations

from jax import Array

from eejax import gates
from eejax.network import ExitOutput
from eejax.training.regime import Regime, RegimeOptions
from eejax.training.regimes.joint import all_at_once


def mixed_cross_entropy(outputs: ExitOutput, targets: Array) -> Array:
    """`CE(f_1, y)`, `[B]`."""
    return -(targets * gates.mixed_log_probabilities(outputs.logits, outputs.gate)).sum(-1)


def with_cost(values: Array, outputs: ExitOutput, options: RegimeOptions) -> Array:
    """Losses `[B]` plus `lambda` times the expected cost of each sample, `[B]`."""
    if not options.cost_weight:
        return values
    return values + options.cost_weight * gates.expected_cost(outputs.gate, options.cumulative_cost)


def losses(outputs: ExitOutput, targets: Array, options: RegimeOptions) -> Array:
    """`CE(f_1, y) + lambda sum_e pi_e c_e`, `[B]`; the exit weights are not read."""
    return with_cost(mixed_cross_entropy(outputs, targets), outputs, options)


REGIME = Regime(all_at_once(losses), trains_gate=True)
