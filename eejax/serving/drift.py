"""Whether the data are still those that thresholds were chosen on: drift, noticed while serving.

A certificate bounds the risk for data like the held-out data, and says nothing once they change.
`Drift` watches two things for ever. The share of samples that goes on past each exit needs no
labels. The mean loss needs a label, or the answer of the last exit, for some of the samples. If
nothing changes, the probability that `Drift` ever raises an alarm is at most delta, however often
it is looked at. The same idea, with confidence sequences for a loss: Podkopaev, Ramdas, *Tracking
the risk of a deployed model and detecting harmful distribution shifts*, ICLR 2022,
https://arxiv.org/abs/2110.06177.
"""

from __future__ import annotations

import collections
import math

import numpy as np
from numpy.typing import ArrayLike

# Fractions of the capital that are staked.
STAKES = tuple(2.0**-i for i in range(1, 8))
# How many numbers the words of an alarm are about, at most.
RECENT = 512
# The weights of the starting times up to this one are about equal; later they fall as
# 1 / (t log(t)^2), so the delay of an alarm grows with the logarithm of the time of the change.
FLAT = 32


class EProcess:
    """Evidence that the mean of a stream of numbers in [0, 1] has left an interval.

    A stake f against "the mean is at most h" multiplies a capital by `1 + f (x - h) / h` at each
    number x. Under the hypothesis the capital does not grow on average, whatever the numbers
    before (Waudby-Smith, Ramdas, *Estimating means of bounded random variables by betting*, JRSS B
    2024, https://arxiv.org/abs/2010.09686). Several stakes on both ends of the interval share the
    capital. All starting times share it too: the weight w_t, with a sum of 1 over all t, joins
    before number t. The sum over the starting times is one recursion,

        capital_t = (capital_{t-1} + w_t) (1 + f (x_t - h) / h).

    With w_t = 1 it is the Shiryaev-Roberts e-detector, which bounds the mean time between false
    alarms (Shin, Ramdas, Rinaldo, *E-detectors*, https://arxiv.org/abs/2203.03532). With a sum of 1
    the evidence, capital and what has not joined yet, is a nonnegative supermartingale that starts
    at 1. By Ville's inequality the probability that it ever reaches 1/delta is at most delta
    (Howard, Ramdas, McAuliffe, Sekhon, *Time-uniform, nonparametric, nonasymptotic confidence
    sequences*, Annals of Statistics 2021, https://arxiv.org/abs/1810.08240).

    Attributes:
      evidence: against the hypothesis, after the numbers so far.
      recent: the last numbers.
    """

    def __init__(self, low: float, high: float) -> None:
        """Without numbers.

        Args:
          low: the mean is at least that; 0 for any.
          high: the mean is at most that; 1 for any.
        """
        up = [(f / high, high) for f in STAKES if high < 1]
        down = [(-f / (1 - low), low) for f in STAKES if low > 0]
        bets, bounds = np.array(up + down).reshape(-1, 2).T
        self.evidence = 1.0
        self.recent: collections.deque[float] = collections.deque(maxlen=RECENT)
        # The factor of a number x is `at_zero + bets * x`.
        self._bets, self._at_zero = bets, 1 - bets * bounds
        self._capital = np.zeros(len(bets))
        self._count, self._waiting = 0, 1.0

    def note(self, x: float) -> None:
        """Takes in a number in [0, 1]."""
        self._count += 1
        self.recent.append(x)
        # Weights are differences of these, so their sum is 1.
        waiting = math.log2(FLAT) / math.log2(FLAT + self._count)
        self._capital += (self._waiting - waiting) / max(len(self._bets), 1)
        self._capital *= self._at_zero + self._bets * x
        self._waiting = waiting
        self.evidence = waiting + float(self._capital.sum())

    def changed(self) -> tuple[int, float]:
        """How many of the last numbers are the strongest evidence, and their mean."""
        x = np.array(self.recent)[::-1]
        best = self._capital.argmax()
        length = int(np.log(self._at_zero[best] + self._bets[best] * x).cumsum().argmax()) + 1
        return length, float(x[:length].mean())


class Drift:
    """Watches the share of samples that goes on past each exit, and the mean loss.

    Each of the E - 1 shares, and the loss, gets an equal part of delta. Held-out samples give a
    share up to a confidence interval (`clopper_pearson`), which takes half of the part. The other
    half is for the test that the share stays within the interval (`EProcess`). The bound of the
    loss is taken as it is.

    Held-out and new samples must be independent draws of one distribution, until it changes. For
    the loss it is enough that the expected loss of each sample, given those before, is at most
    `risk`. The choice of the samples that are noted may depend on time, load and what was noted
    before, but not on the samples.

    Attributes:
      alarm: None, or what was expected and what was seen; an alarm stays, and nothing is noted
        after it.
    """

    def __init__(
        self,
        reached: ArrayLike,
        goes_on: ArrayLike,
        *,
        risk: float | None = None,
        delta: float = 0.01,
    ) -> None:
        """Without samples.

        Args:
          reached: `[E - 1]`, how many held-out samples reached each exit but the last.
          goes_on: `[E - 1]`, how many of them went on, by the thresholds that are served.
          risk: the bound of the mean loss, in (0, 1), such as that of a certificate; None if no
            losses will be noted.
          delta: the probability of a false alarm, ever, in (0, 1).

        Raises:
          ValueError: if the counts do not fit, risk or delta is out of range, or there is nothing
            to watch.
        """
        n, k = np.asarray(reached), np.asarray(goes_on)
        whole = all((a == np.floor(a)).all() and np.isfinite(a).all() for a in (n, k))
        if n.ndim != 1 or n.shape != k.shape or not whole or not ((k >= 0) & (k <= n)).all():
            raise ValueError(
                f"{k.tolist()} samples of {n.tolist()} went on; give a count for each exit but the "
                "last, of at most those that reached it."
            )
        if risk is not None and not 0 < risk < 1:
            raise ValueError(f"a risk of {risk}; give a number between 0 and 1, both excluded.")
        if not 0 < delta < 1:
            raise ValueError(f"a delta of {delta}; give a number between 0 and 1, both excluded.")
        if not len(n) and risk is None:
            raise ValueError("no exit and no risk; give at least one of them to watch.")
        part = delta / (len(n) + (risk is not None))
        self.alarm: str | None = None
        self._exits: list[tuple[EProcess, str]] = []
        counts = zip(k.astype(int).tolist(), n.astype(int).tolist(), strict=True)
        for e, (count, of) in enumerate(counts):
            low, high = clopper_pearson(count, of, part / 2)
            expected = (
                f"exit {e + 1}: {100 * low:.1f} to {100 * high:.1f} % of the samples should go on "
                f"({count:,} of {of:,} held-out samples did)"
            )
            self._exits.append((EProcess(low, high), expected))
        self._loss = None
        if risk is not None:
            self._loss = EProcess(0.0, risk), f"the mean loss should be at most {risk:.4g}"
        self._exit_limit, self._loss_limit = 2 / part, 1 / part

    def note(self, exit: int, goes_on: bool) -> None:
        """Takes in whether a sample went on past an exit that it had reached.

        Args:
          exit: 0-based, not the last.
          goes_on: by the thresholds of the held-out counts, as all its decisions before.

        Raises:
          ValueError: if there is no such exit, or nothing is decided there.
        """
        if not 0 <= exit < len(self._exits):
            raise ValueError(
                f"exit {exit}; decisions are made at {len(self._exits)} exits, counted from 0."
            )
        if self.alarm is None:
            process, expected = self._exits[exit]
            process.note(1.0 if goes_on else 0.0)
            if process.evidence >= self._exit_limit:
                length, mean = process.changed()
                self.alarm = f"{expected}; of the last {length:,}, {100 * mean:.1f} % did."

    def note_loss(self, loss: float) -> None:
        """Takes in the loss of a sample that was chosen without regard to the sample.

        Args:
          loss: in [0, 1], of the kind that `risk` bounds, such as 1 for a wrong answer.

        Raises:
          ValueError: if it is out of range, or there is no bound.
        """
        if self._loss is None:
            raise ValueError("a loss, and no bound for it; give the risk when making the monitor.")
        # Written so that a NaN fails.
        if not 0 <= loss <= 1:
            raise ValueError(f"a loss of {loss}; give a number in [0, 1].")
        if self.alarm is None:
            process, expected = self._loss
            process.note(float(loss))
            if process.evidence >= self._loss_limit:
                length, mean = process.changed()
                self.alarm = f"{expected}; the mean of the last {length:,} is {mean:.4g}."


def clopper_pearson(count: int, of: int, alpha: float) -> tuple[float, float]:
    """The exact confidence interval of a rate, from how many of so many samples.

    At each end, so many samples or more (or fewer) have the probability alpha / 2. Clopper,
    Pearson, *The use of confidence or fiducial limits illustrated in the case of the binomial*,
    Biometrika 1934.

    Args:
      count: samples, 0 to `of`.
      of: samples.
      alpha: the probability that the interval fails, in (0, 1).
    """
    return 1 - _upper(of - count, of, alpha / 2), _upper(count, of, alpha / 2)


def _upper(count: int, of: int, alpha: float) -> float:
    """The rate under which `count` samples or fewer have the probability alpha."""
    if count == of:
        return 1.0
    log_factorial = np.concatenate([[0.0], np.log(np.arange(1, of + 1)).cumsum()])
    i = np.arange(count + 1)
    log_ways = log_factorial[of] - log_factorial[i] - log_factorial[of - i]
    low, high = count / of, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        log_tail = log_ways + i * math.log(middle) + (of - i) * math.log1p(-middle)
        low, high = (middle, high) if np.exp(log_tail).sum() > alpha else (low, middle)
    return high
