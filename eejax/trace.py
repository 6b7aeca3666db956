"""Traces: what every head of a network said of every sample of a split, recorded once."""

from __future__ import annotations

import functools
import hashlib
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from eejax.compiling import compiler_options
from eejax.network import EarlyExitNetwork, ExitOutput, Variables


class Trace(NamedTuple):
    """What every head said of every sample of one split, recorded once.

    Attributes:
      logits: `[N, E, C]` float32.
      gates: `[N, E]` float32.
      labels: `[N]` int32.
      ids: `[N]` uint64, which samples these are: equal for equal images. `guarantees` refuses data
        by them that something was fitted on.
    """

    logits: np.ndarray
    gates: np.ndarray
    labels: np.ndarray
    ids: np.ndarray


def collect(
    network: EarlyExitNetwork,
    variables: Variables,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch: int = 500,
) -> Trace:
    """Runs the whole network once over a split and records what every head says.

    Every call is padded to `batch`, so that one program serves all splits.

    Args:
      network: E exits.
      variables: as `network.init` gives.
      images: `[N, ...]`.
      labels: `[N]` int.
      batch: samples a call.

    Raises:
      ValueError: no images, or not as many labels.
    """
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels; give as many of both.")
    outputs = []
    for start in range(0, len(images), batch):
        some = images[start : start + batch]
        padding = [(0, batch - len(some))] + [(0, 0)] * (some.ndim - 1)
        output = _compiled_heads()(network, variables, jnp.asarray(np.pad(some, padding)))
        outputs.append(jax.device_get(output))
    return Trace(
        np.concatenate([o.logits for o in outputs], 1)[:, : len(images)].swapaxes(0, 1),
        np.concatenate([o.gate for o in outputs], 1)[:, : len(images)].swapaxes(0, 1),
        np.asarray(labels, np.int32),
        fingerprints(images),
    )


def recorded(
    logits: ArrayLike,
    labels: ArrayLike,
    gates: ArrayLike | None = None,
    ids: ArrayLike | None = None,
) -> Trace:
    """A trace from arrays that were recorded elsewhere, by any framework.

    Args:
      logits: `[N, E, C]`.
      labels: `[N]`, whole numbers in [0, C).
      gates: `[N, E]`, the logit of "stop here"; zeros by default.
      ids: `[N]`, which samples these are; by default made from logits and label, which tells
        samples apart within traces of one network.

    Raises:
      ValueError: shapes that do not fit, no samples, NaN, or labels that are no class.
    """
    z = np.asarray(logits, np.float32)
    if z.ndim != 3 or not len(z):
        raise ValueError(f"logits of shape {z.shape}; give [samples, exits, classes].")
    if np.isnan(z).any():
        raise ValueError("logits hold a NaN; give numbers.")
    y = np.asarray(labels)
    if y.shape != z.shape[:1] or not (y == y.astype(np.int32)).all():
        raise ValueError(f"labels of shape {y.shape} for logits {z.shape}; give one class each.")
    if y.min() < 0 or y.max() >= z.shape[2]:
        raise ValueError(
            f"labels from {y.min()} to {y.max()} for {z.shape[2]} classes; give 0 to "
            f"{z.shape[2] - 1}."
        )
    y = y.astype(np.int32)
    g = np.zeros(z.shape[:2], np.float32) if gates is None else np.asarray(gates, np.float32)
    if g.shape != z.shape[:2]:
        raise ValueError(f"gates of shape {g.shape} for logits {z.shape}; give {z.shape[:2]}.")
    if ids is None:
        own = fingerprints(np.concatenate([z.reshape(len(z), -1), y[:, None]], 1, dtype=np.float32))
    else:
        own = np.asarray(ids).astype(np.uint64)
    if own.shape != y.shape:
        raise ValueError(f"ids of shape {own.shape} for {len(y)} samples; give one each.")
    return Trace(z, g, y, own)


def save_trace(path: str | Path, trace: Trace) -> None:
    """Writes a trace as an `.npz` file for `read_trace`, or for NumPy anywhere.

    Args:
      path: of the file, to which no suffix is added; what is there already is replaced.
      trace: N samples.
    """
    with open(path, "wb") as file:  # given a path, NumPy would add a suffix to it
        np.savez(file, **trace._asdict())


def read_trace(path: str | Path) -> Trace:
    """A trace from an `.npz` file that any framework wrote.

    One line of NumPy writes such a file; `logits` of shape `[N, E, C]` and `labels` of shape `[N]`
    it must hold, `gates` and `ids` it may, as for `recorded`, in any dtype of numbers:

        numpy.savez("trace.npz", logits=logits, labels=labels)

    Args:
      path: of the file. Nothing in it is unpickled.

    Raises:
      ValueError: no `.npz` file, one without logits or labels, or arrays that `recorded` refuses.
    """
    try:
        # Opened here, since NumPy does not close what it could not read.
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            # Arrays that are not asked for are left alone.
            names = [n for n in ("logits", "labels", "gates", "ids") if n in loaded.files]
            arrays, files = {n: loaded[n] for n in names}, loaded.files
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        # NumPy says of whatever it does not know that it is a pickle.
        raise ValueError(
            f"{path} cannot be read as an .npz of plain arrays; write it with numpy.savez."
        ) from error
    missing = [n for n in ("logits", "labels") if n not in arrays]
    if missing:
        raise ValueError(
            f"{path} holds {files}, but no {' and no '.join(missing)}; give logits [N, E, C] and "
            "labels [N]."
        )
    try:
        return recorded(**arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def fingerprints(samples: np.ndarray) -> np.ndarray:
    """A number for each sample, `[N]` uint64, that depends on nothing but its bytes.

    Args:
      samples: `[N, ...]`: images, or what else tells samples apart.
    """
    rows = np.ascontiguousarray(samples)
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


@functools.cache
def _compiled_heads() -> Callable[..., ExitOutput]:
    """Every head's output; compiled once for a network and a shape, however often it is called."""

    def heads(network: EarlyExitNetwork, variables: Variables, images: jax.Array) -> ExitOutput:
        return network.apply_all(variables, images)[0]._replace(memory=())

    return jax.jit(heads, static_argnums=0, compiler_options=compiler_options())
