"""The models of an artifact in ONNX Runtime: one image by the single model, batches stage by stage.

A batch goes through the stages in tiles. What a stage keeps is packed into a queue before the next
stage, which runs when its queue holds a full tile, and on what is left at the end. So every sample
is computed up to its own exit, and the kernels see full tiles for as long as there are any.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from eejax.runtime.manifest import Manifest, read

if TYPE_CHECKING:
    import onnxruntime

# Samples a run of a stage: the packing costs a fiftieth from here on, and more buy nothing.
TILE = 64


class Prediction(NamedTuple):
    """Predictions of B images.

    Attributes:
      labels: `[B]` int32.
      exits: `[B]` int32, 0-based: the exit that each sample took.
      logits: `[B, C]` float32, the policy's logits at that exit.
    """

    labels: np.ndarray
    exits: np.ndarray
    logits: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray, exits: np.ndarray) -> Prediction:
        """The prediction of these logits and exits."""
        return cls(logits.argmax(-1).astype(np.int32), exits.astype(np.int32), logits)


class Rows(NamedTuple):
    """Samples before a stage.

    Attributes:
      arrays: what the stage reads, each `[n, ...]`.
      indices: `[n]`, their positions among all samples.
    """

    arrays: tuple[np.ndarray, ...]
    indices: np.ndarray


class Stage(NamedTuple):
    """The result of a stage for n samples.

    Attributes:
      logits: `[n, C]`.
      leaves: `[n]` bool.
      arrays: what the next stage reads, each `[n, ...]`.
    """

    logits: np.ndarray
    leaves: np.ndarray
    arrays: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Runtime:
    """An artifact that runs. Models are loaded, and their files verified, when they are first used.

    Attributes:
      manifest: of the artifact.
      threads: of ONNX Runtime.
    """

    manifest: Manifest
    threads: int

    def predict(self, images: Any, thresholds: ArrayLike | None = None) -> Prediction:
        """Predicts uint8 images `[B, height, width, channels]`, any B >= 1.

        Args:
          images: in 0..255; preprocessing is part of the models.
          thresholds: E - 1; those of the artifact by default.

        Raises:
          ValueError: if shape or dtype of the images, or the thresholds, do not fit, or a file of
            the artifact is damaged.
        """
        given, limits = self.checked(images, thresholds)
        if len(given) == 1:
            feeds = {"images": given, **_limits(self._single, limits)}
            return Prediction.of(*_run(self._single, feeds))
        return next(iter(self.stream([given], limits)))

    def stream(
        self,
        batches: Iterable[Any],
        thresholds: ArrayLike | None = None,
        *,
        tile: int = TILE,
        window: int = 16 * TILE,
    ) -> Iterator[Prediction]:
        """Yields a prediction for each batch, in order, with full tiles in every stage.

        Survivors of one batch wait for those of the next until there is a tile of them, or until
        more than `window` images are under way.

        Args:
          batches: of uint8 images `[b, height, width, channels]`, b >= 1.
          thresholds: E - 1; those of the artifact by default.
          tile: samples a run of a stage, at most.
          window: images under way between two batches, at most: from the first that has no answer
            to the last that was read.

        Raises:
          ValueError: if images or thresholds do not fit, or `tile` is less than 1 or more than
            `window`.
        """
        if not 1 <= tile <= window:
            raise ValueError(f"tiles of {tile} and a window of {window}; give 1 <= tile <= window.")
        limits = self.thresholds(thresholds)
        queues = [_Queue() for _ in range(self.manifest.num_exits)]
        results = _Results(len(self.manifest.classes))
        for batch in batches:
            images = self._images(batch)
            first = results.begin(len(images))
            for start in range(0, len(images), tile):
                part = images[start : start + tile]
                indices = np.arange(first + start, first + start + len(part))
                queues[0].push(Rows((part,), indices))
                self._drain(queues, results, limits, tile, whole=True)
            if results.under_way > window:
                self._drain(queues, results, limits, tile, whole=False)
            # The caller may fill its array anew.
            queues[0].own()
            yield from results.finished()
        self._drain(queues, results, limits, tile, whole=False)
        yield from results.finished()

    def _drain(
        self,
        queues: Sequence[_Queue],
        results: _Results,
        thresholds: np.ndarray,
        tile: int,
        *,
        whole: bool,
    ) -> None:
        """Runs the stages on what waits before them, with `whole` in whole tiles only."""
        for e, queue in enumerate(queues):
            while queue.size >= (tile if whole else 1):
                rows = queue.pop(tile)
                stage = self.run_stage(e, rows.arrays, thresholds)
                results.note(rows.indices, stage, e)
                if not stage.leaves.all():
                    stays = ~stage.leaves
                    kept = tuple(array[stays] for array in stage.arrays)
                    queues[e + 1].push(Rows(kept, rows.indices[stays]))

    def run_stage(self, e: int, arrays: Sequence[np.ndarray], thresholds: np.ndarray) -> Stage:
        """Runs stage e, 0-based, on n samples that reach it.

        Args:
          e: the stage.
          arrays: images for the first; otherwise rows of the arrays of the stage before.
          thresholds: `[E - 1]` float32.
        """
        session = self._stages[e]()
        names = [node.name for node in session.get_inputs() if node.name != "thresholds"]
        feeds = dict(zip(names, arrays, strict=True))
        logits, *more = _run(session, {**feeds, **_limits(session, thresholds)})
        if e + 1 == self.manifest.num_exits:
            return Stage(logits, np.ones(len(logits), bool), ())
        return Stage(logits, more[0], tuple(more[1:]))

    def checked(self, images: Any, thresholds: ArrayLike | None) -> tuple[np.ndarray, np.ndarray]:
        """Images and thresholds as the models read them; ValueError as for `predict`."""
        return self._images(images), self.thresholds(thresholds)

    def _images(self, images: Any) -> np.ndarray:
        given = np.asarray(images)
        shape = self.manifest.image
        if given.dtype != np.uint8 or given.ndim != 4 or given.shape[1:] != shape or not len(given):
            sides = ", ".join(map(str, shape))
            raise ValueError(
                f"images {given.dtype} {given.shape}; give uint8 [B, {sides}] in 0..255, B >= 1."
            )
        return np.ascontiguousarray(given)

    def thresholds(self, thresholds: ArrayLike | None) -> np.ndarray:
        """`[E - 1]` float32, those of the artifact for None; ValueError if they do not fit."""
        if thresholds is None:
            return self.manifest.thresholds
        given = np.asarray(thresholds, np.float32)
        if given.shape != self.manifest.thresholds.shape or np.isnan(given).any():
            raise ValueError(
                f"thresholds {given.tolist()}; give {self.manifest.num_exits - 1} numbers, one for "
                "each exit but the last; inf is one."
            )
        return given

    @functools.cached_property
    def _single(self) -> onnxruntime.InferenceSession:
        return session(self.manifest.file("onnx/single.onnx"), self.threads)

    @functools.cached_property
    def _stages(self) -> list[Callable[[], onnxruntime.InferenceSession]]:
        def loader(e: int) -> Callable[[], onnxruntime.InferenceSession]:
            name = f"onnx/stage{e + 1}.onnx"
            return functools.cache(lambda: session(self.manifest.file(name), self.threads))

        return [loader(e) for e in range(self.manifest.num_exits)]


def load(directory: str | Path, threads: int | None = None) -> Runtime:
    """Opens an artifact.

    Args:
      directory: that `eejax.export` wrote.
      threads: of ONNX Runtime; by default the cores that this process may use.

    Raises:
      ValueError: if there is no artifact, it is damaged, or this version cannot read it; one line.
    """
    if threads is None:
        own = getattr(os, "sched_getaffinity", None)
        threads = len(own(0)) if own else os.cpu_count() or 1
    if threads < 1:
        raise ValueError(f"{threads} threads; give at least 1.")
    return Runtime(read(directory), threads)


def session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    """A model in ONNX Runtime, on the CPU.

    Its threads wait actively for work within a run and not after it: otherwise those of one stage
    take the cores from the next.

    Raises:
      ModuleNotFoundError: if ONNX Runtime is not installed.
      ValueError: if it refuses the model.
    """
    # Here, because reading manifests and bundles needs NumPy alone.
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "running models needs onnxruntime: pip install onnxruntime"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # that an input has a default is a warning
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own classes have no common base
        raise ValueError(f"ONNX Runtime cannot load a model: {error}") from error


def _run(session: onnxruntime.InferenceSession, feeds: dict[str, Any]) -> Any:
    """The outputs of a model; ValueError if it is not what the manifest says."""
    try:
        return session.run(None, feeds)
    except Exception as error:  # as in `session`
        raise ValueError(f"ONNX Runtime cannot run a model: {error}") from error


def _limits(session: onnxruntime.InferenceSession, thresholds: np.ndarray) -> dict[str, np.ndarray]:
    """Thresholds, for a model that reads them: that of the last stage does not."""
    names = {node.name for node in session.get_overridable_initializers()}
    return {"thresholds": thresholds} if "thresholds" in names else {}


class _Queue:
    """Samples that wait before a stage, in the order in which they came."""

    def __init__(self) -> None:
        self.size = 0
        self._parts: collections.deque[Rows] = collections.deque()

    def push(self, rows: Rows) -> None:
        self.size += len(rows.indices)
        self._parts.append(rows)

    def own(self) -> None:
        """Copies what waits, so that it is nobody else's memory."""
        self._parts = collections.deque(
            Rows(tuple(np.array(a) for a in arrays), indices) for arrays, indices in self._parts
        )

    def pop(self, count: int) -> Rows:
        """Up to `count` samples."""
        taken: list[Rows] = []
        while self._parts and count:
            arrays, indices = self._parts.popleft()
            if len(indices) > count:
                self._parts.appendleft(Rows(tuple(a[count:] for a in arrays), indices[count:]))
                arrays, indices = tuple(a[:count] for a in arrays), indices[:count]
            taken.append(Rows(arrays, indices))
            count -= len(indices)
            self.size -= len(indices)
        if len(taken) == 1:
            return taken[0]
        arrays = tuple(
            np.concatenate(parts) for parts in zip(*(t.arrays for t in taken), strict=True)
        )
        return Rows(arrays, np.concatenate([t.indices for t in taken]))


class _Results:
    """Answers in the order of the batches."""

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._next = 0
        # The first index, logits, exits and the number of open answers of each batch.
        self._batches: collections.deque[tuple[int, np.ndarray, np.ndarray, list[int]]]
        self._batches = collections.deque()

    def begin(self, count: int) -> int:
        """Room for a batch; returns the index of its first sample."""
        first = self._next
        logits = np.empty((count, self._classes), np.float32)
        self._batches.append((first, logits, np.empty(count, np.int32), [count]))
        self._next += count
        return first

    @property
    def under_way(self) -> int:
        """Samples from the first batch that is not yielded to the last that was read."""
        return self._next - self._batches[0][0] if self._batches else 0

    def note(self, indices: np.ndarray, stage: Stage, e: int) -> None:
        """Notes the answers of those samples of a stage that leave there."""
        at, answers = indices[stage.leaves], stage.logits[stage.leaves]
        for first, logits, exits, left in self._batches:
            mine = (first <= at) & (at < first + len(exits))
            logits[at[mine] - first], exits[at[mine] - first] = answers[mine], e
            left[0] -= int(mine.sum())

    def finished(self) -> Iterator[Prediction]:
        """The predictions of the batches that are done and have none before them that is not."""
        while self._batches and not self._batches[0][3][0]:
            _, logits, exits, _ = self._batches.popleft()
            yield Prediction.of(logits, exits)
