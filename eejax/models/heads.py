"""Exit heads, in Flax Linen: `head(features, memory, train) -> ExitOutput`.

A head is a *reader*, which turns features into a vector, then a linear classifier, an optional
gate, and optionally the logits of the head before as a further input.

    Head(10)                                    global average pooling, linear
    Head(10, Hidden((128,)))                    a small MLP on that
    Head(10, Convolutional())                   BranchyNet's
    Head(10, Mixed(), gate="uncertainty")       the shallow-deep network's, with a gate
    Head(10, gate="evidence")                   a gate on this answer and on the one before
    Head(10, Tokens("attention"))               for transformers
    Head(10, cascaded=True)                     also reads the logits of the head before
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from eejax.network import ExitOutput, PyTree


class Pooled(nn.Module):
    """Global pooling, `[B, H, W, K]` to `[B, K]`, or `[B, 2 K]` for `"both"`.

    Attributes:
      kind: `"average"`, `"max"`, or `"both"`, concatenated.
      norm: batch normalisation and ReLU before it, as at the end of pre-activation networks.
    """

    kind: str = "average"
    norm: bool = False

    @nn.compact
    def __call__(self, features: Array, *, train: bool) -> Array:
        _check_map(features, "Pooled")
        if self.norm:
            features = nn.relu(_batch_norm(train)(features.astype(jnp.float32)))
        parts = []
        if self.kind in ("average", "both"):
            parts.append(_pooled(features.astype(jnp.float32), lax.add, jnp.mean, 0.0, train))
        if self.kind in ("max", "both"):
            highest = _pooled(features, lax.max, jnp.max, -jnp.inf, train)
            parts.append(highest.astype(jnp.float32))
        if not parts:
            raise ValueError(f'pooling {self.kind!r}; give "average", "max" or "both".')
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


class Flat(nn.Module):
    """`[B, H, W, K]` to `[B, K H W]`, channel by channel, the order of PyTorch's weights.

    Attributes:
      size: height and width after averaging over windows; without it nothing is averaged.
    """

    size: int | None = None

    @nn.compact
    def __call__(self, features: Array, *, train: bool) -> Array:
        del train
        _check_map(features, "Flat")
        b, h, w, _ = features.shape
        if self.size is not None and (h, w) != (self.size, self.size):
            if h % self.size or w % self.size:
                raise ValueError(
                    f"features of {h}x{w} for a classifier on {self.size}x{self.size}; give images "
                    f"whose features are a multiple of {self.size}."
                )
            window = (h // self.size, w // self.size)
            features = average_pool(features.astype(jnp.float32), window)
        return features.transpose(0, 3, 1, 2).reshape(b, -1)


class Hidden(nn.Module):
    """An MLP on another reader: linear layers with ReLU.

    Attributes:
      widths: of the layers.
      reader: turns the features into the vector that the MLP reads.
      dtype: of the arithmetic.
      dropout: the rate after each layer.
    """

    widths: Sequence[int]
    reader: nn.Module = Pooled()
    dtype: Any = jnp.float32
    dropout: float = 0.0

    @nn.compact
    def __call__(self, features: PyTree, *, train: bool) -> Array:
        x = self.reader(features, train=train).astype(self.dtype)
        for i, width in enumerate(self.widths):
            x = nn.relu(nn.Dense(width, dtype=self.dtype, name=f"layer{i}")(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return x


class Convolutional(nn.Module):
    """BranchyNet's branch: a 3x3 convolution, ReLU, 3x3 max pooling with stride 2, flattened.

    Teerapittayanon, McDanel, Kung, *BranchyNet*, ICPR 2016, https://arxiv.org/abs/1709.01686.
    A feature map of one pixel is not pooled.

    Attributes:
      width: channels of the convolution.
      dtype: of the arithmetic.
    """

    width: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Array, *, train: bool) -> Array:
        _check_map(features, "Convolutional")
        x = nn.Conv(self.width, (3, 3), dtype=self.dtype, name="conv")(features.astype(self.dtype))
        x = nn.relu(x)
        if min(x.shape[1:3]) > 1:
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        return Flat()(x, train=train)


class Mixed(nn.Module):
    """Pooling to `size` x `size` by `a max + (1 - a) average` with a learned a, flattened.

    The feature reduction of Kaya, Hong, Dumitras, *Shallow-deep networks*, ICML 2019,
    https://arxiv.org/abs/1810.07052. As there, windows are side // size pixels, so a side that is
    no multiple of `size` keeps up to 2 size - 1 pixels; 7x7 features are not pooled with size 4.
    The classifier reads all of them, which is expensive with many classes.

    Attributes:
      size: height and width after pooling, if those of the features are a multiple of it.
    """

    size: int = 4

    @nn.compact
    def __call__(self, features: Array, *, train: bool) -> Array:
        _check_map(features, "Mixed")
        x = features.astype(jnp.float32)
        window = (max(x.shape[1] // self.size, 1), max(x.shape[2] // self.size, 1))
        if max(window) > 1:
            mix = self.param("mix", nn.initializers.constant(0.5), (), jnp.float32)
            highest, mean = nn.max_pool(x, window, window), average_pool(x, window)
            x = mix * highest + (1 - mix) * mean
        return Flat()(x, train=train)


class Reduced(nn.Module):
    """MSDNet's: two 3x3 convolutions with stride 2, normalised, 2x2 average pooling, flattened.

    Huang, Chen, Li, Wu, van der Maaten, Weinberger, *Multi-scale dense networks for resource
    efficient image classification*, ICLR 2018, https://arxiv.org/abs/1703.09844.

    Attributes:
      width: channels of both convolutions; None keeps those of the features, as for ImageNet.
      dtype: of the arithmetic.
    """

    width: int | None = 128
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Array, *, train: bool) -> Array:
        _check_map(features, "Reduced")
        x = features.astype(self.dtype)
        width = x.shape[-1] if self.width is None else self.width
        for i in range(2):
            conv = nn.Conv(
                width, (3, 3), 2, padding=1, use_bias=False, dtype=self.dtype, name=f"conv{i}"
            )
            x = _batch_norm(train, f"bn{i}")(conv(x).astype(jnp.float32))
            x = nn.relu(x).astype(self.dtype)
        if min(x.shape[1:3]) > 1:
            x = average_pool(x, (2, 2))
        return Flat()(x, train=train)


class Tokens(nn.Module):
    """One vector of tokens: `[B, T, D]` to `[B, D]`.

    Attributes:
      kind: `"class"`, the first token; `"mean"`, of all of them; `"attention"`, the mean weighted
        by a softmax of each token's product with a learned query.
      norm: layer normalisation first, as at the end of transformers.
    """

    kind: str = "class"
    norm: bool = True

    @nn.compact
    def __call__(self, features: Array, *, train: bool) -> Array:
        del train
        if features.ndim != 3:
            hint = "; for feature maps give Pooled()" if features.ndim == 4 else ""
            raise ValueError(f"features of shape {features.shape}; Tokens reads [B, T, D]{hint}.")
        x = features.astype(jnp.float32)
        if self.kind == "class":
            x = x[:, :1]
        if self.norm:
            x = nn.LayerNorm(epsilon=1e-6, name="norm")(x)
        if self.kind == "class":
            return x[:, 0]
        if self.kind == "mean":
            return x.mean(1)
        if self.kind == "attention":
            query = self.param("query", nn.initializers.normal(0.02), (x.shape[-1],), jnp.float32)
            weights = jax.nn.softmax(x @ query / x.shape[-1] ** 0.5, axis=-1)
            return jnp.einsum("bt,btd->bd", weights, x)
        raise ValueError(f'tokens read by {self.kind!r}; give "class", "mean" or "attention".')


class Head(nn.Module):
    """A linear classifier on a reader's vector, with an optional gate.

    Attributes:
      classes: C, the number of classes.
      reader: `reader(features, train) -> [B, K]`. Given several scales, it reads the last, the
        coarsest.
      gate: None, a logit of zero; `"features"`, linear on the reader's vector; `"uncertainty"`,
        linear on `uncertainty(logits)`, as in JEI-DNN (Regol, Chataoui, Coates, *Jointly-learned
        exit and inference for a dynamic neural network*, ICLR 2024,
        https://arxiv.org/abs/2310.09163); `"evidence"`, linear on `evidence(logits, before)`, with
        the logits of the head before as `memory`, and no gradient into either.
      cascaded: the classifier also reads the logits of the head before, normalised and without
        gradient, which travel as `memory` (Wolczyk et al., *Zero time waste*, NeurIPS 2021,
        https://arxiv.org/abs/2106.05409). The first head of a cascade has none to read.
      bias: whether the classifier learns an offset.
      dropout: the rate on what the classifier reads.
    """

    classes: int
    reader: nn.Module = Pooled()
    gate: str | None = None
    cascaded: bool = False
    bias: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, features: PyTree, memory: PyTree, *, train: bool) -> ExitOutput:
        """Features to logits `[B, C]`, gate `[B]`, and what the next head reads as memory."""
        if isinstance(features, list | tuple):
            features = features[-1]
        read = self.reader(features, train=train).astype(jnp.float32)
        x = read
        if self.cascaded and jax.tree.leaves(memory):
            before = nn.LayerNorm(name="before")(lax.stop_gradient(memory))
            x = jnp.concatenate([read, before], axis=-1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        logits = nn.Dense(self.classes, use_bias=self.bias, name="classifier")(x)
        remembers = self.cascaded or self.gate == "evidence"
        gate = self._gate(read, logits, memory)
        return ExitOutput(logits, gate, logits if remembers else ())

    def _gate(self, read: Array, logits: Array, memory: PyTree) -> Array:
        if self.gate is None:
            return jnp.zeros(logits.shape[0], jnp.float32)
        if self.gate == "evidence":
            before = memory if jax.tree.leaves(memory) else None
            read = evidence(*lax.stop_gradient((logits, before)))
        elif self.gate == "uncertainty":
            read = uncertainty(logits)
        elif self.gate != "features":
            expected = '"features", "uncertainty", "evidence" or None'
            raise ValueError(f"a gate on {self.gate!r}; give {expected}.")
        # The bias starts low, so that no exit takes most samples at the start of training.
        linear = nn.Dense(1, name="gate", bias_init=nn.initializers.constant(-1.0))
        return linear(read)[:, 0]


def uncertainty(logits: Array) -> Array:
    """Four statistics of `p = softmax(logits)`, `[B, C]` to `[B, 4]`.

    They are max(p), the entropy over log C, the margin between the two largest probabilities, and
    the entropy over log C of p squared and normalised, which weighs the likely classes more.
    """

    def entropy(logits: Array) -> Array:
        log_p = jax.nn.log_softmax(logits)
        return -(jnp.exp(log_p) * log_p).sum(-1) / jnp.log(float(max(logits.shape[-1], 2)))

    best = lax.top_k(jax.nn.softmax(logits), min(2, logits.shape[-1]))[0]
    margin = best[:, 0] - best[:, -1]
    return jnp.stack([best[:, 0], entropy(logits), margin, entropy(2 * logits)], axis=-1)


def evidence(logits: Array, before: Array | None = None) -> Array:
    """Seven statistics of this head's answer and of the one before, `[B, C]` to `[B, 7]`.

    They are the four of `uncertainty`, the log of one plus `-log(1 - max(p))`, which tells
    confidences close to 1 apart, the same of the head before, and whether both heads predict the
    same class.

    Args:
      logits: `[B, C]`.
      before: `[B, C]`, those of the head before; without it the last two are 0.
    """

    def confidence(logits: Array) -> Array:
        top = jnp.arange(logits.shape[-1])[None] == logits.argmax(-1)[:, None]
        others = jax.nn.logsumexp(jnp.where(top, -jnp.inf, logits), axis=-1)
        odds = jnp.minimum(logits.max(-1) - others, 1e4)  # finite with a single class
        return jnp.log1p(jax.nn.softplus(odds))

    agrees = past = jnp.zeros(logits.shape[0], jnp.float32)
    if before is not None:
        past = confidence(before)
        agrees = (logits.argmax(-1) == before.argmax(-1)).astype(jnp.float32)
    more = jnp.stack([confidence(logits), past, agrees], axis=-1)
    return jnp.concatenate([uncertainty(logits), more], axis=-1)


def average_pool(x: Array, window: tuple[int, int]) -> Array:
    """Averages over adjacent windows, `[B, H, W, K]` to `[B, H // h, W // w, K]`.

    Left-over rows and columns are dropped. `nn.avg_pool` divides by an integer, which strict dtype
    promotion refuses.
    """
    return nn.pool(x, 0.0, lax.add, window, window, "VALID") / float(window[0] * window[1])


def _check_map(features: Array, reader: str) -> None:
    if features.ndim != 4:
        hint = "; for tokens give Tokens()" if features.ndim == 3 else ""
        raise ValueError(f"features of shape {features.shape}; {reader} reads [B, H, W, K]{hint}.")


def _batch_norm(train: bool, name: str = "bn") -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)


def _pooled(x: Array, combine: Any, reduce: Any, start: float, train: bool) -> Array:
    """`[B, H, W, K]` to `[B, K]`, by `reduce`, the mean or the maximum.

    On a CPU, XLA fuses a reduction with everything elementwise before it and computes that again:
    in a ResNet the whole chain of shortcuts of a stage, which made a head cost 1 % of the network.
    It does not fuse a window, so inference on a CPU pools by one. The gradient of a window is
    slower, and so is a window on other devices.
    """
    size = x.shape[1] * x.shape[2]

    def window(x: Array) -> Array:
        # A NumPy constant; with a traced one JAX does not recognise a sum or a maximum and has no
        # gradient for it.
        start_ = np.asarray(start, x.dtype)
        shape = (1, *x.shape[1:3], 1)
        pooled = lax.reduce_window(x, start_, combine, shape, shape, "VALID")
        return pooled[:, 0, 0] / (size if combine is lax.add else 1)

    def plain(x: Array) -> Array:
        return reduce(x, axis=(1, 2))

    return plain(x) if train else lax.platform_dependent(x, cpu=window, default=plain)
