"""Every rule against JAX, in ONNX Runtime."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params
from onnx_models import model_of, results

from eejax.models import layers
from eejax.onnx.rules import RULES

SEED = 20261128
IMAGES = np.random.default_rng(SEED).normal(size=(3, 6, 7, 4)).astype(np.float32)
ROWS = IMAGES.reshape(3, -1)[:, :24]
SPREAD = np.arange(1.0, 6.0, dtype=np.float32)[None]
SPECIAL = np.array([[0, -0.0, 1, -1, 3e38, -3e38, np.inf, -np.inf, np.nan, 1e-30]], np.float32)
KERNEL = np.random.default_rng(SEED + 1).normal(size=(3, 3, 4, 8)).astype(np.float32)

MAX_POOL: Any = nn.max_pool


def flat(x):
    return x.reshape(x.shape[0], -1).astype(jnp.float32)


def convolved(x, kernel=KERNEL, stride=(1, 1), padding: Any = "SAME", **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, jnp.asarray(kernel), stride, padding, dimension_numbers=numbers, **options
    )


def convolved_in_one(x):
    return lax.conv_general_dilated(
        x, jnp.asarray(KERNEL[0]), (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )


def blocks(x, a, b):
    batch, h, w, k = x.shape
    return flat(x.reshape(batch, h // a, a, w // b, b, k).max((2, 4)))


def more_channels(x, before, after, value=0.0):
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, after)), constant_values=value)


def attention(x):
    q, k, v = (jnp.stack([x[..., :2], x[..., 2:]], 2) * s for s in (1.0, 0.5, 2.0))
    weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return flat(jnp.einsum("bhqk,bkhd->bqhd", weights, v))


FUNCTIONS = {
    "arithmetic": lambda x: flat((x * 2 - 1) / (jnp.abs(x) + 0.5) + -x),
    "a_channel": lambda x: flat(x * jnp.arange(4.0)[None, None, None] + x[:, :1]),
    "powers": lambda x: flat(x**2 + x**3 + jnp.abs(x) ** 5 + lax.rsqrt(jnp.abs(x) + 1)),
    "exponentials": lambda x: flat(jnp.expm1(x) + jnp.log1p(jnp.abs(x)) + jnp.log(jnp.exp(x))),
    "sigmoids": lambda x: flat(nn.sigmoid(x) + jnp.tanh(x) + nn.silu(x) + nn.relu6(4 * x)),
    "gelu": lambda x: flat(nn.gelu(x) + nn.gelu(x, approximate=False)),
    "softmax": lambda x: flat(nn.softmax(x) + nn.log_softmax(x) + nn.softplus(x)),
    "an_inner_softmax": lambda x: flat(nn.softmax(x, axis=1)),
    "logsumexp": lambda x: flat(jax.nn.logsumexp(x, axis=(3,))),
    "comparisons": lambda x: flat(
        jnp.where(x > 0.5, 1.0, jnp.where(x >= 0, 2.0, jnp.where(x < -1, 3.0, x)))
        + ((x <= 0) & ~(x == 0) | (x != x)).astype(jnp.float32)
    ),
    "a_chosen_case": lambda x: flat(lax.select_n((x > 0).astype(jnp.int32), x, -x)),
    "signs": lambda x: flat(jnp.sign(x) + jnp.sqrt(jnp.abs(x)) + jnp.minimum(x, 0.1 * x)),
    "transposed": lambda x: flat(x.transpose(0, 3, 1, 2) + 1),
    "turned_twice": lambda x: flat(x.transpose(0, 2, 3, 1).transpose(0, 3, 1, 2) * x),
    "reshaped": lambda x: flat(x.reshape(x.shape[0], 2, 3, 28)[:, :, 1] + 1),
    "sliced": lambda x: flat(x[:, 1:5:2, ::3, -1]) + x[:, 0, 0, 2:3],
    "stacked": lambda x: flat(jnp.stack([x, x * 2], 2)) + 1,
    "concatenated": lambda x: flat(jnp.concatenate([x, convolved(x)], axis=-1)),
    "padded": lambda x: flat(jnp.pad(x, ((0, 0), (1, 2), (0, 0), (0, 3)), constant_values=2.0)),
    "channels_added": lambda x: flat(more_channels(convolved(x), 2, 3)),
    "channels_added_to_every_second": lambda x: flat(
        more_channels(convolved(x)[:, ::2, ::3], 1, 0)
    ),
    "channels_added_to_a_crop": lambda x: flat(more_channels(convolved(x)[:, :4:2, :5], 1, 0)),
    "channels_added_to_every_other": lambda x: flat(more_channels(convolved(x)[..., ::2], 1, 2)),
    "channels_of_twos_added": lambda x: flat(more_channels(convolved(x), 2, 3, 2.0)),
    "channels_added_to_images": lambda x: flat(more_channels(x, 2, 3)),
    "not_padded": lambda x: flat(jnp.pad(x, ((0, 0),) * 4)),
    "sums": lambda x: (
        flat(x.sum(1)) @ jnp.ones((28, 2)) + x.sum((1, 2))[:, :1] + x.max((1, 2, 3))[:, None]
    ),
    "means": lambda x: jnp.concatenate([x.mean((1, 2)), x.max((1, 2)), x.min((1, 2))], -1),
    "halved": lambda x: flat(layers.halved(convolved(x))),
    "halved_images": lambda x: flat(layers.halved(x)),
    "max_window": lambda x: flat(MAX_POOL(x, (3, 3), (2, 2), ((1, 1), (0, 1)))),
    "sum_window": lambda x: flat(
        lax.reduce_window(
            x, 0.0, lax.add, (1, 2, 3, 1), (1, 2, 1, 1), ((0, 0), (1, 0), (0, 1), (0, 0))
        )
    ),
    "convolution": lambda x: flat(convolved(x, stride=(2, 1), padding=((1, 0), (2, 1)))),
    "dilated": lambda x: flat(convolved(x, rhs_dilation=(1, 2))),
    "depthwise": lambda x: flat(convolved(x, KERNEL.reshape(3, 3, 1, 32), feature_group_count=4)),
    "depthwise_of_the_zoo": lambda x: flat(
        layers.Depthwise().apply({"params": {"kernel": jnp.asarray(KERNEL[:, :, :1, :4])}}, x)
    ),
    "normalised": lambda x: flat((convolved(x) - jnp.arange(8.0)[None, None, None]) / 3.0 + 1),
    "two_readers": lambda x: (lambda y: flat(y * 2.0 + jnp.abs(y)))(convolved(x)),
    "pooled_then_scaled": lambda x: flat(nn.max_pool(convolved(x), (2, 2), (2, 2)) * -2.0 + 1),
    "products": lambda x: (
        flat(x @ jnp.arange(12.0).reshape(4, 3)) + flat(x[:, 0] @ jnp.ones(4))[:, :1]
    ),
    "attention": lambda x: attention(x[:, 0]),
    "a_weighted_sum": lambda x: jnp.einsum("bt,btd->bd", x[:, 0, :, 0], x[:, 0]),
    "a_dot_product": lambda x: jnp.einsum("bt,bt->b", x[:, 0, :, 0], x[:, 1, :, 1])[:, None],
    "largest": lambda x: flat(jnp.argmax(x, -1)) + lax.top_k(x[:, 0], 2, axis=1)[0][:, 0, :1],
    "one_hot": lambda x: jax.nn.one_hot(x[:, 0, 0].argmax(-1), 4, dtype=jnp.float32),
    "running_minimum": lambda x: lax.cummin(flat(x[:, 0]), axis=1),
    "set": lambda x: flat(x[:, 0].at[:, 3].set(x[:, 1, 2])) + flat(x[:, 0].at[:, 0].set(0.0)),
    "norm": lambda x: flat(
        nn.LayerNorm().apply({"params": {"scale": jnp.ones(4), "bias": jnp.ones(4)}}, x)
    ),
    "constants_alone": lambda x: (
        jnp.zeros((x.shape[0], 3)) + jnp.arange(3.0)[None] + x[:, 0, 0, :1]
    ),
    "broadcast_to_the_batch": lambda x: jnp.broadcast_to(jnp.arange(3.0)[None], (x.shape[0], 3)),
    "conditional_on_a_constant": lambda x: flat(
        lax.cond(np.bool_(True), lambda x: x + 1, lambda x: x, x)
    ),
    # What looks like pooling, and is not, or not of all that stands there.
    "pooled_every_second": lambda x: blocks(convolved(x)[:, ::2, ::2], 1, 2),
    "pooled_crop": lambda x: blocks(convolved(x)[:, :4, :4], 2, 2),
    "pooled_channels": lambda x: blocks(convolved(x)[..., :3], 2, 1),
    "pooled_shifted": lambda x: blocks(convolved(x)[:, 2:, 1:], 2, 2),
    "pooled_transposed": lambda x: flat(
        convolved(x).reshape(x.shape[0], 3, 2, 7, 1, 8).transpose(0, 2, 1, 3, 4, 5).max((2, 4))
    ),
    "pooled_otherwise": lambda x: flat(convolved(x).reshape(x.shape[0], 3, 2, 7, 4, 2).max((2, 4))),
    "softmax_of_two_axes": lambda x: flat(nn.softmax(x, (1, 2)) + nn.log_softmax(x, (1, 2))),
    "logsumexp_of_two_axes": lambda x: flat(jax.nn.logsumexp(x, axis=(1, 3))),
    "times_and_over_vectors": lambda x: x.mean((1, 2, 3))[:, None] * SPREAD / SPREAD,
    "times_and_over_numbers": lambda x: flat(x * 3.0 / 3.0 + x * 0.5 / 2.0),
    "scaled_in_one_dimension": lambda x: flat(convolved_in_one(x[:, 0]) * 2.0 + 1.0),
    "counted": lambda x: flat((convolved(x) > 0).sum((1, 2))),
    "nothing_reduced": lambda x: flat(jnp.sum(x, axis=())),
    "two_behind_a_barrier": lambda x: flat(sum(lax.optimization_barrier((x, 2 * x)))),
    "barrier": lambda x: flat(lax.optimization_barrier(lax.stop_gradient(jnp.copy(x)))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_the_values_of_jax(name):
    got, expected = results(FUNCTIONS[name], jnp.asarray(IMAGES))
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


def test_every_rule_is_tried():
    tried = set()

    def look(jaxpr):
        for equation in jaxpr.eqns:
            tried.add(equation.primitive.name)
            for inner in jaxprs_in_params(equation.params):
                look(inner)

    for function in FUNCTIONS.values():
        look(jax.make_jaxpr(function)(jnp.asarray(IMAGES)).jaxpr)
    assert not set(RULES) - tried


@pytest.mark.parametrize(
    "function",
    [
        nn.relu, nn.softplus, jnp.isfinite, jnp.sign, jnp.log1p, nn.log_softmax,
        lambda x: jax.nn.logsumexp(x[:, :6], axis=-1, keepdims=True),
        lambda x: jax.nn.logsumexp(x[:, 7:8], axis=-1, keepdims=True),
        lambda x: x >= 0, lambda x: x != x, lambda x: jnp.minimum(x, 1.0),
    ],
)  # fmt: skip
def test_zeros_infinities_and_nan_come_out_as_in_jax(function):
    got, expected = results(lambda x: function(x).astype(jnp.float32), jnp.asarray(SPECIAL))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: jnp.sort(x), "no rule for sort"),
        (lambda x: flat(lax.cond(x[0, 0, 0, 0] > 0, lambda x: x, lambda x: -x, x)), "conditional"),
        (lambda x: flat(lax.conv_transpose(x, jnp.asarray(KERNEL), (2, 2), "SAME")), "transposed"),
        (lambda x: flat(lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 1), (0, 0, 0), (0, 0, 0)))), "padding"),
        (lambda x: jnp.einsum("bhwk,bhwk->bk", x, x), "a product over 2 axes"),
        (lambda x: flat(lax.cummin(x, axis=1, reverse=True)), "from the end"),
        (lambda x: flat(x.at[:, 1, 2].set(0.0)), "scatter that is not"),
        (lambda x: flat(x.at[:, 9].set(0.0)), "a scatter at 9 of an axis of 6"),
        (lambda x: flat((100 * x).astype(jnp.int32)), "floats as integers"),
        (lambda x: flat(convolved(x, padding=((-1, 0), (0, 0)))), "crops its image"),
        (lambda x: flat(MAX_POOL(x, (2, 2), (1, 1), ((0, 2), (0, 0)))), "padded by"),
        (lambda x: flat(x - x.mean((0, 1, 2, 3))), "must not depend on the size of the batch"),
        (lambda x: flat(x) / x.shape[0], "must not depend on the size of the batch"),
        (lambda x: flat(x) + np.zeros((x.shape[0], 1), np.float32), "must not depend on"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(function, said):
    with pytest.raises(NotImplementedError, match=said):
        model_of(function, jnp.asarray(IMAGES))
