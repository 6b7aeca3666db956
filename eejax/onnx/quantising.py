"""int8 models of the stages, by ONNX Runtime's own quantiser.

Convolutions compute in eight bits, with a scale for each output channel. Heads, scores and
decisions stay float32: eight bits of a logit are too few for a threshold. Confidence moves with the
weights all the same, so temperatures and thresholds have to be chosen again, on answers of the
quantised models.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import ArrayLike
from onnxruntime import quantization

# What is quantised where a convolution follows: others are heads and decisions.
_KINDS = ("Add", "AveragePool", "Concat", "Conv", "MaxPool", "Relu")
_BATCH = 64


def quantised(stages: Sequence[onnx.ModelProto], images: np.ndarray) -> list[onnx.ModelProto]:
    """The stages with convolutions in int8.

    Args:
      stages: of `eejax.onnx.stages`, in float32.
      images: `[N, ...]` as the first stage reads them, held out: the ranges of the features are
        those that they cause, at every stage on all of them.

    Raises:
      ValueError: if there are no images.
    """
    if not len(images):
        raise ValueError("no images to quantise with; give some hundred that are held out.")
    parts = [images[i : i + _BATCH] for i in range(0, len(images), _BATCH)]
    inputs = [{"images": part} for part in parts]
    results = []
    with _quiet():
        for stage in stages:
            results.append(_quantised(stage, inputs))
            inputs = [_renamed(made) for made in _run(stage, inputs)]
    return results


def chained(
    stages: Sequence[onnx.ModelProto], parts: Sequence[np.ndarray], thresholds: ArrayLike
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The answers of every exit to all images, also to those that have left before.

    Args:
      stages: E models.
      parts: images `[n, ...]` each, run one after another.
      thresholds: `[E - 1]`.

    Yields:
      For each exit logits `[N, C]`, and whether samples leave there, `[N]` bool.
    """
    limits = np.asarray(thresholds, np.float32)
    inputs = [{"images": part} for part in parts]
    for stage in stages:
        with _quiet():  # not across a yield: it is the whole process's
            made = list(_run(stage, inputs, limits))
        logits = np.concatenate([m["logits"] for m in made])
        leaves = [m.get("leaves", np.ones(len(m["logits"]), bool)) for m in made]
        yield logits, np.concatenate(leaves)
        inputs = [_renamed(m) for m in made]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what ONNX Runtime and its quantiser say: that an input has a default, that a pass
    before quantisation might help, which ours have done, and that channels of zeros have no scale.
    """
    onnxruntime.set_default_logger_severity(3)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with np.errstate(divide="ignore", invalid="ignore"):
            yield
    finally:
        logging.disable(before)
        onnxruntime.set_default_logger_severity(2)


def _run(
    stage: onnx.ModelProto,
    inputs: Sequence[Mapping[str, np.ndarray]],
    thresholds: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    session = onnxruntime.InferenceSession(
        stage.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [node.name for node in session.get_outputs()]
    given = {i.name for i in session.get_overridable_initializers()}
    more = {"thresholds": thresholds} if thresholds is not None and given else {}
    for part in inputs:
        made: Any = session.run(names, {**part, **more})
        yield dict(zip(names, made, strict=True))


def _renamed(made: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the next stage reads."""
    return {f"in{name[3:]}": array for name, array in made.items() if name.startswith("out")}


def _quantised(stage: onnx.ModelProto, parts: Sequence[Mapping[str, np.ndarray]]) -> Any:
    with tempfile.TemporaryDirectory() as place:
        whole, small = Path(place) / "float.onnx", Path(place) / "int8.onnx"
        onnx.save(stage, whole)
        quantization.quantize_static(
            whole,
            small,
            _Reader(parts),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(_KINDS),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=_not_before_convolutions(stage.graph),
        )
        return onnx.load(small)


class _Reader(quantization.CalibrationDataReader):
    def __init__(self, parts: Sequence[Mapping[str, np.ndarray]]) -> None:
        self._parts = iter(parts)

    def get_next(self) -> Any:
        return next(self._parts, None)


def _not_before_convolutions(graph: onnx.GraphProto) -> list[str]:
    """The nodes that are no convolution, and that none depends on."""
    needed: set[str] = set()
    others = []
    for node in reversed(graph.node):
        if node.op_type == "Conv" or needed.intersection(node.output):
            needed.update(node.input)
        else:
            others.append(node.name)
    return others
