"""Stages as separate programs: the reference's answers, few programs, the work that is left out."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from eejax import gate, host

EXITS = 4
NAMES = ("running sum, temperatures",)
_made: dict = {}


def made(name):
    if name not in _made:
        network = toys.shared_network(EXITS)
        _made[name] = host(
            network, toys.POLICIES[name], toys.variables(network, 2), tiles=(8, 2), max_batch=16
        )
    return _made[name]


def assert_agrees(prediction, name, thresholds, images):
    network = toys.shared_network(EXITS)
    toys.assert_answers(prediction, toys.reference(name, network, 2, thresholds, images))


@settings(max_examples=40)
@given(
    st.sampled_from(NAMES),
    st.integers(1, 70),
    st.lists(st.sampled_from([-np.inf, 0.0, 1.0, 2.0, 5.0, np.inf]), min_size=3, max_size=3),
    st.integers(0, 1000),
)
def test_host_answers_as_the_reference(name, count, thresholds, seed):
    images = toys.some_images(seed, count)
    assert_agrees(made(name)(thresholds, images), name, thresholds, images)


def test_devices_share_a_batch():
    network = toys.shared_network(EXITS)
    predict = host(
        network,
        toys.POLICIES["patience"],
        toys.variables(network, 2),
        tiles=(4, 2),
        devices=jax.devices()[:3],
    )
    images = toys.some_images(1, 45)
    assert_agrees(predict([1, 2, 1], images), "patience", [1, 2, 1], images)


def test_only_survivors_are_computed():
    rows = toys.Rows(EXITS)
    network = toys.network(EXITS, rows.watch)
    predict = host(network, gate, toys.variables(toys.shared_network(EXITS), 1), tiles=(1,))
    images = toys.some_images(1, 20)
    for thresholds in ([0, 0, 0], [3, 2, 1], [np.inf] * 3, [-np.inf, 0, 0]):
        exits = predict(thresholds, images).exits
        assert rows.read() == [int((exits >= e).sum()) for e in range(EXITS)]


def test_what_does_not_fit_is_refused():
    network = toys.shared_network(EXITS)
    with pytest.raises(ValueError, match="each a divisor"):
        host(network, gate, toys.variables(network, 2), tiles=(6, 4))
    with pytest.raises(ValueError, match="no images"):
        made(NAMES[0])([0, 0, 0], toys.some_images(0, 0))
    with pytest.raises(ValueError, match="2 thresholds for 4 exits"):
        made(NAMES[0])([0, 0], toys.some_images(0, 3))
