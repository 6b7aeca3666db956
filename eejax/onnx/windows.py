"""The rules for images: convolutions, windows, what looks like one, and padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from eejax.onnx.graph import Graph, Rule, Value, result

# Channels second, as ONNX wants images.
_IMAGES = (0, 3, 1, 2)


def pad(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
    x, value = inputs
    low, high, inside = zip(*params["padding_config"], strict=True)
    if any(inside) or min(*low, *high) < 0:
        raise NotImplementedError("padding inside an array, or a negative one.")
    if not any((*low, *high)):
        return x
    zeros = value.constant is not None and not value.constant.any()
    if zeros and x.order == _IMAGES and not any((*low[:3], *high[:3])) and x.dtype == np.float32:
        return _wider(graph, x, low[3], out)
    pads = [int(each[i]) for each in (low, high) for i in x.order]
    name = graph.add("Pad", graph.name(x, x.order), graph.ints(*pads), graph.name(value))
    return result(out, name, x.order)


def _wider(graph: Graph, x: Value, before: int, out: Any) -> Value:
    """Images with channels of zeros around theirs, by a convolution, whose result stays in a
    runtime's own layout of images. It also takes every n-th pixel, if `x` is that."""
    kind, source, steps = graph.sources.get(x.name, ("", x, ()))
    if kind != "thin" or source.order != _IMAGES or (steps[0], steps[3]) != (1, 1):
        source, steps = x, (1, 1, 1, 1)
    k = x.shape[3]
    kernel = np.zeros((out.shape[3], k, 1, 1), np.float32)
    kernel[before : before + k, :, 0, 0] = np.eye(k)
    read = graph.name(source, _IMAGES), graph.constant(kernel)
    strides = [int(step) for step in steps[1:3]]
    return result(out, graph.add("Conv", *read, strides=strides, kernel_shape=[1, 1]), _IMAGES)


def reduce(op: str) -> Rule:
    def rule(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
        (x,), axes = inputs, params["axes"]
        if not axes:
            return x
        is_float = np.issubdtype(x.dtype, np.floating)
        places = sorted(x.order.index(i) for i in axes)
        left = [i for i in range(len(x.shape)) if i not in axes]
        order = [left.index(i) for i in x.order if i not in axes]
        name = graph.name(x, x.order)
        if len(x.shape) == 4 and places == [2, 3] and op in _GLOBAL and is_float:
            # The pooling stays in a runtime's own layout of images, a reduction does not. A
            # maximum may lose a NaN.
            pooled = graph.add(_GLOBAL[op], name)
            name = graph.add("Reshape", pooled, graph.ints(0, -1))
            if op == "ReduceSum":
                pixels = math.prod(x.shape[i] for i in axes)
                name = graph.add("Mul", name, graph.constant(np.asarray(pixels, x.dtype)))
            return result(out, name, order)
        blocks = _blocks(graph, x, axes) if op == "ReduceMax" and is_float else None
        if blocks is not None:
            return result(out, graph.add("MaxPool", blocks[0], **blocks[1]), _IMAGES)
        name = graph.add(op, name, graph.ints(*places), keepdims=0)
        return result(out, name, order)

    return rule


_GLOBAL = {"ReduceSum": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}


def _blocks(graph: Graph, x: Value, axes: Sequence[int]) -> Any:
    """Input and attributes of the pooling that `[B, H/a, a, W/b, b, K].max((2, 4))` is of images
    `[B, H, W, K]`; None for anything else."""
    kind, image, _ = graph.sources.get(x.name, ("", x, 0))
    if kind != "reshape" or len(image.shape) != 4 or x.order != tuple(range(6)):
        return None
    (b, h, w, k), (_, rows, a, columns, c, _) = image.shape, x.shape
    if tuple(axes) != (2, 4) or x.shape != (b, h // a, a, w // c, c, k) or (h % a, w % c) != (0, 0):
        return None
    kind, longer, _ = graph.sources.get(image.name, ("", image, 0))
    # What does not fill a window is left out by the pooling itself.
    left_over = kind == "shorten" and longer.shape[::3] == (b, k)
    if left_over and (longer.shape[1] // a, longer.shape[2] // c) == (rows, columns):
        image = longer
    return graph.name(image, _IMAGES), {"kernel_shape": [a, c], "strides": [a, c]}


def window(op: str) -> Rule:
    def rule(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
        (x,) = inputs
        sizes, steps = params["window_dimensions"], params["window_strides"]
        padding = params["padding"]
        dilated = {*params["base_dilation"], *params["window_dilation"]} != {1}
        still = [i for i in range(len(x.shape)) if sizes[i] == steps[i] == 1]
        wide = any(
            max(side) >= size for side, size in zip(padding, sizes, strict=True) if any(side)
        )
        is_float = np.issubdtype(x.dtype, np.floating)
        whole = len(x.shape) == 4 and still[:1] == [0] and 3 in still and is_float
        if dilated or wide or not whole:
            raise NotImplementedError(
                f"a reduction over windows of {sizes} of {x.dtype} {x.shape}, padded by {padding}."
            )
        name = graph.name(x, _IMAGES)
        attributes: dict[str, Any] = {
            "kernel_shape": list(sizes[1:3]),
            "strides": list(steps[1:3]),
            "pads": [padding[i][side] for side in (0, 1) for i in (1, 2)],
        }
        if op == "MaxPool":
            return result(out, graph.add(op, name, **attributes), _IMAGES)
        mean = graph.add(op, name, count_include_pad=1, **attributes)
        count = graph.constant(np.asarray(math.prod(sizes), x.dtype))
        return result(out, graph.add("Mul", mean, count), _IMAGES)

    return rule


def convolution(graph: Graph, params: dict[str, Any], inputs: list[Value], out: Any) -> Value:
    x, kernel = inputs
    numbers, padding = params["dimension_numbers"], params["padding"]
    if {*params["lhs_dilation"]} != {1} or params["batch_group_count"] != 1:
        raise NotImplementedError("a transposed convolution, or one grouped over the batch.")
    if min(size for side in padding for size in side) < 0:
        raise NotImplementedError(f"a convolution that crops its image, padding {padding}.")
    name = graph.add(
        "Conv",
        graph.name(x, numbers.lhs_spec),
        graph.name(kernel, numbers.rhs_spec),
        strides=list(params["window_strides"]),
        dilations=list(params["rhs_dilation"]),
        pads=[int(side[i]) for i in (0, 1) for side in padding],
        group=params["feature_group_count"],
        kernel_shape=[kernel.shape[i] for i in numbers.rhs_spec[2:]],
    )
    return result(out, name, numbers.out_spec)
