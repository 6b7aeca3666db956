"""How each primitive of a jaxpr is written in ONNX.

A rule is `rule(graph, params, inputs, out) -> Value`, with the equation's parameters, the values
that it reads, and shape and dtype of its result. Equations that depend on no input never reach a
rule: they are computed when the graph is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import helper

from eejax.onnx.graph import Graph, Rule, Value, constant, result
from eejax.onnx.windows import convolution, pad, reduce, window


def elementwise(op: str, **attributes: Any) -> Rule:
    """A node whose operands broadcast."""

    def rule(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
        del params
        names, order, held = aligned(graph, inputs, out)
        return result(out, graph.add(op, *names, **attributes), order, held)

    return rule


def aligned(
    graph: Graph, inputs: Sequence[Value], out: Any
) -> tuple[list[str], tuple[int, ...], tuple[Any, ...]]:
    """Names of values in one order of the axes, that order, and the shape to which they broadcast.

    The order is that of the largest value, so that the smaller ones are transposed. Scalars need
    none.
    """
    rank = len(out.shape)
    whole = [v for v in inputs if len(v.shape) == rank and v.constant is None]
    largest = max(whole, key=lambda v: sum(size != 1 for size in v.held), default=None)
    order = tuple(range(rank)) if largest is None else largest.order
    names = [graph.held(v, order if len(v.shape) == rank else ()) for v in inputs]
    helds = [v.held for v in inputs if len(v.shape) == rank]
    held = tuple(max(sizes, key=lambda s: s != 1) for sizes in zip(*helds, strict=True))
    return names, order, held


def composed(*ops: tuple[str, Any]) -> Rule:
    """Elementwise nodes in turn; each takes what the one before made, and a constant or nothing
    before or behind it."""

    def rule(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
        del params
        (x,) = inputs
        name = graph.held(x, x.order)
        for op, other in ops:
            more = () if other is None else (graph.constant(np.asarray(other, x.dtype)),)
            name = graph.add(op, name, *more)
        return result(out, name, x.order, x.held)

    return rule


def maximum(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
    """`max(x, 0)` is Relu, which runtimes fuse with a convolution."""
    for x, other in (inputs, inputs[::-1]):
        is_zero = other.constant is not None and not other.constant.any()
        if is_zero and x.constant is None and out.dtype == np.float32 and x.shape == out.shape:
            return result(out, graph.add("Relu", x.name), x.order, x.held)
    return elementwise("Max")(graph, params, inputs, out)


def power(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
    (x,), y = inputs, params["y"]
    name = graph.held(x, x.order)
    if y in (2, 3):
        square = graph.add("Mul", name, name)
        return result(out, square if y == 2 else graph.add("Mul", square, name), x.order, x.held)
    exponent = graph.constant(np.asarray(y, x.dtype))
    return result(out, graph.add("Pow", name, exponent), x.order, x.held)


def select(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
    which, *cases = inputs
    if len(cases) != 2:
        raise NotImplementedError(f"a choice of {len(cases)} cases; ONNX chooses between two.")
    names, order, held = aligned(graph, [which, *reversed(cases)], out)
    if which.dtype != np.bool_:
        names[0] = graph.add("Cast", names[0], to=_type(np.dtype(bool)))
    return result(out, graph.add("Where", *names), order, held)


def finite(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
    (x,) = inputs
    name = graph.held(x, x.order)
    neither = graph.add("Or", graph.add("IsInf", name), graph.add("IsNaN", name))
    return result(out, graph.add("Not", neither), x.order, x.held)


def unequal(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
    names, order, held = aligned(graph, inputs, out)
    return result(out, graph.add("Not", graph.add("Equal", *names)), order, held)


def convert(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
    (x,) = inputs
    if x.dtype == out.dtype:
        return x
    if np.issubdtype(x.dtype, np.floating) and np.issubdtype(out.dtype, np.integer):
        raise NotImplementedError("floats as integers: ONNX leaves open what is out of range.")
    name, kind = graph.held(x, x.order), _type(out.dtype)
    turned = graph.maker(name)
    if turned is not None and turned.op == "Transpose" and x.dtype == np.uint8:
        # Runtimes turn an array of bytes more slowly than one of floats.
        cast = graph.add("Cast", turned.inputs[0], to=kind)
        return result(out, graph.add("Transpose", cast, **turned.attributes), x.order, x.held)
    return result(out, graph.add("Cast", name, to=kind), x.order, x.held)


def same(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> list[Value]:
    return inputs


def transpose(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
    """Only the order of the axes changes."""
    (x,), permutation = inputs, list(params["permutation"])
    held = tuple(x.held[i] for i in permutation)
    return result(out, x.name, [permutation.index(i) for i in x.order], held)


def broadcast(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
    """New axes are held with size 1."""
    (x,), axes, rank = inputs, params["broadcast_dimensions"], len(out.shape)
    held = tuple(x.held[axes.index(i)] if i in axes else 1 for i in range(rank))
    if x.constant is not None:
        return constant(x.constant.reshape(held), out.shape)
    new = [i for i in range(rank) if i not in axes]
    name = graph.held(x, range(len(x.shape)))
    return result(out, graph.add("Unsqueeze", name, graph.ints(*new)) if new else name, None, held)


def reshape(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
    (x,) = inputs
    # -1 is the size that is left over; so the batch needs no node.
    sizes = [-1 if size == graph.batch else size for size in out.shape]
    if 0 in out.shape:
        raise NotImplementedError(f"an empty value {out.shape}.")
    name = graph.add("Reshape", graph.name(x), graph.ints(*sizes))
    graph.sources[name] = ("reshape", x, 0)
    return result(out, name)


def squeeze(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
    (x,), gone = inputs, {int(i) for i in params["dimensions"]}
    kind, source, index = graph.sources.get(x.name, ("", x, 0))
    if kind == "element":
        return result(out, graph.add("Gather", source.name, graph.constant(np.int64(index))))
    places = [place for place, i in enumerate(x.order) if i in gone]
    left = [i for i in range(len(x.shape)) if i not in gone]
    order = [left.index(i) for i in x.order if i not in gone]
    name = graph.add("Squeeze", x.name, graph.ints(*places)) if places else x.name
    return result(out, name, order, tuple(x.held[i] for i in left))


def cut(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
    (x,) = inputs
    steps = params["strides"] or (1,) * len(x.shape)
    start, stop = params["start_indices"], params["limit_indices"]
    axes = [
        i
        for i, size in enumerate(x.shape)
        if x.held[i] != 1 and (start[i], steps[i], stop[i]) != (0, 1, size)
    ]
    held = tuple(1 if x.held[i] == 1 else size for i, size in enumerate(out.shape))
    if not axes:
        return result(out, x.name, x.order, held)
    picked = [graph.ints(*(int(each[i]) for i in axes)) for each in (start, stop)]
    places = graph.ints(*(x.order.index(i) for i in axes))
    name = graph.add("Slice", x.name, *picked, places, graph.ints(*(int(steps[i]) for i in axes)))
    if not any(start) and {*steps} == {1}:
        graph.sources[name] = ("shorten", x, 0)
    elif out.shape == tuple(-(-n // step) for n, step in zip(x.shape, steps, strict=True)):
        graph.sources[name] = ("thin", x, steps)
    if len(x.shape) == 1 and out.shape == (1,):
        kind, first, _ = graph.sources.get(x.name, ("", x, 0))
        source = first if kind == "join" and start[0] < first.shape[0] else x
        graph.sources[name] = ("element", source, start[0])
    return result(out, name, x.order, held)


def concatenate(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
    axis = params["dimension"]
    order = next((v.order for v in inputs if v.constant is None), tuple(range(len(out.shape))))
    names = [graph.name(v, order) for v in inputs]
    name = graph.add("Concat", *names, axis=order.index(axis))
    if axis == 0 and inputs[0].constant is None:
        graph.sources[name] = ("join", inputs[0], 0)
    return result(out, name, order)


def stack(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
    axis = params["axis"]
    at = graph.ints(axis)
    names = [graph.add("Unsqueeze", graph.name(v), at) for v in inputs]
    return result(out, graph.add("Concat", *names, axis=axis))


def product(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
    """A matrix product over one axis, of `[..., M, K]` and `[..., K, N]` after transpositions."""
    (over_x, over_y), (batch_x, batch_y) = params["dimension_numbers"]
    if len(over_x) != 1:
        raise NotImplementedError(f"a product over {len(over_x)} axes.")
    x, y = inputs
    free_x = [i for i in range(len(x.shape)) if i not in (*over_x, *batch_x)]
    free_y = [i for i in range(len(y.shape)) if i not in (*over_y, *batch_y)]
    left = graph.name(x, (*batch_x, *free_x, *over_x))
    right = graph.name(y, (*batch_y, *over_y, *free_y))
    if (batch_x and len(free_x) > 1) or len(free_y) > 1:
        raise NotImplementedError(f"a product of {x.shape} and {y.shape} over axis {over_x[0]}.")
    if not free_x:
        left = graph.add("Unsqueeze", left, graph.ints(len(batch_x)))
    if not free_y:
        right = graph.add("Unsqueeze", right, graph.ints(len(batch_y) + 1))
    name = graph.add("MatMul", left, right)
    gone = [len(batch_x)] if not free_x else []
    gone += [len(batch_x) + max(len(free_x), 1)] if not free_y else []
    if gone:
        name = graph.add("Squeeze", name, graph.ints(*gone))
    return result(out, name)


def argmax(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
    (x,), (axis,) = inputs, params["axes"]
    found = graph.add("ArgMax", graph.name(x), axis=axis, keepdims=0)
    return result(out, graph.add("Cast", found, to=_type(out.dtype)))


def top_k(graph: Graph, params: dict[str, Any], inputs: list[Value], outs: Any) -> list[Value]:
    (x,), axis = inputs, params["axis"]
    values, places = graph.add("TopK", graph.name(x), graph.ints(params["k"]), outputs=2, axis=axis)
    places = graph.add("Cast", places, to=_type(outs[1].dtype))
    return [result(outs[0], values), result(outs[1], places)]


def cumulative_minimum(
    graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any
) -> Value:
    """The minimum of each beginning, by as many nodes as the axis is long."""
    (x,), axis = inputs, params["axis"]
    if params["reverse"]:
        raise NotImplementedError("a cumulative minimum from the end.")
    name, at = graph.name(x), graph.ints(axis)
    parts: list[str] = []
    for i in range(x.shape[axis]):
        part = graph.add("Slice", name, graph.ints(i), graph.ints(i + 1), at)
        parts.append(graph.add("Min", parts[-1], part) if parts else part)
    return result(out, graph.add("Concat", *parts, axis=axis))


def scatter(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
    """`x.at[:, e].set(update)` with a constant e."""
    x, index, update = inputs
    numbers = params["dimension_numbers"]
    axes = numbers.inserted_window_dims
    simple = index.constant is not None and index.constant.size == 1 and len(axes) == 1
    if not simple or numbers.operand_batching_dims or len(update.shape) != len(x.shape) - 1:
        raise NotImplementedError("a scatter that is not `x.at[..., i].set(y)` with a constant i.")
    assert index.constant is not None
    i, axis = int(index.constant.ravel()[0]), axes[0]
    if not 0 <= i < x.shape[axis]:
        raise NotImplementedError(f"a scatter at {i} of an axis of {x.shape[axis]}.")
    name, at = graph.name(x), graph.ints(axis)
    parts = [graph.add("Unsqueeze", graph.name(update), at)]
    if i:
        parts.insert(0, graph.add("Slice", name, graph.ints(0), graph.ints(i), at))
    if i + 1 < x.shape[axis]:
        end = graph.ints(x.shape[axis])
        parts.append(graph.add("Slice", name, graph.ints(i + 1), end, at))
    return result(out, graph.add("Concat", *parts, axis=axis))


def _type(dtype: Any) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


# Computed element by element, so that an axis that is held with size 1 may stay so.
ELEMENTWISE: dict[str, Rule] = {
    "abs": elementwise("Abs"),
    "add": elementwise("Add"),
    "and": elementwise("And"),
    "convert_element_type": convert,
    "copy": same,
    "div": elementwise("Div"),
    "eq": elementwise("Equal"),
    "erfc": composed(("Erf", None), ("Neg", None), ("Add", 1)),
    "exp": elementwise("Exp"),
    # To float32's precision of 1, not of the result: near 0 it is coarser than JAX's. So is log1p.
    "expm1": composed(("Exp", None), ("Sub", 1)),
    "ge": elementwise("GreaterOrEqual"),
    "gt": elementwise("Greater"),
    "integer_pow": power,
    "is_finite": finite,
    "le": elementwise("LessOrEqual"),
    "log": elementwise("Log"),
    "log1p": composed(("Add", 1), ("Log", None)),
    "logistic": elementwise("Sigmoid"),
    "lt": elementwise("Less"),
    "max": maximum,
    "min": elementwise("Min"),
    "mul": elementwise("Mul"),
    "ne": unequal,
    "neg": elementwise("Neg"),
    "not": elementwise("Not"),
    "or": elementwise("Or"),
    "rsqrt": composed(("Sqrt", None), ("Reciprocal", None)),
    "select_n": select,
    "sign": elementwise("Sign"),
    "sqrt": elementwise("Sqrt"),
    "square": lambda graph, params, inputs, out: power(graph, {"y": 2}, inputs, out),
    "stop_gradient": same,
    "sub": elementwise("Sub"),
    "tanh": elementwise("Tanh"),
}

RULES: dict[str, Rule] = {
    **ELEMENTWISE,
    "argmax": argmax,
    "broadcast_in_dim": broadcast,
    "concatenate": concatenate,
    "conv_general_dilated": convolution,
    "cummin": cumulative_minimum,
    "dot_general": product,
    "optimization_barrier": same,
    "pad": pad,
    "reduce_max": reduce("ReduceMax"),
    "reduce_min": reduce("ReduceMin"),
    "reduce_sum": reduce("ReduceSum"),
    "reduce_window_max": window("MaxPool"),
    "reduce_window_sum": window("AveragePool"),
    "reshape": reshape,
    "scatter": scatter,
    "slice": cut,
    "squeeze": squeeze,
    "stack": stack,
    "top_k": top_k,
    "transpose": transpose,
}
