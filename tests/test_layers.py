"""Layers in two forms, of which one is fast on a CPU: both give the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from eejax.models.layers import convolution, convolve, convolved, shifted


@pytest.mark.parametrize(("size", "stride", "side"), [(3, 1, 5), (3, 2, 5), (3, 2, 6), (5, 2, 4)])
def test_a_depthwise_convolution_by_shifts_is_a_convolution(size, stride, side):
    x = jax.random.normal(jax.random.key(0), (2, side, side + 2, 3))
    kernel = jax.random.normal(jax.random.key(1), (size, size, 1, 3))

    def both(x, kernel):
        return shifted(x, kernel, stride), convolved(x, kernel, stride)

    found, expected = both(x, kernel)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)
    found, expected = (
        jax.grad(lambda x, kernel, i=i: (both(x, kernel)[i] ** 2).sum(), (0, 1))(x, kernel)
        for i in (0, 1)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("size", "image"),
    [(3, (2, 2)), (3, (2, 1)), (3, (1, 2)), (3, (1, 1)), (5, (4, 4)), (5, (2, 3))],
)
def test_a_convolution_of_a_few_pixels_is_a_convolution(size, image, dtype):
    padding = [(size // 2, size // 2)] * 2
    x = jax.random.normal(jax.random.key(0), (3, *image, 5)).astype(dtype)
    kernel = jax.random.normal(jax.random.key(1), (size, size, 5, 4)).astype(dtype)
    out = jax.random.normal(jax.random.key(2), (3, *image, 4)).astype(dtype)

    def run(function):
        def forward(x, kernel):
            return function(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

        found, back = jax.vjp(forward, x, kernel)
        return found, *back(out)

    tolerance = 1e-5 if dtype == jnp.float32 else 0.1
    for found, expected in zip(run(convolve), run(lax.conv_general_dilated), strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("side", "size", "stride", "products"),
    [(2, 3, 1, True), (4, 5, 1, True), (3, 3, 1, False), (2, 3, 2, False), (1, 2, 1, False)],
)
def test_only_images_smaller_than_the_kernel_become_products(side, size, stride, products):
    layer = convolution(4, size, stride, jnp.float32)
    same = nn.Conv(4, (size, size), stride, padding=size // 2, use_bias=False)
    x = jax.random.normal(jax.random.key(0), (2, side, side, 3))
    variables = layer.init(jax.random.key(1), x)
    found, expected = jnp.asarray(layer.apply(variables, x)), jnp.asarray(same.apply(variables, x))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    program = jax.jit(layer.apply).lower(variables, x).as_text()
    if jax.default_backend() == "cpu":
        assert ("stablehlo.convolution" in program) != products
