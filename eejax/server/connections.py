"""Connections to the REST side: how long one may say nothing, and how many there may be."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from eejax.server.metrics import logger
from eejax.server.security import Limits, Tls

# Seconds between two checks whether a client that has ended its side is still there.
_LOOK = 0.1


class Server(uvicorn.Server):
    """Uvicorn's, with connections of its own. Signals belong to who starts the server.

    Attributes:
      limits: of connections.
      silent: connections that never brought a request, the oldest first.
      resting: those between two requests, the one that rests for longest first.
    """

    def __init__(self, config: uvicorn.Config, limits: Limits) -> None:
        super().__init__(config)
        self.limits = limits
        self.silent: dict[Connection, None] = {}
        self.resting: dict[Connection, None] = {}

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn has it, with a time for handshakes of TLS: asyncio's own is a minute."""
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {"backlog": self.config.backlog}
        if self.config.ssl is not None:
            options |= {"ssl": self.config.ssl, "ssl_handshake_timeout": self.limits.reading}
        self.servers = [
            await loop.create_server(lambda: Connection(self), sock=place, **options)
            for place in sockets or []
        ]
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn has it, without any."""
        yield


class Connection(H11Protocol):
    """A connection that is closed if it does not bring a whole request, or take the whole answer,
    in time. Uvicorn's own time runs only between requests.

    `scope["state"]["begun"]` is the moment from which the time of a request counts: the beginning
    of the connection, or the end of the response before.
    """

    def __init__(self, server: Server) -> None:
        super().__init__(server.config, server.server_state, {})
        self._server, self._limits = server, server.limits
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            # The one that has been silent for longest makes room.
            waiting = itertools.chain(self._server.silent, self._server.resting)
            oldest = next(waiting, self)
            oldest._busy()
            oldest.transport.abort()
        self._begin(self._server.silent)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._running():
            self._busy()

    def on_response_complete(self) -> None:
        self._begin(self._server.resting)
        super().on_response_complete()
        if self._running():
            self._busy()

    def eof_received(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Over TLS, asyncio closes the connection all the same.
        whole = self._running() and not self.cycle.more_body and self.scheme == "http"
        if not whole or self.scope["http_version"] != "1.1":
            return False
        self.cycle.keep_alive = False
        self.loop.call_later(_LOOK, self._look)
        return True

    def send_400_response(self, msg: str) -> None:
        if self._running() and self.cycle.response_started:
            self.transport.abort()
        else:
            super().send_400_response(msg)

    def connection_lost(self, exc: Exception | None) -> None:
        self._busy()
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _running(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _begin(self, queue: dict[Connection, None]) -> None:
        self._busy()
        queue[self] = None
        self.app_state["begun"] = self.loop.time()
        self._watch()

    def _busy(self) -> None:
        self._server.silent.pop(self, None)
        self._server.resting.pop(self, None)

    def _watch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        seconds = self._limits.reading
        if self._running():
            # For the request, for its answer, and for the client to take that.
            seconds += self._limits.seconds + self._limits.reading
        left = self.app_state["begun"] + seconds - self.loop.time()
        if left > 0:
            self._timer = self.loop.call_later(left, self._watch)
        else:
            self.transport.abort()

    def _look(self) -> None:
        """Finds out whether a client that has ended its side is still there: one that is gone
        resets the connection when it gets something. This line may precede every response."""
        if self._running() and not self.cycle.response_started and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.loop.call_later(_LOOK, self._look)


def listener(app: Any, limits: Limits, tls: Tls | None) -> Server:
    """A server that is not yet started: `await server.serve(sockets=[...])`."""
    log = logging.getLogger("uvicorn")  # and `uvicorn.error` below it
    log.handlers, log.propagate = [*logger().handlers], False
    log.setLevel(logging.WARNING)
    options: dict[str, Any] = {} if tls is None else tls.uvicorn()
    config = uvicorn.Config(
        app,
        http="h11",
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
    return Server(config, limits)
