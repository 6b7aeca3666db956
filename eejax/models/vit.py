"""The vision transformer.

Dosovitskiy, Beyer, Kolesnikov et al., *An image is worth 16x16 words*, ICLR 2021,
https://arxiv.org/abs/2010.11929, its sizes Ti and S from Touvron et al., *Training data-efficient
image transformers*, ICML 2021, https://arxiv.org/abs/2012.12877. All blocks are equal modules, so
with exits after all of them `eejax.loop` compiles one for any depth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from eejax.backbone import Chain, cut
from eejax.exits import Exits
from eejax.models.family import FOR_IMAGENET, TORCHVISION, Family, Published
from eejax.models.heads import Head, Tokens
from eejax.models.layers import check_patches, check_rate, check_size, drop_branch
from eejax.network import EarlyExitNetwork

SIZES = {"Ti": (192, 3), "S": (384, 6), "B": (768, 12)}


class Embedding(nn.Module):
    """Images `[B, H, W, C]` to tokens `[B, T, width]`, row by row, with learned positions.

    Attributes:
      width: D.
      patch: pixels along a patch.
      token: whether a learned token comes before those of the patches.
      dropout: the rate, after the positions are added.
    """

    width: int
    patch: int
    token: bool
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, size, "VALID", dtype=self.dtype, name="patch_embed")(
            x.astype(self.dtype)
        )
        x = x.reshape(x.shape[0], -1, self.width)
        if self.token:
            shape = (1, 1, self.width)
            first = self.param("cls_token", nn.initializers.zeros, shape, jnp.float32)
            first = jnp.broadcast_to(first.astype(self.dtype), (x.shape[0], 1, self.width))
            x = jnp.concatenate([first, x], axis=1)
        shape = (1, *x.shape[1:])
        positions = self.param("pos_embed", nn.initializers.normal(0.02), shape, jnp.float32)
        x = x + positions.astype(self.dtype)
        return nn.Dropout(self.dropout, deterministic=not train)(x)


class Block(nn.Module):
    """Attention, then an MLP, each with layer normalisation before it and beside a shortcut.

    `[B, T, D]` to the same shape.

    Attributes:
      heads: of attention.
      dropout: the rate, after the projection of the attention and after both layers of the MLP.
      drop: the rate of stochastic depth.
    """

    heads: int
    dropout: float = 0.0
    drop: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        b, t, width = x.shape
        dropout = functools.partial(nn.Dropout(self.dropout), deterministic=not train)
        y = self._dense(3 * width, "attn_qkv")(self._norm("norm1", x))
        q, k, v = jnp.moveaxis(y.reshape(b, t, 3, self.heads, width // self.heads), 2, 0)
        scores = jnp.einsum("bihd,bjhd->bhij", q * (width // self.heads) ** -0.5, k)
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(self.dtype)
        y = jnp.einsum("bhij,bjhd->bihd", weights, v).reshape(b, t, width)
        x = x + drop_branch(dropout(self._dense(width, "attn_proj")(y)), self.drop, train)
        y = nn.gelu(self._dense(4 * width, "mlp_fc1")(self._norm("norm2", x)), approximate=False)
        return x + drop_branch(dropout(self._dense(width, "mlp_fc2")(dropout(y))), self.drop, train)

    def _norm(self, name: str, x: Array) -> Array:
        return nn.LayerNorm(epsilon=1e-6, name=name)(x.astype(jnp.float32)).astype(self.dtype)

    def _dense(self, width: int, name: str) -> nn.Dense:
        init = nn.initializers.xavier_uniform()
        return nn.Dense(width, dtype=self.dtype, kernel_init=init, name=name)


def vit(
    classes: int,
    *,
    image: Sequence[int] = (32, 32, 3),
    size: str = "Ti",
    depth: int = 12,
    width: int | None = None,
    heads: int | None = None,
    patch: int = 4,
    pool: str = "class",
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    exits: Exits = None,
    head: Callable[[int], nn.Module] | None = None,
    gate: str | None = None,
    dtype: Any = jnp.float32,
) -> EarlyExitNetwork:
    """A vision transformer, with exits after any of its blocks; all heads are
    `Head(classes, Tokens(pool))`.

    Args:
      image: a multiple of the patch; the learned positions are for this size alone.
      size: `"Ti"`, `"S"` or `"B"`: 192, 384 or 768 wide, with 3, 6 or 12 attention heads.
      depth: blocks.
      width: of the tokens, in place of that of `size`.
      heads: of attention, in place of those of `size`; the width is a multiple of them.
      patch: pixels along a patch; 16 for ImageNet.
      pool: what heads read: `"class"`, a learned token, or `"mean"`, the mean of the tokens, which
        are then those of the patches alone (Beyer, Zhai, Kolesnikov, *Better plain ViT baselines
        for ImageNet-1k*, 2022, https://arxiv.org/abs/2205.01580).
      dropout: of the embedding, the attention's projection and the MLP; 0.1 in the paper.
      stochastic_depth: the rate at which a sample skips an attention or an MLP; DeiT has 0.1. It is
        the same in all blocks, so that they stay equal, as in Touvron, Cord, Jégou, *DeiT III*,
        ECCV 2022, https://arxiv.org/abs/2204.07118.
    """
    if size not in SIZES:
        raise ValueError(f"a ViT of size {size!r}; give {', '.join(map(repr, SIZES))}.")
    if pool not in ("class", "mean"):
        raise ValueError(f'tokens pooled by {pool!r}; give "class" or "mean".')
    width = SIZES[size][0] if width is None else width
    heads = SIZES[size][1] if heads is None else heads
    check_size(image, depth=depth, width=width, heads=heads, patch=patch)
    check_rate(dropout=dropout, stochastic_depth=stochastic_depth)
    if width % heads:
        raise ValueError(f"{width} channels for {heads} attention heads; give a multiple of them.")
    check_patches(image, patch)
    blocks: list[nn.Module] = [Block(heads, dropout, stochastic_depth, dtype) for _ in range(depth)]
    blocks[0] = Chain((Embedding(width, patch, pool == "class", dropout, dtype), blocks[0]))
    last = Head(classes, Tokens(pool), gate)
    return cut(blocks, exits, head or (lambda e: last), classifier=last, image=image)


_LARGE = {**FOR_IMAGENET, "patch": 16}

FAMILY = Family(
    vit,
    "Dosovitskiy et al., 2021, https://arxiv.org/abs/2010.11929",
    {"depth": 3, "width": 8, "heads": 2, "image": (8, 8, 3), "exits": "all"},
    (
        # timm gives no more than two digits of the first two's multiply-accumulates.
        Published("ViT-Ti/16", {**_LARGE, "size": "Ti"}, 5_717_416, None, "timm 1.0.31"),
        Published("ViT-S/16", {**_LARGE, "size": "S"}, 22_050_664, None, "timm 1.0.31"),
        Published("ViT-B/16", {**_LARGE, "size": "B"}, 86_567_656, 17.564e9, TORCHVISION),
    ),
    {"dropout": 0.1, "stochastic_depth": 0.1},
)
