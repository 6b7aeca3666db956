"""The stages of an early-exit network as ONNX models."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import onnx
from jax.extend.core import Literal, jaxprs_in_params
from numpy.typing import ArrayLike
from onnx import helper, numpy_helper

from eejax.inference.step import Samples, bind_exits, exit_step, first_samples
from eejax.network import EarlyExitNetwork, Variables
from eejax.onnx.convert import convert
from eejax.onnx.graph import Graph, Value
from eejax.onnx.nesting import IMAGES, THRESHOLDS
from eejax.onnx.passes import in_blocks, simplified
from eejax.policies import Policy, check_thresholds

# ONNX 1.16's pair: the first with all of Gelu, and old enough for runtimes of 2024.
OPSET, IR = 21, 10
# Tracing needs a batch size. These two stand for any; `_check_sizes` tells them from other sizes.
_ANY, _ANOTHER = 8191, 8179


class Program(NamedTuple):
    """One exit as a traced program.

    Attributes:
      jaxpr: closed; of the leaves of the samples and of thresholds `[E - 1]`, to logits `[B, C]`,
        whether a sample leaves `[B]`, and the leaves of the next exit's samples.
      samples: shape and dtype of each leaf of the samples.
    """

    jaxpr: Any
    samples: Sequence[Any]


def stages(
    network: EarlyExitNetwork,
    policy: Policy,
    variables: Variables,
    image: Any,
    thresholds: ArrayLike,
) -> list[onnx.ModelProto]:
    """A model for each of the E exits, for any batch size.

    The first stage reads `images` `[batch, ...]`, another `in0`, `in1`, ...: those rows of the
    `out0`, `out1`, ... of the stage before that go on. All but the last read `thresholds`, and make
    `logits` `[batch, C]`, the policy's, `leaves` `[batch]`, whether a sample leaves here, and what
    the next stage reads. The last makes logits alone. Answers are those of JAX to float32's
    rounding, but for features that are NaN, which a maximum over windows may lose, or infinite,
    which a shortcut that adds channels makes NaN.

    Args:
      network: E exits, with preprocessing.
      policy: scores the exits.
      variables: of the network; they become constants.
      image: shape and dtype of one image.
      thresholds: `[E - 1]`, what the models take where no others are given.

    Raises:
      NotImplementedError: if an operation cannot be written; the message names it.
      ValueError: if the thresholds do not fit.
    """
    defaults = check_thresholds(np.asarray(thresholds), network.num_exits)
    models, carried = [], []
    for e, program in enumerate(_programs(network, policy, variables, image)):
        if e == 0:
            inputs = [_whole(IMAGES, program.samples[0])]
        else:
            inputs = [v._replace(name=f"in{i}") for i, v in enumerate(carried)]
        graph = Graph(inputs[0].name, _ANY)
        read = [_channels_second(graph, v) if e == 0 else v for v in inputs]
        logits, leaves, *after = convert(graph, program.jaxpr, [*read, _limits(defaults)])
        results = {"logits": logits}
        if e + 1 < network.num_exits:
            results |= {"leaves": leaves}
            results |= {f"out{i}": v for i, v in enumerate(after)}
        made = {name: _made(graph, v, _batch_first(v)) for name, v in results.items()}
        models.append(_model(graph, f"stage{e + 1}", inputs, made, defaults))
        carried = [_whole("", v, _batch_first(v)) for v in after]
    return models


def _programs(
    network: EarlyExitNetwork, policy: Policy, variables: Variables, image: Any
) -> Iterator[Program]:
    """Every exit, traced for a batch size that stands for any."""

    def traced(batch: int) -> Iterator[tuple[Any, Any]]:
        samples: Any = jax.ShapeDtypeStruct((batch, *image.shape), image.dtype)
        for e in range(network.num_exits):

            def run(samples: Any, thresholds: Any, e: int = e) -> Any:
                if e == 0:
                    samples = first_samples(policy, samples)
                exits = bind_exits(network, policy, variables, thresholds)
                after, logits, leaves = exit_step(exits[e], samples)
                return logits, leaves, after

            thresholds = jax.ShapeDtypeStruct((network.num_exits - 1,), np.float32)
            trace = jax.jit(run).trace(samples, thresholds)
            yield trace.jaxpr, samples
            samples = Samples(*trace.out_info[2])

    for (jaxpr, samples), (other, _) in zip(traced(_ANY), traced(_ANOTHER), strict=True):
        _check_any_batch(jaxpr, other)
        yield Program(jaxpr, jax.tree.leaves(samples))


def _check_any_batch(some: Any, other: Any) -> None:
    """Raises NotImplementedError unless two programs differ in the sizes that stand for any batch
    and in nothing else, wherever these occur."""
    for a, b in itertools.zip_longest(_facts(some), _facts(other)):
        if a is None or b is None or len(a) != len(b) or not all(map(_same_fact, a, b)):
            raise NotImplementedError(
                f"{a} for {_ANY} images and {b} for {_ANOTHER}; what a network computes for an "
                "image must not depend on the size of the batch."
            )


def _facts(closed: Any) -> Iterator[tuple[Any, ...]]:
    """What makes a program: names, shapes and literals of its equations, and its constants."""
    for constant in getattr(closed, "consts", ()):
        yield ("constant", str(np.shape(constant)))  # of no batch
    for equation in closed.eqns:
        literals = (a.val for a in equation.invars if isinstance(a, Literal))
        yield (equation.primitive.name, *literals)
        for v in equation.outvars:
            yield v.aval.shape
        for inner in jaxprs_in_params(equation.params):
            yield from _facts(inner)


def _same_fact(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return (a, b) == (_ANY, _ANOTHER) or a == b != _ANY
    return np.array_equal(a, b, equal_nan=not isinstance(a, str))


def _whole(name: str, like: Any, order: Sequence[int] | None = None) -> Value:
    """A value at full size, with the shape and dtype of another."""
    shape = tuple(like.shape)
    return Value(shape, like.dtype, shape, tuple(order or range(len(shape))), name)


def _channels_second(graph: Graph, images: Value) -> Value:
    """Images as convolutions want them. Turned at once, because runtimes are slow with an offset
    and a factor for each channel where that is the last axis."""
    if len(images.shape) != 4:
        return images
    order = (0, 3, 1, 2)
    return images._replace(name=graph.held(images, order), order=order)


def _limits(defaults: np.ndarray) -> Value:
    return _whole(THRESHOLDS, defaults)


def _batch_first(value: Value) -> tuple[int, ...]:
    """The order in which a value leaves a model: as it is held, if its rows are samples."""
    as_it_is = value.constant is None and value.order[:1] == (0,)
    return value.order if as_it_is else tuple(range(len(value.shape)))


def _made(graph: Graph, value: Value, order: Sequence[int] | None = None) -> Value:
    """A value as the result of a node, which results of graphs must be."""
    name = graph.name(value, order)
    if graph.maker(name) is None:
        name = graph.add("Identity", name)
    return _whole(name, value, order)


def _model(
    graph: Graph,
    title: str,
    inputs: Sequence[Value],
    results: Mapping[str, Value],
    defaults: np.ndarray,
) -> onnx.ModelProto:
    made = {}  # by the names within the graph, of which a value may have two outside
    for name, value in results.items():
        inner = graph.add("Identity", value.name) if value.name in made else value.name
        made[inner] = name
    nodes, constants = simplified(graph.nodes, graph.constants, list(made))
    nodes = in_blocks(nodes, [v.name for v in inputs if len(v.shape) == 4])
    reads = {name for node in nodes for name in node.inputs}
    given = [*inputs, *([_limits(defaults)] if THRESHOLDS in reads else [])]
    if THRESHOLDS in reads:
        constants = {**constants, THRESHOLDS: defaults}
    proto = helper.make_graph(
        [
            helper.make_node(
                node.op,
                [made.get(name, name) for name in node.inputs],
                [made.get(name, name) for name in node.outputs],
                name=f"{node.op}{i}",
                **node.attributes,
            )
            for i, node in enumerate(nodes)
        ],
        title,
        [_info(value) for value in given],
        [_info(value._replace(name=name)) for name, value in results.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(proto, opset_imports=[opset], ir_version=IR, producer_name="eejax")


def _info(value: Value) -> onnx.ValueInfoProto:
    sizes = [value.shape[i] for i in value.order]
    sizes = ["batch" if size == _ANY else size for size in sizes]
    return helper.make_tensor_value_info(
        value.name, helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype)), sizes
    )
