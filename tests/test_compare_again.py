"""A comparison that goes on: it grows, survives what fails, and computes nothing twice."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_comparison import (
    BUDGET,
    NEW,
    POLICIES,
    REGIMES,
    SCHEMES,
    SEEDS,
    as_numbers,
    networks,
    read,
    row_of,
    run,
    scored,
)

from eejax.evaluation.routing import route
from experiments.compare import __main__ as compare
from experiments.compare import cells as compare_cells
from experiments.compare import decide as compare_decide
from experiments.compare import report as compare_report
from experiments.compare import timing as compare_timing
from experiments.files import write_json as write_file
from experiments.report import plots


@pytest.fixture(scope="module")
def results(digits_comparison: Path) -> dict[str, Any]:
    return read(digits_comparison)


@pytest.fixture
def copy(digits_comparison: Path, tmp_path: Path) -> Path:
    """The same, to go on from."""
    return Path(shutil.copytree(digits_comparison, tmp_path / "run"))


def write_json(workdir: Path, results: dict[str, Any], table: Any) -> None:
    del table
    write_file(workdir / "results.json", results)


@pytest.fixture
def only_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than all the rest of a comparison of which everything is there."""
    monkeypatch.setattr(compare_report, "write", write_json)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Which networks are trained, what is decided, and how often one is run or timed."""
    found: dict[str, list[str]] = {"trained": [], "run": [], "decided": [], "timed": []}
    train, collect = compare_cells._train, compare_cells.collect
    decided, measured = compare_decide._decided, compare_timing._timed

    def training(cell, place):
        train(cell, place)
        found["trained"].append(f"{cell.name}, {cell.seed}")

    def running(*args):
        found["run"].append("")
        return collect(*args)

    def deciding(model, policy, config, workdir):
        found["decided"].append(f"{model.name}, {model.seed}, {policy}")
        return decided(model, policy, config, workdir)

    def timing(*args):
        found["timed"].append("")
        return measured(*args)

    monkeypatch.setattr(compare_cells, "_train", training)
    monkeypatch.setattr(compare_cells, "collect", running)
    monkeypatch.setattr(compare_decide, "_decided", deciding)
    monkeypatch.setattr(compare_timing, "_timed", timing)
    return found


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, *names: str) -> None:
    """Some trainings, or all of them, end with an error."""
    train = compare_cells._train

    def failing(cell, place):
        if not names or f"{cell.name}, {cell.seed}" in names:
            raise error
        train(cell, place)

    monkeypatch.setattr(compare_cells, "_train", failing)


def lasting(results: dict[str, Any]) -> dict[str, Any]:
    """Without what tells of the run itself."""
    return {k: v for k, v in results.items() if k not in ("date", "seconds", "command")}


@pytest.mark.usefixtures("only_json")
def test_a_comparison_that_is_finished_is_not_computed_again(copy, results, log):
    (copy / "results.json").unlink()
    assert run(copy) == 0
    assert not any(log.values())
    assert lasting(read(copy)) == lasting(results)


@pytest.mark.usefixtures("only_json")
def test_resuming_takes_the_configuration_that_is_there(copy, results, log):
    flags = ["--workdir", str(copy), "--resume", "--jobs", "1", "--policies", "max_prob", "gate"]
    assert compare.main(flags) == 0
    assert not any(log.values())
    again = read(copy)
    schemes = [("joint", "max_prob"), *(("soft_auxiliary", p) for p in ("max_prob", "gate"))]
    schemes.append(("cascade", "max_prob"))
    assert [(c["regime"], c["policy"]) for c in again["curves"]] == schemes
    assert again["rows"] == [r for r in results["rows"] if (r["regime"], r["policy"]) in schemes]


def test_it_grows_by_what_is_new_and_survives_a_training_that_fails(
    copy, results, log, monkeypatch, capsys
):
    """One directory is lost, a policy and a seed are new, and one network of that seed fails."""
    monkeypatch.setattr(plots, "save", lambda *args: None)
    (lost,) = (copy / "networks").glob("width-0-5-seed1-*")
    shutil.rmtree(lost)
    more = ["--seeds", "0", "1", "2", "--policies", *POLICIES, NEW]
    with monkeypatch.context() as patch:
        failing(patch, FloatingPointError("the loss is <nan>"), "joint, 2")
        assert run(copy, *more) == 0
    output = capsys.readouterr().out
    assert "FAILED joint, seed 2: FloatingPointError: the loss is <nan>" in output
    assert log["trained"] == [
        *("soft_auxiliary, 2", "plain network, 2", "depth to exit 1, 2"),
        *("width 0.5, 1", "width 0.5, 2"),
    ]
    new = [f"{regime}, {seed}, {NEW}" for regime in REGIMES for seed in SEEDS]
    new += [f"soft_auxiliary, 2, {p}" for p in (*POLICIES, NEW)] + ["cascade, 2, max_prob"]
    assert sorted(log["decided"]) == sorted(new)
    assert log["timed"] == []
    grown = read(copy)
    error = "FloatingPointError: the loss is <nan>"
    assert grown["failed"] == [{"cell": "joint, seed 2", "error": error}]
    page = (copy / "report.html").read_text()
    assert "joint, seed 2 failed: FloatingPointError: the loss is &lt;nan&gt;" in page

    # What was there is as it was, and the new seed stands beside it where it could be trained.
    for scheme in SCHEMES:
        wanted = {"target": BUDGET, "search": "optimal"}
        before, after = row_of(results, scheme, **wanted), row_of(grown, scheme, **wanted)
        count = 2 if scheme[0] == "joint" else 3
        assert len(after["accuracy"]["seeds"]) == count
        assert after["accuracy"]["seeds"][:2] == before["accuracy"]["seeds"]
        assert after["thresholds"][:2] == before["thresholds"]
    assert grown["timing"] == results["timing"]
    # Schemes are compared over the seeds that both have.
    row = next(
        d for d in grown["differences"] if d["a"] == {"regime": "soft_auxiliary", "policy": "ztw"}
    )
    sides = [
        row_of(grown, scheme, target=BUDGET, search="optimal")["accuracy"]["seeds"][:2]
        for scheme in (("soft_auxiliary", "ztw"), ("joint", "max_prob"))
    ]
    assert row["difference"] == pytest.approx(np.mean(sides[0]) - np.mean(sides[1]), abs=1e-9)

    # The next time only that one is left to do.
    monkeypatch.setattr(compare_report, "write", write_json)
    for part in log.values():
        part.clear()
    assert run(copy, *more) == 0
    assert log["trained"] == ["joint, 2"]
    policies = [p for p in (*POLICIES, NEW) if p != "gate"]
    assert log["decided"] == [f"joint, 2, {p}" for p in policies]
    assert read(copy)["failed"] == []


@pytest.mark.usefixtures("only_json")
def test_an_interruption_keeps_what_is_done(copy, results, log, monkeypatch, capsys):
    for name in ("joint-seed1", "plain-network-seed0"):
        (place,) = (copy / "networks").glob(f"{name}-*")
        shutil.rmtree(place)
    (copy / "results.json").unlink()
    with monkeypatch.context() as patch:
        failing(patch, KeyboardInterrupt(), "plain network, 0")
        assert run(copy) == 130
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert "interrupted" in errors[0]
    assert log["trained"] == ["joint, 1"]
    assert not (copy / "results.json").exists()
    assert run(copy) == 0
    assert log["trained"] == ["joint, 1", "plain network, 0"]
    assert log["decided"] == log["timed"] == []
    # The same seed gives the same network.
    assert lasting(read(copy)) == lasting(results)


def test_nothing_to_compare_is_one_line(tmp_path, monkeypatch, capsys):
    failing(monkeypatch, FloatingPointError("the loss is <nan>"))
    assert run(tmp_path / "run") == 1
    output = capsys.readouterr()
    assert output.err.splitlines() == [
        "error: every network failed, the first with: FloatingPointError: the loss is <nan>"
    ]
    assert "FAILED width 0.5, seed 1" in output.out
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.usefixtures("only_json")
def test_a_budget_in_milliseconds(copy, log):
    flags = ["--seeds", "0", "--regimes", "joint", "--policies", "max_prob", "--static.widths"]
    flags += ["--targets.budgets-ms", "1000", "1e-6", "--timing.policies"]
    assert run(copy, *flags) == 0
    assert log["trained"] == []
    found = read(copy)
    for scheme in (("joint", "max_prob"), ("cascade", "max_prob")):
        row = row_of(found, scheme, kind="ms", value=1000.0)
        assert row["target"]["batch"] == 64
        assert row["met"] == "yes"
        assert 0 < row["expected_ms"] < 1000
        assert "first exit costs" in row_of(found, scheme, kind="ms", value=1e-6)["error"]
        assert "accuracy" not in row_of(found, scheme, kind="ms", value=1e-6)
    network = networks(copy)["joint", 0]
    row = row_of(found, ("joint", "max_prob"), kind="ms", value=1000.0)
    routed = route(scored("max_prob", network)[2], as_numbers(row["thresholds"][0]))
    correct = routed.logits.argmax(-1) == network.test.labels
    assert row["accuracy"]["mean"] == pytest.approx(correct.mean())
