"""The cost of each stage and head in multiply-accumulates, as XLA or as papers count them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

from eejax.network import EarlyExitNetwork, PyTree, Variables, kept_groups


class Costs(NamedTuple):
    """Cost of each stage and each head, in one unit.

    Attributes:
      stages: `[E]` float64.
      heads: `[E]` float64.
    """

    stages: np.ndarray
    heads: np.ndarray

    @property
    def cumulative(self) -> np.ndarray:
        """`[E]`: the cost of leaving at each exit, with all heads up to it."""
        return np.cumsum(self.stages + self.heads)

    @property
    def fractions(self) -> np.ndarray:
        """`[E]`: `cumulative` as fractions of the whole network."""
        return self.cumulative / self.cumulative[-1]

    def keeping(self, exits: Sequence[int]) -> Costs:
        """Costs of `network.keeping(exits)`: stages added up, heads of the kept exits only.

        Args:
          exits: 0-based and increasing.

        Raises:
          ValueError: if there is no exit, or they are not increasing, or one does not exist.
        """
        groups = kept_groups(exits, len(self.stages))
        return Costs(
            np.array([self.stages[a:b].sum() for a, b in groups]),
            np.array([self.heads[b - 1] for _, b in groups]),
        )


def xla_macs(network: EarlyExitNetwork, variables: Variables, images: Any) -> Costs:
    """Multiply-accumulates of each stage and each head for one sample, by XLA's analysis.

    XLA counts two operations for a multiply-accumulate and one for an elementwise operation, in the
    program before optimisation; the result is half of the total. Products with the zero padding of
    a convolution do not count. Nothing is compiled or run, so it is the same on every device.

    Args:
      network: E exits.
      variables: as `network.init` gives, or their shapes.
      images: `[B, ...]`, or their shape and dtype; the costs are divided by B.
    """

    def count(function: Callable[..., Any], *args: Any) -> float:
        analysis = jax.jit(function).lower(*args).cost_analysis()
        return float((analysis or {}).get("flops", 0.0)) / 2

    return _costs(network, variables, images, count)


def macs(network: EarlyExitNetwork, variables: Variables, images: Any) -> Costs:
    """Multiply-accumulates of convolutions and matrix products alone, as papers count them.

    Products with the zero padding of a convolution count, elementwise operations do not. It is for
    comparison with published figures; `xla_macs` is closer to a device's work. Of the branches of
    a conditional the most expensive counts; a `while` loop counts once.

    Arguments are those of `xla_macs`.
    """

    def count(function: Callable[..., Any], *args: Any) -> int:
        return _products(jax.make_jaxpr(function)(*args))

    return _costs(network, variables, images, count)


def exit_inputs(network: EarlyExitNetwork, variables: Variables, images: Any):
    """For each exit: its stage and head as functions, and the shapes of what they read."""
    features, memory = images, ()
    for e in range(network.num_exits):

        def stage(variables: Variables, features: PyTree, e: int = e) -> PyTree:
            return network.apply_stage(variables, e, features)[0]

        def head(variables: Variables, features: PyTree, memory: PyTree, e: int = e) -> PyTree:
            return network.apply_head(variables, e, features, memory)[0]

        after = jax.eval_shape(stage, variables, features)
        yield stage, head, features, (after, memory)
        memory = jax.eval_shape(head, variables, after, memory).memory
        features = after


def _costs(
    network: EarlyExitNetwork,
    variables: Variables,
    images: Any,
    count: Callable[..., float],
) -> Costs:
    """`count(function, *args)` of every stage and head, divided by the batch size."""
    stages, heads = [], []
    for stage, head, features, memory in exit_inputs(network, variables, images):
        stages.append(count(stage, variables, features) / images.shape[0])
        heads.append(count(head, variables, *memory) / images.shape[0])
    return Costs(np.array(stages), np.array(heads))


def _products(jaxpr: Any) -> int:
    """Multiply-accumulates of the convolutions and products in a jaxpr, nested ones included."""
    total = 0
    for equation in jaxpr.eqns:
        kind, params = equation.primitive.name, equation.params
        if kind == "conv_general_dilated":
            kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval
            outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += out.size * math.prod(kernel) // outputs
        elif kind == "dot_general":
            (over, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * math.prod(left[i] for i in over)
        else:
            inner = [_products(nested) for nested in jaxprs_in_params(params)]
            times = params["length"] if kind == "scan" else 1
            total += times * (max(inner, default=0) if kind == "cond" else sum(inner))
    return total
