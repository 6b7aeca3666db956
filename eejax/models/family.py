"""What every family of networks has in common.

A family is a function `family(classes, *, image, ..., exits, head, gate, dtype)` that returns an
`EarlyExitNetwork`. These arguments mean the same everywhere, and no family documents them again:

- `classes`: C, the number of classes.
- `image`: `(height, width, channels)`.
- `exits`: where the early exits sit, as `eejax.exits.blocks_of` takes it; without it three, evenly
  spread.
- `head`: `head(e)` makes the head of early exit e, 0-based; without it the family's own.
- `gate`: what the gates of the family's own heads read: `"features"`, `"uncertainty"`, or None for
  no gate.
- `dtype`: of the backbone's arithmetic; parameters, statistics and heads stay float32.
- `dropout`, `stochastic_depth`: rates in [0, 1), in training only; zero in every family unless
  given.

Every family raises ValueError if an image, a size or a rate is out of range, or if an exit does not
exist; the docstring of a family lists its other errors.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from eejax.network import EarlyExitNetwork

TORCHVISION = "torchvision 0.28"  # the source of many published networks
FOR_IMAGENET = types.MappingProxyType({"classes": 1000, "image": (224, 224, 3)})
"""Arguments of the published networks for ImageNet."""


class Published(NamedTuple):
    """A network of the literature that a family reproduces exactly.

    Attributes:
      name: its name there.
      arguments: of the family's function.
      parameters: their number, with no early exit.
      macs: multiply-accumulates of convolutions and matrix products, to three digits; None where
        the source gives none.
      source: where the numbers come from.
    """

    name: str
    arguments: Mapping[str, Any]
    parameters: int
    macs: float | None
    source: str


class Family(NamedTuple):
    """An architecture.

    Attributes:
      build: the family's function. Without arguments it makes a full network for images of 32x32.
      paper: authors, year and link.
      small: arguments of a member that a test trains in seconds, with its `image`.
      published: members to compare with the literature.
      regularisation: the dropout and stochastic depth that the published networks train with, and
        the arguments that these need.
    """

    build: Callable[..., EarlyExitNetwork]
    paper: str
    small: Mapping[str, Any]
    published: Sequence[Published] = ()
    regularisation: Mapping[str, Any] = types.MappingProxyType({})
