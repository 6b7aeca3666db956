"""The results table: typed, documented, the same after results.csv, and its tables for people."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments.report import table
from experiments.report.table import target_columns

BUDGET = target_columns({"kind": "budget", "value": 0.5})
RISK = {"kind": "risk", "value": 0.05, "loss": "error", "method": "betting", "path": "shared"}


def rows() -> list[dict[str, Any]]:
    """Two seeds of one scheme, one of another that misses its target, and one without result."""
    first = {"regime": "joint", "policy": "max_prob", **BUDGET, "search": "optimal", "cost": 0.4}
    first |= {"thresholds": (math.inf, -1.5), "exit_fractions": (0.5, 0.25, 0.25), "met": True}
    other = first | {"policy": "entropy", "met": False, "accuracy": 0.7, "seed": 0}
    failed = {"regime": "joint", "policy": "vote", "seed": 0, **BUDGET, "search": "optimal"}
    return [
        first | {"seed": 0, "accuracy": 0.9},
        first | {"seed": 1, "accuracy": 0.8, "met": False},
        other,
        failed | {"error": "the first exit costs 0.6"},
    ]


def test_every_column_has_its_type_and_a_meaning() -> None:
    results = table.frame(rows())
    assert list(results) == list(table.COLUMNS)
    for name, column in table.COLUMNS.items():
        assert results[name].dtype == column.dtype
        assert column.meaning
    assert list(table.frame([])) == list(results)


def test_a_row_with_another_key_is_refused() -> None:
    with pytest.raises(ValueError, match="'acuracy'"):
        table.frame([{"acuracy": 1.0}])


def test_the_csv_comes_back(tmp_path: Path) -> None:
    results = table.frame(rows())
    table.write_csv(tmp_path / "results.csv", results)
    pd.testing.assert_frame_equal(table.read_csv(tmp_path / "results.csv"), results)


def test_statistics_over_seeds() -> None:
    means = table.over_seeds(table.frame(rows()))
    assert means["policy"].tolist() == ["max_prob", "entropy", "vote"]
    first, second, failed = (row for _, row in means.iterrows())
    assert first["accuracy"] == pytest.approx(0.85)
    assert (first["accuracy_min"], first["accuracy_max"]) == (0.8, 0.9)
    assert first["accuracy_std"] == pytest.approx(np.std([0.8, 0.9], ddof=1))
    assert (first["seeds"], second["seeds"], failed["seeds"]) == (2, 1, 0)
    assert (first["met"], second["met"]) == (0.5, 0)
    assert first["exit_fractions"] == (0.5, 0.25, 0.25)
    assert failed["error"] == "the first exit costs 0.6"


def test_tables_for_people_show_what_is_known() -> None:
    results = table.frame(rows())
    means = table.over_seeds(results)
    words = table.shown(means, ["policy", "accuracy", "cost", "met", "ece"])
    assert list(words) == ["policy", "accuracy %", "cost", "met"]  # no ECE is known
    assert words["accuracy %"].tolist() == ["85.0 ± 5.0", "70.0", "-"]
    assert words["met"].tolist() == ["50 % of seeds", "no", "-"]
    assert table.text((math.inf, -math.inf, 0.1234), "thresholds") == "off always 0.123"
    assert table.text((0.5, 0.25, 0.25), "exit_fractions") == "50 25 25"
    assert table.text(-1e-9, "cost") == "0.000"
    assert table.text(True, "met") == "yes"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"kind": "budget", "value": 0.5}, "cost <= 0.50"),
        ({"kind": "ms", "value": 1.25, "batch": 64}, "time <= 1.25 ms"),
        ({"kind": "drop", "value": 0.01}, "drop <= 1.0 points"),
        ({"kind": "given"}, "given"),
        (RISK | {"delta": 0.1}, "error <= 5.0 % (betting, thresholds shared, delta 0.1)"),
        (RISK | {"delta": 0.1, "method": "crc"}, "error <= 5.0 % (crc, thresholds shared)"),
    ],
)
def test_targets_in_words(target: dict[str, Any], words: str) -> None:
    assert table.target_words(target) == words


def test_the_interval_of_an_accuracy_is_that_of_clopper_and_pearson() -> None:
    columns = table.accuracy_columns(np.array([True] * 8 + [False] * 2))
    assert columns["accuracy"] == 0.8
    # Tabulated: 8 of 10 at 95 %.
    assert columns["accuracy_low"] == pytest.approx(0.4439, abs=1e-4)
    assert columns["accuracy_high"] == pytest.approx(0.9748, abs=1e-4)


def test_latex_is_escaped_and_marks_what_is_bold() -> None:
    words = pd.DataFrame({"policy_1": ["a_b", "c & d"], "%": ["1", "2"]})
    bold = pd.DataFrame({"policy_1": [False, False], "%": [False, True]})
    text = table.latex(words, "50 % of all_", bold)
    assert r"policy\_1 & \% \\" in text
    assert r"a\_b & 1 \\" in text
    assert r"c \& d & \textbf{2} \\" in text
    assert r"\caption{50 \% of all\_}" in text
    assert r"\toprule" in text
