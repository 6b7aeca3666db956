"""Corrupted images: what each kind does, how much, and always the same."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.data import corruptions
from experiments.data.corruptions import KINDS, SEVERITIES, STRENGTHS, corrupt

SHAPES = [(7, 8, 8, 1), (5, 32, 32, 3), (3, 9, 6, 2)]


def some_images(shape=(20, 32, 32, 3), low=0, high=256):
    return np.random.default_rng(0).integers(low, high, shape).astype(np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_worse_the_severity_the_more_changes(kind, shape):
    images = some_images(shape)
    before = images.copy()
    changes = []
    for severity in SEVERITIES:
        out = corrupt(images, kind, severity, 1)
        assert (out.shape, out.dtype) == (images.shape, np.uint8)
        changes.append(np.abs(out.astype(float) - images).mean())
    assert changes[0] > 1
    assert (np.diff(changes) > 0).all()
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_arguments_give_the_same_images(kind, monkeypatch):
    images = some_images()
    np.random.seed(0)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    out = corrupt(images, kind, 3, 5)
    assert np.random.random() == expected  # noqa: NPY002
    np.testing.assert_array_equal(corrupt(images, kind, 3, 5), out)
    # Whatever comes after an image, and however many are taken at a time.
    np.testing.assert_array_equal(corrupt(images[:7], kind, 3, 5), out[:7])
    monkeypatch.setattr(corruptions, "_VALUES", 3 * images[0].size + 1)
    np.testing.assert_array_equal(corrupt(images, kind, 3, 5), out)
    assert len(corrupt(images[:0], kind, 3, 5)) == 0


def test_noise_is_normal_and_of_its_own_for_each_seed_severity_and_image():
    grey = np.full((40, 32, 32, 3), 128, np.uint8)
    noise = {(s, k): corrupt(grey, "noise", s, k) - 128.0 for s in (1, 5) for k in (0, 1)}
    for (severity, _), x in noise.items():
        # Rounding adds a variance of 1 / 12.
        expected = np.hypot(255 * STRENGTHS["noise"][severity - 1], 12**-0.5)
        assert x.std() == pytest.approx(expected, rel=0.01)
        assert abs(x.mean()) < 0.2
    flat = np.stack([*[x.ravel() for x in noise.values()], np.roll(noise[1, 0], 1, 0).ravel()])
    assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.02


def test_values_at_the_ends_do_not_wrap_around():
    ends = np.zeros((2, 16, 16, 1), np.uint8)
    ends[1] = 255
    out = corrupt(ends, "noise", 5, 0)
    assert out[0].max() < 128 < out[1].min()
    assert 0.4 < (out == ends).mean() < 0.6


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_keeps_the_mean_of_each_image_and_channel(severity):
    images = some_images((10, 32, 32, 3))
    out = corrupt(images, "contrast", severity, 0)
    # Halves of whole numbers, rounded, may all be a quarter off.
    np.testing.assert_allclose(out.mean((1, 2)), images.mean((1, 2)), atol=0.3)
    spread = out.std((1, 2)) / images.std((1, 2))
    np.testing.assert_allclose(spread, STRENGTHS["contrast"][severity - 1], atol=0.01)


def test_blur_spreads_a_point_over_its_image_and_channel_alone():
    point = np.zeros((3, 15, 15, 2), np.uint8)
    point[1, 7, 7, 0] = 255
    out = corrupt(point, "blur", 5, 0)
    bell = np.exp(-(np.hypot(*np.mgrid[-7:8, -7:8]) ** 2) / 2)
    np.testing.assert_allclose(out[1, :, :, 0], 255 * bell / bell.sum(), atol=0.6)
    out[1, :, :, 0] = 0
    assert not out.any()


@pytest.mark.parametrize("kind", ["blur", "contrast"])
def test_images_of_one_colour_stay(kind):
    constant = np.broadcast_to(np.array([0, 99, 255], np.uint8), (2, 8, 8, 3))
    for severity in SEVERITIES:
        np.testing.assert_array_equal(corrupt(constant, kind, severity, 0), constant)


def test_what_cannot_be_corrupted_is_refused():
    images = some_images((2, 8, 8, 1))
    with pytest.raises(ValueError, match="a corruption 'fog'; give one of noise, blur, contrast"):
        corrupt(images, "fog", 1, 0)
    for severity in (0, 6):
        with pytest.raises(ValueError, match=f"severity of {severity}; give a whole number"):
            corrupt(images, "noise", severity, 0)
    with pytest.raises(ValueError, match="give uint8"):
        corrupt(images / 255, "noise", 1, 0)
    with pytest.raises(ValueError, match="give uint8"):
        corrupt(images[0], "noise", 1, 0)
