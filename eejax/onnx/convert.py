"""From a traced function to an ONNX graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal

from eejax.onnx.graph import Graph, Value, constant, result
from eejax.onnx.rules import ELEMENTWISE, RULES


def convert(graph: Graph, closed: Any, inputs: Sequence[Value]) -> list[Value]:
    """Writes the equations of a jaxpr.

    What depends on no input is computed here, by JAX. Where a program is chosen by platform, the
    one for platforms that are not named is written: the others are detours around one compiler.

    Args:
      graph: gets the nodes.
      closed: a closed jaxpr; the batch may have a symbolic size.
      inputs: its arguments.

    Raises:
      NotImplementedError: if a primitive has no rule, or its rule does not cover its use.
    """
    consts = [constant(c) for c in closed.consts]
    return _written(graph, closed.jaxpr, consts, inputs)


def _written(
    graph: Graph, jaxpr: Any, consts: Sequence[Value], inputs: Sequence[Value]
) -> list[Value]:
    values: dict[Any, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Value:
        return constant(atom.val) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        given = [read(atom) for atom in equation.invars]
        made = _equation(graph, equation, given)
        values.update(zip(equation.outvars, made, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(graph: Graph, equation: Any, given: list[Value]) -> list[Value]:
    kind, params = equation.primitive.name, equation.params
    outs = [v.aval for v in equation.outvars]
    if kind in _CALLS:
        inner = params[_CALLS[kind]]
        consts = getattr(inner, "consts", ())
        jaxpr = getattr(inner, "jaxpr", inner)
        return _written(graph, jaxpr, [constant(c) for c in consts], given)
    if kind == "platform_index":
        others = [i for i, names in enumerate(params["platforms"]) if names is None]
        return [constant(np.int32(others[0]))]
    if kind == "cond":
        index, *operands = given
        if index.constant is None:
            raise NotImplementedError("cond: a conditional on a computed value within a stage.")
        return convert(graph, params["branches"][int(index.constant)], operands)
    known = [v.constant for v in given if v.constant is not None]
    if len(known) == len(given) and kind != "broadcast_in_dim":
        if all(graph.batch not in out.shape for out in outs):
            return _computed(
                equation, [np.broadcast_to(c, v.shape) for c, v in zip(known, given, strict=True)]
            )
        if kind in ELEMENTWISE:
            (value,) = _computed(equation, np.broadcast_arrays(*known))
            return [value._replace(shape=tuple(outs[0].shape))]
        given = [result(v, graph.name(v)) for v in given]
    if kind not in RULES:
        raise NotImplementedError(f"no rule for {kind} of {[v.shape for v in given]}.")
    try:
        made = RULES[kind](graph, params, given, outs if len(outs) > 1 else outs[0])
    except NotImplementedError as error:
        raise NotImplementedError(f"{kind}: {error}") from None
    return made if isinstance(made, list) else [made]


# Programs within programs, by the parameter that holds them.
_CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr"}


def _computed(equation: Any, arrays: Sequence[np.ndarray]) -> list[Value]:
    computed = equation.primitive.bind(*arrays, **equation.params)
    several = equation.primitive.multiple_results
    return [constant(np.asarray(x)) for x in (computed if several else [computed])]
