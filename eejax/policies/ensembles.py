"""Policies that answer with all exits so far instead of the present one alone.

All but `vote` pass their answer to another policy, `score`, for the confidence: by default the
largest probability of the ensemble.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from numpy.typing import ArrayLike

from eejax.network import ExitOutput, PyTree
from eejax.policies.base import Policy, Rule, make
from eejax.policies.confidence import max_prob
from eejax.trace import Trace

_RATE = 0.1  # of Adam, falling to zero along a cosine


class VoteParams(NamedTuple):
    """The votes before the first exit: zeros, float32 `[C]`."""

    start: ArrayLike


class ExpertsParams(NamedTuple):
    """The parameters of `mean_of_experts` and `product_of_experts`.

    Attributes:
      start: float32 `[C]`, the state before the first exit: -inf for the mean, zeros for the
        product.
      score: the policy that scores the answer.
    """

    start: ArrayLike
    score: Policy


class ZtwParams(NamedTuple):
    """The parameters of `ztw`.

    Attributes:
      coefficients: float32 `[E, E]`, `exp(w_ej) / (e + 1)` for `j <= e`, zero elsewhere.
      biases: float32 `[E, C]`.
      score: the policy that scores the answer.
    """

    coefficients: ArrayLike
    biases: ArrayLike
    score: Policy


def vote(classes: int) -> Policy:
    """Every exit has a vote; the score is the number of votes for the class that has the most.

    Ties are broken by the mean probability. Sun et al., *Early exiting with ensemble internal
    classifiers*, 2021, https://arxiv.org/abs/2105.13792, divide the votes at exit e by a power of
    e. With a threshold for each exit that is a constant which the threshold absorbs, so the score
    here is the plain count. The answer is the votes plus the mean probability; only its order has a
    meaning, and its softmax is not a probability.

    Args:
      classes: C.
    """
    return make(VOTE, np.zeros(classes))


def mean_of_experts(classes: int, score: Policy = max_prob) -> Policy:
    """Answers with the log of the mean of the probabilities at the exits so far.

    The state is the log of their sum, so that a confidence close to 1 does not round to it.

    Args:
      classes: C.
      score: the policy that scores the answer.
    """
    return make(MEAN_OF_EXPERTS, np.full(classes, -np.inf), score)


def product_of_experts(classes: int, score: Policy = max_prob) -> Policy:
    """Answers with the sum of the log-probabilities at the exits so far.

    Args:
      classes: C.
      score: the policy that scores the answer.
    """
    return make(PRODUCT_OF_EXPERTS, np.zeros(classes), score)


def ztw(weights: ArrayLike, biases: ArrayLike, score: Policy = max_prob) -> Policy:
    """Answers with a weighted geometric mean of the exits so far: the ensemble of Zero Time Waste.

        log q_e = mean_{j <= e} exp(w_ej) log p_j + b_e, normalised

    Wołczyk et al., NeurIPS 2021, https://arxiv.org/abs/2106.05409. With w = 0 and b = 0 it is the
    plain geometric mean; `fit_ztw` fits both.

    Args:
      weights: `[E, E]`, w; entries above the diagonal are ignored.
      biases: `[E, C]`, b.
      score: the policy that scores the answer.

    Raises:
      ValueError: if the shapes do not fit, or `step` reaches an exit that has no weights.
    """
    w, b = np.asarray(weights, np.float32), np.asarray(biases, np.float32)
    if w.ndim != 2 or b.ndim != 2 or w.shape != (len(b), len(b)):
        raise ValueError(f"weights {w.shape} and biases {b.shape}; give [E, E] and [E, C].")
    return make(ZTW, _coefficients(np.tril(w)), b, score)


def fit_ztw(trace: Trace, steps: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Weights and biases for `ztw` that minimise each exit's negative log-likelihood on `trace`.

    The exits are independent problems, convex in `exp(w)` and `b`. Full-batch Adam starts at the
    plain geometric mean, and the best parameters on the way are kept, so that no exit ends worse
    than it started. Nothing is random.

    Args:
      trace: N samples of a split that serves no other purpose; E exits.
      steps: of Adam.

    Returns:
      `(weights [E, E], biases [E, C])`, float32.

    Raises:
      ValueError: if the trace is empty, or logits are not finite.
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
        # The exits share no parameter, so the gradient of the sum holds that of each loss.
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
    # One more step, whose update is ignored, evaluates the last parameters.
    (_, _, best, _), _ = jax.lax.scan(step, carry, length=steps + 1)
    return best


def _coefficients(weights: Any) -> Any:
    """`exp(w_ej) / (e + 1)` for `j <= e`, zero elsewhere, in NumPy or JAX as `weights` are."""
    xp = np if isinstance(weights, np.ndarray) else jnp
    count = np.arange(1, len(weights) + 1, dtype=np.float32)
    return xp.tril(xp.exp(weights)) / count[:, None]


def _start(params: Any, batch_size: int) -> Array:
    """`[B, C]`: the state before the first exit."""
    start = jnp.asarray(params.start)
    return jnp.broadcast_to(start[None], (batch_size, *start.shape))


def _check_classes(output: ExitOutput, classes: int) -> None:
    if output.logits.shape[-1] != classes:
        given = output.logits.shape[-1]
        raise ValueError(f"a policy for {classes} classes, and logits of {given}; give {given}.")


def _vote(
    params: VoteParams, output: ExitOutput, state: PyTree, e: Any
) -> tuple[Array, Array, PyTree]:
    del params, e
    votes, total = state
    classes = votes.shape[-1]
    _check_classes(output, classes)
    votes = votes + jax.nn.one_hot(output.logits.argmax(-1), classes, dtype=jnp.float32)
    total = total + jax.nn.softmax(output.logits)
    # A mean probability never outweighs a vote, not even if it is close to 1: at an exit that voted
    # for another class, the probability of this one was at most one half.
    answer = votes + total / votes.sum(-1, keepdims=True)
    return answer, votes.max(-1), (votes, total)


def _mean(params: ExpertsParams, log_p: Array, log_sum: Array, e: Any) -> tuple[Array, Array]:
    del params, e
    log_sum = jnp.logaddexp(log_sum, log_p)
    return jax.nn.log_softmax(log_sum), log_sum


def _product(params: ExpertsParams, log_p: Array, total: Array, e: Any) -> tuple[Array, Array]:
    del params, e
    return total + log_p, total + log_p


def _weighted(params: ZtwParams, log_p: Array, past: Array, e: Any) -> tuple[Array, Array]:
    coefficients, biases = jnp.asarray(params.coefficients), jnp.asarray(params.biases)
    if isinstance(e, int) and e >= len(biases):
        raise ValueError(f"weights for {len(biases)} exits, and exit {e + 1}; give them for each.")
    past = past.at[:, e].set(log_p)
    # A matrix product would round its factors to ten bits on a GPU.
    terms = coefficients[e][None, :, None] * past
    return jax.nn.log_softmax(terms.sum(1) + biases[e][None]), past


def _check_ztw(params: ZtwParams) -> ZtwParams:
    c, b = np.shape(params.coefficients), np.shape(params.biases)
    if len(b) != 2 or c != (b[0], b[0]):
        raise ValueError(f"coefficients {c} and biases {b}; give [E, E] and [E, C].")
    return params


def _ensemble(
    init: Callable[[Any, int], Array],
    combine: Callable[[Any, Array, Array, Any], tuple[Array, Array]],
) -> tuple[Callable[..., PyTree], Callable[..., tuple[Array, Array, PyTree]]]:
    """A rule's `init` and `step`, from `combine(params, log_p, past, e) -> (logits, past)`; the
    answer is scored by `params.score`."""

    def start(params: Any, batch_size: int) -> PyTree:
        return init(params, batch_size), params.score.init(batch_size)

    def step(params: Any, output: ExitOutput, state: PyTree, e: Any) -> tuple[Array, Array, PyTree]:
        past, inner = state
        _check_classes(output, past.shape[-1])
        logits, past = combine(params, jax.nn.log_softmax(output.logits), past, e)
        logits, score, inner = params.score.step(output._replace(logits=logits), inner, e)
        return logits, score, (past, inner)

    return start, step


VOTE = Rule(
    "vote",
    lambda params, batch_size: (_start(params, batch_size),) * 2,
    _vote,
    VoteParams,
    fit=lambda trace, cost: vote(trace.logits.shape[-1]).params,
    probabilities=False,
)
MEAN_OF_EXPERTS = Rule(
    "mean_of_experts",
    *_ensemble(_start, _mean),
    ExpertsParams,
    fit=lambda trace, cost: mean_of_experts(trace.logits.shape[-1]).params,
)
PRODUCT_OF_EXPERTS = Rule(
    "product_of_experts",
    *_ensemble(_start, _product),
    ExpertsParams,
    fit=lambda trace, cost: product_of_experts(trace.logits.shape[-1]).params,
)
ZTW = Rule(
    "ztw",
    *_ensemble(
        lambda params, batch_size: jnp.zeros((batch_size, *np.shape(params.biases)), jnp.float32),
        _weighted,
    ),
    ZtwParams,
    _check_ztw,
    lambda trace, cost: ztw(*fit_ztw(trace)).params,
)
