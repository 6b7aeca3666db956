"""Machines, the links between them, and what was measured of a network on each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

RAW = "float32"  # the codec that changes nothing


class Crossing(NamedTuple):
    """What it takes to send one sample's features at a cut in a codec.

    Attributes:
      size: bytes of the encoded arrays, on average.
      encode: `[R]` seconds of repeated runs.
      decode: `[R]` seconds.
      changed: `[E]`, the share of measured images that get another label at each exit; 0 before
        the cut.
    """

    size: float
    encode: np.ndarray
    decode: np.ndarray
    changed: np.ndarray


class Times(NamedTuple):
    """What one machine was measured to take for one sample.

    Attributes:
      artifact: the SHA-256 of the manifest of the artifact that was measured.
      stages: `[R, E, E]` seconds: entry `[r, a, e]` is stage e in pass r of those that began with
        stage a after a pause; 0 before it.
      crossings: for each `(cut, codec)`, cuts from 0 to E - 1; the image at cut 0 in `RAW` alone.
      environment: machine, threads and versions, for the reader.
    """

    artifact: str
    stages: np.ndarray
    crossings: Mapping[tuple[int, str], Crossing]
    environment: Mapping[str, str]

    @property
    def codecs(self) -> tuple[str, ...]:
        """The codecs that were measured."""
        return tuple(dict.fromkeys(codec for _, codec in self.crossings))

    def crossing(self, cut: int, codec: str) -> Crossing:
        """At a cut in a codec; an image is sent as it is, whatever the codec.

        Raises:
          ValueError: if it was not measured.
        """
        if (cut, RAW if cut == 0 else codec) not in self.crossings:
            known = ", ".join(self.codecs)
            raise ValueError(f"codec {codec!r} was not measured at cut {cut}; known: {known}.")
        return self.crossings[cut, RAW if cut == 0 else codec]


@dataclasses.dataclass(frozen=True)
class Link:
    """The connection of a tier to the next.

    Attributes:
      up_bits_per_second: towards the next tier.
      down_bits_per_second: back.
      round_trip_seconds: of an empty message.
      jitter_seconds: each way takes up to this much more or less, uniformly, as Linux's netem does
        without a distribution.
      overhead_seconds: of the software of crossing it, for request and answer together.
      price_per_gb: of 10^9 bytes, both ways.
      joules_per_byte: that the sending machine spends.

    Raises:
      ValueError: if a number is out of range; as for `Device`.
    """

    up_bits_per_second: float
    down_bits_per_second: float
    round_trip_seconds: float
    jitter_seconds: float = 0.0
    overhead_seconds: float = 0.001
    price_per_gb: float = 0.0
    joules_per_byte: float = 0.0

    def __post_init__(self) -> None:
        _check_numbers(self, ("up_bits_per_second", "down_bits_per_second"))
        if self.jitter_seconds > self.round_trip_seconds / 2:
            raise ValueError(
                f"jitter_seconds: {self.jitter_seconds}; expected half of round_trip_seconds "
                f"({self.round_trip_seconds}) at most"
            )


@dataclasses.dataclass(frozen=True)
class Device:
    """The machine of a tier.

    Attributes:
      scale: what its times are, over the measured ones; anything but 1 is a model, not a
        measurement.
      watts: while it computes, above what it takes at rest.
      price_per_hour: of computing; idle time is not paid.
      overhead_seconds: of the software that serves a sample here, such as a server's, beside stages
        and codecs; in the latency alone.
    """

    scale: float = 1.0
    watts: float = 0.0
    price_per_hour: float = 0.0
    overhead_seconds: float = 0.0

    def __post_init__(self) -> None:
        _check_numbers(self, ("scale",))


def _check_numbers(instance: Link | Device, positive: tuple[str, ...]) -> None:
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        least = "above 0" if field.name in positive else "of at least 0"
        if not number or not 0 <= value < np.inf or (value == 0 and field.name in positive):
            raise ValueError(f"{field.name}: {value!r}; expected a number {least}")
