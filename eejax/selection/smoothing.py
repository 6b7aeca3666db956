"""How likely each exit is correct, given the scores: what a search cannot overfit as it does luck.

`correct` is one draw of 0 or 1 for each sample and exit. A search over these draws puts thresholds
where the held-out samples happened to be lucky. The fitted probability of being correct has nearly
the same mean and far less noise: it depends on a few parameters instead of N labels.

With `z_ne` the normal score of `s_ne`, its rank among all scores of all exits put on the scale of
the normal distribution, and features `f_ne` of it,

    P(exit e is correct on sample n) = sigmoid((w + u_e) . f_ne),

a logistic regression whose coefficients `w` are shared by all exits, and whose deviations `u_e`
have a ridge penalty `r |u_e|^2 / 2`. Where scores mean the same at every exit, as calibrated
confidences do, `u` is near 0, and all exits estimate one curve together; so a difference between
exits that is no larger than the noise of its estimate does not decide where samples leave. Where
scores differ in meaning, `u` follows the data. `r` is the one of a few values with the highest
marginal likelihood, in Laplace's approximation (MacKay, *The evidence framework applied to
classification networks*, Neural Computation 1992, https://doi.org/10.1162/neco.1992.4.5.720).

The result is the mean of two such fits. The first knows the exit's own score, `f = (1, z, z^2)`.
The second knows the mean of the earlier and that of the later scores of the sample too: samples
that were unsure at exit 1 are less often correct at exit 3 than others with the same score there.
The first has less noise and the second less bias; in the simulation of
`docs/lab/generalisation.md` their mean is as good as the better of them, or nearly.

Ranks make the fits independent of the scale of the scores, and give equal scores equal ranks, so
that they work for every policy.
"""

from __future__ import annotations

import numpy as np
from scipy import linalg, optimize, special, stats

_RIDGES = (300.0, 30.0, 3.0)
# Of the shared coefficients. It matters only where all samples are correct, or none.
_SHARED_RIDGE = 0.01


def chance(scores: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """The fitted probability of being correct, of each sample at each exit.

    Args:
      scores: `[N, E]`, finite, at least one sample.
      correct: `[N, E]` bool.

    Returns:
      `[N, E]` float64, between 0 and 1.
    """
    z = stats.rankdata(scores).reshape(scores.shape)
    z = special.ndtri((z - 0.5) / z.size)
    own = np.stack([np.ones_like(z), z, np.square(z)], axis=-1)
    before, exits = np.cumsum(z, axis=1) - z, np.arange(z.shape[1])
    after = z.sum(axis=1, keepdims=True) - before - z
    means = before / np.maximum(exits, 1), after / np.maximum(exits[::-1], 1)
    every = np.concatenate([own, np.stack(means, axis=-1)], axis=-1)
    return (_probabilities(own, correct) + _probabilities(every, correct)) / 2


def _probabilities(features: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """`[N, E]`, of the fit with the most likely ridge; features are `[N, E, F]`."""
    weights, fits = np.zeros((features.shape[1] + 1, features.shape[2])), []
    for ridge in _RIDGES:  # each fit begins where the one before has ended
        evidence, weights = _fitted(features, correct.astype(np.float64), ridge, weights)
        fits.append((evidence, weights))
    return special.expit(_logits(features, max(fits, key=lambda fit: fit[0])[1]))


def _fitted(
    features: np.ndarray, correct: np.ndarray, ridge: float, start: np.ndarray
) -> tuple[float, np.ndarray]:
    """The log marginal likelihood, and the weights `[E + 1, F]`: shared ones, and deviations."""
    exits, count = features.shape[1:]
    shape = (exits + 1, count)
    penalty = np.repeat([_SHARED_RIDGE] + [ridge] * exits, count)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        logits = _logits(features, flat.reshape(shape))
        loss = np.logaddexp(0, logits).sum() - (correct * logits).sum()
        each = np.einsum("ne,nef->ef", special.expit(logits) - correct, features)
        gradient = np.concatenate([each.sum(0, keepdims=True), each]).ravel() + penalty * flat
        return loss + (penalty * np.square(flat)).sum() / 2, gradient

    def hessian(flat: np.ndarray) -> np.ndarray:
        p = special.expit(_logits(features, flat.reshape(shape)))
        weighted = features * (p * (1 - p))[..., None]
        each = np.matmul(weighted.transpose(1, 2, 0), features.transpose(1, 0, 2))
        matrix = linalg.block_diag(each.sum(0), *each)
        matrix[:count, count:] = each.swapaxes(0, 1).reshape(count, -1)
        matrix[count:, :count] = matrix[:count, count:].T
        return matrix + np.diag(penalty)

    result = optimize.minimize(
        objective,
        start.ravel(),
        jac=True,
        hess=hessian,
        method="trust-ncg",
        options={"gtol": 1e-3},
    )
    size = np.linalg.slogdet(hessian(result.x))[1]
    return np.log(penalty).sum() / 2 - size / 2 - result.fun, result.x.reshape(shape)


def _logits(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`[N, E]`."""
    return np.einsum("nef,ef->ne", features, weights[:1] + weights[1:])
