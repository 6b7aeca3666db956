"""Self-distillation, "be your own teacher": early exits learn from labels and from the last exit.

    CE_E + sum_{e<E} [(1 - a) CE_e + a t^2 KL(sg p_E^t || p_e^t)],    a = 0.1, t = 3

where `p^t` is the softmax of the logits over t. The divergence is summed over classes. Zhang, Song,
Gao, Chen, Bao, Ma, *Be your own teacher: improve the performance of convolutional neural networks
via self distillation*, ICCV 2019, https://arxiv.org/abs/1905.08094; their third term, which
compares features after layers that exist in training alone, is left out. a, t and the factor t^2
are those of luanyunteng/pytorch-be-your-own-teacher, which takes 1 - a of CE_E too; the authors'
later code (ArchipLab-LinfengZhang/pytorch-self-distillation-final) has a = 0.3 and no t^2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from eejax.network import ExitOutput
from eejax.training.regime import Regime, RegimeOptions
from eejax.training.regimes.joint import all_at_once, cross_entropies

SHARE = 0.1
TEMPERATURE = 3.0


def losses(outputs: ExitOutput, targets: Array, options: RegimeOptions) -> Array:
    """The sum of the formula, `[B]`. The exit weights weigh the terms of their exits."""
    alone = cross_entropies(outputs.logits, targets)
    soft = jax.nn.log_softmax(outputs.logits.astype(jnp.float32) / TEMPERATURE)
    teacher = lax.stop_gradient(soft[-1:])
    taught = optax.losses.kl_divergence_with_log_targets(soft[:-1], teacher)
    early = (1 - SHARE) * alone[:-1] + SHARE * TEMPERATURE**2 * taught
    terms = jnp.concatenate([early, alone[-1:]])
    return (options.exit_weights[:, None] * terms).sum(0)


REGIME = Regime(all_at_once(losses), trains_gate=False)
