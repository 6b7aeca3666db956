"""Samples in and answers out, in the messages of the Open Inference Protocol (V2).

A request to the first tier holds images, uint8 `[n, height, width, channels]`. A tier sends its
next one the features of a sample, as bytes `[1, size]`, and says before which stage they stand, by
which codec they are bytes, and of which artifact they are. A response has a row for each sample.

The protocol: https://github.com/kserve/open-inference-protocol.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from kserve import InferInput, InferOutput, InferRequest, InferResponse
from kserve.errors import InvalidInput
from kserve.protocol.infer_type import RequestedOutput, to_http_parameters

from eejax.runtime import Manifest
from eejax.server.parsing import cut, packed
from eejax.tiers.codec import CODECS, Layout, decode
from eejax.tiers.tier import Told

IMAGES, FEATURES = "images", "features"
# Names, types and whether there is a column for each class.
_OUTPUTS = {
    "labels": ("INT32", np.int32),
    "logits": ("FP32", np.float32),
    "confidences": ("FP32", np.float32),
    "exits": ("INT32", np.int32),
    "partial": ("BOOL", np.bool_),
    "levels": ("INT32", np.int32),
    "tiers": ("INT32", np.int32),
    "certified": ("BOOL", np.bool_),
}


class Asked(NamedTuple):
    """A request that was read.

    Attributes:
      samples: what the first stage here reads, arrays `[1, ...]` for each sample.
      seconds: until the deadline.
    """

    samples: list[tuple[np.ndarray, ...]]
    seconds: float


class Reader(NamedTuple):
    """Reads requests.

    Attributes:
      manifest: of the artifact.
      stage: the first stage here.
      layout: of its arrays.
      most: samples in a request.
      seconds: the deadline of a request that has none, and the longest.
    """

    manifest: Manifest
    stage: int
    layout: Layout
    most: int
    seconds: float

    def inputs(self) -> list[dict[str, Any]]:
        """The inputs as the protocol describes them."""
        if self.stage:
            return [{"name": FEATURES, "datatype": "UINT8", "shape": [1, -1]}]
        return [{"name": IMAGES, "datatype": "UINT8", "shape": [-1, *self.manifest.image]}]

    def read(self, request: InferRequest, remaining: float | None = None) -> Asked:
        """The samples of a request.

        Args:
          request: of a client or of a tier.
          remaining: seconds that the client waits, if it said so beside the request.

        Raises:
          InvalidInput: if it is none for this server; one line.
        """
        parameters = request.parameters or {}
        if not isinstance(parameters, Mapping):
            raise InvalidInput("parameters are no object.")
        parameters = to_http_parameters(parameters)
        _wanted(request)
        name = FEATURES if self.stage else IMAGES
        names = [tensor.name for tensor in request.inputs]
        if names != [name]:
            first = f", the first {cut(names[0])}" if names else ""
            raise InvalidInput(f"{len(names)} inputs{first}; give one, {name!r}.")
        array = _array(request.inputs[0])
        seconds = self._seconds(parameters, remaining)
        if self.stage:
            return Asked([self._features(array, parameters)], seconds)
        sides = self.manifest.image
        if array.ndim != 4 or array.shape[1:] != sides or not 1 <= len(array) <= self.most:
            raise InvalidInput(
                f"{name} of shape {list(array.shape)}; give [n, {', '.join(map(str, sides))}], "
                f"1 <= n <= {self.most}."
            )
        return Asked([(array[i : i + 1],) for i in range(len(array))], seconds)

    def _features(self, array: np.ndarray, parameters: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
        expected = {"stage": self.stage, "artifact": self.manifest.sha256}
        for key, value in expected.items():
            given = parameters.get(key)
            # True is equal to 1.
            if type(given) is not type(value) or given != value:
                raise InvalidInput(f"{key} {cut(given)}; expected {value!r}.")
        codec = parameters.get("codec")
        if codec not in CODECS or array.ndim != 2 or len(array) != 1:
            raise InvalidInput(
                f"features of shape {list(array.shape)} by the codec {cut(codec)}; give "
                f"[1, bytes] by one of {', '.join(CODECS)}."
            )
        try:
            return decode(array.tobytes(), self.layout, codec)
        except ValueError as error:
            raise InvalidInput(str(error)) from error

    def _seconds(self, parameters: Mapping[str, Any], remaining: float | None) -> float:
        seconds = self.seconds if remaining is None else min(remaining, self.seconds)
        if "deadline_ms" in parameters:
            value = parameters["deadline_ms"]
            try:
                given = math.nan if isinstance(value, bool) else float(value)
            except (TypeError, ValueError, OverflowError):
                given = math.nan
            if not given > 0:
                raise InvalidInput(
                    f"deadline_ms {cut(value)}; give a positive number of milliseconds."
                )
            seconds = min(seconds, 1e-3 * given)
        return seconds


def outputs(classes: int) -> list[dict[str, Any]]:
    """The outputs as the protocol describes them."""
    return [
        {"name": name, "datatype": kind, "shape": [-1, classes] if name == "logits" else [-1]}
        for name, (kind, _) in _OUTPUTS.items()
    ]


def response(
    request: InferRequest, told: Sequence[Told], certified: bool, artifact: str
) -> InferResponse:
    """The response to a request.

    Args:
      request: that is answered.
      told: of its n samples.
      certified: whether a certificate holds for answers by the chosen thresholds.
      artifact: the SHA-256 of its manifest.
    """
    logits = np.stack([answer.logits for answer in told]).astype(np.float32)
    confidences = 1 / np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)
    rows = {
        "labels": logits.argmax(-1),
        "logits": logits,
        "confidences": confidences,
        "exits": [answer.exit for answer in told],
        "partial": [answer.partial for answer in told],
        "levels": [answer.level for answer in told],
        "tiers": [answer.tier for answer in told],
        "certified": [certified and answer.chosen and not answer.partial for answer in told],
    }
    # Its class declares a method of this name, too.
    binary: Any = request.from_grpc
    tensors = []
    for name, (kind, dtype) in _OUTPUTS.items():
        array = np.asarray(rows[name], dtype)
        tensor = InferOutput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array, binary_data=binary)
        tensors.append(tensor)
    parameters = {"artifact": artifact}
    if reasons := sorted({answer.fallback for answer in told if answer.fallback}):
        parameters["fallback"] = ",".join(reasons)
    wanted = _wanted(request)
    return InferResponse(
        response_id=request.id or "",
        model_name=request.model_name,
        infer_outputs=[t for t in tensors if not wanted or t.name in wanted],
        parameters=parameters,
        from_grpc=binary,
        use_binary_outputs=request.use_binary_outputs,
        requested_outputs=list(wanted.values()),
    )


def _wanted(request: InferRequest) -> dict[str, RequestedOutput]:
    """The outputs that are asked for, each once; none for all."""
    wanted: dict[str, RequestedOutput] = {}
    for output in request.request_outputs or ():
        if not isinstance(output.name, str) or output.name not in _OUTPUTS:
            raise InvalidInput(f"no output {cut(output.name)}; there are {', '.join(_OUTPUTS)}.")
        wanted.setdefault(output.name, output)
    return wanted


def _array(tensor: InferInput) -> np.ndarray:
    if tensor.datatype != "UINT8":
        raise InvalidInput(f"{cut(tensor.name)} of {cut(tensor.datatype)}; give UINT8.")
    # None for bytes.
    data: Any = tensor.data
    if data is not None and len(data):
        whole = packed(list(data), list(tensor.shape))
        return np.frombuffer(whole, np.uint8).reshape(tensor.shape)
    try:
        if min(tensor.shape, default=0) < 0:
            raise ValueError
        return tensor.as_numpy()
    except (ValueError, TypeError, OverflowError):
        raise InvalidInput(
            f"{tensor.name} is not what its shape {cut(list(tensor.shape))} says; give as many "
            "whole numbers from 0 to 255."
        ) from None
