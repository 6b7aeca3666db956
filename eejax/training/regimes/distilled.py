"""Distillation from the last exit, which is trained at the same time.

    (1 - C) CE_E + sum_{e<E} [(1 - C) CE_e + C t^2 CE(sg p_E^t, p_e^t)],    C = 1/2

where `p^t` is the softmax of the logits over a temperature t. The teacher's answers are softened
until the mean of its largest probability is at most 1/2: t is the smallest power of 1.05 with that.
Phuong, Lampert, *Distillation-based training for multi-exit architectures*, ICCV 2019,
https://openaccess.thecvf.com/content_ICCV_2019/html/Phuong_Distillation-Based_Training_for_Multi-Exit_Architectures_ICCV_2019_paper.html.
There t grows by one factor whenever the mean exceeds 1/2 and never falls; here it is solved for
with every batch, so that it needs no state. Their code multiplies the whole by 10 / E.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from eejax.network import ExitOutput
from eejax.training.regime import Regime, RegimeOptions
from eejax.training.regimes.joint import all_at_once, cross_entropies

SHARE = 0.5
CONFIDENCE = 0.5
FACTOR = 1.05
MOST = 200  # powers; 1.05 to the 200th is 17,000


def temperature(logits: Array) -> Array:
    """The smallest power of 1.05 that softens `[B, C]` enough; `[]`.

    With two classes the mean of the largest probability stays above 1/2, and the temperature stops
    growing at the 200th power.
    """

    def too_sure(power: Array) -> Array:
        p = jax.nn.softmax(logits / FACTOR ** power.astype(jnp.float32))
        return (p.max(-1).mean() > CONFIDENCE) & (power < MOST)

    return FACTOR ** lax.while_loop(too_sure, lambda power: power + 1, jnp.int32(0)).astype(
        jnp.float32
    )


def softened(logits: Array, teacher: Array) -> Array:
    """`t^2 CE(sg p_T^t, p_e^t)`, `[E, B]`, from logits `[E, B, C]` and the teacher's `[B, C]`."""
    teacher = lax.stop_gradient(teacher.astype(jnp.float32))
    t = temperature(teacher)
    return t**2 * cross_entropies(logits.astype(jnp.float32) / t, jax.nn.softmax(teacher / t))


def losses(outputs: ExitOutput, targets: Array, options: RegimeOptions) -> Array:
    """The sum of the formula, `[B]`; a network without early exits has `CE_E` alone.

    The exit weights weigh the terms of their exits.
    """
    alone = options.exit_weights[:, None] * cross_entropies(outputs.logits, targets)
    if len(alone) == 1:
        return alone[0]
    taught = options.exit_weights[:-1, None] * softened(outputs.logits[:-1], outputs.logits[-1])
    return (1 - SHARE) * alone.sum(0) + SHARE * taught.sum(0)


REGIME = Regime(all_at_once(losses), trains_gate=False)
