"""The augmentation, against a reference in plain Python that is handed the same draws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.train import augment


def reference(images, draws, cutout, fill):
    """Pixel by pixel: pad by reflection, cut out the shifted view, blank the square."""
    batch, height, width, _ = images.shape
    out = np.empty_like(images)
    for b in range(batch):
        pad = max(height, width) - 1
        vertical, horizontal = min(pad, height - 1), min(pad, width - 1)
        padded = np.pad(
            images[b], ((vertical, vertical), (horizontal, horizontal), (0, 0)), mode="reflect"
        )
        top = vertical + int(draws.shift[b, 0])
        left = horizontal + int(draws.shift[b, 1])
        out[b] = padded[top : top + height, left : left + width]
        for i in range(height):
            for j in range(width):
                from_top = i - (int(draws.centre[b, 0]) - cutout // 2)
                from_left = j - (int(draws.centre[b, 1]) - cutout // 2)
                if 0 <= from_top < cutout and 0 <= from_left < cutout:
                    out[b, i, j] = fill
    return out


def some_images(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_transform_equals_the_reference(data):
    height, width, channels = data.draw(st.sampled_from([(1, 1, 1), (4, 6, 3), (5, 5, 1)]))
    batch, cutout = 3, data.draw(st.sampled_from([0, 1, 2, 3, 9]))
    fill = tuple(data.draw(st.integers(0, 255)) for _ in range(channels))

    def pairs(low, high):
        pair = st.tuples(st.integers(low[0], high[0]), st.integers(low[1], high[1]))
        return st.lists(pair, min_size=batch, max_size=batch)

    shift = data.draw(pairs((1 - height, 1 - width), (height - 1, width - 1)))
    centre = data.draw(pairs((0, 0), (height - 1, width - 1)))
    draws = augment.Draws(jnp.asarray(shift, jnp.int32), jnp.asarray(centre, jnp.int32))
    images = some_images(data.draw(st.integers(0, 99)), batch, height, width, channels)
    fast = augment.transform(jnp.asarray(images), draws, cutout=cutout, fill=fill)
    assert fast.dtype == jnp.uint8
    np.testing.assert_array_equal(fast, reference(images, draws, cutout, fill))


def test_augment_is_draw_then_transform_also_when_compiled():
    images = some_images(0, 64, 8, 8, 3)
    key, fill = jax.random.key(3), (10, 20, 30)
    compiled = jax.jit(
        lambda key, images: augment.augment(key, images, shift=2, cutout=3, fill=fill)
    )
    out = compiled(key, jnp.asarray(images))
    draws = jax.tree.map(np.asarray, augment.draw(key, 64, 8, 8, shift=2))
    np.testing.assert_array_equal(out, reference(images, draws, 3, fill))
    again = compiled(key, jnp.asarray(images))
    other = compiled(jax.random.key(4), jnp.asarray(images))
    np.testing.assert_array_equal(out, again)
    assert np.any(np.asarray(out) != np.asarray(other))


def test_draws_cover_their_whole_range_and_no_more():
    draws = jax.tree.map(np.asarray, augment.draw(jax.random.key(0), 2_000, 5, 9, shift=2))
    for axis, size in enumerate((5, 9)):
        assert set(draws.shift[:, axis]) == {-2, -1, 0, 1, 2}
        assert set(draws.centre[:, axis]) == set(range(size))
    # Rows and columns are drawn apart: equal ones by chance only (1 in 5).
    assert np.mean(draws.shift[:, 0] == draws.shift[:, 1]) < 0.3


def test_what_is_switched_off_is_off():
    images = jnp.asarray(some_images(1, 16, 6, 6, 1))
    key = jax.random.key(0)
    same = augment.augment(key, images, shift=0, cutout=0, fill=(0,))
    np.testing.assert_array_equal(same, images)
    blanked = np.asarray(augment.augment(key, images, shift=0, cutout=2, fill=(7,)))
    changed = (blanked != np.asarray(images)).sum(axis=(1, 2, 3))
    assert changed.max() <= 4
    assert changed.max() > 0
    assert not augment.draw(key, 16, 6, 6, shift=0).shift.any()


def test_images_are_mirrored_in_every_other_epoch():
    images = some_images(2, 200, 3, 4, 3)
    first, second, third = (
        np.asarray(augment.mirrored(jax.random.key(5), jnp.asarray(images), epoch))
        for epoch in range(3)
    )
    moved = (first != images).any((1, 2, 3))
    assert 70 < moved.sum() < 130
    np.testing.assert_array_equal(first[moved], images[moved][:, :, ::-1])
    np.testing.assert_array_equal(second[moved], images[moved])
    np.testing.assert_array_equal(second[~moved], images[~moved][:, :, ::-1])
    np.testing.assert_array_equal(third, first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": 6}, "shift=6 for images of 8x6; give 0 to 5"),
        ({"shift": -1}, "shift=-1"),
        ({"cutout": -2}, "cutout=-2"),
        ({"fill": (1, 2)}, "3 channels"),
        ({"fill": (1, 2, 256)}, "0..255"),
    ],
)
def test_wrong_settings_are_named(change, message):
    settings = {"shift": 1, "cutout": 0, "fill": (1, 2, 3)} | change
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        augment.augment(jax.random.key(0), jnp.zeros((2, 8, 6, 3), jnp.uint8), **settings)


def test_float_images_are_refused():
    with pytest.raises(ValueError, match="float32"):
        augment.augment(jax.random.key(0), jnp.zeros((2, 4, 4, 1)), shift=1, cutout=0, fill=(0,))


def test_epoch_order_is_a_permutation_less_the_remainder():
    order = augment.epoch_order(jax.random.key(0), 103, 10)
    assert order.shape == (10, 10)
    assert order.dtype == jnp.int32
    flat = np.asarray(order).ravel()
    assert len(set(flat)) == 100
    assert flat.min() >= 0
    assert flat.max() < 103
    assert np.any(flat != np.sort(flat))
    again = augment.epoch_order(jax.random.key(0), 103, 10)
    other = augment.epoch_order(jax.random.key(1), 103, 10)
    np.testing.assert_array_equal(order, again)
    assert np.any(np.asarray(order) != np.asarray(other))
    # Who sits out changes: over a few epochs everybody is seen.
    seen = [augment.epoch_order(jax.random.key(i), 103, 10) for i in range(5)]
    assert len(np.unique(np.asarray(seen))) == 103
    with pytest.raises(ValueError, match="a batch of 20 from 10 images"):
        augment.epoch_order(jax.random.key(0), 10, 20)
