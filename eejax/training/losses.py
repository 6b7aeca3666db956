"""What training minimises, as pure functions of stacked logits `[E, B, C]`; each returns `[B]`.

Targets are distributions `[B, C]`, so that label smoothing is the caller's. The soft losses are
those of Scardapane et al., ICASSP 2020, and what was found since to keep them from collapsing; add
`cost_weight * gates.expected_cost(...)` for the paper's cost regulariser.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp
import optax
from jax import Array

from eejax import gates as soft


def cross_entropies(logits: Array, targets: Array) -> Array:
    """Each exit's own cross-entropy, `[E, B]`, from `[E, B, C]` and targets `[B, C]`."""
    chex.assert_rank([logits, targets], [3, 2])
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets[None])


def joint(logits: Array, gates: Array, targets: Array, weights: Array) -> Array:
    """`sum_e w_e CE_e` (BranchyNet, 2016; MSDNet, 2018). Gates are not read and get no gradient.

    Args:
      logits: `[E, B, C]`.
      gates: `[E, B]`.
      targets: `[B, C]`.
      weights: `[E]`.
    """
    del gates
    return (weights[:, None] * cross_entropies(logits, targets)).sum(0)


def soft_literal(logits: Array, gates: Array, targets: Array, weights: Array) -> Array:
    """`CE(f_1, y)`, the cross-entropy of the mixed prediction; the paper's loss to the letter.

    An exit with `pi_e` near zero gets no gradient, neither its head nor its gate: that is how the
    gates collapse. `weights` are not read.
    """
    del weights
    return -(targets * soft.mixed_log_probabilities(logits, gates)).sum(-1)


def soft_auxiliary(logits: Array, gates: Array, targets: Array, weights: Array) -> Array:
    """`CE(f_1, y) + sum_e w_e CE_e`: every head also learns by itself."""
    return soft_literal(logits, gates, targets, weights) + joint(logits, gates, targets, weights)


def soft_mixture(logits: Array, gates: Array, targets: Array, weights: Array) -> Array:
    """`sum_e pi_e w_e CE_e`, a mixture of losses (PonderNet's form, Banino et al., 2021)."""
    pi = jnp.exp(soft.log_exit_distribution(gates))
    return (pi * weights[:, None] * cross_entropies(logits, targets)).sum(0)
