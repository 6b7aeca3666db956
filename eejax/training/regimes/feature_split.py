"""Deep feature surgery: a head and the next stage train different channels of the features.

    sum_e w_e CE_e,    head e reads [a, sg(b)], stage e + 1 reads [sg(a), b]

The channels of the features of stage e are split into halves a and b; sg stops the gradient, so the
gradients of exit e and of later exits never meet in a feature. The forward pass does not change.
Gong, Chen, Luo, Lu, Li, Zhang, Sun, Zhang, *Deep feature surgery: towards accurate and efficient
multi-exit networks*, ECCV 2024, https://arxiv.org/abs/2407.13986; that each reads the other's part
without a gradient is their feature referencing. In their code the next stage trains the first half
and the head the second, and for MSDNet and ViT the heads train all channels, other than in the
paper. Of features at several scales the heads read the last, and it alone is split.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from eejax.network import PyTree
from eejax.training.regime import Phase, Regime, RegimeOptions
from eejax.training.regimes.joint import connected

RATIO = 0.5


def split_gradient(features: PyTree, *, first: bool) -> PyTree:
    """The features; a gradient passes only through the first part of the channels, or the rest.

    Args:
      features: a pytree of arrays whose last axis holds the channels; of a list or tuple, which
        holds scales, only the last is split.
      first: which part.
    """

    def one(x: Array) -> Array:
        cut = round(RATIO * x.shape[-1])
        a, b = x[..., :cut], x[..., cut:]
        a, b = (a, lax.stop_gradient(b)) if first else (lax.stop_gradient(a), b)
        return jnp.concatenate([a, b], axis=-1)

    leaves, tree = jax.tree.flatten(features)
    read = features[-1] if isinstance(features, list | tuple) and features else features
    first_read = len(leaves) - len(jax.tree.leaves(read))
    return tree.unflatten([*leaves[:first_read], *map(one, leaves[first_read:])])


def phases(options: RegimeOptions) -> tuple[Phase, ...]:
    """One phase. The last head reads all channels with their gradient."""
    last = len(options.exit_weights) - 1
    return connected(
        options,
        to_head=lambda e, x: x if e == last else split_gradient(x, first=True),
        to_stage=lambda e, x: x if e == last else split_gradient(x, first=False),
    )


REGIME = Regime(phases, trains_gate=False)
