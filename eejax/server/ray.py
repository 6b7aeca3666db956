"""The stages of a network as a Ray Serve application: a deployment for each group of stages.

Each replica loads the artifact, measures its stages and schedules them as `eejax serve` does. A
sample that leaves at none of a group's exits goes on to the next deployment by its handle, with the
time that is left. Ray places replicas, adds and removes them by the length of their queues, and
replaces those that die. Ray Serve: https://docs.ray.io/en/latest/serve/.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from kserve import InferRequest
from kserve.errors import InvalidInput

from eejax import runtime
from eejax.runtime.manifest import read
from eejax.server import messages
from eejax.server.guarded import Guarded
from eejax.server.messages import Reader
from eejax.server.parsing import parsed
from eejax.server.rest import STATUS
from eejax.server.security import Limits
from eejax.serving import Refusal
from eejax.tiers import Tier, Told, Unanswered
from eejax.tiers.codec import layouts
from eejax.tiers.prepare import prepare

try:
    from ray import serve
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import BackPressureError, RayServeException
    from ray.serve.handle import DeploymentHandle
    from ray.serve.schema import LoggingConfig
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f'Ray is missing: pip install "eejax[ray]" ({error})') from error

# Of `Unanswered`, for a refusal.
_REASONS = {"full": "full", "late": "full", "closed": "down", "failed": "garbage"}
# The length of the JSON before binary data.
_LENGTH = "inference-header-content-length"
_PATH = "/v2/models/model/infer"
# What its next stage reads, each `[1, ...]`, and seconds that it has left.
Sample = tuple[tuple[np.ndarray, ...], float]


class NextGroup:
    """The way to the next group of stages, over the handle of its deployment.

    A call costs milliseconds, so samples that go on in the same turn of the event loop, such as
    those of a tile, share one. Their answers come together, when the last of them is there.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._call: tuple[list[Sample], asyncio.Task[list[Told | str] | str]] | None = None

    async def forward(self, arrays: tuple[np.ndarray, ...], seconds: float) -> Told:
        """As `Upstream.forward`."""
        if self._call is None:
            batch: list[Sample] = []
            self._call = batch, asyncio.create_task(self._sent(batch))
        batch, call = self._call
        index = len(batch)
        batch.append((arrays, seconds))
        try:
            async with asyncio.timeout(seconds):
                answers = await asyncio.shield(call)
        except TimeoutError as error:
            raise Unanswered("late") from error
        answer = answers if isinstance(answers, str) else answers[index]
        if isinstance(answer, str):
            raise Unanswered(answer)
        return answer

    async def _sent(self, batch: list[Sample]) -> list[Told | str] | str:
        """The answers to a batch, or the reason why there are none."""
        self._call = None
        try:
            return await self._handle.forward.remote(batch)
        except BackPressureError:
            return "full"
        except RayTaskError:
            return "garbage"
        # Nothing here cancels the call: Ray does, where a replica has to go.
        except (RayError, RayServeException, asyncio.CancelledError):
            return "down"


class Group:
    """A replica: some stages of an artifact, and the way to the next group."""

    async def __init__(  # pyright: ignore[reportGeneralTypeIssues]
        self,
        artifact: str,
        span: tuple[int, int],
        following: DeploymentHandle | None,
        tile: int,
        threads: int,
        limits: Limits,
    ) -> None:
        """Ray calls it in the event loop in which requests run."""
        # The engine's thread waits for the loop's thread that long after each stage.
        sys.setswitchinterval(1e-4)
        self._runtime = runtime.load(Path(artifact), threads)
        self._limits, self._ended = limits, False
        first, end = span
        stages, service = prepare(self._runtime, first, end, tile, limits.requests)
        upstream = None
        if following is not None:
            upstream = Guarded(NextGroup(following), following.deployment_name)
        self._tier = Tier(stages, await service.__aenter__(), upstream)
        layout = layouts(self._runtime)[first]
        manifest = self._runtime.manifest
        self._reader = Reader(manifest, first, layout, limits.batch, limits.seconds)

    async def predict(self, images: np.ndarray, seconds: float | None = None) -> list[Told]:
        """The answers to some images; they are all answered, or the request is refused.

        Args:
          images: uint8 `[n, height, width, channels]`.
          seconds: from when the replica gets them; at most, and by default, `limits.seconds`.

        Raises:
          Refusal: if there is no place or no time. Over a handle it is also a `RayTaskError`.
          ValueError: if the images do not fit, or the seconds are not positive.
        """
        longest = self._limits.seconds
        seconds = longest if seconds is None else seconds
        # Written so that a NaN fails.
        if not seconds > 0:
            raise ValueError(f"{seconds} seconds; give a positive number.")
        given, _ = self._runtime.checked(images, None)
        if len(given) > self._limits.batch:
            raise ValueError(f"{len(given)} images; give {self._limits.batch} at most.")
        samples = [(given[i : i + 1],) for i in range(len(given))]
        return await self._told(samples, min(seconds, longest))

    async def forward(self, samples: Sequence[Sample]) -> list[Told | str]:
        """The answers to samples of the group before, or reasons of `Unanswered`."""

        async def told(sample: Sample) -> Told | str:
            try:
                return await self._tier.predict(*sample)
            except Refusal as refusal:
                return _REASONS[self._noted(refusal).reason]

        return await asyncio.gather(*map(told, samples))

    async def __call__(self, request: Request) -> Response:
        """The endpoint for inference of the Open Inference Protocol, over HTTP."""
        if request.method != "POST" or not request.url.path.endswith(_PATH):
            return JSONResponse({"error": f"there is POST {_PATH}."}, 404)
        manifest = self._runtime.manifest
        try:
            asked = await self._parsed(request)
            told = await self._told(*self._reader.read(asked))
            certified = bool(manifest.content.get("certificate"))
            response = messages.response(asked, told, certified, manifest.sha256)
        except InvalidInput as error:
            return JSONResponse({"error": str(error)}, 400)
        except Refusal as refusal:
            status = STATUS[refusal.reason]
            text = str(refusal) if status != 500 else "the request could not be processed."
            return JSONResponse({"error": text}, status)
        content, length = response.to_rest()
        if isinstance(content, bytes):
            return Response(content, headers={_LENGTH: str(length)})
        return JSONResponse(content)

    def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        if self._ended:
            raise RuntimeError("the service has ended.")

    async def _parsed(self, request: Request) -> InferRequest:
        body = await request.body()
        if len(body) > self._limits.message:
            raise InvalidInput(f"give {self._limits.message:,} bytes at most.")
        return parsed(body, request.headers.get(_LENGTH), "model")

    async def _told(self, samples: Sequence[tuple[np.ndarray, ...]], seconds: float) -> list[Told]:
        try:
            return await self._tier.predict_all(samples, seconds)
        except Refusal as refusal:
            self._noted(refusal)
            raise

    def _noted(self, refusal: Any) -> Refusal:
        self._ended |= refusal.reason == "closed"
        return refusal


def application(
    artifact: str | Path,
    cuts: Sequence[int] = (),
    *,
    replicas: Sequence[int | Mapping[str, Any]] | None = None,
    threads: int = 1,
    tile: int = 64,
    limits: Limits | None = None,
) -> serve.Application:
    """An application for `ray.serve.run`, whose handle has `predict` of `Group`.

    Args:
      artifact: its directory, under the same path on every machine.
      cuts: a group of stages ends before each; ascending. None for one group.
      replicas: for each group a fixed number, or Ray's `autoscaling_config`, by default 1. Requests
        to a later group are calls with the samples of up to a tile.
      threads: of ONNX Runtime, and CPUs that Ray reserves, for each replica.
      tile: samples that run together, at most.
      limits: `batch` and `message` of a request; `seconds`, the longest deadline; `requests` under
        way in a replica, and waiting in each caller for one; `draining`.

    Raises:
      ValueError: if the artifact cannot be read, or cuts or replicas do not fit.
    """
    limits = limits or Limits()
    place = Path(artifact).resolve()
    exits = read(place).num_exits
    bounds = [0, *cuts, exits]
    if sorted(set(bounds)) != bounds:
        raise ValueError(f"cuts {list(cuts)} of {exits} stages; give ascending ones inside.")
    spans = list(itertools.pairwise(bounds))
    counts = [1] * len(spans) if replicas is None else replicas
    if len(counts) != len(spans):
        raise ValueError(f"replicas {counts} for {len(spans)} groups; give one for each.")
    group = None
    for span, count in reversed(list(zip(spans, counts, strict=True))):
        fixed = isinstance(count, int)
        deployment = serve.deployment(
            Group,
            name="stages_{}_{}".format(*span),
            num_replicas=count if fixed else "auto",
            autoscaling_config=None if fixed else dict(count),
            max_ongoing_requests=limits.requests,
            max_queued_requests=limits.requests,
            ray_actor_options={"num_cpus": threads},
            graceful_shutdown_timeout_s=limits.draining,
            # A line for each sample that goes on is too much.
            logging_config=LoggingConfig(enable_access_log=False),
        )
        group = deployment.bind(str(place), span, group, tile, threads, limits)
    assert group is not None
    return group
