"""Soft gates that harden during training, at a price of cost that is warmed up.

    CE(f_1, y) + sum_e w_e CE(p_e, y) + lambda r sum_e pi_e c_e,    pi, f_1 from the gates / tau

With the progress t in [0, 1) the temperature falls geometrically, `tau = 2 (1/8)^t`, from gates
that mix all exits to gates that nearly decide, as they do in inference. The price is zero at first
and whole after 30 % of the steps, `r = min(1, t / 0.3)`: before the heads have learned, every exit
is equally bad, and a price would only teach the gates to take the cheapest. The regime is
`soft_auxiliary` otherwise (Scardapane, Comminiello, Scarpiniti, Baccarelli, Uncini, *Differentiable
branching in deep networks for fast inference*, ICASSP 2020,
https://sigport.org/documents/differentiable-branching-deep-networks-fast-inference); the
temperature is annealed as in Jang, Gu, Poole, *Categorical reparameterization with Gumbel-softmax*,
ICLR 2017, https://arxiv.org/abs/1611.01144.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from eejax import gates
from eejax.network import ExitOutput
from eejax.training.regime import Regime, RegimeOptions
from eejax.training.regimes import joint
from eejax.training.regimes.joint import along
from eejax.training.regimes.soft_literal import mixed_cross_entropy

FIRST, LAST = 2.0, 0.25
WARM_UP = 0.3


def temperature(progress: Array) -> Array:
    """`tau`, `[]`: geometrically from 2 to 1/4."""
    return FIRST * (LAST / FIRST) ** progress


def warm_up(progress: Array) -> Array:
    """`r`, `[]`: from 0 to 1 in the first 30 % of the steps."""
    return jnp.minimum(1.0, progress / WARM_UP)


def losses(outputs: ExitOutput, targets: Array, options: RegimeOptions, progress: Array) -> Array:
    """`CE(f_1, y) + sum_e w_e CE_e + lambda r sum_e pi_e c_e`, `[B]`."""
    softened = outputs._replace(gate=outputs.gate / temperature(progress))
    values = mixed_cross_entropy(softened, targets) + joint.losses(outputs, targets, options)
    cost = gates.expected_cost(softened.gate, options.cumulative_cost)
    return values + options.cost_weight * warm_up(progress) * cost


REGIME = Regime(along(losses), trains_gate=True)
