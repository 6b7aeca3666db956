"""All that a comparison reports: every part is there, and the parts agree with each other."""

from __future__ import annotations

import collections
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_comparison import (
    BUDGET,
    DROP,
    EARLY,
    NEVER,
    REGIMES,
    SCHEMES,
    SEEDS,
    STATIC,
    Made,
    as_numbers,
    cascades,
    fitted,
    networks,
    read,
    row_of,
)

from eejax.evaluation.routing import route, score
from eejax.trace import Trace, read_trace
from experiments.report.table import (
    GUARANTEES,
    SEARCHED,
    decided,
    over_seeds,
    read_csv,
    timed,
)


@pytest.fixture(scope="module")
def results(digits_comparison: Path) -> dict[str, Any]:
    return read(digits_comparison)


@pytest.fixture(scope="module")
def made(digits_comparison: Path) -> dict[tuple[str, int], Made]:
    return networks(digits_comparison)


def test_the_results_have_all_their_parts(results):
    documented = {
        *("dataset", "data_source", "notice", "command", "date", "device", "versions", "seeds"),
        *("network", "seconds", "samples", "classes", "whole_macs", "failed", "reference"),
        *("regimes", "static", "rows", "curves", "area_range", "differences", "comparisons"),
        *("level", "draws", "agreement", "timing", "drift", "placement"),
    }
    assert documented <= results.keys()
    assert results["dataset"] == "digits"
    assert results["seeds"] == [0, 1]
    assert results["failed"] == []
    assert results["reference"] == {"regime": "joint", "policy": "max_prob"}
    assert [results["samples"][name] for name in ("calibrate", "choose", "certify")] == [
        *(150, 250, 250)
    ]
    assert [regime["name"] for regime in results["regimes"]] == list(REGIMES)
    assert {row["name"] for row in results["static"]} == set(STATIC)


def test_every_scheme_has_a_row_at_every_target(results):
    found = collections.Counter(
        (row["regime"], row["policy"], json.dumps(row["target"]), row["search"])
        for row in results["rows"]
    )
    wanted = [(*s, json.dumps(t), "optimal") for s in SCHEMES for t in (BUDGET, NEVER)]
    wanted += [(*s, json.dumps(t), "geometric") for s in EARLY for t in (BUDGET, NEVER)]
    wanted += [(*s, json.dumps(DROP), "optimal") for s in EARLY]
    assert all(found.pop(key) == 1 for key in wanted)
    # What is left are promises: one for the risk and one for risk and cost, of each regime.
    left = [(regime, policy, json.loads(target)["kind"]) for regime, policy, target, _ in found]
    kinds = ("risk", "certificate")
    assert left == [(regime, "max_prob", kind) for regime in REGIMES for kind in kinds]


def test_a_budget_below_the_first_exit_is_a_row_that_says_why(results):
    rows = [row for row in results["rows"] if row["target"] == NEVER]
    assert len(rows) == 2 * len(EARLY) + 1
    for row in rows:
        assert "first exit" in row["error"]
        assert "accuracy" not in row


def test_a_target_is_met_where_the_test_figures_say_so(results):
    last = {
        regime["name"]: regime["exits"][-1]["accuracy"]["seeds"] for regime in results["regimes"]
    }
    told = 0
    for row in results["rows"]:
        target = row["target"]
        if "accuracy" not in row:
            assert "met" not in row
            continue
        cost, accuracy = row["cost"]["seeds"], row["accuracy"]["seeds"]
        if target["kind"] == "budget":
            met = [c <= target["value"] for c in cost]
        elif target["kind"] == "drop" and row["policy"] != "ztw":  # whose last answer is its own
            met = [
                a >= b - target["value"] for a, b in zip(accuracy, last[row["regime"]], strict=True)
            ]
        elif target["kind"] == "risk":
            met = [r <= target["value"] for r in row["risk"]["seeds"]]
        elif target["kind"] == "certificate":
            met = [
                r <= target["value"] and c <= target["budget"]
                for r, c in zip(row["risk"]["seeds"], cost, strict=True)
            ]
        else:
            continue
        of = len(met) if target["kind"] in ("risk", "certificate") else len(SEEDS)
        words = "yes" if sum(met) == of else f"{sum(met)} of {of}" if any(met) else "no"
        assert row["met"] == words
        told += 1
    assert told > 2 * len(EARLY)


def test_figures_of_a_row_agree_with_each_other(results):
    able = [row for row in results["rows"] if "accuracy" in row]
    regimes = {regime["name"]: regime for regime in results["regimes"]}
    for row in able:
        assert row["accuracy"]["mean"] == pytest.approx(np.mean(row["accuracy"]["seeds"]))
        assert row["accuracy"]["mean"] <= row["oracle"]
        assert 0 <= row["ece"] <= 1
        if row["regime"] in REGIMES:
            costs = [exit_["cost"] for exit_ in regimes[row["regime"]]["exits"]]
            assert np.dot(row["exit_fractions"], costs) == pytest.approx(row["cost"]["mean"])
            by_class = np.array(row["class_exit_fractions"])
            assert by_class.shape == (10, 3)
            np.testing.assert_allclose(by_class.sum(1), 1)
    assert len(able) > len(SCHEMES)


def test_guarantees_have_a_certificate_or_say_why_there_is_none(results):
    rows = [row for row in results["rows"] if row["target"]["kind"] in ("risk", "certificate")]
    for row in rows:
        assert row["policy"] == "max_prob"
        assert row["regime"] in REGIMES
        if row.get("certified"):
            assert "certification samples" in row["certificate"]
        assert row.get("certified", 0) == len(SEEDS) or row["error"]
    assert any(row.get("certified") for row in rows)


def test_differences_are_those_of_the_rows(results):
    def figures(side: dict[str, str], name: str) -> float:
        if side["regime"] == "static":
            row = next(r for r in results["static"] if r["name"] == side["policy"])
            return row[name] if name == "cost" else row[name]["mean"]
        scheme = side["regime"], side["policy"]
        return row_of(results, scheme, target=BUDGET, search="optimal")[name]["mean"]

    reference = results["reference"]
    others = {(r, p) for r, p in SCHEMES} - {("joint", "max_prob")}
    found = results["differences"]
    tested = [(d["a"]["regime"], d["a"]["policy"]) for d in found if d["b"] == reference]
    assert sorted(tested) == sorted(others)
    static = [d for d in found if d["b"]["regime"] == "static"]
    assert [d["a"] for d in static] == [reference]
    assert len(found) == len(tested) + len(static)
    for row in found:
        assert row["target"] == BUDGET
        for name, key in (("accuracy", "difference"), ("cost", "cost_difference")):
            expected = figures(row["a"], name) - figures(row["b"], name)
            assert row[key] == pytest.approx(expected, abs=1e-9)
        assert row["low"] <= row["difference"] <= row["high"]
        assert 0 < row["p"] <= row["adjusted_p"] <= 1
        if row["significant"]:
            assert row["low"] > 0 or row["high"] < 0


def test_the_static_network_set_beside_is_the_best_within_the_budget(results, made):
    row = next(d for d in results["differences"] if d["b"]["regime"] == "static")
    held_out = {}
    for name in STATIC:
        if made[name, 0].macs[-1] <= BUDGET["value"] * results["whole_macs"]:
            splits = [made[name, seed].choose for seed in SEEDS]
            correct = [(t.logits[:, -1].argmax(-1) == t.labels).mean() for t in splits]
            held_out[name] = np.mean(correct)
    assert len(held_out) > 1
    assert held_out[row["b"]["policy"]] == max(held_out.values())


def test_agreement_is_symmetric_and_whole_with_oneself(results):
    assert [entry["regime"] for entry in results["agreement"]] == list(REGIMES)
    for entry in results["agreement"]:
        assert [(entry["regime"], p) for p in entry["policies"]] == [
            s for s in EARLY if s[0] == entry["regime"]
        ]
        for name in ("exits", "answers"):
            matrix = np.array(entry[name])
            np.testing.assert_array_equal(np.diag(matrix), 1)
            np.testing.assert_array_equal(matrix, matrix.T)
            assert matrix.min() >= 0
        assert np.min(entry["exits"]) < 1


def test_drift_begins_at_clean_images_for_every_corruption(results, made):
    rows = results["drift"]
    at = collections.Counter((r["regime"], r["corruption"], r["severity"]) for r in rows)
    wanted = itertools.product(REGIMES, ("noise", "contrast"), (0, 3))
    assert set(at) == set(wanted)
    assert {row["policy"] for row in rows} == {"max_prob"}
    budget = [row for row in rows if row["target"] == BUDGET]
    assert len(budget) == 8
    for row in budget:
        limits = row_of(results, (row["regime"], "max_prob"), target=BUDGET, search="optimal")
        file = "test" if row["severity"] == 0 else f"{row['corruption']}-3-60"
        found = []
        for seed, shown in zip(SEEDS, limits["thresholds"], strict=True):
            network = made[row["regime"], seed]
            trace = Trace(*(a[:60] for a in read_trace(network.place / f"{file}.npz")))
            policy = fitted("max_prob", network.calibrate)
            routed = route(score(policy, trace), as_numbers(shown))
            found.append((routed.logits.argmax(-1) == trace.labels).mean())
            if row["severity"]:
                assert not np.isin(trace.ids, network.test.ids).any()  # other images
        assert row["accuracy"] == pytest.approx(np.mean(found))
    promised = [row for row in rows if row["target"]["kind"] == "risk"]
    assert promised
    for row in promised:
        low, high = row["interval"]
        assert low <= row["risk"] <= high
        assert row["holds"] == ("no" if low > 0.1 else "yes" if high <= 0.1 else "unclear")


def test_curves_end_at_the_cheapest_and_cover_a_common_range(results):
    assert [(c["regime"], c["policy"]) for c in results["curves"]] == SCHEMES
    low, high = results["area_range"]
    assert low <= high
    for curve in results["curves"]:
        costs = [point["cost"] for point in curve["points"]]
        assert costs == sorted(costs)
        assert costs[0] <= low + 1e-9
        assert len(curve["area"]["seeds"]) == len(SEEDS)
        for point in curve["points"]:
            assert point["low"] <= point["accuracy"] <= point["high"]


def test_times_are_measured_for_plain_networks_policies_and_cascades(results, made):
    timing = results["timing"]
    for row in timing:
        assert row["batch"] == 64
        for name in ("ms", "plain_ms", "speedup"):
            assert row[name] > 0
        assert row["speedup"] == pytest.approx(row["plain_ms"] / row["ms"])
    plain = timing[0]
    assert (plain["regime"], plain["policy"]) == ("static", "plain network")
    assert plain["ms"] == plain["plain_ms"]
    # A cascade of one network is that network, which is timed already.
    more = ["cascade"] if cascades(made, SEEDS[0])[0][1] > 1 else []
    assert [row["regime"] for row in timing] == ["static"] * 3 + [*REGIMES, *more]
    for row in timing[3:]:
        assert (row["policy"], row["target"]) == ("max_prob", BUDGET)
        figures = row_of(results, (row["regime"], "max_prob"), target=BUDGET, search="optimal")
        assert row["accuracy"] == figures["accuracy"]["seeds"][0]
        assert row["cost"] == figures["cost"]["seeds"][0]
    for row in timing[3:5]:
        assert row["efficiency"] == pytest.approx(row["ideal_ms"] / row["ms"])
    assert {row["name"]: row["ms"] for row in results["static"]} == {
        row["policy"]: row["ms"] for row in timing[:3]
    }


def test_exits_are_chosen_for_a_measured_budget_and_timed(results):
    row, impossible = results["placement"]
    assert (row["regime"], row["policy"], row["of"], row["batch"]) == ("joint", "max_prob", 3, 64)
    assert row["kept"][-1] == 2
    assert row["kept"] == sorted(set(row["kept"]))
    assert 0 < row["accuracy"] <= 1
    assert 0 < row["all_accuracy"] <= 1
    assert row["expected_ms"] < row["budget_ms"]  # which is twice what the whole network takes
    assert row["ms"] > 0
    assert row["all_ms"] > 0
    assert "cheapest exit" in impossible["error"]
    assert "kept" not in impossible


def test_files_for_people_are_left_in_the_working_directory(digits_comparison, results):
    workdir = digits_comparison
    for name in ("report.html", "results.csv", "table.tex", "config.json"):
        assert (workdir / name).stat().st_size > 500
    assert "soft_auxiliary" in (workdir / "report.html").read_text()
    table = read_csv(workdir / "results.csv")
    means = over_seeds(decided(table, *SEARCHED, *GUARANTEES))
    assert len(means) == len(results["rows"])
    for row, (_, mean) in zip(results["rows"], means.iterrows(), strict=True):
        assert (row["regime"], row["policy"]) == (mean["regime"], mean["policy"])
        if "accuracy" in row:
            assert row["accuracy"]["mean"] == pytest.approx(mean["accuracy"])
            assert row["cost"]["mean"] == pytest.approx(mean["cost"])
    assert len(timed(table)) == len(results["timing"])
    names = {path.name for path in (workdir / "figures").iterdir()}
    assert {"accuracy_macs.svg", "accuracy_macs.pdf", "drift.svg", "differences.svg"} <= names
    stored = json.loads((workdir / "config.json").read_text())["config"]
    assert stored["data"]["name"] == "digits"
    assert stored["seeds"] == [0, 1]
