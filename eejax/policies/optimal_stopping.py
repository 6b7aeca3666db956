"""Optimal stopping, fitted on held-out samples by backward induction, at all prices at once.

At a price `lambda` of cost, leaving at exit e is worth `q_e - lambda c_e`, where `q_e` is the
probability that its answer is correct, given the statistics `s_e` of the exits so far. The value of
a sample, and the gain from going on, follow backwards from the last exit:

    V_E = q_E - lambda c_E,    V_e = max(q_e - lambda c_e, E[V_{e+1} | s_e]),
    G_e(lambda) = E[V_{e+1} | s_e] - (q_e - lambda c_e).

It is optimal to leave where `G_e <= 0` (Chow, Robbins, Siegmund, *Great expectations: the theory of
optimal stopping*, 1971). A single price would serve a single budget. But `G_e` falls with the
price, at least as fast as the next exit costs, so it is zero at exactly one price: the largest
ratio of accuracy to cost that any way of going on can gain. From that price on, leaving is optimal.
It is an index for all budgets at once, like that of Gittins for bandits (*Bandit processes and
dynamic allocation indices*, JRSS B 41, 1979,
https://doi.org/10.1111/j.2517-6161.1979.tb01068.x). Its negative is the score: where the model
holds, one threshold for all exits is optimal for some budget.

`q_e` is a logistic regression on the statistics. The conditional expectations are linear
regressions on what the rule fitted so far earns on the same samples, as in Longstaff, Schwartz,
*Valuing American options by simulation*, Review of Financial Studies 14, 2001,
https://doi.org/10.1093/rfs/14.1.113, one for each price of a grid, with `q` in the place of whether
the answer was correct. The score interpolates between the prices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import ArrayLike

from eejax.network import ExitOutput, PyTree
from eejax.policies.base import Policy, Rule, check_costs, make
from eejax.policies.statistics import COUNT, moments, no_classes, of_trace, statistics
from eejax.trace import Trace

# Accuracy for the cost of a whole network. The score goes on beyond both ends in a straight line.
PRICES = np.concatenate([[0.0], np.geomspace(0.01, 4, 15)])
_INPUTS = COUNT + 3
# Of the squared weights of standardised statistics, against the sum over the samples.
_LOGISTIC_RIDGE = 1.0
_LINEAR_RIDGE = 10.0
_LEAST_STEP = 1e-3  # of the cost, so that exits that cost the same can be told apart


class OptimalStoppingParams(NamedTuple):
    """The parameters of `optimal_stopping`.

    The inputs of the regressions are the statistics of `eejax.policies.statistics`, the largest
    probability and its square, and the mean over the exits so far of the first statistic.

    Attributes:
      weights: `[E, K, 9]`, of an offset and the standardised inputs: the gain from going on at each
        of K prices. Those of the last exit have no effect.
      mean: `[E, 8]`, of the inputs on the trace that they were fitted on.
      std: `[E, 8]`, their standard deviation, 1 where it is zero.
      prices: `[K]`, increasing, of the cost of the whole network.
      steps: `[E]`, positive, the share of that cost which the next exit adds.
    """

    weights: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    prices: np.ndarray
    steps: np.ndarray


def optimal_stopping(params: OptimalStoppingParams) -> Policy:
    """The policy that scores with minus the price from which on leaving is optimal.

    Args:
      params: as `fit` returns.

    Raises:
      ValueError: if the shapes do not fit, or `step` reaches an exit that has no weights.
    """
    return make(OPTIMAL_STOPPING, *params)


def fit(trace: Trace, cost: ArrayLike) -> OptimalStoppingParams:
    """Fits the gain from going on, from the last exit backwards, at every price of a grid.

    Args:
      trace: N samples of a split that serves no other purpose; E exits.
      cost: `[E]`, increasing: the cost of leaving at each exit, in any unit.

    Raises:
      ValueError: if the trace is empty, logits are not finite, or the costs do not fit.
    """
    values = of_trace(trace)
    exits, count, _ = values.shape
    c = check_costs(cost, exits)
    c = c / c[-1]
    so_far = np.cumsum(values[..., 0], 0) / np.arange(1.0, exits + 1)[:, None]
    p = -np.expm1(-np.expm1(values[..., 0]))
    inputs = np.concatenate([values, np.stack([p, p**2, so_far], -1)], -1)
    mean, std = moments(inputs)
    standard = (inputs - mean[:, None]) / std[:, None]
    x = np.concatenate([np.ones((exits, count, 1)), standard], -1)  # [E, N, 9]
    correct = (trace.logits.argmax(-1) == trace.labels[:, None]).T
    q = np.stack([_probabilities(x[e], correct[e]) for e in range(exits)])
    weights = np.zeros((exits, len(PRICES), _INPUTS + 1))
    value = q[-1, :, None] - PRICES * c[-1]  # [N, K]
    for e in reversed(range(exits - 1)):
        here = q[e, :, None] - PRICES * c[e]
        weights[e] = _ridge(x[e], value - here).T
        value = np.where(x[e] @ weights[e].T > 0, value, here)
    steps = np.maximum(np.diff(c, append=2.0), _LEAST_STEP)
    found = (weights, mean, std, PRICES, steps)
    return OptimalStoppingParams(*(np.asarray(a, np.float32) for a in found))


def _probabilities(x: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """The fitted probability `[N]` of being correct, by logistic regression on `x` `[N, F]`."""
    penalty = _penalty(x.shape[1], _LOGISTIC_RIDGE)
    w = np.zeros(x.shape[1])
    for _ in range(30):  # Newton's steps; the penalty and the offset's bound keep them finite
        p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
        curvature = (x * (p * (1 - p))[:, None]).T @ x + penalty
        w = w + np.linalg.solve(curvature, x.T @ (correct - p) - penalty @ w)
    return 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))


def _ridge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weights `[F, K]` of a linear regression of `y` `[N, K]` on `x` `[N, F]`."""
    return np.linalg.solve(x.T @ x + _penalty(x.shape[1], _LINEAR_RIDGE), x.T @ y)


def _penalty(inputs: int, ridge: float) -> np.ndarray:
    """`[F, F]`; the offset is hardly penalised."""
    return np.diag([1e-3, *[ridge] * (inputs - 1)])


def _check(params: OptimalStoppingParams) -> OptimalStoppingParams:
    weights, mean, std, prices, steps = (np.asarray(p, np.float32) for p in params)
    exits, count = len(steps), prices.size
    shapes = ((exits, count, _INPUTS + 1), (exits, _INPUTS), (exits, _INPUTS), (count,), (exits,))
    given = (weights.shape, mean.shape, std.shape, prices.shape, steps.shape)
    if given != shapes:
        raise ValueError(
            f"weights {weights.shape}, mean {mean.shape}, std {std.shape}, prices {prices.shape}, "
            f"steps {steps.shape}; give [E, K, 9], [E, 8], [E, 8], [K] and [E], as `fit` returns."
        )
    if not (np.diff(prices) > 0).all() or not (steps > 0).all():
        raise ValueError(
            f"prices {prices.tolist()}, steps {steps.tolist()}; give increasing prices and "
            "positive steps."
        )
    return OptimalStoppingParams(weights, mean, std, prices, steps)


def _init(params: OptimalStoppingParams, batch_size: int) -> PyTree:
    past = no_classes(batch_size, len(params.steps))
    return past, jnp.zeros(batch_size, jnp.float32)


def _step(
    params: OptimalStoppingParams, output: ExitOutput, state: PyTree, e: Any
) -> tuple[Array, Array, PyTree]:
    weights, mean, std, prices, steps = map(jnp.asarray, params)
    if isinstance(e, int) and e >= len(steps):
        raise ValueError(
            f"optimal stopping over {len(steps)} exits, and exit {e + 1}; fit it for each."
        )
    past, total = state
    values, past = statistics(output, past)
    total = total + values[:, 0]
    so_far = total / (past >= 0).sum(-1).astype(jnp.float32)
    p = -jnp.expm1(-jnp.expm1(values[:, 0]))
    inputs = jnp.concatenate([values, jnp.stack([p, p**2, so_far], -1)], -1)
    standard = (inputs - mean[e][None]) / std[e][None]
    gains = weights[e, :, :1].T + standard @ weights[e, :, 1:].T
    return output.logits, -_zero(gains, prices, steps[e]), (past, total)


def _zero(gains: Array, prices: Array, step: Array) -> Array:
    """The price `[B]` at which gains `[B, K]` at the prices `[K]` are zero.

    Regressions need not fall as fast as gains do; they are made to.
    """
    offset = (step * prices)[None]
    gains = lax.cummin(gains + offset, axis=1) - offset
    # The share of each interval of the grid on which the gain is positive.
    share = jnp.clip(gains[:, :-1] / (gains[:, :-1] - gains[:, 1:]), 0, 1)
    inside = prices[0] + (share * jnp.diff(prices)[None]).sum(-1)
    beyond = jnp.minimum(gains[:, 0], 0) + jnp.maximum(gains[:, -1], 0)
    return inside + beyond / step


OPTIMAL_STOPPING = Rule("optimal_stopping", _init, _step, OptimalStoppingParams, _check, fit)
