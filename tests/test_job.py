"""The main job from its command line to what it leaves behind, on the embedded data."""

import json

import numpy as np
import pytest

import eejax
from experiments.cifar import __main__ as cifar
from experiments.cifar.config import Config
from experiments.command_line import from_json, read_run
from experiments.data import splits
from experiments.report import table
from experiments.train import loop


@pytest.fixture(scope="module")
def workdir(digits_run):
    return digits_run


@pytest.fixture(scope="module")
def report(workdir):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((workdir / "report.json").read_text(), parse_constant=refuse)


def test_the_report_has_the_keys_that_runs_are_compared_by(report):
    assert report["dataset"] == "digits"
    assert report["seed"] == 0
    assert {"jax", "flax", "optax", "python", "eejax"} <= set(report["versions"])
    assert "cpu" in report["device"]
    for exit_ in report["exits"]:
        assert {"index", "macs", "accuracy", "ece"} <= set(exit_)
    for row in report["policies"]:
        assert {
            "name",
            "target",
            "thresholds",
            "accuracy",
            "mean_macs",
            "exit_fractions",
        } <= set(row)
    assert set(report["curve"]) == {"max_prob", "entropy", "margin", "gate"}
    for points in report["curve"].values():
        assert len(points) == 4
        assert all({"mean_macs", "accuracy"} <= set(point) for point in points)
    assert [row["strategy"] for row in report["inference"]] == ["cond", "compact"]
    for row in report["inference"]:
        for name in ("batch", "ms", "plain_ms", "ideal_ms", "speedup", "efficiency"):
            assert row[name] > 0
        assert row["ideal_ms"] <= row["plain_ms"] * (1 + 1e-9)
    assert set(report["train"]) == {"seconds", "images_per_second", "epochs"}


def test_the_numbers_agree_with_each_other(report):
    macs = np.array([e["macs"] for e in report["exits"]])
    assert (np.diff(macs) > 0).all()
    met = [row for row in report["policies"] if row["accuracy"] is not None]
    assert met
    for row in met:
        assert sum(row["exit_fractions"]) == pytest.approx(1)
        assert np.dot(row["exit_fractions"], macs) == pytest.approx(row["mean_macs"])
        assert len(row["thresholds"]) == 3
    # At the largest budget nothing is lost against the last exit.
    last = report["curve"]["max_prob"][-1]
    assert last["accuracy"] >= report["exits"][-1]["accuracy"] - 0.03


def test_a_target_that_cannot_be_met_is_a_row_that_says_why(report):
    impossible = [r for r in report["policies"] if r["target"] == {"kind": "budget", "value": 0.02}]
    assert len(impossible) == 8
    for row in impossible:
        assert row["accuracy"] is None
        assert "first exit" in row["error"]


def test_thresholds_of_ones_own_are_reported(report):
    given = [r for r in report["policies"] if r["search"] == "given"]
    assert [r["thresholds"] for r in given] == [[0.25, 0.5, 0.75]] * 4


def test_drops_and_forecasts_come_from_the_split_that_thresholds_are_chosen_on(workdir, report):
    bundle = eejax.load(workdir)
    config = from_json(Config, read_run(workdir)["config"])
    choose = splits.load(config.data, config.seed).choose
    trace = eejax.collect(bundle.network, bundle.variables, *choose)
    scored = eejax.score(bundle.policy, trace)
    correct = scored.predictions == trace.labels[:, None]
    search = eejax.thresholds.search(scored.scores, correct, bundle.costs.fractions)
    rows = table.read_csv(workdir / "results.csv")
    rows = table.decided(rows[rows["policy"] == "max_prob"], *table.SEARCHED)
    optimal = rows[rows["search"] == "optimal"].set_index("target").to_dict("index")
    choices = {
        "cost <= 0.70": lambda part: part.for_budget(0.7),
        # With the confidence of the command line.
        "drop <= 1.0 points": lambda part: part.for_drop(0.01, 0.5),
    }
    for target, choice in choices.items():
        row, forecast = optimal[target], search.forecast(choice)
        np.testing.assert_allclose(row["thresholds"], choice(search).thresholds, rtol=1e-4)
        assert row["forecast_accuracy"] == pytest.approx(forecast.accuracy)
        assert row["forecast_cost"] == pytest.approx(forecast.mean_cost)
    told = [r["forecast"]["accuracy"] for r in report["policies"] if r["name"] == "max_prob"]
    assert told == [None if value is None else list(value) for value in rows["forecast_accuracy"]]
    without = rows["error"].notna() | (rows["search"] != "optimal")
    assert (rows["forecast_accuracy"].isna() == without).all()


def test_everything_is_left_in_the_working_directory(workdir):
    config = json.loads((workdir / "config.json").read_text())
    assert config["config"]["train"]["epochs"] == 6
    assert config["versions"]["jax"]
    rows = [json.loads(line) for line in (workdir / loop.METRICS).read_text().splitlines()]
    assert sum("held_out_accuracy" in row for row in rows) == 6
    assert (workdir / "report.html").stat().st_size > 20_000
    trace = np.load(workdir / "trace_test.npz")
    assert trace["logits"].shape[:2] == (len(trace["labels"]), 4)


def test_a_run_leaves_a_bundle_that_predicts_as_the_report_says(workdir, report):
    bundle = eejax.load(workdir)
    config = from_json(Config, read_run(workdir)["config"])
    dataset = splits.load(config.data, config.seed)
    assert bundle.classes == tuple(dataset.classes)
    prediction = bundle.predict(dataset.test.images)
    # The thresholds that were given on the command line, as they were timed.
    assert report["target"] == {"kind": "given"}
    rows = [r for r in report["policies"] if r["target"] == report["target"]]
    row = next(r for r in rows if r["name"] == "max_prob")
    timed = table.timed(table.read_csv(workdir / "results.csv"))
    assert timed["thresholds"].tolist() == [(0.25, 0.5, 0.75)] * 2
    assert timed["executor"].tolist() == ["cond", "compact"]
    accuracy = (prediction.labels == dataset.test.labels).mean()
    # Another program may round another way.
    assert accuracy == pytest.approx(row["accuracy"], abs=0.01)
    np.testing.assert_allclose(bundle.thresholds, row["thresholds"], rtol=1e-6)


def test_resuming_a_finished_run_makes_the_same_report_again(workdir, report, capsys):
    assert cifar.main(["--workdir", str(workdir), "--resume"]) == 0
    assert "continuing after step 42" in capsys.readouterr().out
    again = json.loads((workdir / "report.json").read_text())
    for name in ("exits", "policies", "curve", "dataset", "seed"):
        assert again[name] == report[name]


def test_a_mistake_in_the_data_is_one_line_and_leaves_nothing(tmp_path, capsys):
    path = tmp_path / "run"
    flags = ["--data.name", "digits", "--data.choose", "5000", "--workdir", str(path)]
    assert cifar.main(flags) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1
    assert not path.exists()
    assert cifar.main(["--data.name", "digits", "--train.batch", "5000"]) == 2
    assert "train.batch: 5000" in capsys.readouterr().err
