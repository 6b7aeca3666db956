"""An inference request of the Open Inference Protocol (V2) from the bytes of a REST body.

All is checked by hand, and the first mistake ends it: what a client sends costs little.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import orjson
from kserve import InferInput, InferRequest
from kserve.errors import InvalidInput
from kserve.protocol.infer_type import RequestedOutput

_KINDS = {str: "a string", list: "a list", dict: "an object"}
_SCALARS = (str, int, float, bool)
_DIMENSIONS = 8  # of a shape, at most
# Numbers that are converted at once; other threads run in between.
_AT_ONCE = 1 << 16


def parsed(body: bytes, header: str | None, model: str) -> InferRequest:
    """A request; the data of its input are bytes.

    Args:
      body: JSON, and binary data after it.
      header: `Inference-Header-Content-Length`, the length of the JSON; None for all.
      model: its name.

    Raises:
      InvalidInput: if it is no request; one line.
    """
    length = len(body) if header is None else _length(header, len(body))
    try:
        content = orjson.loads(memoryview(body)[:length])
    except ValueError:
        raise InvalidInput("this is no inference request: no JSON.") from None
    if type(content) is not dict:
        raise InvalidInput("this is no inference request: no JSON object.")
    inputs = _field(content, "inputs", list)
    if len(inputs) != 1:
        raise InvalidInput(f"{len(inputs)} inputs; give one.")
    tensor, raw = _input(inputs[0], memoryview(body)[length:])
    parameters = _parameters(content)
    return InferRequest(
        model,
        [tensor],
        request_id=_field(content, "id", str, ""),
        raw_inputs=[raw],
        parameters=parameters,
        request_outputs=_outputs(content, parameters),
    )


def packed(data: Any, shape: Any) -> bytes:
    """Whole numbers from 0 to 255 as bytes.

    Args:
      data: a list of them, or nested lists.
      shape: of the tensor.

    Raises:
      InvalidInput: if they are others, or not as many as the shape has.
    """
    count = _count(shape)
    wrong = InvalidInput(
        f"data do not fit the shape {shape}; give as many whole numbers from 0 to 255."
    )
    if type(data) is not list:
        raise wrong
    for _ in shape[1:]:
        if not data or type(data[0]) is not list:
            break
        size = len(data[0])
        if len(data) * size > count or any(
            type(row) is not list or len(row) != size for row in data
        ):
            raise wrong
        data = list(itertools.chain.from_iterable(data))
    if len(data) != count:
        raise wrong
    parts = []
    for start in range(0, count, _AT_ONCE):
        part = data[start : start + _AT_ONCE]
        # True is an int, too.
        if {*map(type, part)} != {int} or min(part) < 0 or max(part) > 255:
            raise wrong
        parts.append(bytes(part))
    return b"".join(parts)


def cut(text: Any) -> str:
    """What a client sent, as an error may show it."""
    return repr(text[:78] if isinstance(text, str) else text)[:80]


def _length(header: str, most: int) -> int:
    if not (header.isascii() and header.isdigit() and len(header) < 20) or int(header) > most:
        raise InvalidInput(f"inference-header-content-length {cut(header)} of {most} bytes.")
    return int(header)


def _field(content: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = content.get(key)
    value = default if value is None else value
    if type(value) is not kind:
        raise InvalidInput(
            f"{key} is {'missing' if value is None else 'wrong'}; give {_KINDS[kind]}."
        )
    return value


def _parameters(content: dict[str, Any]) -> dict[str, Any]:
    parameters = _field(content, "parameters", dict, {})
    for key, value in parameters.items():
        if type(value) not in _SCALARS:
            raise InvalidInput(f"the parameter {cut(key)} is no string, number or boolean.")
    return parameters


def _count(shape: Any) -> int:
    sizes = type(shape) is list and len(shape) <= _DIMENSIONS
    if not sizes or any(type(size) is not int or size < 0 for size in shape):
        raise InvalidInput(f"shape is wrong; give up to {_DIMENSIONS} whole numbers.")
    return math.prod(shape)


def _input(tensor: Any, rest: memoryview) -> tuple[InferInput, bytes | memoryview]:
    """The only input, and its data."""
    if type(tensor) is not dict:
        raise InvalidInput("inputs is wrong; give a list of objects.")
    name, kind = _field(tensor, "name", str), _field(tensor, "datatype", str)
    shape, given = _field(tensor, "shape", list), _parameters(tensor)
    if kind != "UINT8":
        raise InvalidInput(f"{cut(name)} of {cut(kind)}; give UINT8.")
    data, size = tensor.get("data"), given.get("binary_data_size", 0)
    if type(size) is not int or size != len(rest):
        raise InvalidInput(f"{len(rest)} bytes of binary data; binary_data_size is {cut(size)}.")
    if "binary_data_size" not in given:
        raw = packed(data, shape)
    elif data is None and size == _count(shape):
        raw = rest
    else:
        raise InvalidInput(f"{size} bytes of binary data for the shape {shape}; give as many.")
    return InferInput(name, shape, kind, parameters=given), raw


def _outputs(content: dict[str, Any], parameters: dict[str, Any]) -> list[RequestedOutput]:
    """Each that is asked for once, with whether it is to be binary."""
    default = _flag(parameters, "binary_data_output", False)
    wanted: dict[str, RequestedOutput] = {}
    for output in _field(content, "outputs", list, []):
        if type(output) is not dict:
            raise InvalidInput("outputs is wrong; give a list of objects.")
        name = _field(output, "name", str)
        binary = _flag(_parameters(output), "binary_data", default)
        wanted.setdefault(name, RequestedOutput(name, {"binary_data": binary}))
    return list(wanted.values())


def _flag(parameters: dict[str, Any], key: str, default: bool) -> bool:
    value = parameters.get(key, default)
    if type(value) is not bool:
        raise InvalidInput(f"{key} {cut(value)}; give true or false.")
    return value
