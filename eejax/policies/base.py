"""What a policy is, and the checks of thresholds and costs that everything around it shares.

A sample leaves at exit e if `score_e >= threshold_e`, and at the last exit if it left at none
before. So one search for thresholds, one router and one set of executors serve every policy. A
threshold of +inf switches an exit off, -inf makes it always fire. Scores are finite; a score of NaN
never fires.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from eejax.network import ExitOutput, PyTree
from eejax.trace import Trace


class NoParams(NamedTuple):
    """The parameters of a rule that has none."""


class Rule(NamedTuple):
    """The code of a policy: pure functions of its parameters.

    Attributes:
      name: of the rule, unique among all rules.
      init: `init(params, batch_size) -> state`, a pytree whose leaves have a leading batch axis;
        `()` for a rule that looks at one exit at a time.
      step: `step(params, output, state, e) -> (logits, score, state)`: the policy's answer at exit
        e, `[B, C]`, and its score, `[B]`. `e` is a Python integer, or in `loop`, which runs all
        depths in one program, an int32 scalar.
      params: the NamedTuple that holds the parameters; its fields are arrays or policies.
      check: `check(params) -> params`; raises ValueError if shapes or values do not fit.
      fit: `fit(trace, cost) -> params`, from held-out samples and the cost `[E]` of each exit.
      needs_gate: whether the scores have a meaning only if training has trained the gate.
      baseline: whether the scores ignore the sample, so that other policies are compared with it.
      probabilities: whether the softmax of its answers is a probability, which can be calibrated.
    """

    name: str
    init: Callable[[Any, int], PyTree]
    step: Callable[[Any, ExitOutput, PyTree, Any], tuple[Array, Array, PyTree]]
    params: type = NoParams
    check: Callable[[Any], Any] = lambda params: params
    fit: Callable[[Trace, np.ndarray], Any] = lambda trace, cost: NoParams()
    needs_gate: bool = False
    baseline: bool = False
    probabilities: bool = True


# Compared by identity: arrays have no truth value, and a function compiled for a policy is meant
# for that one.
@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Policy:
    """A rule with its parameters: data, and so a pytree, which may be an argument of `jax.jit`.

    Attributes:
      rule: static.
      params: arrays and policies, as `rule.params` names them.
    """

    rule: Rule = field(metadata={"static": True})
    params: Any = field(default_factory=NoParams)

    @property
    def name(self) -> str:
        return self.rule.name

    def init(self, batch_size: int) -> PyTree:
        """The state before the first exit: a pytree whose leaves have a leading batch axis."""
        return self.rule.init(self.params, batch_size)

    def step(self, output: ExitOutput, state: PyTree, e: Any) -> tuple[Array, Array, PyTree]:
        """`(logits [B, C], score [B], state)` at exit e, as `Rule.step` describes."""
        return self.rule.step(self.params, output, state, e)


def make(rule: Rule, *params: Any) -> Policy:
    """The policy of a rule with these parameters, in the order of the fields of `rule.params`.

    Arrays become NumPy arrays, those of floating point float32.

    Raises:
      ValueError: if the parameters do not fit the rule.
    """
    arrays = [p if isinstance(p, Policy) else _narrow(np.asarray(p)) for p in params]
    return Policy(rule, rule.check(rule.params(*arrays)))


def _narrow(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def stateless(name: str, score: Callable[[ExitOutput], Array], **fields: Any) -> Policy:
    """The policy without state or parameters that answers with the logits of the head.

    Args:
      name: of the rule.
      score: of an exit's output, `[B]`.
      fields: of the rule, such as `needs_gate=True`.
    """

    def step(params: Any, output: ExitOutput, state: PyTree, e: Any) -> tuple[Array, Array, PyTree]:
        del params, e
        return output.logits, score(output), state

    return Policy(Rule(name, lambda params, batch_size: (), step, **fields))


def check_costs(cost: ArrayLike, exits: int) -> np.ndarray:
    """Cumulative costs as float64 `[E]`.

    Raises:
      ValueError: if there is not one for each exit, or they are not positive and increasing.
    """
    c = np.asarray(cost, np.float64)
    if c.shape != (exits,) or not (np.diff(c) >= 0).all() or not (c > 0).all():
        raise ValueError(
            f"costs {c.tolist()} for {exits} exits; give {exits} cumulative costs, positive and "
            "increasing."
        )
    return c


def check_thresholds(thresholds: Iterable[float], exits: int) -> np.ndarray:
    """Thresholds as float32 `[E - 1]`.

    Raises:
      ValueError: if there is not one for each exit but the last, or one is NaN.
    """
    # `list` of an array on a device would fetch its numbers one by one.
    is_array = isinstance(thresholds, np.ndarray | jax.Array)
    values = np.asarray(thresholds if is_array else list(thresholds), np.float32)
    if values.shape != (exits - 1,):
        given = f"{len(values)} thresholds" if values.ndim == 1 else f"thresholds {values.shape}"
        raise ValueError(
            f"{given} for {exits} exits; give {exits - 1}, one for each exit but the last."
        )
    if np.isnan(values).any():
        raise ValueError(f"thresholds {values.tolist()} hold a NaN; give numbers, inf is one.")
    return values
