"""Is a mean below a limit? p-values, intervals and selections that hold at every sample size.

The losses are independent draws from one distribution on [0, 1]; nothing else is assumed. A p-value
here tests the hypothesis that the mean is *above* a limit. If it is at most delta, the mean is
called below the limit, which is wrong in at most a fraction delta of all draws.

`fixed_sequence` and `conformal` test a path of candidates, the safest first, and count how many
pass before the first one that does not.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

_HALVINGS = 40


def hoeffding_bentkus(mean: ArrayLike, n: int, risk: float) -> np.ndarray:
    """The Hoeffding-Bentkus p-value of "the mean loss is above `risk`", from the empirical mean.

    The smaller of two bounds on the chance of a mean this small were the true one `risk`:
    Hoeffding's `exp(-n KL(mean, risk))` and Bentkus's `e P(Binomial(n, risk) <= ceil(n mean))`.
    It needs the mean alone, and so cannot make use of a small variance. Bates, Angelopoulos, Lei,
    Malik, Jordan, *Distribution-free, risk-controlling prediction sets*, Journal of the ACM 2021,
    https://arxiv.org/abs/2101.02703; as p-values in Angelopoulos, Bates, Candès, Jordan, Lei,
    *Learn then test*, https://arxiv.org/abs/2110.01052.

    Args:
      mean: `[...]`, of n losses in [0, 1].
      n: samples.
      risk: the limit, in (0, 1).

    Returns:
      `[...]` float64.

    Raises:
      ValueError: if a mean or the risk is out of range, or there are no samples.
    """
    m = np.asarray(mean, np.float64)
    check_unit("mean losses", m)
    _check_open("risk", risk)
    if n < 1:
        raise ValueError(f"{n} samples; give at least one.")
    below = np.minimum(m, risk)
    divergence = special.rel_entr(below, risk) + special.rel_entr(1 - below, 1 - risk)
    # A sum of whole numbers divided by n and multiplied by it may end up a bit above itself.
    bentkus = math.e * special.bdtr(np.ceil(n * m - 1e-9), n, risk)
    return np.minimum(np.minimum(np.exp(-n * divergence), bentkus), 1.0)


def binomial(losses: ArrayLike, risk: float) -> np.ndarray:
    """The exact p-value of "the mean loss is above `risk`" for losses that are 0 or 1.

    `P(Binomial(n, risk) <= sum of losses)`, the chance of so few losses were the mean `risk`. No
    test by the number of losses has a smaller valid p-value; Bentkus's bound in
    `hoeffding_bentkus` is e times as large.

    Args:
      losses: `[..., N]`, each 0 or 1.
      risk: the limit, in (0, 1).

    Returns:
      `[...]` float64.

    Raises:
      ValueError: if a loss is neither 0 nor 1, risk is out of range, or there are no samples.
    """
    x = _checked(losses)
    _check_open("risk", risk)
    if not binary(x):
        raise ValueError(
            "losses that are neither 0 nor 1; the binomial p-value does not hold for them: use "
            '"betting".'
        )
    return special.bdtr(x.sum(-1), x.shape[-1], risk)


def binary(losses: ArrayLike) -> bool:
    """Whether every loss is 0 or 1."""
    x = np.asarray(losses)
    return bool(((x == 0) | (x == 1)).all())


def betting(losses: ArrayLike, risk: float, delta: float = 0.1) -> np.ndarray:
    """The p-value of "the mean loss is above `risk`" from a game that is fair only if it is.

    A capital of 1 is staked on small losses, sample after sample: it is multiplied by
    `1 + b_i (risk - loss_i)`. If the mean is `risk` or more it does not grow on average, whatever
    the bets, so that it ever reaches 1/p has a probability of at most p. The bets are the
    predictable plug-in ones, `b_i = min(1, sqrt(2 log(1/delta) / (n variance_{i-1})))` with the
    variance of the losses before; where that is small this is far sharper than
    `hoeffding_bentkus`. Waudby-Smith, Ramdas, *Estimating means of bounded random variables by
    betting*, JRSS B 2024, https://arxiv.org/abs/2010.09686.

    Args:
      losses: `[..., N]` in [0, 1], in an order that is independent of the losses: shuffle a split
        that is sorted by class.
      risk: the limit, in (0, 1).
      delta: the level for which the bets are sized. The p-value holds whatever it is.

    Returns:
      `[...]` float64, one over the largest capital on the way.

    Raises:
      ValueError: if losses, risk or delta are out of range, or there are no samples.
    """
    x = _checked(losses)
    _check_open("risk", risk)
    _check_open("delta", delta)
    return np.exp(-_log_capital(x, _bets(x, delta), np.asarray(risk)))


def interval(losses: ArrayLike, confidence: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """A confidence interval of the mean loss, by inverting `betting`.

    The upper bound is the smallest mean that `betting` rejects in favour of a smaller one, the
    lower bound the same for one minus the losses, each at half of the error (Waudby-Smith, Ramdas,
    https://arxiv.org/abs/2010.09686). Both are moved out to the empirical mean where the
    first part of the losses would exclude it.

    Args:
      losses: `[..., N]` in [0, 1], in an order that is independent of the losses.
      confidence: in (0, 1), of both bounds together.

    Returns:
      `(low, high)`, `[...]` float64 each, within [0, 1].

    Raises:
      ValueError: if losses or confidence are out of range, or there are no samples.
    """
    x = _checked(losses)
    _check_open("confidence", confidence)
    delta, mean = (1 - confidence) / 2, x.mean(-1)
    return np.minimum(1 - _upper(1 - x, delta), mean), np.maximum(_upper(x, delta), mean)


def fixed_sequence(p_values: np.ndarray, delta: float) -> np.ndarray:
    """How many hypotheses, counted from the first, are rejected before the first that is not.

    Each is tested at the full level delta, and still the chance of a single false rejection is at
    most delta, because the order was fixed beforehand: there is none unless the first true
    hypothesis is rejected (Angelopoulos, Bates, Candès, Jordan, Lei, *Learn then test*,
    https://arxiv.org/abs/2110.01052). The last one certified is thus number `count - 1`; taking
    number `count`, the first that was not rejected, is an easy mistake.

    Args:
      p_values: `[..., K]`.
      delta: in (0, 1).

    Returns:
      `[...]` int, from 0 to K.

    Raises:
      ValueError: if delta is out of range.
    """
    _check_open("delta", delta)
    return np.logical_and.accumulate(p_values <= delta, axis=-1).sum(-1)


def conformal(losses: ArrayLike, risk: float) -> np.ndarray:
    """How many candidates conformal risk control lets pass.

    The expected loss of a new sample under the last of them, over the draw of all samples, is at
    most `risk`, where no candidate at all counts as no loss. The method asks for losses that only
    grow along the path, so each sample is charged the most that it has lost so far; a candidate
    passes while `(sum + 1) / (N + 1) <= risk`, where the 1 is the most that the new sample can
    lose. Angelopoulos, Bates, Fisch, Lei, Schuster, ICLR 2024, https://arxiv.org/abs/2208.02814.

    Args:
      losses: `[..., K, N]` in [0, 1], of N exchangeable samples under K candidates.
      risk: in (0, 1).

    Returns:
      `[...]` int, from 0 to K.

    Raises:
      ValueError: if losses or risk are out of range, or there are no samples.
    """
    x = _checked(losses)
    _check_open("risk", risk)
    total = np.maximum.accumulate(x, axis=-2).sum(-1)
    return ((total + 1) / (x.shape[-1] + 1) <= risk).sum(-1)


def _upper(x: np.ndarray, delta: float) -> np.ndarray:
    """The smallest mean that the game rejects, or 1."""
    bets = _bets(x, delta)
    # The bets do not depend on the mean in question, so that the capital grows with it and there is
    # one place where it passes 1/delta.
    low, high = np.zeros(x.shape[:-1]), np.ones(x.shape[:-1])
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        rejected = _log_capital(x, bets, middle) >= -math.log(delta)
        low, high = np.where(rejected, low, middle), np.where(rejected, middle, high)
    return high


def _bets(x: np.ndarray, delta: float) -> np.ndarray:
    """`[..., N]`: bet i, in (0, 1], from the losses before i."""
    n = x.shape[-1]
    seen = np.arange(2, n + 2)
    mean = (0.5 + x.cumsum(-1)) / seen
    variance = (0.25 + np.square(x - mean).cumsum(-1)) / seen
    start = np.full((*x.shape[:-1], 1), 0.25)
    before = np.concatenate([start, variance[..., :-1]], axis=-1)
    return np.minimum(np.sqrt(-2 * math.log(delta) / n / before), 1.0)


def _log_capital(x: np.ndarray, bets: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """`[...]`: log of the largest capital on the way, at least that of the start, 0."""
    growth = np.log1p(bets * (np.expand_dims(mean, -1) - x))
    return np.maximum(growth.cumsum(-1).max(-1), 0.0)


def _checked(losses: ArrayLike) -> np.ndarray:
    x = np.asarray(losses, np.float64)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"losses of shape {x.shape}; give [..., samples], at least one sample.")
    check_unit("losses", x)
    return x


def check_unit(what: str, values: np.ndarray) -> None:
    # Written so that a NaN fails.
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            f"{what} from {values.min():.4g} to {values.max():.4g}; give numbers in [0, 1], scaled "
            "by their largest possible value."
        )


def _check_open(what: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"a {what} of {value}; give a number between 0 and 1, both excluded.")
