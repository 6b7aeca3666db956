"""Networks from a sequence of Flax Linen blocks, cut after some of them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eejax import cost
from eejax.exits import Exits, blocks_of
from eejax.network import EarlyExitNetwork, ExitOutput, Module, PyTree, Variables


def from_linen(module: nn.Module) -> Module:
    """A Flax Linen module whose `__call__` takes `(*inputs, train)`, as a `Module`.

    The collections `params` and `batch_stats` are kept; the key of a training step becomes the
    stream `"dropout"`. Equal modules give the same pair, by which an executor sees that they can
    share a program.
    """
    try:
        return _from_linen(module)
    except TypeError:  # a field that cannot be hashed, a list say
        return _from_linen.__wrapped__(module)


@functools.cache
def _from_linen(module: nn.Module) -> Module:
    def init(key: Array, *inputs: Any) -> Variables:
        return module.init(key, *inputs, train=False)

    def apply(
        variables: Variables, *inputs: Any, train: bool, key: Array | None = None
    ) -> tuple[Any, PyTree]:
        stats = variables.get("batch_stats", {})
        rngs = None if key is None else {"dropout": key}
        if not (train and stats):
            return module.apply(variables, *inputs, train=train, rngs=rngs), stats
        outputs, updated = module.apply(
            variables, *inputs, train=True, rngs=rngs, mutable=["batch_stats"]
        )
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
    blocks: Sequence[nn.Module],
    exits: Exits,
    head: Callable[[int], nn.Module],
    *,
    classifier: nn.Module | None = None,
    image: Sequence[int] | None = None,
) -> EarlyExitNetwork:
    """Cuts a sequence of Linen blocks after some of them, and puts a head at each cut.

    Args:
      blocks: the backbone; each block is called with `(features, train=train)`.
      exits: the positions of the exits, as `eejax.exits.blocks_of` takes them. The exit after the
        last block is always there and may be left out.
      head: `head(e)` makes the head of exit e, 0-based.
      classifier: the last head; without it `head` makes that one too.
      image: `(height, width, channels)` of the images; only shares of the cost need it.

    Raises:
      ValueError: if a position does not exist, or shares come without `image`.
    """

    def assemble(ends: Sequence[int], head: Callable[[int], Module]) -> EarlyExitNetwork:
        stages = [Chain(tuple(blocks[a:b])) for a, b in itertools.pairwise([0, *ends])]
        last = len(ends) - 1
        heads = [head(e) for e in range(last)]
        heads.append(from_linen(classifier) if classifier is not None else head(last))
        return EarlyExitNetwork(tuple(map(from_linen, stages)), tuple(heads))

    def fractions() -> list[float]:
        if image is None:
            raise ValueError("exits at shares of the cost need the shape of an image; give image=.")
        plain = assemble(
            range(1, len(blocks) + 1),
            lambda e: from_linen(head(e)) if e == len(blocks) - 1 else _FREE,
        )
        shape = jax.ShapeDtypeStruct((1, *image), jnp.float32)
        shapes = jax.eval_shape(plain.init, jax.random.key(0), shape)
        costs = cost.macs(plain, shapes, shape)
        return (np.cumsum(costs.stages) / costs.cumulative[-1]).tolist()

    ends = blocks_of(exits, len(blocks), fractions)
    return assemble(ends, lambda e: from_linen(head(e)))


def _zeros(
    variables: Variables, features: PyTree, memory: PyTree, **mode: Any
) -> tuple[ExitOutput, PyTree]:
    del variables, memory, mode
    zeros = jnp.zeros(jax.tree.leaves(features)[0].shape[0])
    return ExitOutput(zeros[:, None], zeros, ()), {}


# A head without cost, to measure the backbone alone.
_FREE = Module(lambda *_: {}, _zeros)
