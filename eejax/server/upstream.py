"""The way to the next tier, over gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import grpc
import numpy as np
from grpc import StatusCode
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from eejax.runtime import Manifest
from eejax.server.messages import FEATURES
from eejax.server.metrics import logger
from eejax.tiers.codec import CODECS, LOSSLESS, encode
from eejax.tiers.tier import Told, Unanswered

_MOST_TIERS = 16
_REASONS = {"late", "full", "down", "garbage", "open", "refused", "other"}
_OF_STATUS = {
    StatusCode.DEADLINE_EXCEEDED: "late",
    StatusCode.RESOURCE_EXHAUSTED: "full",
    StatusCode.UNAVAILABLE: "down",
    StatusCode.CANCELLED: "down",
    StatusCode.UNAUTHENTICATED: "refused",
    StatusCode.PERMISSION_DENIED: "refused",
}
# After these another server may be there.
_FORGET = (
    StatusCode.UNAVAILABLE,
    StatusCode.INVALID_ARGUMENT,
    StatusCode.NOT_FOUND,
    StatusCode.FAILED_PRECONDITION,
)


class Said(NamedTuple):
    """What a server says of itself, in the extensions of its metadata.

    Attributes:
      artifact: the SHA-256 of its manifest.
      stage: its first.
      codecs: that it reads.
    """

    artifact: str
    stage: int
    codecs: tuple[str, ...]

    def extensions(self) -> list[str]:
        """As the metadata holds it."""
        words = {"artifact": self.artifact, "stage": self.stage, "codecs": " ".join(self.codecs)}
        return [f"eejax {key} {value}" for key, value in words.items()]

    @classmethod
    def read(cls, extensions: Sequence[str]) -> Said:
        """From the metadata; ValueError if it says nothing of the kind."""
        words = dict(e.removeprefix("eejax ").split(" ", 1) for e in extensions if "eejax " in e)
        try:
            return cls(words["artifact"], int(words["stage"]), tuple(words["codecs"].split()))
        except KeyError as error:
            raise ValueError(f"no {error}") from error


class Link(NamedTuple):
    """How to reach a server.

    Attributes:
      address: HOST:PORT.
      model: the name of its model.
      codecs: for features, the most wanted first.
      credentials: of TLS; None for none.
      token: a bearer token; None for none.
    """

    address: str
    model: str
    codecs: tuple[str, ...] = ("bfloat16", "float32")
    credentials: grpc.ChannelCredentials | None = None
    token: str | None = None


class NextTier:
    """Forwards samples, one a call, and takes no longer than it is given."""

    def __init__(self, link: Link, manifest: Manifest, stage: int, most: int = 8 << 20) -> None:
        """Opens a channel, which connects when it is used. Needs a running event loop.

        Args:
          link: to the next tier.
          manifest: of this tier's artifact, which has to be the next one's, too.
          stage: the first that runs there, at least 1.
          most: bytes in a message.

        Raises:
          ValueError: if a codec is unknown, or the token is not printable ASCII without spaces.
        """
        if not all("!" <= character <= "~" for character in link.token or ""):
            raise ValueError("the token of the next tier; give one of printable ASCII, no spaces.")
        if unknown := set(link.codecs) - set(CODECS) or not link.codecs:
            raise ValueError(f"codecs {unknown}; give some of {', '.join(CODECS)}.")
        self._link, self._manifest, self._stage = link, manifest, stage
        options = [
            ("grpc.max_send_message_length", most),
            ("grpc.max_receive_message_length", most),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        if link.credentials is None:
            self._channel = grpc.aio.insecure_channel(link.address, options)
        else:
            self._channel = grpc.aio.secure_channel(link.address, link.credentials, options)
        self._stub: Any = GRPCInferenceServiceStub(self._channel)
        self._metadata = [("authorization", f"Bearer {link.token}")] if link.token else []
        self._codec: str | None = None
        self._agreeing = asyncio.Lock()

    async def close(self) -> None:
        """Ends what is under way, and the channel."""
        await self._channel.close()

    async def forward(self, arrays: tuple[np.ndarray, ...], seconds: float) -> Told:
        """The next tier's answer to one sample.

        Args:
          arrays: what its first stage reads, each `[1, ...]`.
          seconds: from now.

        Raises:
          Unanswered: if there is none in time.
        """
        due = time.monotonic() + seconds
        try:
            async with asyncio.timeout(seconds):
                codec = await self._agreed(due)
                request = self._request(arrays, codec, due)
                left = due - time.monotonic()
                if left <= 0:
                    raise Unanswered("late")
                call = self._stub.ModelInfer(request, timeout=left, metadata=self._metadata)
                told = _told(await call, self._manifest, self._stage)
            return told._replace(chosen=told.chosen and codec in LOSSLESS)
        except Unanswered:
            raise
        except TimeoutError as error:
            raise Unanswered("late") from error
        except grpc.aio.AioRpcError as error:
            if error.code() in _FORGET:
                self._codec = None
            raise Unanswered(_OF_STATUS.get(error.code(), "garbage")) from error
        except Exception as error:  # whatever it is, this tier answers
            fields = {"next": self._link.address, "error": repr(error)[:200]}
            logger().error("the next tier cannot be asked or understood", extra={"fields": fields})
            raise Unanswered("garbage") from error

    async def _agreed(self, due: float) -> str:
        """The codec, after a look at who is there."""
        async with self._agreeing:
            if self._codec is not None:
                return self._codec
            left = due - time.monotonic()
            metadata = await self._stub.ServerMetadata(
                pb.ServerMetadataRequest(), timeout=max(left, 0), metadata=self._metadata
            )
            try:
                said = Said.read(metadata.extensions)
            except ValueError as error:
                raise Unanswered("garbage") from error
            common = [codec for codec in self._link.codecs if codec in said.codecs]
            if (said.artifact, said.stage) != (self._manifest.sha256, self._stage) or not common:
                fields = {
                    "next": self._link.address,
                    "stage": said.stage,
                    "codecs": said.codecs[:8],
                }
                logger().error("the next tier is of other stages", extra={"fields": fields})
                raise Unanswered("other")
            self._codec = common[0]
            return self._codec

    def _request(self, arrays: tuple[np.ndarray, ...], codec: str, due: float) -> Any:
        parameter, data = pb.InferParameter, encode(arrays, codec)
        milliseconds = max(1, int(1000 * (due - time.monotonic())))
        tensor = pb.ModelInferRequest.InferInputTensor(
            name=FEATURES, datatype="UINT8", shape=[1, len(data)]
        )
        return pb.ModelInferRequest(
            model_name=self._link.model,
            inputs=[tensor],
            raw_input_contents=[data],
            parameters={
                "stage": parameter(int64_param=self._stage),
                "codec": parameter(string_param=codec),
                "artifact": parameter(string_param=self._manifest.sha256),
                "deadline_ms": parameter(int64_param=milliseconds),
            },
        )


def _told(response: Any, manifest: Manifest, stage: int) -> Told:
    """The answer in a response; ValueError and the like if it is none."""
    rows = {
        tensor.name: np.frombuffer(raw, _DTYPES[tensor.datatype]).reshape(tuple(tensor.shape))
        for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    (logits,) = rows["logits"]
    ((exit_, level, tier),) = zip(rows["exits"], rows["levels"], rows["tiers"], strict=True)
    ((partial, certified),) = zip(rows["partial"], rows["certified"], strict=True)
    if logits.shape != (len(manifest.classes),) or not np.isfinite(logits).all():
        raise ValueError("logits that are none")
    if not (stage <= exit_ < manifest.num_exits and level >= 0 and 0 <= tier < _MOST_TIERS):
        raise ValueError("an exit that is not there")
    fallback = response.parameters["fallback"].string_param
    if fallback and fallback not in _REASONS:
        raise ValueError("a reason that is none")
    chosen = bool(certified)  # without a certificate nobody asks
    return Told(logits, int(exit_), bool(partial), int(level), chosen, int(tier), fallback)


_DTYPES = {"INT32": np.int32, "FP32": np.float32, "BOOL": np.bool_}
