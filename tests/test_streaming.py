"""Streams: the reference's answers, in order, with full tiles and bounded memory."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from eejax import Prediction, compact, gate, predictor, rebatched, stream

MESH = Mesh(np.array(jax.devices()[:3]), ("data",))
NAMES = ("patience", "running sum, temperatures")
EXITS = 4
_made: dict = {}


def streamer(name, **options):
    key = (name, *options.items())
    if key not in _made:
        network = toys.shared_network(EXITS)
        _made[key] = stream(network, toys.POLICIES[name], toys.variables(network, 1), **options)
    return _made[key]


def expected(name, thresholds, images):
    return toys.reference(name, toys.shared_network(EXITS), 1, thresholds, images)


def cut(images, sizes):
    ends = list(itertools.accumulate(sizes))
    return [images[b - s : b] for s, b in zip(sizes, ends, strict=True)]


def assert_in_order(predictions, sizes, routed):
    assert [len(p.labels) for p in predictions] == list(sizes)
    whole = zip(*(p for p in predictions if len(p.labels)), strict=True)
    toys.assert_answers(Prediction(*map(np.concatenate, whole)), routed)


OPTIONS = {
    "default tiles": {"chunk": 8},
    "default window": {"chunk": 16, "tiles": (8, 2)},
    "one tile, tight window": {"chunk": 4, "tiles": (4,), "window": 12},
    "large tile, tight window": {"chunk": 8, "tiles": (8, 4, 1), "window": 24},
}


@settings(max_examples=40)
@given(
    st.sampled_from([(NAMES[i % 2], options) for i, options in enumerate(OPTIONS)]),
    st.lists(st.integers(0, 40), min_size=1, max_size=8),
    st.lists(st.sampled_from([-np.inf, 0.0, 1.0, 2.0, 5.0, np.inf]), min_size=3, max_size=3),
    st.integers(0, 100),
)
def test_a_stream_answers_as_the_reference_in_order(kind, sizes, thresholds, seed):
    name, options = kind
    images = toys.some_images(seed, max(sum(sizes), 1))[: sum(sizes)]
    found = list(streamer(name, **OPTIONS[options])(thresholds, cut(images, sizes)))
    if len(images):
        assert_in_order(found, sizes, expected(name, thresholds, images))
    else:
        assert [len(p.labels) for p in found] == sizes


def test_a_stream_of_nothing_is_empty():
    assert list(streamer("patience", chunk=16, tiles=(8, 2))([0, 0, 0], [])) == []


@pytest.mark.parametrize("devices", [2, 4])
def test_each_device_of_a_mesh_packs_its_own_share(devices):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    images, sizes = toys.some_images(5, 111), [50, 1, 60]
    run = streamer("patience", chunk=16, tiles=(4, 1), mesh=mesh)
    found = list(run([1, 2, 1], cut(images, sizes)))
    assert_in_order(found, sizes, expected("patience", [1, 2, 1], images))


def test_deep_stages_are_given_full_tiles():
    """Few reach the last stage from each chunk, and yet it is given whole tiles."""
    rows = toys.Rows(EXITS)
    network = toys.network(EXITS, rows.watch)
    variables = toys.variables(toys.shared_network(EXITS), 1)
    run = stream(network, gate, variables, chunk=16, tiles=(16,), window=1 << 12)
    images = toys.some_images(3, 40 * 16)
    thresholds = [2.0, 2.0, 2.0]
    found = list(run(thresholds, cut(images, [16] * 40)))
    exits = np.concatenate([p.exits for p in found])
    reach = [int((exits >= e).sum()) for e in range(EXITS)]
    assert 16 < reach[3] < 40 * 8  # under half a tile from each chunk
    assert rows.read() == [-(-n // 16) * 16 for n in reach]


def test_answers_come_while_images_are_still_going_in():
    """An endless iterator: at most a window of images is taken before their answers are given."""
    taken = 0

    def endless():
        nonlocal taken
        for seed in itertools.count():
            taken += 8
            yield toys.some_images(seed, 8)

    window = 48
    run = streamer("patience", chunk=8, tiles=(8,), window=window)
    # Hardly anyone agrees with the last exit but two times in a row, so deep queues fill slowly.
    answers = run([np.inf, 2.0, np.inf], endless())
    for given_ in range(1, 60):
        assert len(next(answers).labels) == 8
        assert taken - 8 * given_ <= window + 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 12, "tiles": (8, 4)}, "multiple of 8"),
        ({"chunk": 12}, "a power of two on each"),
        ({"chunk": 8, "mesh": MESH}, "for 3 device.* a power of two on each"),
        ({"chunk": 16, "tiles": (6, 4)}, "each a divisor"),
        ({"chunk": 16, "tiles": (8,), "window": 40}, "at least 48"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        streamer("patience", **options)


def test_a_stream_refuses_thresholds_that_do_not_fit():
    with pytest.raises(ValueError, match="2 thresholds for 4 exits"):
        next(streamer("patience", chunk=16, tiles=(8, 2))([0, 0], [toys.some_images(0, 3)]))


@pytest.mark.parametrize("sizes", [[5], [0, 3, 0], [16], [16, 16], [3, 20, 1, 40]])
def test_any_predictor_is_given_full_batches(sizes):
    network = toys.shared_network(EXITS)
    predict = predictor(network, gate, toys.variables(network, 1), compact, max_batch=16)
    given_ = []

    def watched(thresholds, images):
        given_.append(len(images))
        return predict(thresholds, images)

    images, thresholds = toys.some_images(9, sum(sizes)), [1.0, 2.0, 0.0]
    found = list(rebatched(watched, batch=16)(thresholds, cut(images, sizes)))
    assert given_[:-1] == [16] * (len(given_) - 1)
    assert sum(given_) == len(images)
    assert_in_order(found, sizes, expected("gate", thresholds, images))
