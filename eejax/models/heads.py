"""Exit heads, in Flax Linen: `head(features, memory, train) -> ExitOutput`.

A head is a *reader*, which makes a vector of the features, and what every head has after it: a
linear classifier, and if asked for a gate and a look at what the head before said.

    Head(10)                                    global average pooling, linear
    Head(10, Hidden((128,)))                    a small MLP on that
    Head(10, Convolutional())                   BranchyNet's
    Head(10, Mixed(), gate="uncertainty")       the shallow-deep network's, with a gate
    Head(10, Tokens("attention"))               for transformers
    Head(10, cascaded=True)                     sees the head before it
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
      kind: `"average"`, `"max"`, or `"both"` side by side.
      norm: batch normalisation and ReLU before it, which pre-activation networks end with.
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
    """`[B, H, W, K]` to `[B, K H W]`, channel by channel, the order in which PyTorch's weights are.

    Attributes:
      size: average over windows to this height and width before; None leaves them.
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
    """Linear layers with ReLU on what another reader gives: a small MLP.

    Attributes:
      widths: of each layer.
      reader: what it reads.
      dtype: of the arithmetic.
    """

    widths: Sequence[int]
    reader: nn.Module = Pooled()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: PyTree, *, train: bool) -> Array:
        x = self.reader(features, train=train).astype(self.dtype)
        for i, width in enumerate(self.widths):
            x = nn.relu(nn.Dense(width, dtype=self.dtype, name=f"layer{i}")(x))
        return x


class Convolutional(nn.Module):
    """BranchyNet's branch: a 3x3 convolution, ReLU, 3x3 max pooling with stride 2, flattened.

    Teerapittayanon, McDanel, Kung, *BranchyNet*, ICPR 2016, https://arxiv.org/abs/1709.01686.
    Of a feature map of one pixel nothing is pooled.

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
    https://arxiv.org/abs/1810.07052. Windows are side // size pixels, their formula, so a side that
    is no multiple of `size` keeps up to 2 size - 1; of 7x7 features nothing is pooled with size 4.
    All that stays is read by the classifier, which is heavy where there are many classes.

    Attributes:
      size: height and width after pooling, of features that are a multiple of it.
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
      width: channels of both convolutions; None is as many as come in (their ImageNet networks).
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
      norm: layer normalisation first, which transformers end with.
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
    """A linear classifier on what a reader makes of the features, with an optional gate.

    Attributes:
      classes: C, the number of classes.
      reader: `reader(features, train) -> [B, K]`. Of a list of scales it gets the last, the
        coarsest.
      gate: None, a logit of zero; `"features"`, linear on what the reader gives; `"uncertainty"`,
        linear on `uncertainty(logits)`, as in JEI-DNN (Regol, Chataoui, Coates, *Jointly-learned
        exit and inference for a dynamic neural network*, ICLR 2024,
        https://arxiv.org/abs/2310.09163).
      cascaded: the classifier also sees the logits of the head before, normalised and without
        gradient, which come and go as `memory` (Wolczyk et al., *Zero time waste*, NeurIPS 2021,
        https://arxiv.org/abs/2106.05409). The first head of a cascade has none to see.
      bias: whether the classifier learns an offset.
    """

    classes: int
    reader: nn.Module = Pooled()
    gate: str | None = None
    cascaded: bool = False
    bias: bool = True

    @nn.compact
    def __call__(self, features: PyTree, memory: PyTree, *, train: bool) -> ExitOutput:
        """Features to logits `[B, C]`, gate `[B]`, and for a cascaded head the logits as memory."""
        if isinstance(features, list | tuple):
            features = features[-1]
        read = self.reader(features, train=train).astype(jnp.float32)
        seen = read
        if self.cascaded and jax.tree.leaves(memory):
            said = nn.LayerNorm(name="before")(lax.stop_gradient(memory))
            seen = jnp.concatenate([read, said], axis=-1)
        logits = nn.Dense(self.classes, use_bias=self.bias, name="classifier")(seen)
        return ExitOutput(logits, self._gate(read, logits), logits if self.cascaded else ())

    def _gate(self, read: Array, logits: Array) -> Array:
        if self.gate is None:
            return jnp.zeros(logits.shape[0], jnp.float32)
        if self.gate not in ("features", "uncertainty"):
            raise ValueError(f'a gate on {self.gate!r}; give "features", "uncertainty" or None.')
        # The gate starts undecided at a low rate, so that no exit hoards the samples at the start.
        linear = nn.Dense(1, name="gate", bias_init=nn.initializers.constant(-1.0))
        return linear(read if self.gate == "features" else uncertainty(logits))[:, 0]


def uncertainty(logits: Array) -> Array:
    """Four statistics of `p = softmax(logits)`, `[B, C]` to `[B, 4]`.

    The largest probability; the entropy over log C; the largest less the second largest; and the
    entropy over log C of p squared and normalised, which looks closer at the likely classes.
    """

    def entropy(logits: Array) -> Array:
        log_p = jax.nn.log_softmax(logits)
        return -(jnp.exp(log_p) * log_p).sum(-1) / jnp.log(float(max(logits.shape[-1], 2)))

    best = lax.top_k(jax.nn.softmax(logits), min(2, logits.shape[-1]))[0]
    margin = best[:, 0] - best[:, -1]
    return jnp.stack([best[:, 0], entropy(logits), margin, entropy(2 * logits)], axis=-1)


def average_pool(x: Array, window: tuple[int, int]) -> Array:
    """Averages over windows side by side, `[B, H, W, K]` to `[B, H/h, W/w, K]`.

    What is left over at the lower and right edges is dropped. Flax's own divides by an integer,
    which strict types refuse.
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

    XLA fuses a reduction with everything elementwise before it, and on a CPU computes that again
    for it: in a ResNet the whole chain of shortcuts of a stage, which made a head cost 1 % of the
    network. It does not fuse a window. Where gradients are wanted a window's are slower, though,
    and on other devices the reduction is the quicker.
    """
    size = x.shape[1] * x.shape[2]

    def window(x: Array) -> Array:
        # NumPy's, which stays a constant while tracing. With any other start JAX does not see that
        # this is a sum or a maximum, and has no gradient for it.
        start_ = np.asarray(start, x.dtype)
        shape = (1, *x.shape[1:3], 1)
        pooled = lax.reduce_window(x, start_, combine, shape, shape, "VALID")
        return pooled[:, 0, 0] / (size if combine is lax.add else 1)

    def plain(x: Array) -> Array:
        return reduce(x, axis=(1, 2))

    return plain(x) if train else lax.platform_dependent(x, cpu=window, default=plain)
