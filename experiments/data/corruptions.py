"""Corrupted test images, made on the fly: three kinds, five severities.

In the spirit of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", ICLR 2019 (https://arxiv.org/abs/1903.12261). The strengths are
those of their CIFAR-10-C, for Gaussian noise, Gaussian blur and contrast, in `make_cifar_c.py` of
https://github.com/hendrycks/robustness; the images are not: the noise is another draw, and values
are rounded here, not cut off.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import gaussian_filter

STRENGTHS: dict[str, tuple[float, ...]] = {
    "noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation, as a fraction of 255
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # standard deviation, in pixels
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # remaining share of the distance from the mean
}
KINDS = tuple(STRENGTHS)
SEVERITIES = (1, 2, 3, 4, 5)

_VALUES = 2**22  # how many values are float32 at a time: 16 MB


def corrupt(images: np.ndarray, kind: str, severity: int, seed: int) -> np.ndarray:
    """Images with noise, blurred, or of less contrast; the same for the same arguments.

    What becomes of an image does not depend on those after it. The strengths are meant for 32x32
    pixels; on smaller images a blur takes away more.

    Args:
      images: `[N, H, W, C]` uint8.
      kind: "noise" (Gaussian, independent for each value), "blur" (Gaussian, the border's pixels
        continued outwards) or "contrast" (towards each image's mean in each channel).
      severity: 1 to 5.
      seed: of the noise, at least 0; the others have nothing random.

    Returns:
      `[N, H, W, C]` uint8.

    Raises:
      ValueError: an unknown kind or severity, or other images.
    """
    if kind not in STRENGTHS:
        raise ValueError(f"a corruption {kind!r}; give one of {', '.join(KINDS)}.")
    if severity not in SEVERITIES:
        raise ValueError(f"a severity of {severity}; give a whole number from 1 to 5.")
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(f"images {images.dtype} {images.shape}; give uint8 [N, H, W, C].")
    strength = STRENGTHS[kind][severity - 1]
    random = np.random.default_rng((seed, severity))
    out = np.empty_like(images)
    chunk = max(1, _VALUES // max(1, math.prod(images.shape[1:])))
    for start in range(0, len(images), chunk):
        x = images[start : start + chunk].astype(np.float32)
        if kind == "noise":
            x += np.float32(255 * strength) * random.standard_normal(x.shape, np.float32)
        elif kind == "blur":
            x = gaussian_filter(x, (0, strength, strength, 0), mode="nearest")
        else:
            mean = x.mean((1, 2), keepdims=True)
            x = (x - mean) * np.float32(strength) + mean
        out[start : start + chunk] = np.clip(np.rint(x), 0, 255)
    return out
