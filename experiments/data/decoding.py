"""Image files to uint8 arrays of one shape, on the host.

Needs Pillow and NumPy alone, so that `experiments.pipelines` can give the same work to the data
loaders of other frameworks. Pillow releases the interpreter's lock while it decodes and resizes.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:  # where images are decoded, since few commands do that
    from PIL import Image

Crop = Literal["random", "centre", "whole"]
Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels

# Side of the central square as a share of the shorter side: 224 of 256 pixels.
CENTRE = 0.875


@dataclass(frozen=True)
class Decoder:
    """Decodes, crops and resizes one image.

    Attributes:
      size: H and W of the result.
      crop: what is kept of a training image. "random": a part of 8 to 100 % of its area (Szegedy et
        al., *Going deeper with convolutions*, CVPR 2015, https://arxiv.org/abs/1409.4842);
        "centre": the central square, 7/8 of the shorter side; "whole": all of it.
    """

    size: int
    crop: Crop

    def __call__(
        self, image: bytes | np.ndarray, random: np.random.Generator | None = None
    ) -> np.ndarray:
        """One image.

        Args:
          image: an encoded file, or uint8 `[H, W]`, `[H, W, 1]` or `[H, W, 3]`.
          random: draws a random crop; None, as in evaluation, takes the centre instead.

        Returns:
          uint8 `[size, size, 3]`.

        Raises:
          ValueError: if it cannot be decoded.
        """
        with _opened(image) as opened:
            width, height = opened.size
            if self.crop == "whole":
                box = (0.0, 0.0, float(width), float(height))
            elif self.crop == "random" and random is not None:
                box = random_box(width, height, random)
            else:
                box = central_box(width, height)
            # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, which takes less time; no side
            # of the box gets shorter than the result.
            share = max(self.size / (box[2] - box[0]), self.size / (box[3] - box[1]))
            if share < 1:
                opened.draft("RGB", (int(width * share), int(height * share)))
            try:
                pixels = opened.convert("RGB")
            except (OSError, SyntaxError) as error:
                raise ValueError(f"an image cannot be decoded: {error}") from error
        x, y = pixels.width / width, pixels.height / height
        box = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
        if (*box, *pixels.size) != (0, 0, *pixels.size, self.size, self.size):
            from PIL import Image

            pixels = pixels.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        return np.asarray(pixels)


def _opened(image: bytes | np.ndarray) -> Image.Image:
    from PIL import Image

    if isinstance(image, np.ndarray):
        return Image.fromarray(image.squeeze(-1) if image.shape[2:] == (1,) else image)
    try:
        return Image.open(io.BytesIO(image))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"an image cannot be decoded: {error}") from error


def central_box(width: int, height: int) -> Box:
    """The central square, 7/8 of the shorter side."""
    side = CENTRE * min(width, height)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def random_box(width: int, height: int, random: np.random.Generator) -> Box:
    """A random part of 8 to 100 % of the area, its sides in a ratio of 3/4 to 4/3.

    The first of ten draws that fits into the image; otherwise the largest central square.
    """
    shares = random.uniform(0.08, 1.0, 10)
    ratios = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3), 10))
    left, upper = random.uniform(size=2)
    widths = np.sqrt(width * height * shares * ratios)
    heights = np.sqrt(width * height * shares / ratios)
    fits = (widths <= width) & (heights <= height)
    if fits.any():
        first = int(fits.argmax())
        w, h = float(widths[first]), float(heights[first])
    else:
        w = h = float(min(width, height))
        left = upper = 0.5
    x, y = float(left) * (width - w), float(upper) * (height - h)
    return x, y, x + w, y + h
