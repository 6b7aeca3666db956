"""A bundle with fewer exits: the answers of the whole one's exits, in JAX and as an artifact."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from onnx_models import small_bundle, some_images

import eejax
from eejax import policies, runtime
from eejax.bundle import save
from eejax.evaluation.routing import first_exit
from eejax.runtime.manifest import HeldOut


@functools.cache
def bundle():
    """With held-out samples whose later exits are right more often."""
    small, random = small_bundle(), np.random.default_rng(7)
    trace = eejax.collect(small.network, small.variables, some_images(3, 200), np.zeros(200, int))
    scores = eejax.score(small.policy, trace).scores
    correct = random.random((200, 3)) < [0.7, 0.8, 0.9]
    return dataclasses.replace(small, held_out=HeldOut(scores, correct))


def routed(kept, exits, images):
    """By the specification, from the outputs of the whole network."""
    whole = bundle()
    outputs, _ = jax.jit(whole.network.apply_all)(whole.variables, images)
    logits = np.asarray(outputs.logits)[list(exits)].transpose(1, 0, 2)
    scored = eejax.score(kept.policy, eejax.recorded(logits, np.zeros(len(images), int)))
    return eejax.route(scored, kept.thresholds)


@pytest.mark.parametrize("exits", [(1, 2), (0, 2), (0, 1, 2)])
def test_answers_are_those_of_the_kept_exits(exits, tmp_path):
    kept, images = eejax.keep_exits(bundle(), exits), some_images(4, 80)
    expected = routed(kept, exits, images)
    assert kept.network.num_exits == len(exits)
    save(kept, tmp_path / "bundle")
    loaded = eejax.load(tmp_path / "bundle")
    eejax.export(loaded, tmp_path / "artifact", layers=["onnx"])
    for prediction in (
        loaded.predict(images),
        runtime.load(tmp_path / "artifact").predict(images),
    ):
        np.testing.assert_array_equal(prediction.exits, expected.exits)
        np.testing.assert_allclose(prediction.logits, expected.logits, rtol=1e-3, atol=1e-4)


def test_thresholds_are_chosen_for_the_same_mean_cost():
    whole, kept = bundle(), eejax.keep_exits(bundle(), (1, 2))
    assert whole.held_out is not None
    assert kept.held_out is not None
    costs = [
        b.costs.cumulative[first_exit(held_out.scores, b.thresholds)].mean()
        for b, held_out in ((whole, whole.held_out), (kept, kept.held_out))
    ]
    # A head less, and one more sample that went on would be too dear.
    assert costs[1] <= costs[0] <= costs[1] + (kept.costs.cumulative[-1] / 200)
    np.testing.assert_array_equal(kept.held_out.scores, whole.held_out.scores[:, 1:])
    np.testing.assert_array_equal(
        kept.policy.params.temperatures, whole.policy.params.temperatures[1:]
    )
    assert kept.costs.cumulative[-1] == whole.costs.cumulative[-1] - whole.costs.heads[0]


def changed(**changes):
    return lambda: dataclasses.replace(bundle(), **changes)


@pytest.mark.parametrize(
    ("made", "exits", "words"),
    [
        (bundle, (0, 1), "the last, 2"),
        (bundle, (), "the last, 2"),
        (bundle, (2,), "budget"),
        (bundle, (1, 1, 2), "increasing"),
        (bundle, (-1, 2), "increasing"),
        (small_bundle, (1, 2), "no held-out samples"),
        (lambda: eejax.keep_exits(bundle(), (1, 2)), (1,), r"exits \(1, 2\) alone"),
        (changed(policy=policies.patience), (1, 2), "more than one exit"),
        (changed(thresholds=np.array([-np.inf, 0.0])), (1, 2), "budget"),
    ],
)
def test_what_cannot_be_kept_is_refused(made, exits, words):
    with pytest.raises(ValueError, match=words):
        eejax.keep_exits(made(), exits)


def test_a_bundle_from_before_there_were_kept_exits_is_read(tmp_path, monkeypatch):
    from eejax.runtime import manifest

    sealed = manifest.sealed
    monkeypatch.setattr(
        manifest,
        "sealed",
        lambda content, *rest: sealed({k: v for k, v in content.items() if k != "exits"}, *rest),
    )
    save(bundle(), tmp_path / "bundle")
    assert eejax.load(tmp_path / "bundle").exits is None


def test_the_command_counts_from_one(tmp_path):
    from eejax.commands import main

    save(bundle(), tmp_path / "bundle")
    command = ["export", str(tmp_path / "bundle"), "--to", str(tmp_path / "artifact")]
    assert main([*command, "--layers", "onnx", "--keep", "2", "3"]) == 0
    found = runtime.read(tmp_path / "artifact")
    assert found.content["network"]["exits"] == [1, 2]
    assert main([*command, "--layers", "onnx", "--keep", "1", "2"]) == 2
