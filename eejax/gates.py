"""Soft exits: gates as a distribution over exits, and what a network mixed by it says and costs.

Scardapane, Comminiello, Scarpiniti, Baccarelli, Uncini, *Differentiable branching in deep networks
for fast inference*, ICASSP 2020. The paper mixes from the last exit backwards,

    f_e = g_e p_e + (1 - g_e) f_{e+1},    f_E = p_E,    g_e = sigmoid(gate_e),

which is the expectation `f_1 = sum_e pi_e p_e` over `pi_e = g_e prod_{j<e} (1 - g_j)`, with the
last exit taking what is left. Everything here works with `log pi`, so that gates far from zero
neither vanish nor overflow.
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
    """`log pi`, the log-probability of leaving at each exit.

    Args:
      gates: `[E, B]` gate logits; the last exit's is not read, it takes all that is left.

    Returns:
      `[E, B]` float32.
    """
    chex.assert_rank(gates, 2)
    gates = gates.astype(jnp.float32)[:-1]
    go_on = jnp.cumsum(jax.nn.log_sigmoid(-gates), axis=0)  # log prod_{j<=e} (1 - g_j)
    certain = jnp.zeros((1, gates.shape[1]), jnp.float32)  # log 1
    reach = jnp.concatenate([certain, go_on])
    return reach + jnp.concatenate([jax.nn.log_sigmoid(gates), certain])


def mixed_log_probabilities(logits: Array, gates: Array) -> Array:
    """`log f_1 = logsumexp_e (log pi_e + log p_e)`: the soft network's answer.

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
    """`sum_e pi_e c_e`, `[B]`; its recursion `c_e = g_e c_e + (1 - g_e) c_{e+1}` is our reading of
    the paper's cost term.

    Args:
      gates: `[E, B]`.
      cumulative_cost: `[E]`, the cost of leaving at each exit as a fraction of the whole network.
    """
    chex.assert_rank([gates, cumulative_cost], [2, 1])
    pi = jnp.exp(log_exit_distribution(gates))
    return (pi * jnp.asarray(cumulative_cost, jnp.float32)[:, None]).sum(0)


def mean_exit_distribution(gates: Array) -> Array:
    """The mean probability of leaving at each exit, `[E]`, from gates `[E, B]`."""
    return jnp.exp(log_exit_distribution(gates)).mean(1)


def normalised_entropy(distribution: ArrayLike) -> Array:
    """Entropy of a distribution over E exits divided by `log E`, in [0, 1]; 0 for E = 1.

    Of a mean exit distribution it shows whether the gates have collapsed: near 0 all samples leave
    at one exit, and the other heads hardly learn through the gates.
    """
    p = jnp.asarray(distribution, jnp.float32)
    chex.assert_rank(p, 1)
    nats = -(p * jnp.log(jnp.maximum(p, 1e-30))).sum()
    return nats / math.log(max(len(p), 2))
