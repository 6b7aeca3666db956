"""Small models to cut, and heads for them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name as named

from eejax import ExitOutput, Module
from eejax.adapters.slicing import cut_named, graft

IMAGE = jax.ShapeDtypeStruct((8, 8, 2), jnp.float32)
VECTOR = jax.ShapeDtypeStruct((4,), jnp.float32)
WIDTH = CLASSES = 4


def drawn(key, nth, *shape):
    """Numbers that the key decides; drawing properly takes longer to compile than all else here."""
    seed = jax.random.key_data(key).sum().astype(jnp.float32) % 1000
    size = int(np.prod(shape))
    numbers = jnp.sin((jnp.arange(size, dtype=jnp.float32) + 1) * (seed + 7 * nth + 1))
    return numbers.reshape(shape) / int(np.prod(shape[:-1])) ** 0.5


def images_of(count, image=IMAGE, seed=0) -> Any:
    return np.random.default_rng(seed).normal(size=(count, *image.shape)).astype(image.dtype)


def linear_head(e):
    """A head on features `[B, ..., K]`."""
    del e

    def init(key, features, memory):
        del memory
        return {"params": {"w": drawn(key, 0, features.shape[-1], CLASSES)}}

    def apply(variables, features, memory, *, train, key=None):
        del memory, train
        pooled = features.astype(jnp.float32).mean(tuple(range(1, features.ndim - 1)))
        logits = pooled @ variables["params"]["w"]
        return ExitOutput(logits, logits[:, 0], ()), variables.get("batch_stats", {})

    return Module(init, apply)


def conv(x, w):
    return lax.conv_general_dilated(
        x, w.astype(x.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.jit
def block(x, params, stats, train):
    """Convolution, batch normalisation and a skip; `train` is 0 or 1."""
    y = conv(x, params["w"])
    mean = jnp.where(train, y.mean((0, 1, 2)), stats["mean"].astype(y.dtype))
    y = (y - mean[None, None, None]) * params["scale"].astype(y.dtype)[None, None, None]
    return x + jnp.tanh(y), {"mean": 0.9 * stats["mean"] + 0.1 * mean.astype(jnp.float32)}


def convnet(dtype=jnp.float32):
    """Three blocks; the first is named inside a `jit`, and its output skips to the head as well."""

    def init(key, images):
        params = {"stem": drawn(key, 3, 3, 3, images.shape[-1], WIDTH)}
        for i in range(3):
            w = drawn(key, i, 3, 3, WIDTH, WIDTH)
            params[f"block{i}"] = {"w": w, "scale": jnp.ones(WIDTH)}
        params["head"] = {"w": drawn(key, 4, 2 * WIDTH, CLASSES)}
        stats = {f"block{i}": {"mean": jnp.zeros(WIDTH)} for i in range(3)}
        return {"params": params, "batch_stats": {**stats, "steps": jnp.int32(0)}}

    def apply(variables, images, *, train, key=None):
        params, before = variables["params"], variables["batch_stats"]
        x = conv(images.astype(dtype), params["stem"])
        after, kept = {"steps": before["steps"] + 1}, []
        for i in range(3):
            x, after[f"block{i}"] = block(x, params[f"block{i}"], before[f"block{i}"], train)
            x = jax.jit(lambda x, i=i: named(x, f"x{i}"))(x)
            kept.append(x)
        both = jnp.concatenate([kept[0], x], axis=-1).mean((1, 2))
        return both @ params["head"]["w"].astype(dtype), after if train else before

    return Module(init, apply)


@functools.cache
def cut_convnet(dtype):
    network = cut_named(convnet(dtype), ("x0", "x1"), linear_head, IMAGE)
    original = jax.jit(convnet(dtype).init)(jax.random.key(1), images_of(1))
    variables = graft(jax.jit(network.init)(jax.random.key(0), images_of(1)), original)
    return network, variables, original


def assert_close(found, wanted, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-5, atol=atol
        ),
        found,
        wanted,
    )


def dense(variables, name, x):
    return x @ variables["params"][name]


def dense_model(apply, *names, stats=()):
    """A model of `[4, 4]` matrices and, of zeros, batch statistics `[4]`."""

    def init(key, images):
        del images
        params = {n: drawn(key, i, 4, 4) for i, n in enumerate(names)}
        return {"params": params, "batch_stats": {n: jnp.zeros(4) for n in stats}}

    def with_stats(variables, x, *, train, key=None):
        out = apply(variables, x, train)
        return out if isinstance(out, tuple) else (out, variables["batch_stats"])

    return Module(init, with_stats)
