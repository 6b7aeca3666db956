"""Traces: the output of every head for every sample of a split, recorded once."""

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
    """The output of every head for every sample of one split.

    Attributes:
      logits: `[N, E, C]` float32.
      gates: `[N, E]` float32.
      labels: `[N]` int32.
      ids: `[N]` uint64, equal for equal images. By them `guarantees` recognises samples that
        something was fitted on.
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
    """Runs the whole network once over a split and records the output of every head.

    Every call is padded to `batch`, so that one program serves all splits.

    Args:
      network: E exits.
      variables: as `network.init` gives.
      images: `[N, ...]`.
      labels: `[N]` int.
      batch: samples in a call.

    Raises:
      ValueError: if there are no images, or not as many labels.
    """
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels; give as many of both.")
    outputs = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        padding = [(0, batch - len(part))] + [(0, 0)] * (part.ndim - 1)
        output = _compiled_heads()(network, variables, jnp.asarray(np.pad(part, padding)))
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
    """A trace from arrays that another framework recorded.

    Args:
      logits: `[N, E, C]`.
      labels: `[N]`, whole numbers in [0, C).
      gates: `[N, E]`, the logit of "stop here"; zeros by default.
      ids: `[N]`, equal for equal samples; by default hashes of logits and label, which identify
        samples within traces of one network.

    Raises:
      ValueError: if the shapes do not fit, there are no samples, logits are NaN, or a label is not
        a class.
    """
    z = np.asarray(logits, np.float32)
    if z.ndim != 3 or not len(z):
        raise ValueError(f"logits of shape {z.shape}; give [samples, exits, classes].")
    if np.isnan(z).any():
        raise ValueError("logits hold a NaN; give numbers.")
    y = np.asarray(labels)
    if y.shape != z.shape[:1] or not (y == y.astype(np.int32)).all():
        raise ValueError(f"labels of shape {y.shape} for logits {z.shape}; give one label each.")
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
        rows = np.concatenate([z.reshape(len(z), -1), y[:, None]], 1, dtype=np.float32)
        ids = fingerprints(rows)
    ids = np.asarray(ids).astype(np.uint64)
    if ids.shape != y.shape:
        raise ValueError(f"ids of shape {ids.shape} for {len(y)} samples; give one for each.")
    return Trace(z, g, y, ids)


def save_trace(path: str | Path, trace: Trace) -> None:
    """Writes a trace as an `.npz` file for `read_trace`, or for NumPy anywhere.

    Args:
      path: of the file; no suffix is added, and an existing file is replaced.
      trace: N samples.
    """
    with open(path, "wb") as file:  # given a path, NumPy would add a suffix to it
        np.savez(file, **trace._asdict())


def read_trace(path: str | Path) -> Trace:
    """A trace from an `.npz` file that any framework wrote.

    One line of NumPy writes such a file. It must hold `logits` `[N, E, C]` and `labels` `[N]`, and
    may hold `gates` and `ids` as for `recorded`, of any numeric dtype:

        numpy.savez("trace.npz", logits=logits, labels=labels)

    Args:
      path: of the file. Nothing in it is unpickled.

    Raises:
      ValueError: if it is not an `.npz` file, lacks logits or labels, or `recorded` raises.
    """
    try:
        # Opened here because NumPy does not close a file that it could not read.
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            # Other arrays are not read.
            names = [n for n in ("logits", "labels", "gates", "ids") if n in loaded.files]
            arrays, files = {n: loaded[n] for n in names}, loaded.files
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        # NumPy calls every unknown format a pickle.
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
    """A hash of the bytes of each sample, `[N]` uint64.

    Args:
      samples: `[N, ...]`: images, or other arrays that identify samples.
    """
    rows = np.ascontiguousarray(samples)
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


@functools.cache
def _compiled_heads() -> Callable[..., ExitOutput]:
    """The outputs of all heads; compiled once for a network and a shape."""

    def heads(network: EarlyExitNetwork, variables: Variables, images: jax.Array) -> ExitOutput:
        return network.apply_all(variables, images)[0]._replace(memory=())

    return jax.jit(heads, static_argnums=0, compiler_options=compiler_options())
