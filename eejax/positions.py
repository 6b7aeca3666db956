"""Where exits sit: by number, by share of the cost, evenly, or after every block."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

Exits = Literal["all"] | int | Sequence[int] | Sequence[float] | None


def blocks_of(
    exits: Exits, blocks: int, fractions: Callable[[], Sequence[float]]
) -> tuple[int, ...]:
    """The blocks after which exits sit, 1-based; the one after the last block is always among them.

    Args:
      exits: one of
        - block numbers, 1-based and increasing: `(2, 5)`;
        - shares of the whole network's multiply-accumulates, between 0 and 1: `(0.15, 0.3, 0.45)`.
          Each is the block at which a plain network would have spent the share most nearly (Kaya,
          Hong, Dumitras, *Shallow-deep networks*, ICML 2019, https://arxiv.org/abs/1810.07052,
          take 15, 30, ... 90 %);
        - a number: so many early exits, evenly spread over the blocks;
        - `"all"`: after every block;
        - None: three early exits evenly spread, fewer where there are not so many blocks.
      blocks: how many there are.
      fractions: gives `[blocks]`, the share that is spent after each block; only asked for shares.

    Raises:
      ValueError: positions that do not exist, that are out of order, or that fall together.
    """
    if exits is None:
        exits = min(3, blocks - 1)
    if isinstance(exits, str):
        if exits != "all":
            raise ValueError(f'exits {exits!r}; give "all", a number, block numbers or shares.')
        return tuple(range(1, blocks + 1))
    if isinstance(exits, float):
        exits = (exits,)
    if isinstance(exits, int):
        if not 0 <= exits < blocks:
            raise ValueError(
                f"{exits} early exits for {blocks} blocks; give 0 to {blocks - 1}. The last exit "
                "is not counted."
            )
        return (*(int(blocks * k / (exits + 1) + 0.5) for k in range(1, exits + 1)), blocks)
    if any(isinstance(e, float) for e in exits):
        return (*_nearest([float(e) for e in exits], np.asarray(fractions())), blocks)
    ends = [int(e) for e in exits]
    if not ends or ends[-1] != blocks:
        ends.append(blocks)
    if any(b <= a for a, b in itertools.pairwise([0, *ends])) or ends[-1] > blocks:
        raise ValueError(
            f"exits {tuple(exits)} for {blocks} blocks; give increasing numbers from 1 to {blocks}."
        )
    return tuple(ends)


def _nearest(shares: Sequence[float], fractions: np.ndarray) -> list[int]:
    """The block, 1-based, that ends nearest to each share."""
    ends = [int(np.abs(fractions - share).argmin()) + 1 for share in shares]
    inside = all(0 < share < 1 for share in shares)
    if not inside or any(b <= a for a, b in itertools.pairwise([0, *ends, len(fractions)])):
        pairs = zip(shares, ends, strict=True)
        found = ", ".join(f"{share:g} at block {end}" for share, end in pairs)
        after = ", ".join(f"{f:.3f}" for f in fractions)
        raise ValueError(
            f"shares {found}; give increasing shares between 0 and 1 that fall to different blocks "
            f"before the last. The blocks end at {after}."
        )
    return ends
