"""Policies that answer with all the exits so far, not with the present one alone.

All but `vote` pass their answer to another policy, `score`, for the confidence: by default the
largest probability of the ensemble.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from numpy.typing import ArrayLike

from eejax.network import ExitOutput, PyTree
from eejax.policies.base import Policy
from eejax.policies.confidence import max_prob
from eejax.trace import Trace

_RATE = 0.1  # of Adam, falling to zero along a cosine


def vote(classes: int) -> Policy:
    """Every exit has a vote; the score is the number of votes for the class that has the most.

    Ties are broken by the mean probability. Sun et al., *Early exiting with ensemble internal
    classifiers*, 2021, https://arxiv.org/abs/2105.13792, divide the votes at exit e by a power of
    e. With a threshold for each exit that is a constant which the threshold absorbs, so the score
    here is the plain count. The answer is the votes plus the mean probability: its order is what it
    is for, and its softmax is no probability.

    Args:
      classes: C.
    """

    def init(batch_size: int) -> PyTree:
        zeros = jnp.zeros((batch_size, classes), jnp.float32)
        return zeros, zeros

    def step(output: ExitOutput, state: PyTree, e: Any) -> tuple[Array, Array, PyTree]:
        del e
        _check_classes(output, classes)
        votes, total = state
        votes = votes + jax.nn.one_hot(output.logits.argmax(-1), classes, dtype=jnp.float32)
        total = total + jax.nn.softmax(output.logits)
        # A mean probability never outweighs a vote, not even where it is close to 1: where another
        # class was voted for, this one's probability was at most one half.
        answer = votes + total / votes.sum(-1, keepdims=True)
        return answer, votes.max(-1), (votes, total)

    return Policy(init, step)


def mean_of_experts(classes: int, score: Policy = max_prob) -> Policy:
    """Answers with the log of the mean of the probabilities at the exits so far.

    Kept as a log, so that a confidence close to 1 does not round to it.

    Args:
      classes: C.
      score: the policy that is given the answer for logits.
    """

    def combine(log_p: Array, log_sum: PyTree, e: Any) -> tuple[Array, PyTree]:
        del e
        log_sum = jnp.logaddexp(log_sum, log_p)
        return jax.nn.log_softmax(log_sum), log_sum

    return _ensemble(
        lambda b: jnp.full((b, classes), -jnp.inf, jnp.float32), combine, classes, score
    )


def product_of_experts(classes: int, score: Policy = max_prob) -> Policy:
    """Answers with the sum of the log-probabilities at the exits so far.

    Args:
      classes: C.
      score: the policy that is given the answer for logits.
    """

    def combine(log_p: Array, total: PyTree, e: Any) -> tuple[Array, PyTree]:
        del e
        return total + log_p, total + log_p

    return _ensemble(lambda b: jnp.zeros((b, classes), jnp.float32), combine, classes, score)


def ztw(weights: ArrayLike, biases: ArrayLike, score: Policy = max_prob) -> Policy:
    """Answers with a weighted geometric mean of the exits so far: Zero Time Waste's ensemble.

        log q_e = mean_{j <= e} exp(w_ej) log p_j + b_e, normalised

    Wołczyk et al., NeurIPS 2021, https://arxiv.org/abs/2106.05409. With zeros for both it is the
    plain geometric mean; `fit_ztw` finds better ones.

    Args:
      weights: `[E, E]`, w; what stands above the diagonal is not read.
      biases: `[E, C]`, b.
      score: the policy that is given the answer for logits.

    Raises:
      ValueError: shapes that do not fit; at an exit for which there are no weights.
    """
    w, b = np.asarray(weights, np.float32), np.asarray(biases, np.float32)
    if w.ndim != 2 or b.ndim != 2 or w.shape != (len(b), len(b)):
        raise ValueError(f"weights {w.shape} and biases {b.shape}; give [E, E] and [E, C].")
    exits, classes = b.shape
    coefficients = _coefficients(np.tril(w))

    def combine(log_p: Array, past: PyTree, e: Any) -> tuple[Array, PyTree]:
        if isinstance(e, int) and e >= exits:
            raise ValueError(f"weights for {exits} exits, and exit {e + 1}; give them for each.")
        past = past.at[:, e].set(log_p)
        # Not a matrix product, which on a GPU would round its factors to ten bits.
        terms = jnp.asarray(coefficients)[e][None, :, None] * past
        return jax.nn.log_softmax(terms.sum(1) + jnp.asarray(b)[e][None]), past

    return _ensemble(lambda n: jnp.zeros((n, exits, classes), jnp.float32), combine, classes, score)


def fit_ztw(trace: Trace, steps: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Weights and biases for `ztw` that minimise each exit's negative log-likelihood on `trace`.

    Every exit's part is a problem of its own, convex in `exp(w)` and `b`. It starts at the plain
    geometric mean, takes full-batch steps of Adam, and keeps the best that it comes by, so that no
    exit ends worse than it started. Nothing is random.

    Args:
      trace: N samples of a split that serves no other purpose; E exits.
      steps: of Adam.

    Returns:
      `(weights [E, E], biases [E, C])`, float32.

    Raises:
      ValueError: an empty trace, or logits that are not finite.
    """
    if not len(trace.labels) or not np.isfinite(trace.logits).all():
        raise ValueError("an empty trace, or logits with NaN or infinity; give finite logits.")
    log_p = jax.nn.log_softmax(jnp.asarray(trace.logits, jnp.float32))
    weights, biases = _fit(log_p, jnp.asarray(trace.labels), steps)
    return np.tril(weights), np.asarray(biases)


@functools.partial(jax.jit, static_argnames="steps")
def _fit(log_p: Array, labels: Array, steps: int) -> tuple[Array, Array]:
    exits, classes = log_p.shape[1:]
    optimiser = optax.adam(optax.cosine_decay_schedule(_RATE, max(steps, 1)))

    def nll(parameters: tuple[Array, Array]) -> Array:
        """`[E]`."""
        weights, biases = parameters
        terms = jnp.einsum("ej,njc->nec", _coefficients(weights), log_p, precision="highest")
        log_q = jax.nn.log_softmax(terms + biases[None])
        return -jnp.take_along_axis(log_q, labels[:, None, None], -1)[..., 0].mean(0)

    def step(carry: PyTree, _: None) -> tuple[PyTree, None]:
        parameters, state, best, lowest = carry
        # The exits share no parameter, so the gradient of the sum is each one's own.
        loss, back = jax.vjp(nll, parameters)
        better = (loss < lowest)[:, None]
        best = jax.tree.map(lambda now, old: jnp.where(better, now, old), parameters, best)
        (gradient,) = back(jnp.ones(exits, jnp.float32))
        with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in int32
            updates, state = optimiser.update(gradient, state)
        parameters = optax.apply_updates(parameters, updates)
        return (parameters, state, best, jnp.minimum(loss, lowest)), None

    start = (jnp.zeros((exits, exits), jnp.float32), jnp.zeros((exits, classes), jnp.float32))
    carry = (start, optimiser.init(start), start, jnp.full(exits, jnp.inf, jnp.float32))
    # One step more than asked for, whose update is not read: it judges the last parameters.
    (_, _, best, _), _ = jax.lax.scan(step, carry, length=steps + 1)
    return best


def _coefficients(weights: Any) -> Any:
    """`exp(w_ej) / (e + 1)` for `j <= e`, zero elsewhere; NumPy or JAX, as it comes."""
    xp = np if isinstance(weights, np.ndarray) else jnp
    count = np.arange(1, len(weights) + 1, dtype=np.float32)
    return xp.tril(xp.exp(weights)) / count[:, None]


def _ensemble(
    init: Callable[[int], PyTree],
    combine: Callable[[Array, PyTree, Any], tuple[Array, PyTree]],
    classes: int,
    score: Policy,
) -> Policy:
    """A policy from `combine(log_p, state, e) -> (logits, state)`, scored by another."""

    def step(output: ExitOutput, state: PyTree, e: Any) -> tuple[Array, Array, PyTree]:
        _check_classes(output, classes)
        own, inner = state
        logits, own = combine(jax.nn.log_softmax(output.logits), own, e)
        answer, certainty, inner = score.step(output._replace(logits=logits), inner, e)
        return answer, certainty, (own, inner)

    return Policy(lambda batch_size: (init(batch_size), score.init(batch_size)), step)


def _check_classes(output: ExitOutput, classes: int) -> None:
    if output.logits.shape[-1] != classes:
        found = output.logits.shape[-1]
        raise ValueError(f"a policy for {classes} classes, and logits of {found}; give {found}.")
