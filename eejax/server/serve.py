"""A server, from an artifact to the end of its process."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn
from kserve.model_repository import ModelRepository
from kserve.protocol.dataplane import DataPlane

import eejax
from eejax import runtime
from eejax.runtime.manifest import sha256
from eejax.server import rest, rpc
from eejax.server.guarded import Guarded
from eejax.server.messages import Reader
from eejax.server.metrics import Metrics, logger
from eejax.server.model import EarlyExits
from eejax.server.security import Limits, Tls, Tokens
from eejax.server.upstream import Link, NextTier, Said
from eejax.serving import Drift, Level, Scheduler, Service, noise, watched, whole
from eejax.tiers import Tier
from eejax.tiers.codec import CODECS, layouts
from eejax.tiers.prepare import prepare


@dataclasses.dataclass(frozen=True)
class Options:
    """Of a server.

    Attributes:
      artifact: its directory.
      limits: of clients.
      name: of the model, in requests.
      host: to listen at.
      rest, grpc: ports; 0 for any that is free.
      stages: the first, and the one after the last; None for all.
      link: to the next tier; None for none.
      codecs: for features that come in.
      tile: samples that run together, at most.
      threads: of ONNX Runtime; None for one for each core.
      thresholds: E - 1, in place of the artifact's and its certificate; None for those.
      delta: probability of a false alarm of drift, ever; 0 to watch for none.
      tls: certificates; None for none.
      tokens: that clients need; None for none.
    """

    artifact: Path
    limits: Limits
    name: str = "model"
    host: str = "127.0.0.1"
    rest: int = 8080
    grpc: int = 8081
    stages: tuple[int, int] | None = None
    link: Link | None = None
    codecs: tuple[str, ...] = CODECS
    tile: int = 64
    threads: int | None = None
    thresholds: tuple[float, ...] | None = None
    delta: float = 0.01
    tls: Tls | None = None
    tokens: Tokens | None = None


class Ports(NamedTuple):
    """Where a server listens."""

    rest: int
    grpc: int


class _Plane(DataPlane):
    """The protocol's implementation, with this server's own name and readiness."""

    def __init__(self, model: EarlyExits, said: Said, service: Service) -> None:
        models = ModelRepository()
        models.update(model)
        super().__init__(models)
        self._model, self._said, self._service = model, said, service

    def metadata(self) -> dict[str, Any]:
        """As the protocol has it."""
        version = eejax.__version__
        return {"name": "eejax", "version": version, "extensions": self._said.extensions()}

    async def ready(self) -> bool:
        """Whether requests are taken."""
        return self._model.ready and not self._service.broke


@contextlib.asynccontextmanager
async def serving(options: Options) -> AsyncIterator[tuple[Ports, Tier]]:
    """A server at work. At the end of the block it takes no more requests and finishes those that
    are under way, for `limits.draining` seconds at most.

    Raises:
      ValueError: if the artifact cannot be read, or has no such stages.
      OSError: if it cannot listen.
    """
    log = logger()
    artifact = runtime.load(options.artifact, options.threads)
    if options.thresholds is not None:
        artifact = _with_thresholds(artifact, options.thresholds)
    manifest = artifact.manifest
    exits = manifest.num_exits
    first, end = options.stages or (0, exits)
    if not 0 <= first < end <= exits:
        raise ValueError(f"stages {first}:{end}; give some of 0:{exits}.")
    if (options.link is None) != (end == exits):
        raise ValueError(
            f"stages {first}:{end} of {exits} {'without' if end < exits else 'with'} a next tier; "
            "the last stages run in the last tier."
        )
    limits = options.limits
    log.info("measuring", extra={"fields": {"artifact": str(options.artifact)}})
    sizes = (options.tile, limits.requests)
    stages, service = await asyncio.to_thread(prepare, artifact, first, end, *sizes)
    layout, core = layouts(artifact)[first], service.scheduler
    metrics = Metrics(core)
    async with contextlib.AsyncExitStack() as stack:
        upstream = None
        if options.link is not None:
            link = NextTier(options.link, manifest, end, limits.message)
            stack.push_async_callback(link.close)
            upstream = Guarded(link, options.link.address)
        await stack.enter_async_context(service)
        tier = Tier(stages, service, upstream)
        reader = Reader(manifest, first, layout, limits.batch, limits.seconds)
        model = EarlyExits(options.name, tier, manifest, reader, metrics)
        # Later tiers do not know by which thresholds a sample came to them.
        watches = first == 0 and options.delta > 0
        drift = watched(manifest, options.delta) if watches else None
        if drift is not None:
            core.decided = _noted(drift, model, metrics, core, stages.here(whole(exits)))
        plane = _Plane(model, Said(manifest.sha256, first, options.codecs), service)
        ports = await _listen(stack, options, plane, model, metrics)
        model.ready = True
        fields = {"host": options.host, **ports._asdict(), "stages": f"{first}:{end}"}
        log.info("serving", extra={"fields": fields})
        try:
            yield ports, tier
        finally:
            model.ready = False
            log.info("draining", extra={"fields": {"under_way": core.under_way}})
    log.info("stopped")


def _with_thresholds(artifact: runtime.Runtime, thresholds: Sequence[float]) -> runtime.Runtime:
    """The artifact with other thresholds, which makes it another one, without certificate."""
    manifest = artifact.manifest
    _, own = artifact.checked(noise(manifest.image, 1), thresholds)
    left_out = ("certificate", "levels")
    changed = dataclasses.replace(
        manifest,
        sha256=sha256(manifest.sha256.encode() + own.tobytes()),
        thresholds=own,
        content={key: part for key, part in manifest.content.items() if key not in left_out},
    )
    return dataclasses.replace(artifact, manifest=changed)


def _noted(
    drift: Drift, model: EarlyExits, metrics: Metrics, scheduler: Scheduler, path: list[Level]
) -> Callable[[int, bool], None]:
    """What notes decisions by the chosen thresholds, and on an alarm sends all samples on."""
    decisions = model.exits - 1

    def noted(exit: int, goes_on: bool) -> None:
        if drift.alarm or exit >= decisions:
            return
        drift.note(exit, goes_on)
        if drift.alarm:
            # The thresholds and their certificate are those of other data.
            metrics.drift.set(1)
            model.certified = False
            scheduler.follow(path)
            logger().error("drift", extra={"fields": {"alarm": drift.alarm}})

    return noted


async def _listen(
    stack: contextlib.AsyncExitStack,
    options: Options,
    plane: _Plane,
    model: EarlyExits,
    metrics: Metrics,
) -> Ports:
    """Opens the ports; the stack closes them."""
    limits, tls, tokens = options.limits, options.tls, options.tokens
    place = _socket(options.host, options.rest)
    web = rest.listener(rest.application(plane, metrics, limits, tokens), limits, tls)
    task = asyncio.create_task(web.serve(sockets=[place]))
    while not (web.started or task.done()):
        await asyncio.sleep(0.01)
    server = rpc.listener(rpc.Servicer(plane, model, metrics), limits, tokens, metrics)
    # By number: gRPC would listen at all that a name stands for.
    host, rest_port = place.getsockname()[:2]
    address = f"[{host}]:{options.grpc}" if ":" in host else f"{host}:{options.grpc}"
    try:
        if tls is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, tls.server())
    except RuntimeError as error:
        await _ended(web, task)
        raise OSError(f"cannot listen at {address}: {error}") from error
    await server.start()

    async def end() -> None:
        await asyncio.gather(_ended(web, task), server.stop(limits.draining))

    stack.push_async_callback(end)
    return Ports(rest_port, port)


def _socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol by name: only then asyncio switches Nagle's algorithm off, which would hold
    # the end of every response for 40 ms.
    place = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind((host, port))
        place.listen(2048)
    except OSError:
        place.close()
        raise
    return place


async def _ended(web: uvicorn.Server, task: asyncio.Task[None]) -> None:
    web.should_exit = True
    await task


async def serve(options: Options) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what is under way; a second signal ends it."""
    # The engine's thread waits for the loop's thread that long after each stage.
    sys.setswitchinterval(1e-4)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    async with serving(options) as (_, tier):
        # A full collection looks at all that was imported, for longer than many a deadline: 35 ms.
        gc.collect()
        gc.freeze()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _signalled, stop, number)
        # Whoever started it has to learn that it can serve no more.
        while not (stop.is_set() or tier.service.broke):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 1.0)
        if tier.service.broke:
            logger().critical("the service broke")


def _signalled(stop: asyncio.Event, number: int) -> None:
    if stop.is_set():
        # As if nothing had handled it.
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    stop.set()
