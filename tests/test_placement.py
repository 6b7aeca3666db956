"""The choice of exits: against loops over all subsets, and on the network that it makes."""

from __future__ import annotations

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eejax import Costs, EarlyExitNetwork, ExitOutput, for_budget, gate, max_prob, recorded
from eejax import trace as eejax_trace
from eejax.backbone import from_linen
from eejax.cost import macs
from eejax.evaluation import routing
from eejax.inference.compaction import compact
from eejax.network import keep_variables
from eejax.policies.temperature import with_temperatures
from eejax.selection.placement import choose_exits, keep_trace, unchanged


def drawn(seed, count, exits):
    """A trace whose gates are the scores, and costs; later exits are better, heads not cheap."""
    random = np.random.default_rng(seed)
    scores = random.normal(size=(count, 1)) + random.normal(size=(count, exits))
    chance = 1 / (1 + np.exp(-(1.5 * scores + np.linspace(0, 2, exits))))
    correct = random.uniform(size=(count, exits)) < chance
    logits = 3.0 * np.stack([correct, ~correct], -1) + 0.1 * random.normal(size=(count, exits, 2))
    costs = Costs(random.uniform(0.5, 1, exits), random.uniform(0, 0.3, exits))
    return recorded(logits, np.zeros(count, int), scores), costs


def in_a_loop(trace, costs, budget):
    """Accuracy and exits of every subset that keeps the budget; nothing shared with the library
    but the search for thresholds."""
    count, exits = trace.gates.shape
    correct = trace.logits.argmax(-1) == trace.labels[:, None]
    results = []
    for keep in itertools.product([False, True], repeat=exits - 1):
        kept = [e for e, kept in enumerate([*keep, True]) if kept]
        cost, spent = [], 0.0
        for e in range(exits):
            spent += costs.stages[e]
            if e in kept:
                spent += costs.heads[e]
                cost.append(spent)
        if cost[0] <= budget:
            choice = for_budget(trace.gates[:, kept], correct[:, kept], np.array(cost), budget)
            results.append((round(choice.accuracy * count), kept))
    return results


@pytest.mark.parametrize(("seed", "share"), [(0, 0.35), (1, 0.5), (2, 0.7), (3, 1.0)])
def test_few_exits_are_searched_as_a_loop_over_all_subsets_does(seed, share):
    trace, costs = drawn(seed, 60, 4)
    budget = share * costs.cumulative[-1]
    placement = choose_exits(trace, unchanged(gate), costs, budget)
    every = in_a_loop(trace, costs, budget)
    best = max(hits for hits, _ in every)
    assert round(60 * placement.accuracy) == best
    assert len(placement.exits) == min(len(kept) for hits, kept in every if hits == best)
    assert placement.search == "exhaustive"
    assert placement.looked_at == 8


@pytest.mark.parametrize(("seed", "share"), [(4, 0.4), (7, 0.6), (8, 0.4)])
def test_many_exits_are_searched_greedily_and_hardly_worse(seed, share):
    """Of 60 samples at most one is lost to trying all subsets. Draws 7 and 8 need exits that were
    added first to be dropped or exchanged later."""
    trace, costs = drawn(seed, 60, 6)
    budget = share * costs.cumulative[-1]
    every = choose_exits(trace, unchanged(gate), costs, budget)
    greedy = choose_exits(trace, unchanged(gate), costs, budget, exhaustive_up_to=31)
    assert (every.search, every.looked_at) == ("exhaustive", 32)
    assert greedy.search == "greedy"
    assert greedy.looked_at < 32
    if seed in (7, 8):
        assert greedy.exits == every.exits
    assert every.accuracy - 1.01 / 60 <= greedy.accuracy <= every.accuracy
    for placement in (every, greedy):
        assert placement.whole is not None
        assert placement.accuracy >= placement.whole.accuracy
        assert placement.mean_cost <= budget * (1 + 1e-9)


def test_what_a_placement_says_of_itself_is_what_routing_finds():
    """With a policy that has a number for each exit, whose exits are those that are kept."""
    trace, costs = drawn(7, 60, 4)
    temperatures = np.array([0.5, 3.0, 1.0, 2.0])
    asked = []

    def policy(exits):
        asked.append(exits)
        return with_temperatures(max_prob, temperatures[list(exits)])

    placement = choose_exits(trace, policy, costs, 0.6 * costs.cumulative[-1])
    assert placement.exits in asked
    assert len(set(asked)) == len(asked) > 1
    assert placement.thresholds.shape == (len(placement.exits) - 1,)
    kept_trace = keep_trace(trace, placement.exits)
    np.testing.assert_array_equal(kept_trace.logits, trace.logits[:, np.array(placement.exits)])
    # Logits that were divided before are those of the policy without temperatures.
    divided = kept_trace.logits / temperatures[list(placement.exits)][None, :, None].astype(
        np.float32
    )
    routed = routing.route(
        routing.score(max_prob, kept_trace._replace(logits=divided)), placement.thresholds
    )
    assert placement.accuracy == (routed.logits.argmax(-1) == trace.labels).mean()
    cumulative = costs.keeping(placement.exits).cumulative
    assert placement.mean_cost == pytest.approx(cumulative[routed.exits].mean())


@pytest.mark.parametrize("limit", [1, 64])
def test_a_head_that_costs_much_and_tells_little_is_dropped(limit):
    trace, costs = drawn(8, 200, 4)
    useless = trace._replace(gates=trace.gates.copy())
    useless.gates[:, 1] = 0
    costs.heads[:] = [0.01, 1.5, 0.01, 0.01]
    budget = 0.6 * costs.stages.sum()
    placement = choose_exits(useless, unchanged(gate), costs, budget, exhaustive_up_to=limit)
    assert 1 not in placement.exits
    assert placement.whole is not None
    assert placement.accuracy > placement.whole.accuracy + 0.02


def test_the_search_goes_on_from_all_exits_where_they_beat_what_it_found():
    """Each early exit is worth its head only together with the others: one alone tells nothing."""
    count, exits = 64, 5
    group = np.arange(count) % 4
    # Exit e is sure, and right, of its own quarter; it scores the rest as low as it can.
    correct = np.concatenate([group[:, None] == np.arange(4), np.ones((count, 1), bool)], 1)
    logits = np.stack([correct, ~correct], -1)
    trace = recorded(logits, np.zeros(count, int), 1.0 * correct)
    costs = Costs(np.array([1.0, 0.1, 0.1, 0.1, 10.0]), np.full(exits, 0.01))
    placement = choose_exits(trace, unchanged(gate), costs, 1.3, exhaustive_up_to=1)
    assert placement.whole is not None
    assert placement.accuracy >= placement.whole.accuracy
    assert placement.accuracy == choose_exits(trace, unchanged(gate), costs, 1.3).accuracy


def test_of_equals_the_fewest_exits_are_kept():
    trace, costs = drawn(9, 40, 3)
    correct = np.zeros((40, 3, 2))
    correct[..., 0] = 1
    placement = choose_exits(
        trace._replace(logits=correct.astype(np.float32)), unchanged(gate), costs, 100.0
    )
    assert placement.exits == (2,)
    assert placement.thresholds.shape == (0,)
    assert placement.accuracy == 1
    assert placement.whole is not None
    assert placement.whole.accuracy == 1


@pytest.mark.parametrize("limit", [1, 64])
def test_a_dear_first_head_leaves_only_subsets_without_it(limit):
    trace, costs = drawn(10, 40, 4)
    costs.stages[:], costs.heads[:] = 1, [10, 0.5, 0.5, 0.5]
    placement = choose_exits(trace, unchanged(gate), costs, 3.0, exhaustive_up_to=limit)
    assert placement.whole is None
    assert placement.exits[0] in (1, 2)
    assert placement.mean_cost <= 3
    with pytest.raises(ValueError, match=r"a budget of 2\.4; leaving at the cheapest.* 2\.5"):
        choose_exits(trace, unchanged(gate), costs, 2.4, exhaustive_up_to=limit)


def test_what_does_not_fit_is_refused():
    trace, costs = drawn(11, 10, 3)
    with pytest.raises(ValueError, match=r"give `unchanged\(policy\)`"):
        choose_exits(trace, gate, costs, 1.0)  # pyright: ignore
    with pytest.raises(ValueError, match="2 stages and 2 heads for a trace of 3 exits"):
        choose_exits(trace, unchanged(gate), costs.keeping([0, 2]), 1.0)
    with pytest.raises(ValueError, match="give at least that"):
        choose_exits(trace, unchanged(gate), costs, float("nan"))
    with pytest.raises(ValueError, match="increasing, 0 to 2"):
        keep_trace(trace, [1, 3])


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.tanh(2 * nn.Dense(8)(x))


class Linear(nn.Module):
    @nn.compact
    def __call__(self, features, memory, train):
        logits = 3 * nn.Dense(3)(features)
        return ExitOutput(logits, logits[:, 0], ())


def test_the_chosen_network_runs_in_an_executor_as_its_trace_says():
    """From a trace of the whole network to a program of the kept one."""
    network = EarlyExitNetwork((from_linen(Layer()),) * 3, (from_linen(Linear()),) * 3)
    images = np.random.default_rng(0).normal(size=(96, 5)).astype(np.float32)
    variables = jax.jit(network.init)(jax.random.key(0), images[:1])
    # The last exit is taken to be right, so that there is something to route for.
    trace = eejax_trace.collect(network, variables, images, np.zeros(96, int), batch=96)
    trace = trace._replace(labels=trace.logits[:, -1].argmax(-1).astype(np.int32))
    costs = macs(network, variables, images)
    placement = choose_exits(trace, unchanged(max_prob), costs, 0.7 * costs.cumulative[-1])
    kept, kept_variables = (
        network.keeping(placement.exits),
        keep_variables(variables, placement.exits),
    )
    assert kept.num_exits == 2
    run = jax.jit(lambda v, t, x: compact(kept, max_prob, v, t, x, tiles=(16,)))
    answered = run(kept_variables, jnp.asarray(placement.thresholds), jnp.asarray(images))
    scored = routing.score(max_prob, keep_trace(trace, placement.exits))
    expected = routing.route(scored, placement.thresholds)
    np.testing.assert_array_equal(answered.exits, expected.exits)
    np.testing.assert_allclose(answered.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert len(np.unique(expected.exits)) == kept.num_exits
    counted = macs(kept, kept_variables, images)
    assert counted.cumulative[expected.exits].mean() == pytest.approx(placement.mean_cost, rel=1e-6)
