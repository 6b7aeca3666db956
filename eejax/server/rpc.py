"""The gRPC side of a server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
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

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        """Answers a request, or ends it with a status."""
        try:
            if request.model_name != self._model.name:
                raise ModelNotFound(request.model_name[:80])
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
            await context.abort(StatusCode.INVALID_ARGUMENT, str(error))
        except ModelNotFound as error:
            await context.abort(StatusCode.NOT_FOUND, str(error))
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


class _Authentication(grpc.aio.ServerInterceptor):
    def __init__(self, tokens: Tokens, metrics: Metrics) -> None:
        self._tokens, self._metrics = tokens, metrics

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        if handler_call_details.method in _OPEN:
            return await continuation(handler_call_details)
        metadata = dict(handler_call_details.invocation_metadata)
        if self._tokens.allow(metadata.get("authorization")):
            return await continuation(handler_call_details)
        self._metrics.refused("unauthenticated")

        async def refuse(request: Any, context: Any) -> None:
            del request
            await context.abort(StatusCode.UNAUTHENTICATED, "a bearer token is needed.")

        return grpc.unary_unary_rpc_method_handler(refuse)


def listener(
    servicer: Servicer, limits: Limits, tokens: Tokens | None, metrics: Metrics
) -> grpc.aio.Server:
    """A gRPC server without ports."""
    interceptors = [] if tokens is None else [_Authentication(tokens, metrics)]
    options = {
        "grpc.max_receive_message_length": limits.message,
        "grpc.max_send_message_length": limits.message,
        "grpc.max_metadata_size": 16 << 10,
        "grpc.max_concurrent_streams": limits.requests,
        "grpc.max_allowed_incoming_connections": limits.connections,
        "grpc.server_handshake_timeout_ms": int(1000 * limits.reading),
        "grpc.max_connection_idle_ms": 300_000,
        # Two servers on one port would share its connections unnoticed.
        "grpc.so_reuseport": 0,
    }
    server = grpc.aio.server(
        interceptors=interceptors,
        options=list(options.items()),
        maximum_concurrent_rpcs=limits.requests,
    )
    add_GRPCInferenceServiceServicer_to_server(servicer, server)
    return server


__all__ = ["CODES", "Servicer", "listener", "pb"]
