"""An engine in a process of its own, and what it runs."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eejax.runtime import Prediction
from experiments.latency.workload import Workload

SINGLES = 20  # images of a call at batch 1, one after another
WARM = 0.05  # seconds of calls before those that are timed, or two calls


class Contender:
    """An engine in a process of its own, which answers one request at a time."""

    def __init__(self, name: str, place: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, place, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, *request: Any) -> Any:
        """The answer to a request; RuntimeError with the engine's own words if it failed."""
        try:
            self._pipe.send(request)
            failed, answer = self._pipe.recv()
        except (EOFError, BrokenPipeError):
            raise RuntimeError(f"{self.name} ended without an answer") from None
        if failed:
            raise RuntimeError(f"{self.name}: {answer}")
        return answer

    def end(self) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


def _serve(name: str, place: Path, pipe: Any) -> None:
    """The process of an engine."""
    engine = None
    while True:
        try:
            what, *details = pipe.recv()
        except EOFError:
            return
        try:
            engine = engine or ENGINES[name](place)
            answer = _predicted(engine, *details) if what == "predict" else _timed(engine, *details)
        except Exception:
            pipe.send((True, traceback.format_exc(limit=-1).strip().splitlines()[-1]))
        else:
            pipe.send((False, answer))


def _predicted(
    engine: dict[str, Callable[..., Any]], images: np.ndarray, batch: int, thresholds: np.ndarray
) -> Prediction:
    """The answers to all images, in calls of `batch`."""
    parts = [images[i : i + batch] for i in range(0, len(images), batch)]
    answers = [engine["early"](part, thresholds) for part in parts]
    return Prediction(*(np.concatenate(arrays) for arrays in zip(*answers, strict=True)))


def _timed(
    engine: dict[str, Callable[..., Any]],
    kind: str,
    images: np.ndarray,
    batch: int,
    thresholds: np.ndarray,
) -> float:
    """Seconds for all images in calls of `batch`, after calls that are not timed."""
    predict = engine[kind]
    parts = [images[i : i + batch] for i in range(0, len(images), batch)]
    begin = time.perf_counter()
    for done, part in enumerate(itertools.cycle(parts)):
        if done >= 2 and time.perf_counter() - begin >= WARM:
            break
        predict(part, thresholds)
    start = time.perf_counter()
    for part in parts:
        predict(part, thresholds)
    return time.perf_counter() - start


def _xla(place: Path) -> dict[str, Callable[..., Any]]:
    import eejax

    bundle = eejax.load(place)
    last = bundle.network.num_exits - 1
    plain = eejax.predictor(
        bundle.network.keeping([last]),
        eejax.max_prob,
        eejax.keep_variables(bundle.variables, [last]),
        eejax.full,
    )
    single = eejax.predictor(bundle.network, bundle.policy, bundle.variables, eejax.cond)
    packed = eejax.predictor(bundle.network, bundle.policy, bundle.variables, eejax.compact)
    return {
        "plain": lambda images, thresholds: plain((), images),
        "early": lambda images, t: (single if len(images) == 1 else packed)(t, images),
    }


def _onnxruntime(place: Path) -> dict[str, Callable[..., Any]]:
    from eejax import runtime
    from eejax.runtime.engine import session

    loaded = runtime.load(place / "artifact")
    plain = session((place / "plain.onnx").read_bytes(), loaded.threads)

    def outputs(images: np.ndarray) -> Any:
        return plain.run(None, {"images": images})

    return {
        "plain": lambda images, t: np.argmax(outputs(images)[0], -1),
        "early": loaded.predict,
    }


def _stored(place: Path, layer: str) -> dict[str, Callable[..., Any]]:
    """The artifact's programs for XLA."""
    import eejax

    early = eejax.load(place / "artifact", layer).predict
    return {"plain": _xla(place)["plain"], "early": early}


def _pytorch(place: Path) -> dict[str, Callable[..., Any]]:
    from experiments.engines import pytorch

    return pytorch.by_hand(place)


def _earlyon(place: Path) -> dict[str, Callable[..., Any]]:
    from experiments.engines import pytorch

    return pytorch.by_earlyon(place)


ENGINES: dict[str, Callable[[Path], dict[str, Callable[..., Any]]]] = {
    "xla": _xla,
    "onnxruntime": _onnxruntime,
    **{layer: functools.partial(_stored, layer=layer) for layer in ("stablehlo", "export")},
    "pytorch": _pytorch,
    "earlyon": _earlyon,
}


def write_engines(workload: Workload, bundle: Any, engines: Sequence[str], place: Path) -> None:
    """Writes what these engines read: bundle, artifact, and the plain network."""
    import eejax
    from eejax import bundle as bundles

    bundles.save(bundle, place / "bundle")
    layers = ["onnx", *({"stablehlo", "export"} & set(engines))]
    eejax.export(bundle, place / "artifact", layers=layers, images=workload.images[:4])
    (place / "plain.onnx").write_bytes(plain_model(bundle))


def plain_model(bundle: Any, quantise: Any = None) -> bytes:
    """The whole network without its early heads; `quantise` as for `eejax.export`."""
    import jax

    import eejax
    from eejax import onnx
    from eejax.onnx.quantising import quantised

    last = bundle.network.num_exits - 1
    plain = onnx.stages(
        bundle.network.keeping([last]),
        eejax.max_prob,
        eejax.keep_variables(bundle.variables, [last]),
        jax.ShapeDtypeStruct(bundle.image, np.uint8),
        [],
    )
    (model,) = plain if quantise is None else quantised(plain, quantise)
    return model.SerializeToString()
