"""What a file of the zoo says of itself, for the tests and for the table in docs/models.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from eejax.network import EarlyExitNetwork


class Published(NamedTuple):
    """A network of the literature that a family makes to the letter.

    Attributes:
      name: as it is called there.
      arguments: of the family's function.
      parameters: with exits nowhere but at the end, exactly.
      macs: multiply-accumulates of convolutions and matrix products, to three digits; None where
        the source gives none.
      source: who says so.
    """

    name: str
    arguments: Mapping[str, Any]
    parameters: int
    macs: float | None
    source: str


class Family(NamedTuple):
    """A way to make networks.

    Attributes:
      build: `build(classes, *, image, exits, head, gate, dtype, ...) -> EarlyExitNetwork`. Without
        arguments a full network for images of 32x32.
      paper: authors, year and address.
      small: arguments of a member that a test trains in seconds, its `image` among them.
      published: members to stand beside.
    """

    build: Callable[..., EarlyExitNetwork]
    paper: str
    small: Mapping[str, Any]
    published: Sequence[Published] = ()
