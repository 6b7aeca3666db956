"""Self-distillation with feature hints: early features also attend to the places that the last do.

    self_distilled + b sum_{e<E} w_e |q_e - sg q_E|^2,    b = 1000 / 128

where `q_e` is the attention map of the features that head e reads: the mean over channels of their
squares, brought to the size of the last map, with unit norm over all positions. Features without
positions, or with a single one, give no hint. So features of different widths are compared without
layers that exist in training alone, which the feature term of Zhang et al., *Be your own teacher*,
ICCV 2019, https://arxiv.org/abs/1905.08094, needs. Attention maps: Zagoruyko, Komodakis, *Paying
more attention to attention*, ICLR 2017, https://arxiv.org/abs/1612.03928. In their code
(szagoruyko/attention-transfer) b is 1000 over the number of positions; here it is half of that for
a map of 8x8, and the same for maps of any size. Of 0.001, 0.01, 0.1, 1 and 10 times this weight it
has the highest mean accuracy of the exits on held-out digits (docs/train.md).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from eejax.network import EarlyExitNetwork, PyTree, Variables
from eejax.training.exitwise import apply_exits
from eejax.training.regime import Batch, LossAux, Phase, Regime, RegimeOptions
from eejax.training.regimes import self_distilled

WEIGHT = 1000 / 128
_TINY = 1e-12


def attention(features: PyTree) -> Array:
    """Mean of squares over channels: `[B, ..., K]` to `[B, ...]`; of several scales the last."""
    if isinstance(features, list | tuple):
        features = features[-1]
    return (features.astype(jnp.float32) ** 2).mean(-1)


def hints(features: list[PyTree]) -> Array:
    """`|q_e - sg q_E|^2` for each early exit, `[E - 1, B]`, from the features of each exit."""
    target = attention(lax.stop_gradient(features[-1]))

    def unit(energy: Array) -> Array:
        if energy.shape != target.shape:
            energy = jax.image.resize(energy, target.shape, "linear")
        energy = energy.reshape(len(energy), -1)
        return energy * lax.rsqrt((energy**2).sum(-1, keepdims=True) + _TINY)

    maps = jnp.stack([unit(attention(early)) for early in features[:-1]])
    return ((maps - unit(target)[None]) ** 2).sum(-1)


def phases(options: RegimeOptions) -> tuple[Phase, ...]:
    """One phase. The exit weights weigh the terms of their exits."""

    def loss(
        network: EarlyExitNetwork, variables: Variables, batch: Batch, key: Array, _: Array
    ) -> tuple[Array, LossAux]:
        features = []

        def read(e: int, x: PyTree) -> PyTree:
            del e
            features.append(x)
            return x

        outputs, batch_stats = apply_exits(network, variables, batch.images, key, to_head=read)
        values = self_distilled.losses(outputs, batch.targets, options)
        if network.num_exits > 1:
            hint = options.exit_weights[:-1, None] * hints(features)
            values = values + WEIGHT * hint.sum(0)
        return values.mean(), LossAux(batch_stats, outputs)

    return (Phase(1.0, loss),)


REGIME = Regime(phases, trains_gate=False)
