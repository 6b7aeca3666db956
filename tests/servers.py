"""Servers within a test, on loopback and free ports."""

import asyncio
import contextlib
import http.client
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from eejax.server.security import Limits
from eejax.server.serve import Options, serving
from eejax.server.upstream import Link


@contextlib.asynccontextmanager
async def server(place: Path, limits: Limits | None = None, **options: Any):
    """A server of an artifact: its ports and its tier."""
    limits = limits or Limits(seconds=600, draining=5)
    options = {"rest": 0, "grpc": 0, "tile": 8, "threads": 1, **options}
    async with serving(Options(place, limits, **options)) as running:
        yield running


@contextlib.asynccontextmanager
async def tiers(place: Path, cuts: Sequence[int], codec: str, exits: int = 3, **options: Any):
    """Tiers in this process: the ports of the first."""
    async with contextlib.AsyncExitStack() as stack:
        link = None
        for first, end in reversed(list(itertools.pairwise([0, *cuts, exits]))):
            ports, _ = await stack.enter_async_context(
                server(place, stages=(first, end), link=link, **options)
            )
            link = Link(f"127.0.0.1:{ports.grpc}", "model", (codec,))
        yield ports


class Reply:
    """Of REST: status, headers, and the JSON of the body, or its text."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers = response.status, dict(response.getheaders())
        self.text = response.read().decode()
        self.content: Any = json.loads(self.text) if self.text[:1] == "{" else None


async def ask(port: int, path: str, body: Any = None, **headers: str) -> Reply:
    """GET, or POST with a body: bytes, or what JSON holds."""

    def run() -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.closing(connection):
            if body is None:
                connection.request("GET", path, headers=headers)
            else:
                data = body if isinstance(body, bytes) else json.dumps(body)
                kind = {"content-type": "application/json", **headers}
                connection.request("POST", path, data, kind)
            return Reply(connection.getresponse())

    return await asyncio.to_thread(run)


def request(images: np.ndarray, **parameters: Any) -> dict[str, Any]:
    """An inference request in JSON."""
    tensor = {"name": "images", "datatype": "UINT8", "shape": list(images.shape)}
    tensor["data"] = images.ravel().tolist()
    return {"inputs": [tensor], "parameters": parameters}


INFER = "/v2/models/model/infer"


def message(images: np.ndarray, **parameters: Any) -> Any:
    """An inference request for gRPC."""
    tensor = pb.ModelInferRequest.InferInputTensor(
        name="images", datatype="UINT8", shape=list(images.shape)
    )
    kinds = {int: "int64_param", str: "string_param", bool: "bool_param"}
    return pb.ModelInferRequest(
        model_name="model",
        inputs=[tensor],
        raw_input_contents=[images.tobytes()],
        parameters={
            name: pb.InferParameter(**{kinds[type(value)]: value})
            for name, value in parameters.items()
        },
    )


@contextlib.asynccontextmanager
async def stub(port: int, credentials: grpc.ChannelCredentials | None = None):
    """The protocol's client for gRPC."""
    address = f"127.0.0.1:{port}"
    if credentials is None:
        channel = grpc.aio.insecure_channel(address)
    else:
        channel = grpc.aio.secure_channel(address, credentials)
    async with channel:
        yield GRPCInferenceServiceStub(channel)


def rows(response: Any) -> dict[str, np.ndarray]:
    """The outputs of a response, of gRPC or of REST."""
    kinds = {"INT32": np.int32, "FP32": np.float32, "BOOL": np.bool_}
    if isinstance(response, dict):
        return {
            tensor["name"]: np.array(tensor["data"], kinds[tensor["datatype"]]).reshape(
                tensor["shape"]
            )
            for tensor in response["outputs"]
        }
    return {
        tensor.name: np.frombuffer(raw, kinds[tensor.datatype]).reshape(tuple(tensor.shape))
        for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
