"""A link: a proxy on loopback that delays bytes and paces them."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import time
from collections.abc import AsyncIterator

from eejax.planning import Link

_CHUNK = 1448  # bytes, of a packet
_AHEAD = 1 << 18  # bytes under way, at most, as in a router's buffer


class Shaper:
    """One direction of a link: everything that crosses it shares its rate.

    Attributes:
      bytes: that crossed.
    """

    def __init__(self, bits_per_second: float, delay: float, jitter: float, seed: int) -> None:
        self.bytes = 0
        self._rate, self._delay, self._jitter = bits_per_second / 8, delay, jitter
        self._random = random.Random(seed)
        self._free = 0.0

    def arrival(self, size: int) -> float:
        """When bytes that are sent now are there, in the loop's time."""
        self.bytes += size
        self._free = max(self._free, time.monotonic()) + size / self._rate
        return self._free + self._delay + self._random.uniform(-self._jitter, self._jitter)


class Counters:
    """The two directions of a link.

    Attributes:
      up: towards the server.
      down: back.
    """

    def __init__(self, link: Link, seed: int) -> None:
        half = link.round_trip_seconds / 2
        self.up = Shaper(link.up_bits_per_second, half, link.jitter_seconds, seed)
        self.down = Shaper(link.down_bits_per_second, half, link.jitter_seconds, seed + 1)


@contextlib.asynccontextmanager
async def emulated(link: Link, address: str, seed: int = 0) -> AsyncIterator[tuple[str, Counters]]:
    """A link to a server: the address of its near end, and what crossed it.

    Args:
      link: rates, round trip and jitter; connections share them.
      address: HOST:PORT of the server.
      seed: of the jitter.
    """
    counters = Counters(link, seed)
    host, _, port = address.rpartition(":")

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A connection that is cut at the end is no news to anybody.
        with contextlib.suppress(OSError, asyncio.CancelledError):
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            try:
                await asyncio.gather(
                    _carry(reader, far_writer, counters.up),
                    _carry(far_reader, writer, counters.down),
                )
            finally:
                far_writer.transport.abort()
        writer.transport.abort()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        near = server.sockets[0].getsockname()
        yield f"{near[0]}:{near[1]}", counters


async def _carry(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, shaper: Shaper
) -> None:
    """Moves bytes in their order until one side ends."""
    under_way: collections.deque[tuple[float, bytes]] = collections.deque()
    news, ended, size = asyncio.Event(), False, 0

    async def deliver() -> None:
        nonlocal size
        while not (ended and not under_way):
            if not under_way:
                news.clear()
                await news.wait()
                continue
            when, data = under_way[0]
            # A sleep ends up to a millisecond late, which would be longer than some links.
            while (left := when - time.monotonic()) > 0:
                await asyncio.sleep(left - 0.0015 if left > 0.0015 else 0)
            under_way.popleft()
            size -= len(data)
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()

    delivery = asyncio.create_task(deliver())
    try:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(_CHUNK):
                under_way.append((shaper.arrival(len(data)), data))
                size += len(data)
                news.set()
                while size > _AHEAD:
                    await asyncio.sleep(0.001)
        ended = True
        news.set()
        with contextlib.suppress(ConnectionError):
            await delivery
    finally:
        delivery.cancel()
