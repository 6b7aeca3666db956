"""The choice of an executor by measurement."""

from __future__ import annotations

import numpy as np
import pytest
import toys

from eejax import auto, benchmark, full, gate, predictor
from eejax.inference import EXECUTORS

THRESHOLDS = [2.0, 1.0, 0.0]


def choose(monkeypatch, batch, quickest, exits=4):
    """`auto`, with a clock that favours one of the candidates by its place."""

    def seconds(calls, repeats, warmup=2):
        times = np.full((len(calls), repeats), 0.002)
        times[quickest] = 0.001
        return times

    monkeypatch.setattr(benchmark, "paired_seconds", seconds)
    network = toys.shared_network(exits)
    variables = toys.variables(network, 1)
    images = toys.some_images(3, batch)
    thresholds = THRESHOLDS[: exits - 1]
    chosen = auto(network, gate, variables, thresholds, images)
    whole = predictor(network, gate, variables, full)(thresholds, images)
    return chosen, chosen.predict(thresholds, images), whole


NAMES = ["plain network", *EXECUTORS, "host"]


@pytest.mark.parametrize("name", ["plain network", "compact", "host", "loop"])
def test_the_quickest_is_chosen_and_said(monkeypatch, name):
    chosen, found, whole = choose(monkeypatch, 12, NAMES.index(name))
    assert list(chosen.milliseconds) == NAMES
    assert chosen.milliseconds[name] == 1.0
    if name == "plain network":
        assert chosen.name == "full"  # of the candidates the first
        assert "early exit does not pay" in chosen.explanation
    else:
        assert chosen.name == name
        assert chosen.explanation.startswith(f"{name}: 1 ms for 12 images on cpu")
        assert "does not pay" not in chosen.explanation
    shares = np.bincount(whole.exits, minlength=4) / 12
    assert ", ".join(f"{100 * s:.0f} %" for s in shares) in chosen.explanation
    np.testing.assert_array_equal(found.exits, whole.exits)
    np.testing.assert_array_equal(found.logits, whole.logits)


def test_single_images_and_networks_without_equal_stages_have_fewer_candidates(monkeypatch):
    assert list(choose(monkeypatch, 1, 2)[0].milliseconds) == ["plain network", "full", "cond"]
    names = list(choose(monkeypatch, 4, 2, exits=2)[0].milliseconds)
    assert names == ["plain network", "full", "cond", "compact", "host"]


def test_what_does_not_fit_is_refused():
    network = toys.shared_network(4)
    variables = toys.variables(network, 1)
    with pytest.raises(ValueError, match="2 thresholds for 4 exits"):
        auto(network, gate, variables, [0, 0], toys.some_images(0, 2))
    with pytest.raises(ValueError, match="no images"):
        auto(network, gate, variables, THRESHOLDS, toys.some_images(0, 0))
