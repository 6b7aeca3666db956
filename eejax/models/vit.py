"""The vision transformer.

Dosovitskiy, Beyer, Kolesnikov et al., *An image is worth 16x16 words*, ICLR 2021,
https://arxiv.org/abs/2010.11929, its sizes Ti and S from Touvron et al., *Training data-efficient
image transformers*, ICML 2021, https://arxiv.org/abs/2012.12877. All blocks are one module, so that
with exits after all of them `compaction.loop` compiles one, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from eejax.backbone import Chain, cut
from eejax.exits import Exits
from eejax.models.family import Family, Published
from eejax.models.heads import Head, Tokens
from eejax.models.layers import check_patches, check_size
from eejax.network import EarlyExitNetwork

SIZES = {"Ti": (192, 3), "S": (384, 6), "B": (768, 12)}


class Embedding(nn.Module):
    """Images `[B, H, W, C]` to tokens `[B, T, width]`, row by row, with learned positions.

    Attributes:
      width: D.
      patch: pixels along a patch.
      token: a learned token comes before those of the patches.
    """

    width: int
    patch: int
    token: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        del train
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
        return x + positions.astype(self.dtype)


class Block(nn.Module):
    """Attention and then an MLP, each normalised before it and beside a shortcut: `[B, T, D]`."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        del train
        b, t, width = x.shape
        y = self._dense(3 * width, "attn_qkv")(self._norm("norm1", x))
        q, k, v = jnp.moveaxis(y.reshape(b, t, 3, self.heads, width // self.heads), 2, 0)
        scores = jnp.einsum("bihd,bjhd->bhij", q * (width // self.heads) ** -0.5, k)
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(self.dtype)
        y = jnp.einsum("bhij,bjhd->bihd", weights, v).reshape(b, t, width)
        x = x + self._dense(width, "attn_proj")(y)
        y = nn.gelu(self._dense(4 * width, "mlp_fc1")(self._norm("norm2", x)), approximate=False)
        return x + self._dense(width, "mlp_fc2")(y)

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
    exits: Exits = None,
    head: Callable[[int], nn.Module] | None = None,
    gate: str | None = None,
    dtype: Any = jnp.float32,
) -> EarlyExitNetwork:
    """A vision transformer, with exits after any of its blocks.

    Without dropout and stochastic depth, which change neither parameters nor inference.

    Args:
      classes: C.
      image: `(height, width, channels)`, which the learned positions are bound to.
      size: `"Ti"`, `"S"` or `"B"`: 192, 384 or 768 wide, with 3, 6 or 12 attention heads.
      depth: blocks.
      width: of the tokens, in place of the size's.
      heads: of attention, in place of the size's.
      patch: pixels along a patch; 16 for ImageNet.
      pool: what heads read: `"class"`, a token of its own, or `"mean"`, of the patches' tokens
        (Beyer, Zhai, Kolesnikov, *Better plain ViT baselines for ImageNet-1k*, 2022,
        https://arxiv.org/abs/2205.01580); then there is no class token.
      exits: where, as `positions.blocks_of` takes them.
      head: `head(e)` makes an early head; `heads.Head(classes, Tokens(pool), gate)` without it.
      gate: what the gates of the heads read: `"features"`, `"uncertainty"`, or None for no gate.
      dtype: of the backbone's arithmetic; parameters, normalisation and heads stay float32.

    Raises:
      ValueError: another size or pool, a number that is not positive, images that are not whole
        patches, a width that is not a multiple of the heads, or exits that do not exist.
    """
    if size not in SIZES:
        raise ValueError(f"a ViT of size {size!r}; give {', '.join(map(repr, SIZES))}.")
    if pool not in ("class", "mean"):
        raise ValueError(f'tokens pooled by {pool!r}; give "class" or "mean".')
    width = SIZES[size][0] if width is None else width
    heads = SIZES[size][1] if heads is None else heads
    check_size(image, depth=depth, width=width, heads=heads, patch=patch)
    if width % heads:
        raise ValueError(f"{width} channels for {heads} attention heads; give a multiple of them.")
    check_patches(image, patch)
    blocks: list[nn.Module] = [Block(heads, dtype) for _ in range(depth)]
    blocks[0] = Chain((Embedding(width, patch, pool == "class", dtype), blocks[0]))
    last = Head(classes, Tokens(pool), gate)
    return cut(blocks, exits, head or (lambda e: last), classifier=last, image=image)


_LARGE = {"classes": 1000, "image": (224, 224, 3), "patch": 16}

FAMILY = Family(
    vit,
    "Dosovitskiy et al., 2021, https://arxiv.org/abs/2010.11929",
    {"depth": 3, "width": 8, "heads": 2, "image": (8, 8, 3), "exits": "all"},
    (
        # timm gives no more than two digits of the first two's multiply-accumulates.
        Published("ViT-Ti/16", {**_LARGE, "size": "Ti"}, 5_717_416, None, "timm 1.0.31"),
        Published("ViT-S/16", {**_LARGE, "size": "S"}, 22_050_664, None, "timm 1.0.31"),
        Published("ViT-B/16", {**_LARGE, "size": "B"}, 86_567_656, 17.564e9, "torchvision 0.28"),
    ),
)
