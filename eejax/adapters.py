"""Adapters: modules that somebody already has, as the pairs of pure functions of `network`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
from jax import Array

from eejax.network import EarlyExitNetwork, Module, PyTree, Variables


def from_linen(module: nn.Module) -> Module:
    """A Flax Linen module whose `__call__` takes `(*inputs, train)`, as a `Module`.

    Of its collections `params` and `batch_stats` are carried. Equal modules give the same pair, by
    which an executor sees that they can share a program (`compaction.runs`).
    """
    try:
        return _from_linen(module)
    except TypeError:  # a field that cannot be hashed, a list say
        return _from_linen.__wrapped__(module)


@functools.cache
def _from_linen(module: nn.Module) -> Module:
    def init(key: Array, *inputs: Any) -> Variables:
        return module.init(key, *inputs, train=False)

    def apply(variables: Variables, *inputs: Any, train: bool) -> tuple[Any, PyTree]:
        stats = variables.get("batch_stats", {})
        if not (train and stats):
            return module.apply(variables, *inputs, train=train), stats
        outputs, updated = module.apply(variables, *inputs, train=True, mutable=["batch_stats"])
        return outputs, updated["batch_stats"]

    return Module(init, apply)


class Chain(nn.Module):
    """Linen modules one after the other, each called with `(features, train=train)`."""

    blocks: Sequence[nn.Module]

    @nn.compact
    def __call__(self, features: PyTree, *, train: bool) -> PyTree:
        for block in self.blocks:
            features = block(features, train=train)
        return features


def cut(
    blocks: Sequence[nn.Module], exits: Sequence[int], head: Callable[[int], nn.Module]
) -> EarlyExitNetwork:
    """A network from a sequence of Linen blocks, cut after some of them.

    Args:
      blocks: the backbone; each is called with `(features, train=train)`.
      exits: after which blocks an exit sits, 1-based and increasing. The network's own classifier
        after the last block is always there and may be left out of the list.
      head: `head(e)` makes the head of exit e, 0-based.

    Raises:
      ValueError: a position that does not exist, or positions out of order.
    """
    ends = list(exits)
    if not ends or ends[-1] != len(blocks):
        ends.append(len(blocks))
    if any(b <= a for a, b in itertools.pairwise([0, *ends])) or ends[-1] > len(blocks):
        raise ValueError(
            f"exits {tuple(exits)} for {len(blocks)} blocks; give increasing numbers from 1 to "
            f"{len(blocks)}."
        )
    stages = [Chain(tuple(blocks[a:b])) for a, b in itertools.pairwise([0, *ends])]
    heads = [head(e) for e in range(len(ends))]
    return EarlyExitNetwork(tuple(map(from_linen, stages)), tuple(map(from_linen, heads)))
