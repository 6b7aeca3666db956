"""One model that stops by itself, from the models of the stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

IMAGES, THRESHOLDS = "images", "thresholds"


def single(stages: Sequence[onnx.ModelProto]) -> onnx.ModelProto:
    """A model for one image that runs no stage after the exit that it takes.

    It reads `images` `[1, ...]` and `thresholds`, and makes `logits` `[1, C]`, the policy's, and
    `exits` `[1]`, the exit, 0-based, int32. Each exit but the last is an `If`. What follows the
    exit stands in its branch, with its weights: runtimes prepare weights for their kernels only in
    the graph that holds them.

    Args:
      stages: of `eejax.onnx.stages`, or these quantised.
    """
    first = stages[0]
    results = ("logits", "exits")
    graph = _from_exit(stages, 0, results)
    graph.input.extend(first.graph.input)
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    graph.initializer.extend(i for i in first.graph.initializer if i.name == THRESHOLDS)
    return helper.make_model(
        graph,
        opset_imports=first.opset_import,
        ir_version=first.ir_version,
        producer_name=first.producer_name,
    )


def _from_exit(
    stages: Sequence[onnx.ModelProto], e: int, results: tuple[str, str]
) -> onnx.GraphProto:
    """Stage e and, in the branch of an `If`, all that follow; it makes `results`."""
    stage = stages[e].graph
    classes = stage.output[0].type.tensor_type.shape.dim[1].dim_value
    here = numpy_helper.from_array(np.full(1, e, np.int32), f"exit{e + 1}.here")

    def answer(names: tuple[str, str]) -> tuple[list[onnx.NodeProto], list[Any]]:
        nodes = [
            helper.make_node("Identity", [f"exit{e + 1}.logits"], [names[0]]),
            helper.make_node("Identity", [here.name], [names[1]]),
        ]
        return nodes, [
            helper.make_tensor_value_info(names[0], TensorProto.FLOAT, [1, classes]),
            helper.make_tensor_value_info(names[1], TensorProto.INT32, [1]),
        ]

    # Names are unique over all branches; what a stage reads are results of the one before.
    names = {IMAGES: IMAGES, THRESHOLDS: THRESHOLDS, "": ""}
    names |= {i.name: f"exit{e}.out{i.name[2:]}" for i in stage.input if i.name not in names}
    nodes = []
    for node in stage.node:
        copy = nodes.append(onnx.NodeProto()) or nodes[-1]
        copy.CopyFrom(node)
        copy.name = f"exit{e + 1}.{node.name}"
        copy.input[:] = [names.get(name, f"exit{e + 1}.{name}") for name in node.input]
        copy.output[:] = [f"exit{e + 1}.{name}" for name in node.output]
    constants = [here]
    for constant in stage.initializer:
        if constant.name != THRESHOLDS:
            copy = constants.append(onnx.TensorProto()) or constants[-1]
            copy.CopyFrom(constant)
            copy.name = f"exit{e + 1}.{constant.name}"
    last, infos = answer(results)
    if e + 1 == len(stages):
        return helper.make_graph([*nodes, *last], f"exit{e + 1}", [], infos, constants)
    left = f"leave{e + 1}.logits", f"leave{e + 1}.exits"
    leaving, leaving_infos = answer(left)
    after = f"after{e + 1}.logits", f"after{e + 1}.exits"
    nodes.append(
        helper.make_node(
            "If",
            [f"exit{e + 1}.leaves"],
            results,
            then_branch=helper.make_graph(leaving, f"leave{e + 1}", [], leaving_infos),
            else_branch=_from_exit(stages, e + 1, after),
        )
    )
    return helper.make_graph(nodes, f"exit{e + 1}", [], infos, constants)
