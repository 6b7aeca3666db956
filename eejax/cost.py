"""What each stage and head costs: multiply-accumulates by XLA's analysis, and measured time."""

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
        """`[E]`: the cost of leaving at each exit, every head on the way counted."""
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
          ValueError: none, one that does not exist, or not in order.
        """
        groups = kept_groups(exits, len(self.stages))
        return Costs(
            np.array([self.stages[a:b].sum() for a, b in groups]),
            np.array([self.heads[b - 1] for _, b in groups]),
        )


def xla_macs(network: EarlyExitNetwork, variables: Variables, images: Any) -> Costs:
    """Multiply-accumulates of each stage and each head for one sample.

    XLA's analysis of the program before optimisation counts two operations for a
    multiply-accumulate and one for every elementwise one; half of the total is what is returned.
    Products with a convolution's zero padding are not counted. Nothing is compiled or run, so that
    the answer is the same on every device.

    Args:
      network: E exits.
      variables: as `network.init` gives, or their shapes.
      images: `[B, ...]`, or their shape and dtype; B divides out.
    """
    batch = images.shape[0]
    stages, heads = [], []
    for stage, head, features, memory in exit_inputs(network, variables, images):
        stages.append(_operations(stage, variables, features) / 2 / batch)
        heads.append(_operations(head, variables, *memory) / 2 / batch)
    return Costs(np.array(stages), np.array(heads))


def macs(network: EarlyExitNetwork, variables: Variables, images: Any) -> Costs:
    """Multiply-accumulates of convolutions and matrix products alone, as papers count them.

    Products with a convolution's zero padding count, what is elementwise does not. For standing
    beside published figures; `xla_macs` is nearer to what a device does. Where a program has
    branches, the dearest counts; a `while` loop counts once.

    Args:
      network: E exits.
      variables: as `network.init` gives, or their shapes.
      images: `[B, ...]`, or their shape and dtype; B divides out.
    """
    batch = images.shape[0]
    stages, heads = [], []
    for stage, head, features, memory in exit_inputs(network, variables, images):
        stages.append(_products(jax.make_jaxpr(stage)(variables, features)) / batch)
        heads.append(_products(jax.make_jaxpr(head)(variables, *memory)) / batch)
    return Costs(np.array(stages), np.array(heads))


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


def _operations(function: Callable[..., Any], *args: Any) -> float:
    analysis = jax.jit(function).lower(*args).cost_analysis()
    return float((analysis or {}).get("flops", 0.0))


def _products(jaxpr: Any) -> int:
    """Multiply-accumulates of the convolutions and products in a jaxpr and in those inside it."""
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
            inner = [_products(each) for each in jaxprs_in_params(params)]
            times = params["length"] if kind == "scan" else 1
            total += times * (max(inner, default=0) if kind == "cond" else sum(inner))
    return total
