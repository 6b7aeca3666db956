"""Positions of exits: block numbers, shares of the cost, evenly spread, or after every block."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np

Exits = Literal["all"] | int | float | Iterable[int] | Iterable[float] | None


def blocks_of(
    exits: Exits, blocks: int, fractions: Callable[[], Sequence[float]]
) -> tuple[int, ...]:
    """The blocks that an exit follows, 1-based; the last block is always among them.

    Args:
      exits: one of
        - block numbers, 1-based and increasing: `(2, 5)`;
        - shares of the network's multiply-accumulates, between 0 and 1: `(0.15, 0.3, 0.45)`, or a
          single share. The exit follows the block after which the share spent by a plain network
          is nearest (Kaya, Hong, Dumitras, *Shallow-deep networks*, ICML 2019,
          https://arxiv.org/abs/1810.07052, take 15, 30, ... 90 %);
        - a whole number of early exits, evenly spread over the blocks;
        - `"all"`: after every block;
        - None: three early exits, evenly spread, or fewer if there are fewer blocks.
      blocks: their number.
      fractions: returns `[blocks]`, the share spent after each block; only called for shares.

    Raises:
      ValueError: if positions do not exist, are not increasing or coincide, or `exits` is of
        another form.
    """
    if exits is None:
        exits = min(3, blocks - 1)
    if isinstance(exits, str) and exits == "all":
        return tuple(range(1, blocks + 1))
    numbers = _numbers(exits)
    if numbers.ndim == 0 and numbers.dtype.kind in "iu":
        count = int(numbers)
        if not 0 <= count < blocks:
            raise ValueError(
                f"{count} early exits for {blocks} blocks; give 0 to {blocks - 1}. The last exit "
                "is not counted."
            )
        return (*(int(blocks * k / (count + 1) + 0.5) for k in range(1, count + 1)), blocks)
    given = tuple(np.atleast_1d(numbers).tolist())
    if numbers.dtype.kind == "f" and given:
        if not all(0 < share < 1 for share in given):
            raise ValueError(
                f"exits {given}; shares lie between 0 and 1; block numbers are whole numbers."
            )
        return (*_nearest(given, np.asarray(fractions())), blocks)
    ends = given if given and given[-1] == blocks else (*given, blocks)
    if any(b <= a for a, b in itertools.pairwise([0, *ends])) or ends[-1] > blocks:
        raise ValueError(
            f"exits {given} for {blocks} blocks; give increasing numbers from 1 to {blocks}."
        )
    return ends


def _numbers(exits: object) -> np.ndarray:
    """`exits` as an array of whole numbers or of floats, without axes or with one."""
    values = exits
    # An array without axes cannot be listed.
    if isinstance(exits, Iterable) and not isinstance(exits, str) and getattr(exits, "ndim", 1):
        values = list(exits)
    try:
        numbers = np.asarray(values)
    except ValueError:  # lists of different lengths
        numbers = np.asarray(None)
    # Among numbers, NumPy takes True for 1.
    booleans = isinstance(values, list) and any(isinstance(v, bool | np.bool_) for v in values)
    if numbers.ndim > 1 or numbers.dtype.kind not in "iuf" or booleans:
        raise ValueError(f'exits {values!r}; give "all", a number, block numbers or shares.')
    return numbers


def _nearest(shares: Sequence[float], fractions: np.ndarray) -> list[int]:
    """For each share the block, 1-based, whose end is nearest to it."""
    ends = [int(np.abs(fractions - share).argmin()) + 1 for share in shares]
    if any(b <= a for a, b in itertools.pairwise([0, *ends, len(fractions)])):
        pairs = zip(shares, ends, strict=True)
        positions = ", ".join(f"{share:g} at block {end}" for share, end in pairs)
        after = ", ".join(f"{f:.3f}" for f in fractions)
        raise ValueError(
            f"shares {positions}; give increasing shares that fall to different blocks before the "
            f"last. The blocks end at {after}."
        )
    return ends
