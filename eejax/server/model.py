"""The model of a server: what the Open Inference Protocol's implementation calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from kserve import InferRequest, InferResponse
from kserve.errors import InvalidInput
from kserve.model import InferenceModel, InferenceVerb

from eejax.runtime import Manifest
from eejax.server import messages
from eejax.server.messages import Reader
from eejax.server.metrics import Metrics, logger
from eejax.serving import Refusal
from eejax.tiers.tier import Tier


class EarlyExits(InferenceModel):
    """A tier as a model.

    Attributes:
      ready: whether it takes requests.
      exits: E.
      certified: whether the artifact's certificate holds for answers by the chosen thresholds.
    """

    def __init__(
        self, name: str, tier: Tier, manifest: Manifest, reader: Reader, metrics: Metrics
    ) -> None:
        super().__init__(name)
        self._tier, self._manifest, self._reader = tier, manifest, reader
        self._metrics = metrics
        self.exits = manifest.num_exits
        self.certified = bool(manifest.content.get("certificate"))

    def get_input_types(self) -> list[dict[str, Any]]:
        """As the protocol describes inputs."""
        return self._reader.inputs()

    def get_output_types(self) -> list[dict[str, Any]]:
        """As the protocol describes outputs."""
        return messages.outputs(len(self._manifest.classes))

    async def __call__(
        self,
        body: Any,
        headers: Mapping[str, str] | None = None,
        verb: InferenceVerb = InferenceVerb.PREDICT,
    ) -> tuple[InferResponse, dict[str, str]]:
        """For the REST endpoints."""
        del headers
        if verb != InferenceVerb.PREDICT or not isinstance(body, InferRequest):
            raise InvalidInput("only inference requests of the protocol V2 are answered.")
        return await self.infer(body), {}

    async def infer(self, request: InferRequest, remaining: float | None = None) -> InferResponse:
        """The response to a request: all of its samples are answered, or it is refused.

        Args:
          request: of the protocol.
          remaining: seconds that the client waits, if known.

        Raises:
          InvalidInput: if the request is none for this server.
          Refusal: if it is not answered.
        """
        begin = time.monotonic()
        try:
            asked = self._reader.read(request, remaining)
            told = await self._tier.predict_all(*asked)
            response = messages.response(request, told, self.certified, self._manifest.sha256)
        except InvalidInput:
            self._metrics.refused("invalid")
            raise
        except Refusal as refusal:
            self._metrics.refused(refusal.reason)
            if refusal.reason == "failed":
                logger().error("a sample failed", extra={"fields": {"reason": str(refusal)}})
            raise
        except asyncio.CancelledError:
            self._metrics.refused("gone")
            raise
        self._metrics.answered(told, time.monotonic() - begin, asked.seconds)
        return response
