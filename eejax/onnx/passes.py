"""What makes a graph smaller after it is written.

A jaxpr spells out what ONNX has an operation for, and keeps a normalisation apart from the
convolution before it. Runtimes mend such things too, but know the spelling of other exporters.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eejax.onnx.graph import Node

Constants = dict[str, np.ndarray]
Words = Mapping[str, str]

# A pattern is an operation and, in turn, the patterns of what it reads, which Add, Mul, Max and Or
# may read in either order. A word stands for a value, the same everywhere; a number for a constant.
# ("=", word, pattern) gives the value of a pattern a word.
Pattern = Any


class Idiom(NamedTuple):
    """What a jaxpr spells out, and the operation that it is in ONNX.

    Attributes:
      pattern: of the last node.
      op: the operation.
      reads: the words that it reads.
      attributes: of the operation.
      axis: whether the constant `axes` is its attribute `axis`.
    """

    pattern: Pattern
    op: str
    reads: Sequence[str] = ("x",)
    attributes: Mapping[str, Any] = {}
    axis: bool = False


_TOP = ("=", "top", ("Max", -math.inf, ("ReduceMax", "x", "axes")))
_SHIFT = ("=", "shift", ("Where", ("Not", ("Or", ("IsInf", _TOP), ("IsNaN", _TOP))), _TOP, 0.0))
_EXP_SUM = ("ReduceSum", ("Exp", ("Sub", "x", ("Unsqueeze", _SHIFT, "axes"))), "axes")
_CENTRED = ("=", "centred", ("Sub", "x", ("Unsqueeze", _TOP, "axes")))
_POWERS = ("=", "powers", ("Exp", _CENTRED))
_TOTAL = ("Unsqueeze", ("ReduceSum", _POWERS, "axes"), "axes")
_CUBIC = ("Add", "x", ("Mul", 0.044715, ("Mul", ("Mul", "x", "x"), "x")))
_TANH = ("Add", 1.0, ("Tanh", ("Mul", math.sqrt(2 / math.pi), _CUBIC)))
_ERFC = ("Add", 1.0, ("Neg", ("Erf", ("Mul", math.sqrt(0.5), ("Neg", "x")))))
_LESS = ("=", "less", ("Sub", "x", 0.0))
_LOG1P = ("Log", ("Add", 1.0, ("Exp", ("Neg", ("Abs", _LESS)))))

# Those of `jax.nn`, then what rules leave behind.
IDIOMS = (
    Idiom(("Mul", "x", ("Mul", 0.5, _TANH)), "Gelu", attributes={"approximate": "tanh"}),
    Idiom(("Mul", ("Mul", 0.5, "x"), _ERFC), "Gelu"),
    Idiom(
        ("Add", _SHIFT, ("Log", ("Abs", _EXP_SUM))),
        "ReduceLogSumExp",
        ("x", "axes"),
        {"keepdims": 0},
    ),
    Idiom(
        (
            "Where",
            ("Not", ("Equal", _LESS, _LESS)),
            ("Add", "x", 0.0),
            ("Add", ("Relu", "x"), _LOG1P),
        ),
        "Softplus",
    ),
    Idiom(("Sub", _CENTRED, ("Log", _TOTAL)), "LogSoftmax", axis=True),
    Idiom(("Div", _POWERS, _TOTAL), "Softmax", axis=True),
    Idiom(("Neg", ("Neg", "x")), "Identity"),
    Idiom(("Or", "x", 0.0), "Identity"),
    Idiom(("Div", ("Mul", "x", "n"), "n"), "Identity"),
)
_EXCHANGED = {"Add", "Mul", "Max", "Or"}


def simplified(
    nodes: Sequence[Node], constants: Constants, outputs: Sequence[str]
) -> tuple[list[Node], Constants]:
    """What the outputs need, in fewer nodes.

    Args:
      nodes: in the order in which they run.
      constants: by name.
      outputs: the names of the results.

    Returns:
      The nodes, and the constants that they read.
    """
    constants = dict(constants)
    nodes = needed(spelled(needed(nodes, outputs), constants), outputs)
    nodes = needed(folded(direct(nodes, outputs), constants, outputs), outputs)
    read = {name for node in nodes for name in node.inputs}
    return nodes, {name: array for name, array in constants.items() if name in read}


def needed(nodes: Sequence[Node], outputs: Sequence[str]) -> list[Node]:
    """The nodes that the outputs depend on."""
    names, kept = set(outputs), []
    for node in reversed(nodes):
        if names.intersection(node.outputs):
            kept.append(node)
            names.update(node.inputs)
    return kept[::-1]


def direct(nodes: Sequence[Node], outputs: Sequence[str]) -> list[Node]:
    """Without identities, but for those that name an output."""
    same: dict[str, str] = {}
    result = []
    for node in nodes:
        node = node._replace(inputs=tuple(same.get(name, name) for name in node.inputs))
        if node.op == "Identity" and node.outputs[0] not in outputs:
            same[node.outputs[0]] = node.inputs[0]
        else:
            result.append(node)
    return result


def spelled(nodes: Sequence[Node], constants: Constants) -> list[Node]:
    """Idioms as operations; what they were made of is left where it is."""
    maker: dict[str, Node] = {}
    result = []
    for node in nodes:
        maker.update(dict.fromkeys(node.outputs, node))
        for idiom in IDIOMS:
            words = _match(idiom.pattern, node.outputs[0], {}, maker, constants)
            if words is not None and _is_legal(idiom, words, constants):
                attributes = dict(idiom.attributes)
                if idiom.axis:
                    attributes["axis"] = int(constants[words["axes"]][0])
                reads = tuple(words[word] for word in idiom.reads)
                node = Node(idiom.op, reads, node.outputs, attributes)
                maker[node.outputs[0]] = node
                break
        result.append(node)
    return result


def _is_legal(idiom: Idiom, words: Words, constants: Constants) -> bool:
    """Whether the constants that an idiom's words stand for are what the operation needs."""
    if "axes" in words:
        axes = constants.get(words["axes"])
        if axes is None or (idiom.axis and axes.size != 1):
            return False
    if "n" in words:
        n = constants.get(words["n"])
        if n is None or n.ndim or not np.issubdtype(n.dtype, np.floating):
            return False
        return bool(np.isfinite(n) and n != 0)
    return True


def _match(
    pattern: Pattern, name: str, words: Words, maker: Mapping[str, Node], constants: Constants
) -> Words | None:
    """The words of a pattern that a value matches, with those already given; None otherwise."""
    if isinstance(pattern, str):
        return {**words, pattern: name} if words.get(pattern, name) == name else None
    if isinstance(pattern, float):
        array = constants.get(name)
        alike = array is not None and array.size == 1 and array.item() == np.float32(pattern)
        return words if alike else None
    if pattern[0] == "=":
        found = _match(pattern[2], name, words, maker, constants)
        return None if found is None else _match(pattern[1], name, found, maker, constants)
    op, *parts = pattern
    node = maker.get(name)
    if node is None or node.op != op or len(node.inputs) != len(parts):
        return None
    for inputs in (node.inputs, node.inputs[::-1]) if op in _EXCHANGED else (node.inputs,):
        found: Words | None = words
        for part, given in zip(parts, inputs, strict=True):
            found = None if found is None else _match(part, given, found, maker, constants)
        if found is not None:
            return found
    return None


def folded(nodes: Sequence[Node], constants: Constants, outputs: Sequence[str]) -> list[Node]:
    """Factors and offsets of channels, such as a normalisation's, become a convolution's.

    They follow it at once, or after a maximum over windows, which commutes with positive factors.
    """
    uses = collections.Counter(name for node in nodes for name in node.inputs)
    uses.update(outputs)
    result: dict[str, Node] = {}  # by the first output

    def sole_maker(name: str, op: str) -> Node | None:
        node = result.get(name)
        return node if node is not None and node.op == op and uses[name] == 1 else None

    for node in nodes:
        scaled = _scaled(node, constants)
        if scaled is not None:
            source, factor, offset = scaled
            pool = sole_maker(source, "MaxPool") if (factor > 0).all() else None
            conv = sole_maker(pool.inputs[0] if pool else source, "Conv")
            if conv is not None and _can_take(conv, factor, offset, constants):
                new = _with(conv, factor, offset, constants)
                if pool:
                    result[conv.outputs[0]] = new
                    result[node.outputs[0]] = result.pop(source)._replace(outputs=node.outputs)
                else:
                    del result[source]
                    result[node.outputs[0]] = new._replace(outputs=node.outputs)
                continue
        result[node.outputs[0]] = node
    return list(result.values())


def in_blocks(nodes: Sequence[Node], images: Sequence[str]) -> list[Node]:
    """The same, where a sum reads the graph's images from a pooling that changes nothing.

    ONNX Runtime keeps images in blocks of channels from one convolution or pooling to the next, and
    adds to a convolution within its kernel, but only what is in blocks as well. Images that enter a
    graph are not, and without them no sum down a chain of residual blocks would be.
    """
    result, same = [], {}
    for name in images:
        readers = {node.op for node in nodes if name in node.inputs}
        if {"Conv", "Add"} <= readers:
            same[name] = f"{name}.blocks"
            result.append(Node("MaxPool", (name,), (same[name],), {"kernel_shape": [1, 1]}))
    renamed = [n._replace(inputs=tuple(same.get(i, i) for i in n.inputs)) for n in nodes]
    return [*result, *renamed]


def _scaled(node: Node, constants: Constants) -> tuple[str, np.ndarray, np.ndarray] | None:
    """For `x * factor + offset` with one number for each channel, or for all: x, factor, offset."""
    if node.op not in ("Add", "Sub", "Mul", "Div"):
        return None
    x, other = node.inputs
    if x in constants and node.op in ("Add", "Mul"):
        x, other = other, x
    array = constants.get(other)
    if array is None or not (array.ndim == 0 or (array.ndim == 4 and array.size == array.shape[1])):
        return None
    # Folded in double precision, so that the weights are rounded once.
    c, none = array.astype(np.float64).reshape(-1), np.ones(1)
    if node.op in ("Add", "Sub"):
        return x, none, c if node.op == "Add" else -c
    return x, c if node.op == "Mul" else 1 / c, np.zeros(1)


def _can_take(conv: Node, factor: np.ndarray, offset: np.ndarray, constants: Constants) -> bool:
    kernel = constants.get(conv.inputs[1])
    if kernel is None or kernel.ndim != 4:
        return False
    fits = all(c.size in (1, len(kernel)) and np.isfinite(c).all() for c in (factor, offset))
    return fits and (len(conv.inputs) == 2 or conv.inputs[2] in constants)


def _with(conv: Node, factor: np.ndarray, offset: np.ndarray, constants: Constants) -> Node:
    """The convolution whose result is multiplied and moved, with weights of its own."""
    kernel = constants[conv.inputs[1]]
    old = constants[conv.inputs[2]] if len(conv.inputs) == 3 else np.zeros(len(kernel))
    names = tuple(f"{conv.outputs[0]}.{what}" for what in ("kernel", "offset"))
    factor = np.broadcast_to(factor, len(kernel))
    constants[names[0]] = (kernel * factor[:, None, None, None]).astype(kernel.dtype)
    constants[names[1]] = (old * factor + offset).astype(kernel.dtype)
    return conv._replace(inputs=(conv.inputs[0], *names))
