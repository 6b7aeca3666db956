"""The REST side of a server: the protocol's endpoints, metrics, and a guard before them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterator, MutableMapping
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from kserve.errors import InvalidInput, ModelNotFound, ModelNotReady, ServerNotReady
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.rest.v2_endpoints import register_v2_endpoints
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from uvicorn.protocols.http.h11_impl import H11Protocol

from eejax.server.metrics import Metrics, logger
from eejax.server.security import Limits, Tls, Tokens
from eejax.serving import Refusal

# Of a refusal.
STATUS = {"full": 429, "late": 429, "closed": 503, "failed": 500}
# Probes have no token.
_OPEN = ("/v2/health/live", "/v2/health/ready")
_METRICS = "/metrics"
# The length of the JSON before binary data.
_BINARY = b"inference-header-content-length"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Coroutine[Any, Any, None]]


def application(plane: DataPlane, metrics: Metrics, limits: Limits, tokens: Tokens | None) -> App:
    """The ASGI application.

    Args:
      plane: with the model.
      metrics: to show.
      limits: of requests.
      tokens: that clients need; None for none.
    """
    app = FastAPI(title="eejax", docs_url=None, redoc_url=None, openapi_url=None)
    register_v2_endpoints(app, plane, None)

    @app.get(_METRICS)
    async def _metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        del request
        # What went wrong with a sample inside is for the log.
        text = str(error) if error.reason != "failed" else "the request could not be processed."
        headers = {"retry-after": "1"} if STATUS[error.reason] != 500 else None
        return JSONResponse({"error": text}, STATUS[error.reason], headers)

    def answer(status: int) -> Any:
        async def handler(request: Request, error: Exception) -> Response:
            del request
            return JSONResponse({"error": str(error)}, status)

        return handler

    async def malformed(request: Request, error: Exception) -> Response:
        del request, error
        metrics.refused("invalid")
        text = "this is no inference request of the Open Inference Protocol V2."
        return JSONResponse({"error": text}, 400)

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(InvalidInput, answer(400))
    app.add_exception_handler(ModelNotFound, answer(404))
    app.add_exception_handler(ModelNotReady, answer(503))
    app.add_exception_handler(ServerNotReady, answer(503))
    app.add_exception_handler(RequestValidationError, malformed)
    return Guard(app, limits, tokens, metrics)


class Guard:
    """What a request meets first: whether it may come in, whether there is a place for it, and
    whether it is all there in time. A client that leaves ends its request."""

    def __init__(self, app: App, limits: Limits, tokens: Tokens | None, metrics: Metrics) -> None:
        self._app, self._limits, self._tokens, self._metrics = app, limits, tokens, metrics
        self._under_way = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            return
        path = scope["path"]
        headers = dict(scope["headers"])
        if _BINARY not in headers:
            # Clients that send JSON and do not say so are meant to be understood.
            others = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
            scope = {**scope, "headers": [*others, (b"content-type", b"application/json")]}
        allowed = self._tokens is None or self._tokens.allow(headers.get(b"authorization"))
        if path not in _OPEN and not allowed:
            self._metrics.refused("unauthenticated")
            await _error(send, 401, "a bearer token is needed.")
            return
        if path.startswith("/v2/repository"):
            await _error(send, 404, "models are neither loaded nor unloaded from outside.")
            return
        if self._under_way >= self._limits.requests:
            self._metrics.refused("full")
            await _error(send, 429, "too many requests are under way; try again later.")
            return
        self._under_way += 1
        try:
            await self._let_in(scope, receive, send)
        finally:
            self._under_way -= 1

    async def _let_in(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._limits.reading):
                body = await _body(receive, dict(scope["headers"]), self._limits.message)
        except TimeoutError:
            await _error(send, 408, "the request did not come in time.")
            return
        except OverflowError:
            self._metrics.refused("invalid")
            await _error(send, 413, f"give {self._limits.message:,} bytes at most.")
            return
        if body is None:
            return
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        work = asyncio.create_task(self._app(scope, _given(body), noting))
        leaving = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait([work, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
        except Exception:
            # FastAPI raises what its handlers do not know, after it was to answer.
            self._metrics.refused("error")
            logger().exception("a request failed")
            if not begun:
                await _error(send, 500, "internal error.")
        finally:
            for task in (work, leaving):
                task.cancel()


async def _body(receive: Receive, headers: dict[bytes, bytes], most: int) -> bytes | None:
    """The body of a request; None if the client is gone; OverflowError if it is too long."""
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or int(length) > most:
        raise OverflowError
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise OverflowError
        if not message.get("more_body", False):
            return b"".join(parts)


def _given(body: bytes) -> Receive:
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        for message in messages:
            return message
        return await asyncio.get_running_loop().create_future()  # never

    return receive


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _error(send: Send, status: int, text: str) -> None:
    data = json.dumps({"error": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers += [(b"content-length", str(len(data)).encode())]
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    headers += [(b"retry-after", b"1")] if status == 429 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


def listener(app: App, limits: Limits, tls: Tls | None) -> uvicorn.Server:
    """A server that is not yet started: `await server.serve(sockets=[...])`."""

    # Connections that never brought a request, the oldest first.
    silent: dict[H11Protocol, None] = {}

    class Patient(H11Protocol):
        """A connection that is closed if it brings no request for a while: uvicorn's own time runs
        from the end of a request, and not from the beginning of a connection. Where there are too
        many, the one that has been silent for longest is closed, so that newcomers get in."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            silent[self] = None
            if len(self.connections) > limits.connections:
                oldest = next(iter(silent))
                del silent[oldest]
                oldest.transport.abort()
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None:
                silent.pop(self, None)

        def _watch(self) -> None:
            before = self.cycle
            self._patience = self.loop.call_later(limits.reading, self._give_up, before)

        def _give_up(self, before: Any) -> None:
            if self.transport.is_closing():
                return
            idle = self.cycle is None or self.cycle.response_complete
            if idle and self.cycle is before:
                self.transport.abort()
            else:
                self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            silent.pop(self, None)
            self._patience.cancel()
            super().connection_lost(exc)

    options: dict[str, Any] = {} if tls is None else tls.uvicorn()
    config = uvicorn.Config(
        app,
        http=Patient,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(limits.draining) + 1,
        **options,
    )
    return _Server(config)


class _Server(uvicorn.Server):
    """Signals belong to who starts the server."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
