"""An early-exit network in ONNX: a model for each stage, and one that stops by itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import onnx
from jax.extend.core import jaxprs_in_params
from numpy.typing import ArrayLike
from onnx import helper, numpy_helper

from eejax.inference.step import Samples, bind_exits, exit_step, first_samples
from eejax.network import EarlyExitNetwork, Variables
from eejax.onnx.convert import convert
from eejax.onnx.graph import Graph, Value
from eejax.onnx.passes import simplified
from eejax.policies import Policy, check_thresholds

# ONNX 1.16's pair: the first with all of Gelu, and old enough for runtimes of 2024.
OPSET, IR = 21, 10
IMAGES, THRESHOLDS = "images", "thresholds"
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
    the next stage reads. The last makes logits alone.

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
    for e, program in enumerate(_programs(network, policy, variables, image, _ANY)):
        if e == 0:
            inputs = [_whole(IMAGES, program.samples[0])]
        else:
            inputs = [v._replace(name=f"in{i}") for i, v in enumerate(carried)]
        graph = Graph(f"exit{e + 1}.", inputs[0].name, _ANY)
        logits, leaves, *after = convert(graph, program.jaxpr, [*inputs, _limits(defaults)])
        results = {"logits": logits}
        if e + 1 < network.num_exits:
            results |= {"leaves": leaves}
            results |= {f"out{i}": v for i, v in enumerate(after)}
        made = {name: _made(graph, v, _batch_first(v)) for name, v in results.items()}
        models.append(_model(graph, f"stage{e + 1}", inputs, made, defaults))
        carried = [_whole("", v, _batch_first(v)) for v in after]
    return models


def single(
    network: EarlyExitNetwork,
    policy: Policy,
    variables: Variables,
    image: Any,
    thresholds: ArrayLike,
) -> onnx.ModelProto:
    """A model for one image that runs no stage after the exit that it takes.

    It reads `images` `[1, ...]` and `thresholds`, and makes `logits` `[1, C]`, the policy's, and
    `exits` `[1]`, the exit, 0-based, int32. Each exit but the last is an `If`; what follows the
    exit stands in its branch with its weights, since runtimes prepare weights for their kernels
    only in the graph that holds them.

    Arguments and errors are those of `stages`.
    """
    defaults = check_thresholds(np.asarray(thresholds), network.num_exits)
    programs = list(_programs(network, policy, variables, image, 1))
    inputs = [_whole(IMAGES, programs[0].samples[0])]
    graph, results = _from_exit(programs, 0, inputs, defaults)
    return _model(graph, "network", inputs, results, defaults)


def _from_exit(
    programs: Sequence[Program], e: int, inputs: Sequence[Value], defaults: np.ndarray
) -> tuple[Graph, dict[str, Value]]:
    """The graph of exit e, and of those after it in the branch of an `If`; and its results."""
    graph = Graph(f"exit{e + 1}.", IMAGES, None)
    logits, leaves, *after = convert(graph, programs[e].jaxpr, [*inputs, _limits(defaults)])

    def answer(graph: Graph, logits: Value) -> dict[str, Value]:
        here = Value((1,), np.dtype(np.int32), (1,), (0,), graph.constant(np.full(1, e, np.int32)))
        return {"logits": _made(graph, logits), "exits": _made(graph, here)}

    if e + 1 == len(programs):
        return graph, answer(graph, logits)
    # Names of this graph, which its branches can read.
    outer = [
        v if v.constant is not None else v._replace(name=graph.held(v, v.order)) for v in after
    ]
    logits = logits._replace(name=graph.name(logits), order=(0, 1), held=logits.shape)
    leave = Graph(f"leave{e + 1}.", IMAGES, None)
    branches = {
        "then_branch": (leave, answer(leave, logits)),
        "else_branch": _from_exit(programs, e + 1, outer, defaults),
    }
    written = {name: _graph(name, *branch) for name, branch in branches.items()}
    captured = [name for of_branch in written.values() for name in of_branch[1]]
    condition = graph.add("Reshape", graph.name(leaves), graph.ints())
    graphs = {name: of_branch[0] for name, of_branch in written.items()}
    names = graph.add("If", condition, outputs=2, captured=captured, **graphs)
    results = branches["else_branch"][1]
    return graph, {
        result: v._replace(name=name)
        for (result, v), name in zip(results.items(), names, strict=True)
    }


def _programs(
    network: EarlyExitNetwork, policy: Policy, variables: Variables, image: Any, batch: int
) -> Iterator[Program]:
    """Every exit, traced for `batch` images."""

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

    others = traced(_ANOTHER) if batch == _ANY else itertools.repeat((None, None))
    for (jaxpr, samples), (other, _) in zip(traced(batch), others, strict=False):
        if other is not None:
            _check_any_batch(jaxpr, other)
        yield Program(jaxpr, jax.tree.leaves(samples))


def _check_any_batch(some: Any, other: Any) -> None:
    """Raises NotImplementedError unless two programs differ in the sizes that stand for any batch
    and in nothing else, wherever these occur."""
    for a, b in itertools.zip_longest(_shapes(some), _shapes(other)):
        sizes = list(itertools.zip_longest(a or (), b or ()))
        if not all(pair == (_ANY, _ANOTHER) or (pair[0] == pair[1] != _ANY) for pair in sizes):
            raise NotImplementedError(
                f"{a} values for {_ANY} images and {b} for {_ANOTHER}; sizes must be those of "
                "the batch, or not depend on it."
            )


def _shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from _shapes(inner)


def _whole(name: str, like: Any, order: Sequence[int] | None = None) -> Value:
    """A value at full size, with the shape and dtype of another."""
    shape = tuple(like.shape)
    return Value(shape, like.dtype, shape, tuple(order or range(len(shape))), name)


def _limits(defaults: np.ndarray) -> Value:
    return _whole(THRESHOLDS, defaults)


def _batch_first(value: Value) -> tuple[int, ...]:
    """The order in which a value leaves a model: as it is held, if its rows are samples."""
    as_it_is = value.constant is None and value.order[:1] == (0,)
    return value.order if as_it_is else tuple(range(len(value.shape)))


def _made(graph: Graph, value: Value, order: Sequence[int] | None = None) -> Value:
    """A value as the result of a node, which results of graphs must be."""
    name = graph.name(value, order)
    if not graph.makes(name):
        name = graph.add("Identity", name)
    return _whole(name, value, order)


def _graph(
    title: str, graph: Graph, results: Mapping[str, Value]
) -> tuple[onnx.GraphProto, list[str]]:
    """A graph, and the names that it reads of those around it."""
    names = [v.name for v in results.values()]
    nodes, constants = simplified(graph.nodes, graph.constants, names)
    protos = [
        helper.make_node(node.op, node.inputs, node.outputs, **node.attributes) for node in nodes
    ]
    proto = helper.make_graph(
        protos,
        title,
        [],
        [_info(v) for v in results.values()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    own = {*constants, *(name for node in nodes for name in node.outputs)}
    return proto, sorted({name for node in nodes for name in node.reads} - own)


def _model(
    graph: Graph,
    title: str,
    inputs: Sequence[Value],
    results: Mapping[str, Value],
    defaults: np.ndarray,
) -> onnx.ModelProto:
    internal: dict[str, Value] = {}
    for name, value in results.items():
        twice = value.name in {v.name for v in internal.values()}
        internal[name] = value._replace(name=graph.add("Identity", value.name)) if twice else value
    proto, read = _graph(title, graph, internal)
    _rename(proto, {value.name: name for name, value in internal.items()})
    proto.input.extend(_info(value) for value in inputs)
    if THRESHOLDS in read:
        proto.input.append(_info(_limits(defaults)))
        proto.initializer.append(numpy_helper.from_array(defaults, THRESHOLDS))
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(proto, opset_imports=[opset], ir_version=IR, producer_name="eejax")


def _rename(proto: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Renames values, in branches too."""
    for node in proto.node:
        for several in (node.input, node.output):
            several[:] = [names.get(name, name) for name in several]
        for attribute in node.attribute:
            _rename(attribute.g, names)
    for info in proto.output:
        info.name = names.get(info.name, info.name)


def _info(value: Value) -> onnx.ValueInfoProto:
    sizes = [value.shape[i] for i in value.order]
    sizes = ["batch" if size == _ANY else size for size in sizes]
    return helper.make_tensor_value_info(
        value.name, helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype)), sizes
    )
