"""What a comparison leaves: a short page, a headline that agrees with its numbers, other files."""

from __future__ import annotations

import copy
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from made_comparison import POLICIES, REFERENCE, make_comparison, make_table
from page import check_stands_alone
from rich.console import Console

from experiments.compare import report
from experiments.report import table
from experiments.report.table import over_seeds

FEW = ("max_prob", "entropy", "fixed")
BAD = "</title></style></script><script>alert(1)</script><img src=x onerror='x'>_%&#"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Everything that a small comparison leaves."""
    results = make_comparison(policies=FEW)
    before = copy.deepcopy(results)
    folder = tmp_path_factory.mktemp("compare") / "new"
    report.write(folder, results, make_table(results))
    assert str(before) == str(results)
    return results, folder


def means(results: dict[str, Any]) -> pd.DataFrame:
    rows = make_table(results)
    return over_seeds(rows[rows["executor"].isna()])


def headline(results: dict[str, Any]) -> str:
    return report.headline(results, means(results))


# --- the files


def test_json_is_strict_and_holds_everything(written: tuple[dict[str, Any], Path]) -> None:
    results, folder = written

    def refuse(word: str) -> None:
        raise AssertionError(word)

    stored = json.loads((folder / "results.json").read_text("utf-8"), parse_constant=refuse)
    assert stored == results


def test_csv_is_the_table(written: tuple[dict[str, Any], Path]) -> None:
    results, folder = written
    stored = table.read_csv(folder / "results.csv")
    pd.testing.assert_frame_equal(stored, make_table(results))


def test_latex_is_balanced_and_escaped(written: tuple[dict[str, Any], Path]) -> None:
    text = (written[1] / "table.tex").read_text("utf-8")
    bare = re.sub(r"\\[{}%&_#$]", "", text)
    assert bare.count("{") == bare.count("}")
    assert "_" not in bare
    assert "\\toprule" in text
    lines = [line for line in bare.splitlines() if line.endswith(r"\\")]
    assert {line.count("&") for line in lines} == {1 + 5}  # regime, policy, and five targets
    assert len(lines) == 1 + 7


def test_latex_marks_the_best_that_met_its_target() -> None:
    results = make_comparison(policies=FEW, seeds=1)
    fixed = results["rows"][2]
    fixed["accuracy"], fixed["met"] = {"mean": 0.99, "seeds": [0.99]}, "no"
    text = report.latex(results, means(results))
    cells = {name: next(line for line in text.splitlines() if f"& {name} &" in line).split(" & ")[2]
             for name in ("max\\_prob", "entropy", "fixed")}  # fmt: skip
    best = f"{100 * results['rows'][0]['accuracy']['mean']:.1f}"
    assert cells["max\\_prob"] == f"\\textbf{{{best}}}"
    assert cells["fixed"] == "99.0"  # the best, but dearer than allowed


def test_figures_are_there(written: tuple[dict[str, Any], Path]) -> None:
    names = {"accuracy_macs", "accuracy_time", "differences", "drift", "drift_1", "classes"}
    names |= {"agreement_joint", "agreement_soft_auxiliary"}
    expected = {f"{name}.{ending}" for name in names for ending in ("svg", "pdf")}
    assert {path.name for path in (written[1] / "figures").iterdir()} == expected


# --- the page


def test_page_stands_alone_and_opens_short(written: tuple[dict[str, Any], Path]) -> None:
    text = (written[1] / "report.html").read_text("utf-8")
    page = check_stands_alone(text)
    start = text[: text.index("<details")]
    assert (start.count("<svg"), start.count("<table>")) == (1, 1)
    assert "max_prob (joint) classifies" in page.first
    sections = {"targets", "significant", "time", "networks", "guarantees", "drift", "classes"}
    assert sections | {"placement", "made", "columns"} <= set(page.values("id"))


def test_page_shows_what_failed_and_why(written: tuple[dict[str, Any], Path]) -> None:
    page = check_stands_alone((written[1] / "report.html").read_text("utf-8"))
    assert "joint, seed 1 failed: the loss is <nan>" in page.first
    assert "the cheapest exit_1 costs 0.35 & more" in page.folded


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    results = make_comparison(policies=("max_prob", BAD), seeds=1)
    results |= {"dataset": BAD, "notice": BAD, "command": BAD, "network": BAD, "drift": []}
    results["failed"] = [{"cell": BAD, "error": BAD}]
    report.write(tmp_path, results, make_table(results))
    page = check_stands_alone((tmp_path / "report.html").read_text("utf-8"))
    assert not page.values("onerror")
    assert BAD in page.words


def test_parts_may_be_empty(tmp_path: Path) -> None:
    results = make_comparison(policies=FEW, seeds=1)
    results |= {name: [] for name in ("differences", "agreement", "timing", "drift", "placement")}
    results["rows"] = [r for r in results["rows"] if r["target"]["kind"] == "budget"]
    report.write(tmp_path, results, make_table(results))
    page = check_stands_alone((tmp_path / "report.html").read_text("utf-8"))
    assert not {"significant", "time", "guarantees", "drift"} & set(page.values("id"))


def test_the_reference_may_meet_no_budget(tmp_path: Path) -> None:
    results = make_comparison(policies=FEW, seeds=1)
    for row in results["rows"]:
        row["class_exit_fractions"] = None
    report.write(tmp_path, results, make_table(results))
    page = check_stands_alone((tmp_path / "report.html").read_text("utf-8"))
    assert "Exit fractions by class." not in page.values("aria-label")


# --- the words


def test_headline_tells_the_reference_beside_the_plain_network() -> None:
    results = make_comparison()
    words = headline(results)
    accuracy = 100 * results["rows"][0]["accuracy"]["mean"]
    assert "At 50 % of the plain network's multiply-accumulates, max_prob (joint)" in words
    assert f"classifies {accuracy:.1f} ± 0.4 %" in words
    assert "the plain network classifies 93.5 ± 0.4 %" in words


def test_headline_counts_significant_differences_both_ways() -> None:
    results = make_comparison()
    target = results["rows"][0]["target"]
    gaps = [d for d in results["differences"] if d["target"] == target and d["b"] == REFERENCE]
    for gap in gaps:
        gap["significant"] = False
    assert f"Of {len(gaps)} other schemes, 0 differ" in headline(results)
    gaps[0] |= {"significant": True, "difference": 0.01}
    for gap in gaps[1:3]:
        gap |= {"significant": True, "difference": -0.01}
    assert "1 differ from it significantly for the better and 2 for the worse" in headline(results)


def test_summary_has_a_row_a_policy_and_marks_what_is_significant() -> None:
    results = make_comparison()
    words = report.summary(results, means(results))
    assert words["policy"].tolist() == [*POLICIES, "max_prob (cascade)"]
    assert list(words)[1:3] == ["joint: accuracy %", "joint: cost"]
    for gap in results["differences"]:
        regime, policy = gap["a"]["regime"], gap["a"]["policy"]
        if gap["target"] == results["rows"][0]["target"] and regime == "soft_auxiliary":
            (cell,) = words.loc[words["policy"] == policy, "soft_auxiliary: accuracy %"]
            assert cell.endswith(report.MARK) == gap["significant"]


def test_the_correction_is_named() -> None:
    words = report.tested(make_comparison())
    assert "Bonferroni" in words
    assert "Holm" not in words
    assert "60 comparisons" in words


def test_one_seed_has_no_spread() -> None:
    results = make_comparison(seeds=1)
    assert "±" not in headline(results)
    for curve in results["curves"]:
        for point in curve["points"]:
            point["low"] = point["high"] = math.nan
    assert report._figures(results, make_table(results))["accuracy_macs"].axes


def test_terminal_at_80_columns_has_every_number_whole() -> None:
    results = make_comparison()
    console = Console(width=80, file=io.StringIO())
    console.print(report.console(results, make_table(results)))
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert max(map(len, text.splitlines())) <= 80
    assert "±" not in text  # an old encoding lacks it
    for cell in report.summary(results, means(results)).to_numpy().ravel():
        assert cell.replace("±", "+-") in text
