"""Soft gates: a distribution over exits, and the prediction and cost of the network it mixes.

The prediction is mixed from the last exit backwards,

    f_e = g_e p_e + (1 - g_e) f_{e+1},    f_E = p_E,    g_e = sigmoid(gate_e).

That is the expectation `f_1 = sum_e pi_e p_e` over the exit distribution

    pi_e = g_e prod_{j<e} (1 - g_j),    pi_E = prod_{j<E} (1 - g_j).

All functions work with `log pi`, so gates far from zero neither vanish nor overflow. Scardapane,
Comminiello, Scarpiniti, Baccarelli, Uncini, *Differentiable branching in deep networks for fast
inference*, ICASSP 2020,
https://sigport.org/documents/differentiable-branching-deep-networks-fast-inference. PonderNet
halts by the same distribution: Banino, Balaguer, Blundell, *PonderNet: learning to ponder*, 2021,
https://arxiv.org/abs/2107.05407.
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


def log_exit_distribution(gates: Array) -> Array:
    """Computes `log pi`, the log-probability of leaving at each exit.

    Args:
      gates: `[E, B]` gate logits. The last exit's is not read: it takes the probability that the
        others leave.

    Returns:
      `[E, B]` float32.
    """
    chex.assert_rank(gates, 2)
    gates = gates.astype(jnp.float32)[:-1]
    log_one = jnp.zeros((1, gates.shape[1]), jnp.float32)
    log_not = jnp.cumsum(jax.nn.log_sigmoid(-gates), axis=0)  # log prod_{j<=e} (1 - g_j)
    log_reached = jnp.concatenate([log_one, log_not])
    return log_reached + jnp.concatenate([jax.nn.log_sigmoid(gates), log_one])


def mixed_log_probabilities(logits: Array, gates: Array) -> Array:
    """Computes `log f_1 = logsumexp_e (log pi_e + log p_e)`, the mixed prediction.

    Args:
      logits: `[E, B, C]`.
      gates: `[E, B]`.

    Returns:
      `[B, C]` float32.
    """
    chex.assert_rank([logits, gates], [3, 2])
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jax.nn.logsumexp(log_exit_distribution(gates)[..., None] + log_p, axis=0)


def expected_cost(gates: Array, cumulative_cost: Array | np.ndarray) -> Array:
    """Computes `sum_e pi_e c_e`, the expected cost of each sample.

    It solves the recursion `C_e = g_e c_e + (1 - g_e) C_{e+1}`, which is our reading of the paper's
    regulariser.

    Args:
      gates: `[E, B]`.
      cumulative_cost: `[E]`, the cost `c_e` of leaving at each exit as a fraction of the whole
        network.

    Returns:
      `[B]` float32.
    """
    chex.assert_rank([gates, cumulative_cost], [2, 1])
    pi = jnp.exp(log_exit_distribution(gates))
    return (pi * jnp.asarray(cumulative_cost, jnp.float32)[:, None]).sum(0)


def mean_exit_distribution(gates: Array) -> Array:
    """Averages `pi` over the batch: `[E]` float32 from gates `[E, B]`."""
    return jnp.exp(log_exit_distribution(gates)).mean(1)


def normalised_entropy(distribution: ArrayLike) -> Array:
    """Computes the entropy of a distribution `[E]` divided by `log E`: in [0, 1], 0 for E = 1.

    The entropy of a mean exit distribution tells whether the gates have collapsed: near 0 all
    samples leave at one exit, and the other heads learn almost nothing through the gates.
    """
    p = jnp.asarray(distribution, jnp.float32)
    chex.assert_rank(p, 1)
    nats = -(p * jnp.log(jnp.maximum(p, 1e-30))).sum()
    return nats / math.log(max(len(p), 2))
