"""Every rule of the table: fitted, saved, read back, an argument of a compiled function."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import eejax.policies.scheduler
from eejax import compact, for_budget, policies, route
from eejax.evaluation.routing import score
from eejax.network import ExitOutput
from eejax.trace import collect, recorded

EXITS, CLASSES = 3, 4
COST = np.array([0.3, 0.6, 1.0])


def a_trace(seed, count=200):
    random = np.random.default_rng(seed)
    labels = random.integers(CLASSES, size=count)
    logits = 2 * random.normal(size=(count, EXITS, CLASSES))
    logits += 2 * np.eye(CLASSES)[labels][:, None]
    return recorded(logits, labels, random.normal(size=(count, EXITS)))


@pytest.fixture(scope="module", params=policies.POLICIES)
def fitted(request):
    return policies.fit(request.param, a_trace(0), COST)


def scores_bits(policy):
    scored = score(policy, a_trace(1, 50))
    return scored.logits.view(np.uint32), scored.scores.view(np.uint32)


def test_a_rule_is_in_the_table_by_its_name():
    assert all(name == rule.name for name, rule in policies.POLICIES.items())


def test_a_policy_is_fitted_on_the_logits_that_its_temperatures_divide(fitted):
    assert fitted.name == "temperature"
    trace, inner = a_trace(0), fitted.params.policy
    temperatures = policies.fit_temperatures(trace).astype(np.float32)
    np.testing.assert_array_equal(fitted.params.temperatures, temperatures)
    divided = trace._replace(logits=trace.logits / temperatures[None, :, None])
    expected = inner.rule.fit(divided, COST)
    jax.tree.map(np.testing.assert_array_equal, inner.params, expected)
    # `check` is for parameters from elsewhere; what is fitted passes it unchanged.
    jax.tree.map(np.testing.assert_array_equal, inner.rule.check(expected), expected)


def test_a_saved_policy_scores_the_same_bits(fitted):
    description, arrays = policies.to_arrays(fitted)
    assert all(isinstance(array, np.ndarray) for array in arrays.values())
    again = policies.from_arrays(json.loads(json.dumps(description)), arrays)
    assert again.rule is fitted.rule
    for saved, expected in zip(scores_bits(again), scores_bits(fitted), strict=True):
        np.testing.assert_array_equal(saved, expected)


def test_a_policy_is_an_argument_of_a_compiled_function(fitted):
    trace = a_trace(2, 20)
    expected = score(fitted, trace)

    @jax.jit
    def run(policy, logits, gates):
        state, results = policy.init(len(logits)), []
        for e in range(EXITS):
            output = ExitOutput(logits[:, e], gates[:, e], ())
            answer, certainty, state = policy.step(output, state, e)
            results.append((answer, certainty))
        return tuple(jnp.stack(part, 1) for part in zip(*results, strict=True))

    logits, scores = run(fitted, trace.logits, trace.gates)
    np.testing.assert_allclose(logits, expected.logits, rtol=1e-5, atol=1e-6)
    if fitted.params.policy.name == "random":  # any bit of a logit changes it
        assert ((scores >= 0) & (scores < 1)).all()
    else:
        np.testing.assert_allclose(scores, expected.scores, rtol=1e-5, atol=1e-5)


def test_scores_change_with_the_arrays_of_a_policy_and_not_with_the_program():
    traces = []

    @jax.jit
    def step(policy, logits):
        traces.append(policy)
        return policy.step(ExitOutput(logits, logits[:, 0], ()), (), 0)

    logits = jnp.asarray(a_trace(3, 20).logits[:, 0])
    for temperature in (1.0, 2.0, 4.0):
        policy = policies.with_temperatures(policies.gate, [temperature])
        np.testing.assert_array_equal(step(policy, logits)[0], logits / temperature)
    assert len(traces) == 1


@pytest.mark.parametrize("name", policies.POLICIES)
def test_an_executor_takes_the_exits_of_the_reference(name):
    """Its state is moved with the surviving samples: large tiles first, smaller ones later."""
    network, images = toys.shared_network(4), toys.some_images(5, 40)
    variables = toys.variables(network, 1)
    trace = collect(network, variables, images, np.arange(40) % toys.CLASSES)
    policy = policies.fit(name, trace, np.arange(1.0, 5))
    scored = score(policy, trace)
    correct = scored.predictions == trace.labels[:, None]
    thresholds = for_budget(scored.scores, correct, np.arange(1.0, 5), 2.5).thresholds
    expected = route(scored, thresholds)
    run = jax.jit(functools.partial(compact, network, tiles=(16, 4)))
    prediction = run(policy, variables, thresholds, images)
    np.testing.assert_array_equal(prediction.exits, expected.exits)
    np.testing.assert_allclose(prediction.logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_an_unknown_name_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="no policy 'confidence'; give one of max_prob, entropy"):
        policies.fit("confidence", a_trace(0), COST)


def test_a_policy_that_is_not_in_the_table_is_not_saved():
    policy = toys.policy_of(lambda batch_size: (), lambda output, state, e: None)
    for unknown in (policy, policies.with_temperatures(policy, [1.0])):
        with pytest.raises(ValueError, match=r"'of a test' is not in eejax\.policies\.POLICIES"):
            policies.to_arrays(unknown)


def test_a_description_that_does_not_fit_is_refused():
    policy = policies.with_temperatures(policies.ztw(np.zeros((2, 2)), np.zeros((2, 3))), [1.0, 2])
    description, arrays = policies.to_arrays(policy)
    assert description == {
        "rule": "temperature",
        "temperatures": [2],
        "policy": {
            "rule": "ztw",
            "coefficients": [2, 2],
            "biases": [2, 3],
            "score": {"rule": "max_prob"},
        },
    }
    assert sorted(arrays) == ["policy.biases", "policy.coefficients", "temperatures"]
    inner = description["policy"]

    def refused(description, arrays, match):
        with pytest.raises(ValueError, match=match):
            policies.from_arrays(description, arrays)

    refused({**description, "rule": "heat"}, arrays, "no policy rule 'heat'; expected one of max")
    refused({**description, "policy": [2]}, arrays, "no policy rule None; expected one of max")
    refused({**description, "temperatures": inner}, arrays, r"{'rule': .* and \[2\] came")
    refused(description["temperatures"], arrays, "no policy rule None")
    refused({"rule": "temperature"}, arrays, r"has the parameters \[\]; expected \['temperatures'")
    refused({**description, "more": [1]}, arrays, "has the parameters .*'more'")
    missing = {name: array for name, array in arrays.items() if name != "policy.biases"}
    refused(description, missing, r"'policy\.biases' .* \[2, 3\], and no array came")
    other = {**arrays, "temperatures": np.ones(3)}
    refused(description, other, r"'temperatures' has the shape \[2\], and \[3\] came")
    # Shapes as described, but not those of any ensemble.
    square = {**description, "policy": {**inner, "coefficients": [2, 3]}}
    wrong = {**arrays, "policy.coefficients": np.zeros((2, 3))}
    refused(square, wrong, r"'ztw' cannot be read: coefficients \(2, 3\) .* give \[E, E\]")
    cold = {**arrays, "temperatures": np.zeros(2)}
    refused(description, cold, "'temperature' cannot be read: temperatures .* give positive")


def test_the_module_of_the_scheduler_is_a_module():
    assert eejax.policies.scheduler is eejax.scheduler
    assert callable(eejax.scheduler.fit)
