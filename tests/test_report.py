"""What a run leaves for people: a table that fits, strict JSON, and a page that stands alone."""

from __future__ import annotations

import base64
import copy
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from experiments.report import report as reports
from experiments.report.report import Gallery
from experiments.report.words import headline

CLASSES = ("airplane", "<script>alert('cat')</script>", 'the "bird" & co')
VOID = {"meta", "img", "br", "link", "input", "hr"}


def make_report(exits: int = 3) -> dict[str, Any]:
    """Only the keys that a report always has."""
    macs = [4_000_000 * (e + 1) // exits for e in range(exits)]
    accuracy = [0.883 - 0.05 * (exits - 1 - e) for e in range(exits)]
    return {
        "dataset": "cifar10",
        "device": "cpu",
        "versions": {"jax": "0.10.2"},
        "seed": 7,
        "exits": [{"index": e, "macs": m, "accuracy": a, "ece": 0.0123}
                  for e, (m, a) in enumerate(zip(macs, accuracy, strict=True))],
        "policies": [{"name": "max_prob", "target": {"kind": "budget", "value": 0.6},
                      "thresholds": [0.9] * (exits - 1), "accuracy": 0.881, "mean_macs": 2_400_000,
                      "exit_fractions": [1 / exits] * exits}],
        "curve": {"max_prob": [{"mean_macs": m, "accuracy": a}
                               for m, a in zip(macs, accuracy, strict=True)]},
        "inference": [{"strategy": "cond", "batch": 1, "ms": 1.2, "plain_ms": 2.0, "ideal_ms": 1.1,
                       "speedup": 1.6667, "efficiency": 0.9167}],
        "train": {"seconds": 123.4, "images_per_second": 4567.8, "epochs": 30},
    }  # fmt: skip


def make_gallery(exit: int, k: int = 4, size: int = 8, channels: int = 1) -> Gallery:
    numbers = np.arange(k)
    images = (np.arange(k * size * size * channels) % 256).astype(np.uint8)
    images = images.reshape(k, size, size, channels)
    confidences = np.linspace(0.99, 0.5, k)
    return Gallery(exit, images, numbers % 3, np.where(numbers < 2, numbers, 1) % 3, confidences)


def make_bins(exits: int) -> list[dict[str, Any]]:
    return [{"confidence": [0.5, None], "accuracy": [0.4, None], "count": [3, 0]}] * exits


def write(path: Path, report: dict[str, Any], **parts: Any) -> str:
    exits = len(report["exits"])
    defaults: dict[str, Any] = {
        "history": [],  # two figures less, because layout is most of the time here
        "reliability": [],
        "gallery": [make_gallery(e) for e in range(exits)],
        "classes": CLASSES,
    }
    reports.write_html(path, report, **(defaults | parts))
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Reads a page, and refuses one whose tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data if self.open[-1:] != ["style"] else ""

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.tags if attribute in attrs]


def shown(report: dict[str, Any], width: int, **options: Any) -> str:
    console = Console(width=width, file=io.StringIO(), **options)
    console.print(reports.table(report))
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


# --- the page


@pytest.mark.parametrize("exits", [1, 3, 10])
def test_page_stands_alone(tmp_path: Path, exits: int) -> None:
    history = [{"epoch": 1, "loss": 1.9, "held_out_accuracy": [0.5] * exits}]
    path, bins = tmp_path / "report.html", make_bins(exits)
    text = write(path, make_report(exits), history=history, reliability=bins)
    page = Page(text)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for attribute in ("src", "href", "xlink:href", "srcset", "data", "action"):
        for value in page.values(attribute):
            assert value.startswith(("data:image/png;base64,", "#"))
            assert not value.startswith("#") or value[1:] in ids
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
    assert "@import" not in text
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object"} & set(tags)
    assert tags.count("style") == 1  # a figure's own would reach the whole page
    assert {f"exit-{e + 1}" for e in range(exits)} <= set(ids)
    assert [attrs["lang"] for tag, attrs in page.tags if tag == "html"] == ["en"]
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    figures = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(figures) == 5
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in figures)
    assert "cifar10" in text[text.index("<title>") : text.index("</title>")]


def test_page_with_everything_shows_it(tmp_path: Path) -> None:
    report = make_report() | {
        "data_source": "from a shelf",
        "notice": "Random images were used.",
        "date": "2026-01-14",
        "command": "python -m experiments.cifar --seed 7",
        "network": "a small ResNet",
        "whole_macs": 4_000_000,
        "overthinking": {"destructive": 0.041},
        "warnings": ["The gate has collapsed."],
    }
    row = report["policies"][0]
    row |= {"search": "geometric", "mean_fraction": 0.61, "thresholds": [None, -math.inf]}
    row |= {"chosen": {"accuracy": 0.8876, "mean_fraction": 0.598}}
    failed = {"name": "margin", "target": {"kind": "budget", "value": 0.05}, "accuracy": None,
              "thresholds": None, "mean_macs": None, "exit_fractions": None,
              "error": "the first exit costs 0.33 already"}  # fmt: skip
    report["policies"].append(failed)
    report["inference"][0] |= {"spread": 0.03, "policy": "max_prob", "mean_fraction": 0.61}
    words = Page(write(tmp_path / "report.html", report)).words
    expected = ["from a shelf", "Random images were used.", "2026-01-14", "a small ResNet", "4.1"]
    expected += ["python -m experiments.cifar --seed 7", "The gate has collapsed.", "88.8", "0.60"]
    expected += ["geometric", "off always", "the first exit costs 0.33 already", "cost <= 0.05"]
    assert [text for text in expected if text not in words] == []


def test_page_without_training_times_or_policies(tmp_path: Path) -> None:
    report = make_report() | {"policies": [], "curve": {}, "inference": [], "train": {}}
    text = write(tmp_path / "report.html", report, gallery=[])
    page = Page(text)
    assert {"exit-1", "exit-2", "exit-3"} <= set(page.values("id"))
    assert page.words.count("No test image") == 3


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    bad = "</title></style><script>alert(1)</script><img src=x onerror='x'>"
    report = make_report() | {"dataset": bad, "notice": bad, "warnings": [bad], "command": bad}
    report |= {"device": bad, "versions": {bad: bad}, "network": bad, "date": bad}
    report["policies"][0] |= {"name": bad, "error": bad, "search": bad}
    report["curve"] = {bad: report["curve"]["max_prob"]}
    report["inference"][0] |= {"strategy": bad, "policy": bad}
    page = Page(write(tmp_path / "report.html", report, classes=(bad, *CLASSES[1:])))
    assert "script" not in {tag for tag, _ in page.tags}
    assert not page.values("onerror")
    assert CLASSES[1] in page.words
    assert any(CLASSES[2] in alt for alt in page.values("alt"))


def test_gallery_shows_each_image_with_answer_and_truth(tmp_path: Path) -> None:
    pictures = make_gallery(1, k=4)
    page = Page(write(tmp_path / "report.html", make_report(), gallery=[pictures]))
    urls = page.values("src")
    decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(u.split(",")[1])))) for u in urls]
    np.testing.assert_array_equal(decoded, pictures.images[..., 0])
    assert page.words.count("No test image") == 2  # exits 1 and 3
    marks = [attrs.get("class") for tag, attrs in page.tags if tag == "li"]
    assert marks == [None, None, "wrong", "wrong"]
    assert page.values("alt")[2] == f"{CLASSES[2]}, answered {CLASSES[1]} with confidence 66 %"
    assert {"64"} == set(page.values("width")[-4:])  # 8 pixels, eightfold


def test_colour_gallery_and_an_exit_that_nobody_took(tmp_path: Path) -> None:
    gallery = [make_gallery(0, k=24, size=32, channels=3), make_gallery(2, k=0, size=32)]
    path = tmp_path / "report.html"
    page = Page(write(path, make_report(), gallery=gallery))
    assert len(page.values("src")) == 24
    assert page.words.count("No test image") == 2


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"reliability": make_bins(2)}, "2 sets of reliability bins for 3 exits"),
        ({"gallery": [make_gallery(3)]}, r"galleries of exits \[3\]"),
        ({"gallery": [make_gallery(0), make_gallery(0)]}, "one each"),
        ({"gallery": [make_gallery(0, channels=2)]}, "expected uint8 images"),
        ({"gallery": [make_gallery(0)._replace(labels=np.zeros(3, int))]}, "3 labels, 4 images"),
        ({"classes": CLASSES[:2]}, "labels 0 to 2, 2 class names"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, parts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "report.html", make_report(), **parts)
    assert list(tmp_path.iterdir()) == []


def test_page_of_a_cifar_run_is_small(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    noise = draws.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)  # the worst case for PNG
    gallery = [make_gallery(e, 24, 32, 3)._replace(images=noise) for e in range(5)]
    parts = {"gallery": gallery, "reliability": make_bins(5)}
    write(tmp_path / "report.html", make_report(5), **parts)
    assert (tmp_path / "report.html").stat().st_size < 1_500_000


# --- the headline


def test_headline_of_a_gain() -> None:
    assert headline(make_report()) == (
        "At 60 % of the whole network's multiply-accumulates, the max_prob policy answers 88.1 % "
        "of the test images correctly; the whole network answers 88.3 % (0.2 points more). "
        "A single image takes 1.20 ms instead of 2.00 ms (strategy cond)."
    )


def test_headline_of_a_loss_says_so() -> None:
    report = make_report()
    report["policies"][0] |= {"mean_macs": 4_100_000, "accuracy": 0.9}
    report["inference"][0] |= {"ms": 2.5}
    words = headline(report)
    assert "At 102 % " in words
    assert "(1.7 points less)" in words
    assert "It saves no computation." in words
    assert "takes 2.50 ms and so saves no time against 2.00 ms" in words


def test_headline_without_a_policy_that_reached_its_target() -> None:
    report = make_report()
    report["policies"][0] |= {"accuracy": None, "mean_macs": None, "exit_fractions": None}
    assert "88.3 % of the test images" in headline(report)
    assert "No policy reached its target" in headline(report)


def test_headline_chooses_by_the_held_out_images_not_by_the_test_images() -> None:
    report = make_report()
    first = report["policies"][0]
    lucky = first | {"name": "lucky", "accuracy": 0.95, "chosen": {"accuracy": 0.88}}
    other = first | {"name": "other", "target": {"kind": "drop", "value": 0.01}}
    other |= {"chosen": {"accuracy": 0.99}}
    report["policies"] = [first | {"chosen": {"accuracy": 0.89}}, lucky, other]
    assert "the max_prob policy" in headline(report)
    report["policies"][1] |= {"chosen": {"accuracy": 0.9}}
    assert "the lucky policy" in headline(report)


def test_headline_does_not_take_a_time_measured_with_easier_thresholds() -> None:
    report = make_report()
    row = report["inference"][0]
    flattering = row | {"ms": 0.2, "mean_fraction": 0.2}
    report["inference"] = [flattering, row | {"mean_fraction": 0.59}]
    assert "takes 1.20 ms instead" in headline(report)
    report["inference"] = [flattering]
    assert "(strategy cond, cost 0.20)" in headline(report)


def test_headline_leaves_out_the_strategy_that_never_exits() -> None:
    report = make_report()
    row = report["inference"][0]
    rows = [row | {"strategy": "full", "ms": 0.1}, row | {"batch": 256, "ms": 70, "plain_ms": 90}]
    report["inference"] += rows
    assert headline(report).endswith("A batch of 256 takes 70.00 ms instead of 90.00 ms "
                                     "(strategy cond).")  # fmt: skip
    assert "0.10" not in headline(report)


# --- the terminal


def numbers_of(text: str) -> list[str]:
    return sorted(re.findall(r"[-+]?\d[\d.,]*\d|\d", text))


@pytest.mark.parametrize("exits", [1, 5, 10])
def test_table_at_80_columns_has_every_number_whole(exits: int) -> None:
    report = make_report(exits)
    row = report["inference"][0]
    report["inference"] = [
        row | {"batch": 4096, "ms": 12345.6, "plain_ms": 23456.7, "spread": 0.12,
               "policy": "a_policy_with_a_very_long_name", "mean_fraction": 0.59},
    ]  # fmt: skip
    report["inference"][0]["strategy"] = "a_strategy_with_a_very_long_name"
    report["policies"][0] |= {"name": "a_policy_with_a_very_long_name"}
    narrow, wide = shown(report, 80), shown(report, 300)
    assert max(map(len, narrow.splitlines())) <= 80
    assert numbers_of(narrow) == numbers_of(wide)
    assert "…" not in narrow
    for number in ("12,346", "23,457", "88.3", "88.1", "-0.2", "0.012", "0.60", "4,568"):
        assert number in narrow


def test_table_in_a_pipe_has_no_colour_and_old_encodings_take_it() -> None:
    report = make_report() | {"warnings": "mind [bold]this[/bold]", "notice": "a quick look"}
    raw = io.BytesIO()
    pipe = io.TextIOWrapper(raw, encoding="ascii")
    Console(file=pipe).print(reports.table(report))
    pipe.flush()
    text = raw.getvalue().decode("ascii")
    assert "\x1b" not in text
    assert "WARNING: mind [bold]this[/bold]" in text
    assert "NOTICE: a quick look" in text


def test_table_tells_whether_a_target_holds_on_the_test_images() -> None:
    report = make_report()
    row = report["policies"][0]
    missed = row | {"mean_macs": 2_800_000, "name": "missed"}
    drop = row | {"target": {"kind": "drop", "value": 0.001}, "name": "dropped"}
    fixed = row | {"target": {"kind": "fixed"}, "name": "given"}
    failed = row | {"name": "failed", "accuracy": None, "mean_macs": None, "exit_fractions": None}
    report["policies"] = [row, missed, drop, fixed, failed | {"error": "cannot be hit"}]
    lines = {line.split()[0]: line.split() for line in shown(report, 120).splitlines() if line}
    assert "yes" in lines["max_prob"]
    assert "no" in lines["missed"]
    assert "no" in lines["dropped"]
    assert not {"yes", "no"} & set(lines["given"])
    assert lines["failed,"][-3:] == ["cannot", "be", "hit"]


# --- the JSON


def test_json_is_strict_and_comes_back(tmp_path: Path) -> None:
    report = make_report()
    report["policies"][0]["thresholds"] = (math.inf, np.float32(0.5), math.nan)
    report |= {"array": np.array([1.0, -np.inf]), "count": np.int64(3), "path": Path("a/b")}
    before = copy.deepcopy(report)
    path = tmp_path / "new" / "report.json"
    reports.write_json(path, report)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert found["policies"][0]["thresholds"] == [None, 0.5, None]
    assert (found["array"], found["count"], found["path"]) == ([1.0, None], 3, "a/b")
    assert found["exits"] == report["exits"]
    assert str(before) == str(report)


def test_a_report_read_back_from_json_makes_the_same_page_and_table(tmp_path: Path) -> None:
    report = make_report()
    report["policies"][0]["thresholds"] = [math.inf, 0.5]
    report["exits"][0]["ece"] = math.nan
    reports.write_json(tmp_path / "report.json", report)
    again = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert shown(report, 80) == shown(again, 80)
    bins = make_bins(3)
    first = write(tmp_path / "a.html", report, reliability=bins)
    assert first == write(tmp_path / "b.html", again, reliability=bins)


def test_a_reader_of_the_old_file_is_not_disturbed(tmp_path: Path) -> None:
    path, old = tmp_path / "report.json", tmp_path / "old.json"
    reports.write_json(path, {"seed": 1})
    old.hardlink_to(path)
    reports.write_json(path, {"seed": 2})
    assert [json.loads(p.read_text(encoding="utf-8"))["seed"] for p in (old, path)] == [1, 2]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    reports.write_json(path, {"seed": 1})
    with pytest.raises(TypeError):
        reports.write_json(path, {"seed": object()})
    with pytest.raises(UnicodeEncodeError):  # fails late, while the file is being written
        reports.write_json(path, {"seed": "\ud800"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"seed": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
