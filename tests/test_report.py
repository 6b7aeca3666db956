"""What a run leaves for people: a short page that stands alone, a console table, strict JSON."""

from __future__ import annotations

import base64
import copy
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from page import check_stands_alone
from PIL import Image
from rich.console import Console

from experiments.files import write_json
from experiments.report import report as reports
from experiments.report import table
from experiments.report.report import headline, summary
from experiments.report.table import target_columns, timed_row

BAD = "</title></style><script>alert(1)</script><img src=x onerror='x'>"
BUDGET = {"kind": "budget", "value": 0.6}
MEASURED = {"strategy": "cond", "batch": 1, "ms": 1.2, "plain_ms": 2.0, "ideal_ms": 1.1,
            "speedup": 1.6667, "efficiency": 0.9167, "spread": 0.03}  # fmt: skip


def result(**more: Any) -> dict[str, Any]:
    """A row of a policy at the leading target."""
    row = {"regime": "joint", "policy": "max_prob", "seed": 7, "search": "optimal", "met": True}
    row |= {**target_columns(BUDGET), "accuracy": 0.881, "accuracy_low": 0.87, "cost": 0.6}
    row |= {"accuracy_high": 0.89, "macs": 2.4e6, "ece": 0.0123, "chosen_accuracy": 0.89}
    row |= {"chosen_cost": 0.598, "exit_fractions": (0.5, 0.5), "thresholds": (0.9,)}
    return row | more


def exit_row(e: int, exits: int) -> dict[str, Any]:
    accuracy = 0.883 - 0.05 * (exits - e)
    row = {"regime": "joint", "policy": "none", **target_columns({"kind": "exit", "value": e})}
    row |= {"accuracy_low": accuracy - 0.01, "accuracy_high": accuracy + 0.01, "ece": 0.01}
    return row | {"accuracy": accuracy, "cost": e / exits, "macs": 4e6 * e / exits}


def make_rows(exits: int = 3, *results: dict[str, Any]) -> list[dict[str, Any]]:
    curve = target_columns({"kind": "curve", "value": 0.5})
    rows = list(results) if results else [result()]
    points = [r | curve for r in rows if "error" not in r]
    return [*rows, *points, *(exit_row(e + 1, exits) for e in range(exits))]


def make_report(exits: int = 3) -> dict[str, Any]:
    return {
        "dataset": "cifar10",
        "device": "cpu",
        "versions": {"jax": "0.10.2"},
        "seed": 7,
        "target": BUDGET,
        "whole_macs": 4e6,
        "exits": [{"index": e, "temperature": 1.5} for e in range(exits)],
        "train": {"seconds": 123.4, "images_per_second": 4567.8, "epochs": 30},
    }


def make_gallery(exits: int, k: int = 4, size: int = 8, channels: int = 1) -> list[Any]:
    pixels = np.arange(k * size * size * channels, dtype=np.uint32) % 256
    images = pixels.astype(np.uint8).reshape(k, size, size, channels)
    names = ("airplane", "<script>alert('cat')</script>", 'the "bird" & co')
    items = [
        {"image": image, "predicted": names[min(i, 1)], "truth": names[i % 3],
         "confidence": 0.99 - 0.1 * i}
        for i, image in enumerate(images)
    ]  # fmt: skip
    return [items, *([] for _ in range(exits - 1))]


def write(folder: Path, report: dict[str, Any], rows: list[dict[str, Any]], **parts: Any) -> str:
    exits = len(report["exits"])
    defaults: dict[str, Any] = {"history": [], "reliability": [], "gallery": make_gallery(exits)}
    reports.write(folder, report, table.frame(rows), **(defaults | parts))
    return (folder / "report.html").read_text(encoding="utf-8")


def shown(report: dict[str, Any], rows: list[dict[str, Any]], width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(reports.console(report, table.frame(rows)))
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


# --- the page


@pytest.mark.parametrize("exits", [1, 3, 10])
def test_page_stands_alone(tmp_path: Path, exits: int) -> None:
    history = [{"epoch": 1, "loss": 1.9, "held_out_accuracy": [0.5] * exits}]
    bins = [{"confidence": [0.5, np.nan], "accuracy": [0.4, np.nan], "count": [3, 0]}] * exits
    rows = make_rows(exits, result(exit_fractions=(1 / exits,) * exits))
    text = write(tmp_path, make_report(exits), rows, history=history, reliability=bins)
    page = check_stands_alone(text)
    assert {f"exit-{e + 1}" for e in range(exits)} <= set(page.values("id"))
    assert [tag for tag, _ in page.tags].count("svg") == 4
    assert "cifar10" in text[text.index("<title>") : text.index("</title>")]


def test_page_opens_with_headline_picture_and_a_short_table(tmp_path: Path) -> None:
    many = [result(policy=f"policy {i}", chosen_accuracy=0.8 + 0.001 * i) for i in range(12)]
    geometric = [r | {"search": "geometric", "accuracy": 0.5} for r in many]
    text = write(tmp_path, make_report(), make_rows(3, *many, *geometric))
    start = text[: text.index("<details")]
    assert (start.count("<svg"), start.count("<table>")) == (1, 1)
    assert start.count("<tr>") == 1 + reports.MOST_ROWS
    # Those that did best on held-out images stay.
    page = check_stands_alone(text)
    assert "policy 11" in page.first
    assert "policy 4\n" not in page.first
    assert page.folded.count("geometric") == 2 * 12  # results, and thresholds
    assert "% of the test images" in page.first


def test_page_with_everything_shows_it(tmp_path: Path) -> None:
    report = make_report() | {
        "data_source": "from a shelf",
        "notice": "Random images were used.",
        "date": "2026-01-14",
        "command": "python -m experiments.cifar --seed 7",
        "network": "a small ResNet",
        "overthinking": {"destructive": 0.041},
        "warnings": ["The gate has collapsed."],
    }
    row = result(search="geometric", thresholds=(math.inf, -math.inf), chosen_accuracy=0.8876)
    row |= {"forecast_accuracy": (0.8512, 0.9034), "forecast_cost": (0.5671, 0.6129)}
    failed = {"regime": "joint", "policy": "margin", "search": "optimal", "seed": 7}
    failed |= target_columns({"kind": "budget", "value": 0.05})
    failed |= {"error": "the first exit costs 0.33 already"}
    rows = [*make_rows(3, result(), row, failed), timed_row(result(), MEASURED)]
    words = check_stands_alone(write(tmp_path, report, rows)).words
    expected = ["from a shelf", "Random images were used.", "2026-01-14", "a small ResNet", "4.1"]
    expected += ["python -m experiments.cifar --seed 7", "The gate has collapsed.", "88.8", "0.598"]
    expected += ["geometric", "off always", "the first exit costs 0.33 already", "cost <= 0.05"]
    expected += ["1.67", "0.92", "forecast %", "85.1 90.3", "forecast cost", "0.567 0.613"]
    assert [text for text in expected if text not in words] == []


def test_page_without_training_times_or_policies(tmp_path: Path) -> None:
    report = make_report() | {"train": {}}
    rows = [exit_row(e + 1, 3) for e in range(3)]
    page = check_stands_alone(write(tmp_path, report, rows, gallery=[[], [], []]))
    assert page.words.count("No test image") == 3
    assert "Nothing was trained" in page.words
    assert "No policy reached its target" in page.first


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    report = make_report() | {"dataset": BAD, "notice": BAD, "warnings": [BAD], "command": BAD}
    report |= {"device": BAD, "versions": {BAD: BAD}, "network": BAD, "date": BAD}
    rows = make_rows(3, result(policy=BAD, search=BAD), result(policy=BAD, error=BAD))
    rows.append(timed_row(result(policy=BAD), MEASURED | {"strategy": BAD}))
    page = check_stands_alone(write(tmp_path, report, rows))
    assert not page.values("onerror")
    assert "<script>alert('cat')</script>" in page.words
    assert any('the "bird" & co' in alt for alt in page.values("alt"))


def test_gallery_shows_each_image_with_prediction_and_truth(tmp_path: Path) -> None:
    gallery = make_gallery(3)
    page = check_stands_alone(write(tmp_path, make_report(), make_rows(), gallery=gallery))
    urls = page.values("src")
    decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(u.split(",")[1])))) for u in urls]
    np.testing.assert_array_equal(decoded, [item["image"][..., 0] for item in gallery[0]])
    assert page.words.count("No test image") == 2  # exits 2 and 3
    marks = [attrs.get("class") for tag, attrs in page.tags if tag == "li"]
    assert marks == [None, None, "wrong", "wrong"]
    assert "predicted <script>alert('cat')</script> with confidence 79 %" in page.values("alt")[2]
    assert {"64"} == set(page.values("width")[-4:])  # 8 pixels, eightfold


def test_page_of_a_cifar_run_is_small(tmp_path: Path) -> None:
    gallery = make_gallery(5, 24, 32, 3)
    draws = np.random.default_rng(0)
    for item in gallery[0]:
        item["image"] = draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)  # the worst for PNG
    write(tmp_path, make_report(5), make_rows(5), gallery=[gallery[0]] * 5)
    assert (tmp_path / "report.html").stat().st_size < 1_500_000


# --- the headline


def test_headline_of_a_gain() -> None:
    rows = [*make_rows(), timed_row(result(), MEASURED)]
    assert headline(make_report(), table.frame(rows)) == (
        "At 60 % of the whole network's multiply-accumulates, max_prob classifies 88.1 % of the "
        "test images correctly; the whole network classifies 88.3 %. It classifies one image in "
        "1.2 ms instead of 2 ms."
    )


def test_headline_of_a_loss_says_so() -> None:
    slow = timed_row(result(), MEASURED | {"ms": 2.5, "batch": 256})
    rows = [*make_rows(3, result(cost=1.02, accuracy=0.5)), slow]
    words = headline(make_report(), table.frame(rows))
    assert "At 102 % " in words
    assert "classifies 50.0 %" in words
    assert "256 images in 2.5 ms instead of 2 ms" in words


def test_headline_chooses_by_the_held_out_images_not_by_the_test_images() -> None:
    lucky = result(policy="lucky", accuracy=0.95, chosen_accuracy=0.88)
    drop = target_columns({"kind": "drop", "value": 0.01})
    other = result(policy="other", chosen_accuracy=0.99, **drop)
    for chosen_accuracy, name in ((0.88, "max_prob"), (0.9, "lucky")):
        lucky["chosen_accuracy"] = chosen_accuracy
        rows = make_rows(3, lucky, result(), other)
        assert f"{name} classifies" in headline(make_report(), table.frame(rows))


def test_headline_of_given_thresholds_is_of_the_policy_that_was_timed() -> None:
    given = [
        result(policy=name, search="given", **target_columns({"kind": "given"}))
        for name in ("max_prob", "entropy")
    ]
    rows = [*make_rows(3, result(), *given), timed_row(given[1], MEASURED)]
    report = make_report() | {"target": {"kind": "given"}}
    given[1]["chosen_accuracy"] = 0.1
    assert "entropy classifies" in headline(report, table.frame(rows))


# --- the terminal


@pytest.mark.parametrize("exits", [1, 5, 10])
def test_console_at_80_columns_has_every_number_whole(exits: int) -> None:
    rows = make_rows(exits, result(policy="product_of_experts"))
    rows.append(timed_row(rows[0], MEASURED | {"ms": 12345.6}))
    narrow, wide = (shown(make_report(exits), rows, width) for width in (80, 300))
    assert max(map(len, narrow.splitlines())) <= 80
    numbers = [sorted(re.findall(r"\d[\d.,]*\d|\d", text)) for text in (narrow, wide)]
    assert numbers[0] == numbers[1]
    for word in ("product_of_experts", "88.3", "88.1", "-0.2", "0.600", "4,568"):
        assert word in narrow
    assert len(narrow.splitlines()) < 20


def test_console_in_a_pipe_has_no_colour_and_old_encodings_take_it() -> None:
    report = make_report() | {"warnings": ["mind [bold]this[/bold]"]}
    raw = io.BytesIO()
    pipe = io.TextIOWrapper(raw, encoding="ascii")
    Console(file=pipe).print(reports.console(report, table.frame(make_rows())))
    pipe.flush()
    text = raw.getvalue().decode("ascii")
    assert "\x1b" not in text
    assert "WARNING: mind [bold]this[/bold]" in text


def test_summary_tells_the_change_the_interval_and_whether_the_target_holds() -> None:
    rows = make_rows(3, result(), result(policy="entropy", met=False, accuracy=0.893))
    words = summary(make_report(), table.frame([*rows, timed_row(result(), MEASURED)]))
    assert words["policy"].tolist() == ["whole network", "max_prob", "entropy"]
    assert words["change"].tolist() == ["", "-0.2", "+1.0"]
    assert words["met"].tolist() == ["-", "yes", "no"]
    assert words["95 % interval"].tolist()[1] == "87.0 to 89.0"
    assert words["speedup, batch 1"].tolist() == ["", "1.67", ""]


# --- the files


def test_csv_holds_the_table(tmp_path: Path) -> None:
    rows = [*make_rows(), timed_row(result(), MEASURED)]
    write(tmp_path, make_report(), rows)
    pd.testing.assert_frame_equal(table.read_csv(tmp_path / "results.csv"), table.frame(rows))


def test_json_is_strict_and_comes_back(tmp_path: Path) -> None:
    report = {"thresholds": (math.inf, np.float32(0.5), math.nan), "array": np.array([1, -np.inf])}
    report |= {"count": np.int64(3), "path": Path("a/b"), "nested": {"x": [1.5]}}
    before = copy.deepcopy(report)
    path = tmp_path / "new" / "report.json"
    write_json(path, report)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    stored = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert stored == {
        "thresholds": [None, 0.5, None],
        "array": [1.0, None],
        "count": 3,
        "path": "a/b",
        "nested": {"x": [1.5]},
    }
    assert str(before) == str(report)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"seed": 1})
    with pytest.raises(TypeError):
        write_json(path, {"seed": object()})
    with pytest.raises(UnicodeEncodeError):  # fails late, while the file is being written
        write_json(path, {"seed": "\ud800"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"seed": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
