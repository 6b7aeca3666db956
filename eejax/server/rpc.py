"""The gRPC side of a server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import StatusCode
from kserve import InferRequest
from kserve.errors import InvalidInput, ModelNotFound, ModelNotReady
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import (
    add_GRPCInferenceServiceServicer_to_server,
)
from kserve.protocol.grpc.servicer import InferenceServicer

from eejax.server.metrics import Metrics, logger
from eejax.server.model import EarlyExits
from eejax.server.security import Limits, Tokens
from eejax.serving import Refusal

# Of a refusal.
CODES = {
    "full": StatusCode.RESOURCE_EXHAUSTED,
    "late": StatusCode.RESOURCE_EXHAUSTED,
    "closed": StatusCode.UNAVAILABLE,
    "failed": StatusCode.INTERNAL,
}
_SERVICE = "/inference.GRPCInferenceService/"
# Probes have no token.
_OPEN = (_SERVICE + "ServerLive", _SERVICE + "ServerReady")


class Servicer(InferenceServicer):
    """The protocol's service, with deadlines, and without loading models."""

    def __init__(self, plane: DataPlane, model: EarlyExits, metrics: Metrics) -> None:
        super().__init__(plane, None)  # pyright: ignore[reportArgumentType]
        self._model, self._metrics = model, metrics

    async def ModelReady(self, request: Any, context: Any) -> Any:
        """As the protocol has it."""
        await self._known(request.name, context)
        return await super().ModelReady(request, context)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        """As the protocol has it."""
        await self._known(request.name, context)
        return await super().ModelMetadata(request, context)

    async def _known(self, name: str, context: Any) -> None:
        if name != self._model.name:
            await context.abort(StatusCode.NOT_FOUND, str(ModelNotFound(name[:80])))

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        """Answers a request, or ends it with a status."""
        await self._known(request.model_name, context)
        try:
            self.validate_grpc_request(request)
            try:
                asked = InferRequest.from_grpc(request)
            except InvalidInput:
                raise
            except Exception as error:  # of whatever a message can hold
                raise InvalidInput("this is no inference request.") from error
            response = await self._model.infer(asked, context.time_remaining())
            return response.to_grpc()
        except Refusal as error:
            failed = error.reason == "failed"
            text = "the request could not be processed." if failed else str(error)
            await context.abort(CODES[error.reason], text)
        except InvalidInput as error:
            await context.abort(StatusCode.INVALID_ARGUMENT, str(error)[:400])
        except ModelNotReady as error:
            await context.abort(StatusCode.UNAVAILABLE, str(error))
        except Exception:
            self._metrics.refused("error")
            logger().exception("a request failed")
            await context.abort(StatusCode.INTERNAL, "internal error.")

    async def RepositoryModelLoad(self, request: Any, context: Any) -> None:
        """Not from outside."""
        del request
        await context.abort(StatusCode.UNIMPLEMENTED, "models are not loaded from outside.")

    async def RepositoryModelUnload(self, request: Any, context: Any) -> None:
        """Not from outside."""
        del request
        await context.abort(StatusCode.UNIMPLEMENTED, "models are not unloaded from outside.")


class _Guard(grpc.aio.ServerInterceptor):
    """What a call meets first: whether it may come in, and whether its message is there in time.
    Where too many calls wait for theirs, the one that has waited for longest ends."""

    def __init__(self, limits: Limits, tokens: Tokens | None, metrics: Metrics) -> None:
        self._limits, self._tokens, self._metrics = limits, tokens, metrics
        # Of calls without a message, the oldest first.
        self._silent: dict[asyncio.Timeout, None] = {}
        self._under_way = 0

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        method, metadata = handler_call_details.method, handler_call_details.invocation_metadata
        allowed = self._tokens is None or self._tokens.allow(dict(metadata).get("authorization"))
        if method not in _OPEN and not allowed:
            self._metrics.refused("unauthenticated")
            return grpc.stream_unary_rpc_method_handler(_unauthenticated)
        handler = await continuation(handler_call_details)
        if handler is None:
            return None

        # As a stream, because gRPC waits for a single message for ever.
        async def answer(messages: Any, context: Any) -> Any:
            request = await self._message(messages, context)
            if method in _OPEN:
                return await handler.unary_unary(request, context)
            if self._under_way >= self._limits.requests:
                self._metrics.refused("full")
                text = "too many requests are under way; try again later."
                await context.abort(StatusCode.RESOURCE_EXHAUSTED, text)
            self._under_way += 1
            try:
                return await handler.unary_unary(request, context)
            finally:
                self._under_way -= 1

        return grpc.stream_unary_rpc_method_handler(
            answer, handler.request_deserializer, handler.response_serializer
        )

    async def _message(self, messages: Any, context: Any) -> Any:
        patience = asyncio.timeout(self._limits.reading)
        try:
            async with patience:
                self._silent[patience] = None
                if len(self._silent) > self._limits.requests:
                    oldest = next(iter(self._silent))
                    del self._silent[oldest]
                    if not oldest.expired():
                        oldest.reschedule(0)
                try:
                    return await anext(aiter(messages))
                finally:
                    self._silent.pop(patience, None)
        except TimeoutError:
            text = "the request did not come in time."
            await context.abort(StatusCode.RESOURCE_EXHAUSTED, text)
        except (StopAsyncIteration, DecodeError):
            self._metrics.refused("invalid")
            text = "this is no message of the Open Inference Protocol V2."
            await context.abort(StatusCode.INVALID_ARGUMENT, text)


async def _unauthenticated(messages: Any, context: Any) -> None:
    del messages
    await context.abort(StatusCode.UNAUTHENTICATED, "a bearer token is needed.")


def listener(
    servicer: Servicer, limits: Limits, tokens: Tokens | None, metrics: Metrics
) -> grpc.aio.Server:
    """A gRPC server without ports."""
    options = {
        "grpc.max_receive_message_length": limits.message,
        "grpc.max_send_message_length": limits.message,
        "grpc.max_metadata_size": 16 << 10,
        "grpc.max_concurrent_streams": limits.requests,
        "grpc.max_allowed_incoming_connections": limits.connections,
        "grpc.server_handshake_timeout_ms": int(1000 * limits.reading),
        "grpc.max_connection_idle_ms": int(1000 * limits.reading),
        # Two servers on one port would share its connections unnoticed.
        "grpc.so_reuseport": 0,
    }
    interceptors = [_Guard(limits, tokens, metrics)]
    server = grpc.aio.server(interceptors=interceptors, options=list(options.items()))
    add_GRPCInferenceServiceServicer_to_server(servicer, server)
    return server


__all__ = ["CODES", "Servicer", "listener", "pb"]
