"""A learned score for each exit, from the outputs of the exits so far.

The idea is from EENet (Ilhan et al., *Adaptive deep neural network inference optimization with
EENet*, WACV 2024, https://arxiv.org/abs/2301.07099): whether the exits so far agree is evidence
beside the confidence, and a held-out split shows how strong. This version differs in four ways.

- EENet trains its score to predict whether the present answer is correct, and a second network that
  assigns samples to exits. Here the score is trained through the soft routing itself, so that it
  also learns where a later exit would help.
- EENet is fitted for one budget. Here soft thresholds for a whole range of prices share the score
  and are then discarded; `selection.thresholds` chooses for any budget, on a separate split.
- The score of EENet reads all C class probabilities. This one reads six statistics for any C.
- The score of EENet starts at random. This one starts as `max_prob`, and nothing is random.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from numpy.typing import ArrayLike

from eejax.gates import log_exit_distribution
from eejax.network import ExitOutput, PyTree
from eejax.policies.base import Policy, Rule, check_costs, make
from eejax.policies.statistics import COUNT, moments, no_classes, of_trace, statistics
from eejax.trace import Trace

# Accuracy for the cost of a whole network. Below the lowest price hardly any saving pays, above the
# highest hardly any sample survives the first exit.
_PRICES = np.geomspace(0.01, 4, 16)
_SLOPE = 2.0  # of the initial soft thresholds, in standard deviations of `max_prob`
# Weight of the squared distance from the weights of `max_prob`, divided by N. Without it, a fit on
# 200 samples lost 0.8 points of accuracy where `max_prob` is the best score; with it 0.2.
_PULL = 0.3
_RATE = 0.03  # of Adam, falling to zero along a cosine


class Parameters(NamedTuple):
    """The parameters of `scheduler`.

    The statistics are those of `eejax.policies.statistics`.

    Attributes:
      weights: `[E, 6]`, of the standardised statistics and of the score at the exit before.
      mean: `[E, 5]`, of the statistics on the trace that it was fitted on.
      std: `[E, 5]`, their standard deviation, 1 where it is zero.
    """

    weights: np.ndarray
    mean: np.ndarray
    std: np.ndarray


def scheduler(parameters: Parameters) -> Policy:
    """The policy that scores with a linear function of the statistics and answers with the logits.

    Args:
      parameters: as `fit` returns.

    Raises:
      ValueError: if the shapes do not fit, or `step` reaches an exit that has no weights.
    """
    return make(SCHEDULER, *parameters)


def _check(params: Parameters) -> Parameters:
    weights, mean, std = (np.asarray(p, np.float32) for p in params)
    shape = (len(weights), COUNT) if weights.ndim == 2 else ()
    if weights.shape[1:] != (COUNT + 1,) or not mean.shape == std.shape == shape:
        raise ValueError(
            f"weights {weights.shape}, mean {mean.shape}, std {std.shape}; give [E, 6], [E, 5] and "
            "[E, 5], as `fit` returns."
        )
    return Parameters(weights, mean, std)


def _init(params: Parameters, batch_size: int) -> PyTree:
    past = no_classes(batch_size, len(params.weights))
    return past, jnp.zeros(batch_size, jnp.float32)


def _step(
    params: Parameters, output: ExitOutput, state: PyTree, e: Any
) -> tuple[Array, Array, PyTree]:
    weights, mean, std = map(jnp.asarray, params)
    if isinstance(e, int) and e >= len(weights):
        raise ValueError(
            f"a scheduler of {len(weights)} exits, and exit {e + 1}; fit one for each."
        )
    past, before = state
    values, past = statistics(output, past)
    score = _score(weights[e], (values - mean[e][None]) / std[e][None], before)
    return output.logits, score, (past, score)


def fit(trace: Trace, cost: ArrayLike, steps: int = 300) -> Parameters:
    """Fits scores that serve a whole range of prices of computation at once.

    With `pi_e` the probability of leaving at exit e, from sigmoids of score minus threshold, the
    objective for one price is `sum_e pi_e (correct_e - price c_e)`. Full-batch Adam maximises its
    mean over the samples and a grid of prices, in the weights of the scores and in thresholds,
    which are separate for each price.

    Args:
      trace: N samples of a split that serves no other purpose; E exits.
      cost: `[E]`, increasing: the cost of leaving at each exit, in any unit.
      steps: of Adam.

    Raises:
      ValueError: if the trace is empty, logits are not finite, or the costs do not fit.
    """
    values = of_trace(trace)
    exits = len(values)
    c = check_costs(cost, exits)
    mean, std = moments(values)
    standard = (values - mean[:, None]) / std[:, None]
    correct = (trace.logits.argmax(-1) == trace.labels[:, None]).T
    # The score of the last exit has no effect; it stays `max_prob`.
    weights = np.zeros((exits, COUNT + 1), np.float32)
    weights[:, 0] = _SLOPE
    shares = 1 - (np.arange(len(_PRICES)) + 0.5) / len(_PRICES)
    thresholds = np.quantile(_SLOPE * standard[:-1, :, 0], shares, axis=1)  # [prices, E - 1]
    fitted = _fit(
        (jnp.asarray(weights), jnp.asarray(thresholds, jnp.float32)),
        jnp.asarray(standard, jnp.float32),
        jnp.asarray(correct, jnp.float32),
        jnp.asarray(c / c[-1], jnp.float32),
        steps,
    )
    return Parameters(np.asarray(fitted), mean.astype(np.float32), std.astype(np.float32))


@functools.partial(jax.jit, static_argnames="steps")
def _fit(
    start: tuple[Array, Array], standard: Array, correct: Array, cost: Array, steps: int
) -> Array:
    """Weights `[E, 6]`, from initial weights and thresholds `[prices, E - 1]`, standardised
    statistics `[E, N, 5]`, correct `[E, N]` and cost `[E]`."""
    optimiser = optax.adam(optax.cosine_decay_schedule(_RATE, max(steps, 1)))

    def loss(parameters: tuple[Array, Array]) -> Array:
        weights, thresholds = parameters
        scores, before = [], jnp.zeros(standard.shape[1], jnp.float32)
        for e in range(len(standard)):
            before = _score(weights[e], standard[e], before)
            scores.append(before)
        last = jnp.zeros((len(thresholds), 1), jnp.float32)  # has no effect
        levels = jnp.concatenate([thresholds, last], 1)

        def worth(level: Array, price: Array) -> Array:
            pi = jnp.exp(log_exit_distribution(jnp.stack(scores) - level[:, None]))
            gain = (pi * (correct - price * cost[:, None])).sum(0).mean()
            # Otherwise high prices, whose objective has the larger range, would dominate.
            return gain / (1 + price)

        moved = ((weights - start[0]) ** 2).sum() / standard.shape[1]
        return _PULL * moved - jax.vmap(worth)(levels, jnp.asarray(_PRICES, jnp.float32)).mean()

    def step(carry: PyTree, _: None) -> tuple[PyTree, None]:
        parameters, state = carry
        gradient = jax.grad(loss)(parameters)
        with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in int32
            updates, state = optimiser.update(gradient, state)
        return (optax.apply_updates(parameters, updates), state), None

    ((weights, _), _), _ = jax.lax.scan(step, (start, optimiser.init(start)), length=steps)
    return weights


def _score(weights: Array, standard: Array, before: Array) -> Array:
    """`[B]`, from weights `[6]`, standardised statistics `[B, 5]` and the score before `[B]`."""
    return (standard * weights[None, :-1]).sum(-1) + before * weights[-1]


SCHEDULER = Rule("scheduler", _init, _step, Parameters, _check, fit)
