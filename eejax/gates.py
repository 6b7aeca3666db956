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
from jax import Array, lax
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


def straight_through(gates: Array) -> Array:
    """The exit that hard gates take, with the gradient of the soft distribution.

    A sample leaves at the first exit with `g_e >= 1/2`. The value is that choice, one-hot; the
    gradient is that of `pi` (the straight-through estimator of Bengio, Leonard, Courville, 2013,
    https://arxiv.org/abs/1308.3432).

    Args:
      gates: `[E, B]`.

    Returns:
      `[E, B]` float32.
    """
    pi = jnp.exp(log_exit_distribution(gates))
    leaves = (gates >= 0).at[-1].set(True)
    hard = jax.nn.one_hot(leaves.argmax(0), len(gates), axis=0, dtype=jnp.float32)
    return pi + lax.stop_gradient(hard - pi)


def offset_for_cost(gates: Array, cumulative_cost: Array | np.ndarray, budget: float) -> Array:
    """The number to add to all gates so that the mean expected cost of the batch is `budget`.

    The mean cost falls with the offset, so bisection finds it. A budget that no offset meets gives
    an end of the range, where nearly all samples leave at the first or the last exit.

    Args:
      gates: `[E, B]`.
      cumulative_cost: `[E]`, as for `expected_cost`.
      budget: in the unit of the cost.

    Returns:
      `[]` float32, without a gradient.
    """
    gates = lax.stop_gradient(gates.astype(jnp.float32))
    limit = jnp.abs(gates).max() + 20

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        dear = expected_cost(gates + middle, cumulative_cost).mean() > budget
        return jnp.where(dear, middle, low), jnp.where(dear, high, middle)

    low, high = lax.fori_loop(0, 40, halve, (-limit, limit))
    return (low + high) / 2


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
