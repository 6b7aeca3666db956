"""A comparison's figures, computed anew from what its networks said, by the library alone."""

from __future__ import annotations

import contextlib
import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_comparison import (
    BUDGET,
    CONFIDENCE,
    DROP,
    EARLY,
    FLAGS,
    REGIMES,
    SEEDS,
    Made,
    as_numbers,
    cascades,
    networks,
    read,
    row_of,
    scored,
    zip_seeds,
)

from eejax.evaluation.routing import route
from eejax.selection import guarantees, thresholds
from eejax.trace import fingerprints
from experiments.compare import cells as compare_cells
from experiments.compare import decide as compare_decide
from experiments.compare.certify import certified
from experiments.compare.config import Comparison, GuaranteeConfig, parse
from experiments.compare.decide import Model
from experiments.data import splits as data
from experiments.evaluate.decide import Traces, view
from experiments.report import table


@pytest.fixture(scope="module")
def workdir(digits_comparison: Path) -> Path:
    return digits_comparison


@pytest.fixture(scope="module")
def results(workdir: Path) -> dict[str, Any]:
    return read(workdir)


@pytest.fixture(scope="module")
def made(workdir: Path) -> dict[tuple[str, int], Made]:
    return networks(workdir)


@pytest.mark.parametrize("scheme", EARLY, ids="-".join)
@pytest.mark.parametrize("kind", ["budget", "geometric", "drop"])
def test_thresholds_are_chosen_on_one_split_and_figures_are_of_the_test_split(
    results, made, scheme, kind
):
    for_drop = functools.partial(thresholds.for_drop, confidence=CONFIDENCE)
    searches = {
        "budget": (thresholds.for_budget, BUDGET, "optimal"),
        "geometric": (thresholds.geometric, BUDGET, "geometric"),
        "drop": (for_drop, DROP, "optimal"),
    }
    search, target, words = searches[kind]
    row = row_of(results, scheme, target=target, search=words)
    shown = list(zip_seeds(row, "accuracy", "cost"))
    for seed in SEEDS:
        network = made[scheme[0], seed]
        # The unit is the plain network, which has one head: the whole early-exit network is dearer.
        cost = network.macs / made["plain network", seed].macs[-1]
        choose, _, test = scored(scheme[1], network)
        correct = choose.predictions == network.choose.labels[:, None]
        choice = None
        with contextlib.suppress(ValueError):
            choice = search(choose.scores, correct, cost, target["value"])
        if choice is None:  # scores so coarse that the budget cannot be hit
            assert row["error"]
            continue
        limits, accuracy, mean_cost = shown.pop(0)
        np.testing.assert_allclose(as_numbers(limits), choice.thresholds, rtol=1e-6)
        routed = route(test, choice.thresholds)
        assert accuracy == pytest.approx((routed.logits.argmax(-1) == network.test.labels).mean())
        assert mean_cost == pytest.approx(cost[routed.exits].mean())
    assert not shown


def test_forecasts_are_of_the_split_that_thresholds_are_chosen_on(workdir, made):
    rows = table.decided(table.read_csv(workdir / "results.csv"), *table.SEARCHED)
    rows = rows[rows["policy"] == "max_prob"]
    keys = ["regime", "seed", "target"]
    optimal = rows[rows["search"] == "optimal"].set_index(keys).to_dict("index")
    choices = {
        "cost <= 0.60": lambda search: search.for_budget(BUDGET["value"]),
        "drop <= 1.0 points": lambda search: search.for_drop(DROP["value"], CONFIDENCE),
    }
    for regime, seed in itertools.product(REGIMES, SEEDS):
        network = made[regime, seed]
        choose = scored("max_prob", network)[0]
        correct = choose.predictions == network.choose.labels[:, None]
        cost = network.macs / made["plain network", seed].macs[-1]
        search = thresholds.search(choose.scores, correct, cost)
        for target, choice in choices.items():
            row, forecast = optimal[regime, seed, target], search.forecast(choice)
            assert row["forecast_accuracy"] == pytest.approx(forecast.accuracy)
            assert row["forecast_cost"] == pytest.approx(forecast.mean_cost)
    # Nothing is forecast where nothing is chosen, nor for the geometric search.
    without = rows[rows["error"].notna() | (rows["search"] == "geometric")]
    assert len(without)
    assert without["forecast_accuracy"].isna().all()


def test_costs_are_fractions_of_the_plain_network(results, made):
    whole = results["whole_macs"]
    for regime in results["regimes"]:
        network = made[regime["name"], 0]
        costs = [exit_["cost"] for exit_ in regime["exits"]]
        np.testing.assert_allclose(costs, network.macs / whole)
        assert costs[-1] > 1  # heads on the way are paid for
        accuracy = [exit_["accuracy"]["seeds"] for exit_ in regime["exits"]]
        tests = [made[regime["name"], seed].test for seed in SEEDS]
        correct = [(t.logits.argmax(-1) == t.labels[:, None]).mean(0) for t in tests]
        np.testing.assert_allclose(np.transpose(accuracy), correct)
    assert [row["name"] for row in results["static"]][-1] == "plain network"
    for row in results["static"]:
        assert row["cost"] == made[row["name"], 0].macs[-1] / whole
        tests = [made[row["name"], seed].test for seed in SEEDS]
        correct = [(t.logits[:, -1].argmax(-1) == t.labels).mean() for t in tests]
        assert row["accuracy"]["seeds"] == pytest.approx(correct)
        assert row["accuracy"]["mean"] == pytest.approx(np.mean(correct))
    assert max(row["cost"] for row in results["static"]) == 1


def test_a_cascade_is_the_one_of_the_static_networks_that_is_best_on_held_out_samples(
    results, made
):
    row = row_of(results, ("cascade", "max_prob"), target=BUDGET)
    for i, seed in enumerate(SEEDS):
        _, count, accuracy, cost = cascades(made, seed)[0]
        assert row["accuracy"]["seeds"][i] == pytest.approx(accuracy)
        assert row["cost"]["seeds"][i] == pytest.approx(cost)
        assert len(row["thresholds"][i]) == count - 1


@pytest.mark.parametrize("regime", REGIMES)
def test_a_risk_is_certified_on_samples_of_its_own(results, made, regime):
    row = row_of(results, (regime, "max_prob"), kind="risk")
    target = row["target"]
    assert (target["value"], target["loss"], target["method"]) == (0.1, "disagreement", "betting")
    training = data.load(parse(FLAGS).run.data, 0).train
    assert isinstance(training, data.Split)
    shown = list(zip_seeds(row, "risk"))
    assert row["certified"] == len(shown)
    for seed in SEEDS:
        network = made[regime, seed]
        choose, certify, test = scored("max_prob", network)
        certificate = None
        with contextlib.suppress(ValueError):
            certificate = guarantees.control_risk(
                guarantees.shared_path(choose, network.choose),
                certify,
                guarantees.disagreement(certify),
                network.certify,
                network.macs / results["whole_macs"],
                target["value"],
                used={"training": fingerprints(training.images), "else": network.calibrate.ids},
                delta=target["delta"],
                method="betting",
            )
        if certificate is None:
            assert row["error"]
            continue
        if len(shown) == row["certified"]:
            assert row["certificate"] == certificate.words
        limits, risk = shown.pop(0)
        np.testing.assert_allclose(as_numbers(limits), certificate.thresholds, rtol=1e-6)
        said = route(test, certificate.thresholds).logits.argmax(-1)
        assert risk == pytest.approx((said != test.predictions[:, -1]).mean())
    assert not shown


def test_a_guarantee_names_the_method_that_it_was_made_by(made, monkeypatch):
    issued = []

    def recording(test, *args, **kwargs):
        issued.append(test(*args, **kwargs))
        return issued[-1]

    for name in ("control_risk", "certify"):
        test = getattr(guarantees, name)
        monkeypatch.setattr(guarantees, name, functools.partial(recording, test))
    network = made["joint", 0]
    cost = network.macs / network.macs[-1]
    traces = Traces(network.calibrate, network.choose, network.certify, network.test)
    one = view("max_prob", traces, (0, 1, 2), cost, np.empty(0))
    # Risk and cost that the whole network has, so that everything is certified.
    config = GuaranteeConfig(risks=(0.99,), methods=("crc", "binomial"), budgets=(0.99,))
    decisions = list(certified(one, traces, config, np.zeros(0, np.uint64)))
    assert [d.target["kind"] for d in decisions] == ["risk", "risk", "certificate"] * 2
    assert [d.target["method"] for d in decisions] == [c.method for c in issued]
    assert [d.words for d in decisions] == [c.words for c in issued]


@pytest.fixture(scope="module")
def models(workdir: Path) -> tuple[list[Model], Comparison]:
    """A network with early exits and a cascade, and what they are to be decided for."""
    config = parse(FLAGS).run
    cells = [c for c in compare_cells.cells(config) if c.seed == 0]
    whole = max(compare_cells.macs(c)[-1] for c in cells if c.kind == "static")
    early = next(c for c in cells if c.kind == "regime")
    static = sorted(
        (c for c in cells if c.kind == "static"), key=lambda c: compare_cells.macs(c)[-1]
    )
    alone = tuple(float(compare_cells.macs(c)[-1] / whole) for c in static)
    found = [
        Model("joint", 0, (early,), tuple((compare_cells.macs(early) / whole).tolist()), ()),
        Model("cascade", 0, tuple(static), alone, ()),
    ]
    return found, config


@pytest.mark.parametrize("which", [0, 1], ids=["early exits", "cascade"])
def test_nothing_is_chosen_on_the_test_split(workdir, models, monkeypatch, which):
    model, config = models[0][which], models[1]
    decided = compare_decide._decided(model, "max_prob", config, workdir)
    traces = compare_cells.traces

    def other_tests(cell, workdir):
        found = traces(cell, workdir)
        test = found.test._replace(labels=(found.test.labels + 1) % 10, logits=-found.test.logits)
        return found._replace(test=test)

    monkeypatch.setattr(compare_cells, "traces", other_tests)
    after = compare_decide._decided(model, "max_prob", config, workdir)
    pairs = list(zip(decided.rows, after.rows, strict=True))
    for one, other in pairs:
        for name in ("target", "search", "exits", "thresholds", "certificate", "error"):
            assert one.get(name) == other.get(name)
    assert any(one.get("accuracy") != other.get("accuracy") for one, other in pairs)


def test_splits_do_not_overlap_and_have_the_sizes_asked_for(made):
    config = parse(FLAGS).run.data
    held = data.load(config, 0)
    assert isinstance(held.train, data.Split)
    training = fingerprints(held.train.images)
    official = np.concatenate(
        [training, *(fingerprints(s.images) for s in (held.calibrate, held.choose, held.certify))]
    )
    # An image that the data hold twice may well be in two splits.
    ids, counts = np.unique(official, return_counts=True)
    twice = set(ids[counts > 1].tolist())
    assert len(twice) < 10
    cuts = []
    for network in made.values():
        splits = [network.calibrate.ids, network.choose.ids, network.certify.ids]
        assert [len(s) for s in splits] == [config.calibrate, config.choose, config.certify]
        for a, b in itertools.combinations([training, *splits, network.test.ids], 2):
            assert set(a.tolist()) & set(b.tolist()) <= twice
        assert sorted(official) == sorted(np.concatenate([training, *splits]))
        cuts.append(network.choose.ids.tolist())
    assert len({tuple(sorted(cut)) for cut in cuts}) == len(SEEDS)  # each seed cuts anew


def test_the_splits_are_the_ones_that_decisions_are_made_on(workdir, made):
    for cell in compare_cells.cells(parse(FLAGS).run):
        network = made[cell.name, cell.seed]
        assert cell.directory(workdir) == network.place
        for one, other in zip(compare_cells.traces(cell, workdir), network[2:], strict=True):
            assert one is not None
            np.testing.assert_array_equal(one.ids, other.ids)
            np.testing.assert_array_equal(one.logits, other.logits)
