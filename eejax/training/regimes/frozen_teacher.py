"""Distillation from a teacher of the same shape: the trained plain network, frozen.

    CE_E for half of the steps, then sum_e w_e [(1 - C) CE_e + C t^2 CE(p_T^t, p_e^t)],    C = 1/2

The first half trains the plain network. A copy of it, in inference mode, is the teacher T of the
second half, in which all exits learn, the last one too; the student goes on from the same
parameters. The temperature t is that of `distilled`. Hinton, Vinyals, Dean, *Distilling the
knowledge in a neural network*, 2015, https://arxiv.org/abs/1503.02531; in multi-exit networks:
Phuong, Lampert, *Distillation-based training for multi-exit architectures*, ICCV 2019 (see
`distilled`), whose teacher is the last exit as it learns.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from eejax.network import EarlyExitNetwork, PyTree, Variables
from eejax.training.regime import Batch, LossAux, Phase, Regime, RegimeOptions
from eejax.training.regimes.distilled import SHARE, softened
from eejax.training.regimes.exits_only import BACKBONE, last_exit
from eejax.training.regimes.joint import cross_entropies


def copied(variables: Variables, key: Array) -> PyTree:
    """The teacher: the network's variables as they are when a phase begins."""
    del key
    return jax.tree.map(jnp.copy, dict(variables))


def phases(options: RegimeOptions) -> tuple[Phase, ...]:
    """Plain network, then all exits; a network without early exits has the first phase alone."""
    exits = len(options.exit_weights)
    if exits == 1:
        return (last_exit(1.0, exits),)
    plain = last_exit(BACKBONE, exits)

    def first(
        network: EarlyExitNetwork,
        variables: Variables,
        batch: Batch,
        key: Array,
        progress: Array,
        teacher: PyTree,
    ) -> tuple[Array, LossAux]:
        del teacher
        return plain.loss(network, variables, batch, key, progress)

    def second(
        network: EarlyExitNetwork,
        variables: Variables,
        batch: Batch,
        key: Array,
        _: Array,
        teacher: PyTree,
    ) -> tuple[Array, LossAux]:
        outputs, batch_stats = network.apply_all(variables, batch.images, train=True, key=key)
        taught = softened(outputs.logits, network.apply_plain(teacher, batch.images))
        alone = cross_entropies(outputs.logits, batch.targets)
        terms = options.exit_weights[:, None] * ((1 - SHARE) * alone + SHARE * taught)
        return terms.sum(0).mean(), LossAux(batch_stats, outputs)

    return (
        plain._replace(loss=first, begin=copied),
        Phase(1 - BACKBONE, second, begin=copied),
    )


REGIME = Regime(phases, trains_gate=False)
