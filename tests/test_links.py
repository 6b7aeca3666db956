"""Heads that read the answer of the head before: what they answer, and who gets a gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_bundle import IMAGE, IMAGES, example
from test_heads import cascade, drawn, normalised, some

from eejax import bundle, compact, cond, loop, max_prob
from eejax.evaluation.routing import route, score
from eejax.inference.executors import full
from eejax.links import LINKS
from eejax.models import build
from eejax.models.heads import Head
from eejax.trace import collect

__all__ = ["example"]

IMAGES_OF = jnp.asarray(some(30, 2, 2, 6))
BARE = cascade(Head(3, gate="features"), exits=5)
LINKED = {name: link(BARE) for name, link in LINKS.items()}
VARIABLES = {name: drawn(network, IMAGES_OF) for name, network in LINKED.items()}


def own(variables):
    """The variables of the heads without their links."""
    params = variables["params"]
    heads = tuple(head.get("head", head) for head in params["heads"])
    return {**variables, "params": {**params, "heads": heads}}


def bare_logits(name):
    return np.asarray(BARE.apply_all(own(VARIABLES[name]), IMAGES_OF)[0].logits)


def logits(name):
    return np.asarray(LINKED[name].apply_all(VARIABLES[name], IMAGES_OF)[0].logits)


def test_boosted_answers_add_half_of_the_answer_before():
    expected = [*bare_logits("boosted")]
    for e in range(1, 5):
        expected[e] = expected[e] + expected[e - 1] / 2
    np.testing.assert_allclose(logits("boosted"), expected, rtol=1e-4, atol=1e-4)


def test_a_cascade_of_early_heads_reads_normalised_answers_and_leaves_the_last_head_alone():
    expected, heads = [*bare_logits("cascaded")], VARIABLES["cascaded"]["params"]["heads"]
    assert ["before" in head for head in heads] == [False, True, True, True, False]
    for e in (1, 2, 3):
        before = heads[e]["before"]
        read = normalised(expected[e - 1], before["scale"], before["bias"])
        expected[e] = expected[e] + read @ before["kernel"]
    np.testing.assert_allclose(logits("cascaded"), expected, rtol=1e-3, atol=1e-3)
    plain = LINKED["cascaded"].keeping([4]).apply_plain
    kept = {c: {"stages": (tuple(t["stages"]),), "heads": t["heads"][4:]}
            for c, t in VARIABLES["cascaded"].items()}  # fmt: skip
    np.testing.assert_allclose(plain(kept, IMAGES_OF), expected[4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LINKS)
def test_no_gradient_passes_to_the_head_before(name):
    network, e = LINKED[name], {"boosted": 4, "cascaded": 3}[name]

    def answer(params):
        return (network.apply_all({"params": params}, IMAGES_OF)[0].logits[e] ** 2).sum()

    gradients = jax.jit(jax.grad(answer))(VARIABLES[name]["params"])["heads"]
    size = [jax.tree.map(lambda x: float(np.abs(x).max()), head) for head in gradients]
    assert max(jax.tree.leaves(size[:e])) == 0
    assert min(jax.tree.leaves(size[e].get("before", 1.0))) > 0


@pytest.mark.parametrize("name", LINKS)
def test_every_executor_hands_the_answers_on(name):
    """Two programs differ in the last bits, so samples that sit on a threshold are left out."""
    network, variables, images = LINKED[name], VARIABLES[name], np.asarray(IMAGES_OF)
    scored = score(max_prob, collect(network, variables, images, np.zeros(30, int)))
    thresholds = np.quantile(scored.scores[:, :-1], 0.6, axis=0).astype(np.float32)
    routed = route(scored, thresholds)
    assert len(set(routed.exits.tolist())) >= 3
    clear = (np.abs(scored.scores[:, :-1] - thresholds) > 1e-4).all(1)
    assert clear.sum() >= 20

    # The middle heads are one module, so `loop` runs them as one program.
    assert network.heads[1] is network.heads[2]
    executors = (full, cond, compact, loop) if name == "boosted" else (full, cond, compact)

    def run(variables, thresholds, images):
        return [each(network, max_prob, variables, thresholds, images) for each in executors]

    for found in jax.jit(run)(variables, thresholds, images):
        np.testing.assert_array_equal(found.exits[clear], routed.exits[clear])
        np.testing.assert_allclose(found.logits[clear], routed.logits[clear], rtol=1e-4, atol=1e-4)


def test_a_network_of_the_zoo_is_linked_by_a_word():
    arguments = {"width": 2, "exits": (1, 2, 3)}
    for name in LINKS:
        linked = build("fast", 3, IMAGE, link=name, **arguments)
        shapes = jax.eval_shape(linked.init, jax.random.key(0), jnp.zeros((1, *IMAGE)))
        assert ("before" in shapes["params"]["heads"][1]) == (name == "cascaded")
    with pytest.raises(ValueError, match="'chained' is no link; give one of boosted, cascaded"):
        build("fast", 3, IMAGE, link="chained", **arguments)


def test_a_bundle_keeps_the_link(example, tmp_path):
    arguments = {**example.arguments, "link": "boosted"}
    linked = dataclasses.replace(example, arguments=arguments)
    bundle.save(linked, tmp_path)
    loaded, thresholds = bundle.load(tmp_path), np.array([np.inf, np.inf])
    found = dataclasses.replace(loaded, thresholds=thresholds).predict(IMAGES)
    outputs = example.network.apply_all(example.variables, jnp.asarray(IMAGES))[0].logits
    expected = outputs[2] + outputs[1] / 2 + outputs[0] / 4
    np.testing.assert_allclose(found.logits, expected, rtol=1e-4, atol=1e-4)
