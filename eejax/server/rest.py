"""The REST side of a server: the protocol's endpoints, metrics, and a guard before them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from kserve import InferResponse
from kserve.errors import InvalidInput, ModelNotFound, ModelNotReady, ServerNotReady
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.rest.v2_endpoints import V2Endpoints
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from eejax.server.connections import listener
from eejax.server.metrics import Metrics, logger
from eejax.server.parsing import parsed
from eejax.server.security import Limits, Tokens
from eejax.serving import Refusal

# Of a refusal.
STATUS = {"full": 429, "late": 429, "closed": 503, "failed": 500}
# Probes have no token.
_OPEN = ("/v2/health/live", "/v2/health/ready")
_METRICS = "/metrics"
_LENGTH = "inference-header-content-length"
# Bytes of a body above which it is parsed in a thread.
_INLINE = 64 << 10
# Bytes of a refused request that are read, so that the client sees the answer.
_DISCARDED = 64 << 20

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
    _describe(app, plane)
    # Large bodies one after the other, because each needs many times its size.
    large = asyncio.Lock()

    @app.get(_METRICS)
    async def _metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/v2/models/{name}/infer")
    async def _infer(name: str, request: Request) -> Response:
        body, header = await request.body(), request.headers.get(_LENGTH)
        try:
            if not await plane.model_ready(name, True):
                raise ModelNotReady(name)
            if len(body) <= _INLINE:
                asked = parsed(body, header, name)
            else:
                async with large:
                    asked = await asyncio.to_thread(parsed, body, header, name)
        except (InvalidInput, ModelNotFound):
            metrics.refused("invalid")
            raise
        response, _ = await plane.infer(name, asked)
        assert isinstance(response, InferResponse)
        content, length = response.to_rest()
        if length is None:
            return Response(orjson.dumps(content), media_type="application/json")
        return Response(content, 200, {_LENGTH: str(length)}, "application/octet-stream")

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
            # A name in it can be as long as a path.
            return JSONResponse({"error": " ".join(str(error).split())[:300]}, status)

        return handler

    async def nothing_there(request: Request, error: Exception) -> Response:
        del request
        metrics.refused("invalid")
        status = getattr(error, "status_code", 404)
        return JSONResponse({"error": "there is no such endpoint."}, status)

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(InvalidInput, answer(400))
    app.add_exception_handler(ModelNotFound, answer(404))
    app.add_exception_handler(ModelNotReady, answer(503))
    app.add_exception_handler(ServerNotReady, answer(503))
    app.add_exception_handler(404, nothing_there)
    app.add_exception_handler(405, nothing_there)
    return Guard(app, limits, tokens, metrics)


def _describe(app: FastAPI, plane: DataPlane) -> None:
    """The protocol's endpoints for GET; versions of a model and the repository are left out."""
    endpoints = V2Endpoints(plane)

    async def model(name: str) -> Any:
        return await endpoints.model_metadata(name)

    async def model_ready(name: str) -> Any:
        return await endpoints.model_ready(name)

    app.add_api_route("/v2", endpoints.metadata)
    app.add_api_route("/v2/health/live", endpoints.live)
    app.add_api_route("/v2/health/ready", endpoints.ready)
    app.add_api_route("/v2/models", endpoints.models)
    app.add_api_route("/v2/models/{name}", model)
    app.add_api_route("/v2/models/{name}/ready", model_ready)


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
        incoming = _Incoming(receive, scope["state"]["begun"] + self._limits.reading)
        if path in _OPEN:
            # Even if all places are taken.
            if scope["method"] == "GET":
                await self._app(scope, _given(b""), send)
            else:
                await _error(send, 405, "give GET.", incoming)
        elif self._tokens is not None and not self._tokens.allow(headers.get(b"authorization")):
            self._metrics.refused("unauthenticated")
            await _error(send, 401, "a bearer token is needed.", incoming)
        elif path.startswith("/v2/repository"):
            text = "models are neither loaded nor unloaded from outside."
            await _error(send, 404, text, incoming)
        elif self._under_way >= self._limits.requests:
            self._metrics.refused("full")
            text = "too many requests are under way; try again later."
            await _error(send, 429, text, incoming)
        else:
            self._under_way += 1
            try:
                await self._let_in(scope, incoming, send)
            finally:
                self._under_way -= 1

    async def _let_in(self, scope: Message, incoming: _Incoming, send: Send) -> None:
        receive = incoming.receive
        try:
            body = await incoming.body(dict(scope["headers"]), self._limits.message)
        except TimeoutError:
            await _error(send, 408, "the request did not come in time.")
            return
        except OverflowError:
            self._metrics.refused("invalid")
            text = f"give {self._limits.message:,} bytes at most."
            await _error(send, 413, text, incoming)
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


class _Incoming:
    """The body of a request, and the time until which it has to be there."""

    def __init__(self, receive: Receive, until: float) -> None:
        self.receive, self._until, self._more = receive, until, True

    async def body(self, headers: dict[bytes, bytes], most: int) -> bytes | None:
        """All of it; None if the client is gone; OverflowError or TimeoutError."""
        if int(headers.get(b"content-length", b"0")) > most:
            raise OverflowError
        parts, size = [], 0
        async with asyncio.timeout_at(self._until):
            while self._more:
                part = await self._part()
                if part is None:
                    return None
                parts.append(part)
                size += len(part)
                if size > most:
                    raise OverflowError
        return b"".join(parts)

    async def discard(self) -> None:
        """Reads what is left of it, within bounds: if a connection is closed before, clients that
        are still sending lose the answer."""
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._until):
                while self._more and size < _DISCARDED:
                    size += len(await self._part() or b"")

    async def _part(self) -> bytes | None:
        message = await self.receive()
        self._more = message.get("more_body", False)
        return None if message["type"] == "http.disconnect" else message.get("body", b"")


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


async def _error(send: Send, status: int, text: str, incoming: _Incoming | None = None) -> None:
    """Answers, reads what is still to come of the request, and closes the connection."""
    data = json.dumps({"error": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers += [(b"content-length", str(len(data)).encode())]
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    headers += [(b"allow", b"GET")] if status == 405 else []
    headers += [(b"retry-after", b"1")] if status == 429 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data, "more_body": True})
    if incoming is not None:
        await incoming.discard()
    await send({"type": "http.response.body", "body": b""})


__all__ = ["STATUS", "Guard", "application", "listener"]
