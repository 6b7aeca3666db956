"""Weights and images made of names and seeds alone, so that two libraries get the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """An array for each name of a PyTorch `state_dict`, float32, drawn by a hash of the name.

    Matrices and convolutions keep the size of what passes through them; scales and variances lie
    between 1/2 and 3/2; the rest is small.
    """
    return {name: _array(name, tuple(shape)) for name, shape in shapes.items()}


def _array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    rng = np.random.default_rng(seed)
    scales = name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1)
    if scales:
        return rng.random(shape, np.float32) + np.float32(0.5)
    values = rng.standard_normal(shape, np.float32)
    if name.endswith("weight") and len(shape) > 1:
        return values / np.float32(np.sqrt(np.prod(shape[1:])))
    return values * np.float32(0.1)


def images(shape: Sequence[int], count: int = 2) -> np.ndarray:
    """`[count, H, W, C]` float32."""
    return np.random.default_rng(0).standard_normal((count, *shape), np.float32)
