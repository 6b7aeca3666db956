"""An ONNX graph while it is written: nodes, constants, and values as a jaxpr sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Value(NamedTuple):
    """A value of a jaxpr, as an ONNX graph holds it.

    ONNX axis i holds axis `order[i]` of the jaxpr's value, so that a transposition is no node, and
    a convolution's result is held channels second, as ONNX computes it. An axis along which nothing
    changes may be held with size 1, since ONNX broadcasts where it is used.

    Attributes:
      shape: in the jaxpr; the graph's `batch` among the sizes is any batch size.
      dtype: of the elements.
      held: the shape that is held, in the jaxpr's order of the axes: for each axis its size, or 1.
      order: the jaxpr's axis that each ONNX axis holds.
      name: in the graph; `""` for a constant.
      constant: the elements of a constant, shaped `held`; None for what depends on an input.
    """

    shape: tuple[Any, ...]
    dtype: np.dtype
    held: tuple[Any, ...]
    order: tuple[int, ...]
    name: str = ""
    constant: np.ndarray | None = None


class Node(NamedTuple):
    """An operation, as `onnx.helper.make_node` takes it.

    Attributes:
      op: its name.
      inputs, outputs: the names of values.
      attributes: by name.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


class Graph:
    """Nodes in the order in which they run, and constants by their names.

    Attributes:
      nodes: the operations.
      sources: for a few results, by their names, how they were made, of what, and a detail: a
        "reshape"; a slice that only has to "shorten" or, with its steps, to "thin"; the "element"
        at an index of a vector; a "join" that begins with what is named.
      constants: weights and all other constants.
      batch: as given.
    """

    def __init__(self, images: str, batch: int) -> None:
        """An empty graph.

        Args:
          images: the name of a value that leads with the batch axis.
          batch: the size in the traced program that stands for any.
        """
        self.batch = batch
        self.nodes: list[Node] = []
        self.sources: dict[str, tuple[str, Value, Any]] = {}
        self.constants: dict[str, np.ndarray] = {}
        self._images = images
        self._equal: dict[Any, str] = {}
        self._maker: dict[str, Node] = {}
        self._count = 0
        self._size = ""

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node; returns the name of its result, or of all if there are several."""
        names = tuple(self._fresh() for _ in range(outputs))
        node = Node(op, inputs, names, attributes)
        self.nodes.append(node)
        self._maker.update(dict.fromkeys(names, node))
        return names[0] if outputs == 1 else names

    def constant(self, array: Any) -> str:
        """The name of a constant; equal ones are held once."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._equal:
            self._equal[key] = name = self._fresh()
            self.constants[name] = array
        return self._equal[key]

    def ints(self, *numbers: int) -> str:
        """The name of a constant int64 vector, as ONNX takes shapes and axes."""
        return self.constant(np.asarray(numbers, np.int64))

    def sizes(self, shape: Iterable[Any]) -> str:
        """The name of a shape as an int64 vector, with the batch size where it is symbolic."""
        shape = list(shape)
        if self.batch not in shape:
            return self.ints(*shape)
        batch = self._size or self.add("Shape", self._images, start=0, end=1)
        self._size = batch
        parts = [batch if s == self.batch else self.ints(s) for s in shape]
        return parts[0] if len(parts) == 1 else self.add("Concat", *parts, axis=0)

    def maker(self, name: str) -> Node | None:
        """The node whose result a value is; None for an input or a constant."""
        return self._maker.get(name)

    def held(self, value: Value, order: Sequence[int]) -> str:
        """The name of a value with its axes in this order; an axis held with size 1 stays so."""
        if value.constant is not None:
            return self.constant(value.constant.transpose(order))
        if tuple(order) == value.order:
            return value.name
        return self.add("Transpose", value.name, perm=[value.order.index(i) for i in order])

    def name(self, value: Value, order: Sequence[int] | None = None) -> str:
        """The name of a value at its full size, its axes in this order, by default its own."""
        order = range(len(value.shape)) if order is None else order
        name = self.held(value, order)
        if value.held != value.shape:
            name = self.add("Expand", name, self.sizes(value.shape[i] for i in order))
        return name

    def _fresh(self) -> str:
        self._count += 1
        return f"value{self._count}"


def constant(array: Any, shape: Sequence[Any] | None = None) -> Value:
    """A constant, broadcast to `shape` if it is given."""
    array = np.asarray(array)
    whole = array.shape if shape is None else tuple(shape)
    return Value(whole, array.dtype, array.shape, tuple(range(array.ndim)), "", array)


def result(out: Any, name: str, order: Sequence[int] | None = None, held: Any = None) -> Value:
    """A node's result, by default at full size with the axes in the jaxpr's order."""
    order = range(len(out.shape)) if order is None else order
    return Value(tuple(out.shape), out.dtype, held or tuple(out.shape), tuple(order), name)


Rule = Callable[[Graph, dict[str, Any], list[Value], Any], Any]
