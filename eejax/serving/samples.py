"""What a scheduler handles: samples, the tiles that they run in, and what they are told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np


class Level(NamedTuple):
    """A position on the path of thresholds.

    Attributes:
      thresholds: `[E - 1]`.
      goes_on: `[S - 1]`, the share of the samples at each of the S exits that goes on, on held-out
        data; S is E, unless the last stages run elsewhere.
    """

    thresholds: np.ndarray
    goes_on: np.ndarray


class Answer(NamedTuple):
    """What a sample is told.

    Attributes:
      logits: `[C]`, the policy's.
      exit: 0-based.
      partial: whether it would have gone on, if there had been time, or further stages here.
      level: at which its exit was decided; 0 for the thresholds that were chosen.
      chosen: whether the chosen thresholds alone decided, at this exit and all before it.
      arrays: what the next stage reads, each `[1, ...]`, if that is not one of the S; else empty.
    """

    logits: np.ndarray
    exit: int
    partial: bool
    level: int
    chosen: bool = True
    arrays: tuple[np.ndarray, ...] = ()


class Refusal(Exception):
    """A sample that is not answered.

    Attributes:
      reason: `"full"`, `"late"`, `"closed"`, or `"failed"`.
    """

    def __init__(self, reason: str, words: str) -> None:
        super().__init__(words)
        self.reason = reason

    def __reduce__(self) -> tuple[type[Refusal], tuple[str, str]]:
        # By default an exception is unpickled from `args`, which lack the reason.
        return type(self), (self.reason, str(self))


@dataclasses.dataclass(eq=False)
class Sample:
    """A sample from its acceptance to its answer.

    Attributes:
      arrays: what its next stage reads, each `[m, ...]`, together with m - 1 others.
      row: its own, there.
      together: who waits with rows of the same arrays.
      due: its deadline, in the seconds of the caller's clock.
      tell: gets the answer or the refusal, once.
      number: by which samples with the same deadline are served in order.
      stage: the next one.
      best: of the last exit that it reached.
      waits: whether it waits before its stage, and not in the tile that runs.
      chosen: whether the chosen thresholds alone have decided so far.
      alone: whether it has to run by itself, because a tile with it failed.
      open: whether it is still to be told.
    """

    arrays: tuple[np.ndarray, ...]
    row: int
    due: float
    tell: Callable[[Answer | Refusal], None]
    number: int
    together: set[Sample]
    stage: int = 0
    best: Answer | None = None
    waits: bool = False
    chosen: bool = True
    alone: bool = False
    open: bool = True


class Work(NamedTuple):
    """A tile that is to run.

    Attributes:
      stage: 0-based.
      samples: n of them.
      level: the level's number.
      thresholds: `[E - 1]`.
      sources: arrays `[m, ...]` and the rows of them, which make the tile, in the order of the
        samples.
    """

    stage: int
    samples: tuple[Sample, ...]
    level: int
    thresholds: np.ndarray
    sources: list[tuple[tuple[np.ndarray, ...], list[int]]]

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What the stage reads, each `[n, ...]`."""
        first, _ = self.sources[0]
        tile = tuple(np.empty((len(self.samples), *a.shape[1:]), a.dtype) for a in first)
        start = 0
        for arrays, rows in self.sources:
            end = start + len(rows)
            for source, to in zip(arrays, tile, strict=True):
                if source.shape[1:] != to.shape[1:] or source.dtype != to.dtype:
                    raise ValueError(f"a sample of {source.dtype} {source.shape[1:]}")
                # Other modes than "raise" copy without a detour.
                source.take(rows, 0, to[start:end], "clip")
            start = end
        return tile


class StageResult(Protocol):
    """What a stage makes of n samples: `eejax.runtime`'s `Stage`."""

    @property
    def logits(self) -> np.ndarray: ...
    @property
    def leaves(self) -> np.ndarray: ...
    @property
    def arrays(self) -> tuple[np.ndarray, ...]: ...


def trim(together: set[Sample]) -> None:
    """Copies the rows of those that wait, if they are fewer than half, so that the others' are
    free."""
    some = next(iter(together), None)
    if some is None or 2 * len(together) >= len(some.arrays[0]):
        return
    samples = list(together)
    rows = [sample.row for sample in samples]
    arrays = tuple(array[rows] for array in some.arrays)
    for row, sample in enumerate(samples):
        sample.arrays, sample.row = arrays, row
