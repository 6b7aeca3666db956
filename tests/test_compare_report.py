"""What a comparison leaves: words that agree with its numbers, files that other programs read."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_comparison import BETTING, BUDGETS, CERTIFICATE, POLICIES, make_comparison
from rich.console import Console

from experiments.compare import plot, report, tables, words
from experiments.compare.page import charts, heat
from experiments.compare.terms import gaps, number, spread_words, target_words

FEW = ("max_prob", "entropy", "fixed")
BAD = "</title></style></script><script>alert(1)</script><img src=x onerror='x'>_%&#"


def lean(results: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Without the parts whose figures take long to lay out."""
    return results | {"differences": [], "drift": []} | more


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Everything that a small comparison leaves."""
    results = make_comparison(policies=FEW)
    results["rows"][0]["accuracy"]["low"] = math.nan
    before = copy.deepcopy(results)
    folder = tmp_path_factory.mktemp("compare") / "new"
    report.write(folder, results)
    assert str(before) == str(results)
    return results, folder


class Page(HTMLParser):
    """The elements and words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.within = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.within = tag

    def handle_data(self, data: str) -> None:
        self.words += data if self.within not in ("style", "script") else ""

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.tags if attribute in attrs]

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]


# --- the files


def test_json_is_strict_and_holds_everything(written: tuple[dict[str, Any], Path]) -> None:
    results, folder = written

    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = json.loads((folder / "results.json").read_text("utf-8"), parse_constant=refuse)
    assert found["rows"][0]["accuracy"]["low"] is None
    assert found["differences"] == results["differences"]
    assert len(found["rows"]) == len(results["rows"])


def test_csv_has_a_line_a_row_and_comes_back(written: tuple[dict[str, Any], Path]) -> None:
    results, folder = written
    with open(folder / "results.csv", encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == list(tables.CSV_COLUMNS)
    assert len(found) == len(results["rows"])
    for line, row in zip(found, results["rows"], strict=True):
        assert (line["regime"], line["policy"]) == (row["regime"], row["policy"])
        if row["accuracy"] is None:
            assert line["accuracy"] == line["accuracy_seeds"] == ""
            assert line["error"] == row["error"]
        else:
            assert float(line["accuracy"]) == row["accuracy"]["mean"]
            assert [float(x) for x in line["accuracy_seeds"].split()] == row["accuracy"]["seeds"]
            assert float(line["accuracy_std"]) == pytest.approx(0.004)
    tested = [line for line in found if line["difference"]]
    assert {line["target"] for line in tested} == {"cost <= 0.50", "cost <= 0.30"}
    assert {line["search"] for line in tested} == {"optimal"}
    entropy = tested[0]
    assert (entropy["policy"], entropy["difference"]) == ("entropy", "0.004")
    assert entropy["significant"] == "yes"


def test_latex_is_balanced_and_escaped(written: tuple[dict[str, Any], Path]) -> None:
    text = (written[1] / "table.tex").read_text("utf-8")
    bare = re.sub(r"\\[{}%&_#$]", "", text)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert "_" not in bare
    assert "\\toprule" in text
    for table in re.findall(r"\\begin{tabular}.*?\\end{tabular}", bare, flags=re.S):
        columns = re.search(r"\\begin{tabular}{(\w+)}", table)
        assert columns is not None
        lines = [line for line in table.splitlines() if line.endswith(r"\\")]
        assert {line.count("&") + 1 for line in lines} == {len(columns[1])}


def test_latex_marks_the_best_that_met_its_target_and_what_is_significant() -> None:
    results = make_comparison(policies=FEW, seeds=1)
    first, entropy, fixed = results["rows"][:3]
    fixed["accuracy"], fixed["met"] = {"mean": 0.99}, "no"
    lines = tables.tex_text(results).splitlines()
    cells = {name: next(line for line in lines if f"& {name} &" in line).split(" & ")[2]
             for name in ("max\\_prob", "entropy", "fixed")}  # fmt: skip
    assert cells["max\\_prob"] == f"$\\mathbf{{{number(first['accuracy'], 1, scale=100)}}}$"
    assert cells["entropy"] == f"${number(entropy['accuracy'], 1, scale=100)}^{{*}}$"
    assert cells["fixed"] == "$99.0$"  # the best, but dearer than allowed


def test_figures_are_there_and_the_same_bytes_each_time(
    written: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    results, folder = written
    names = {"accuracy_macs", "accuracy_time", "differences", "drift", "agreement"}
    expected = {f"{name}.{ending}" for name in names for ending in ("svg", "pdf")}
    assert {path.name for path in (folder / "figures").iterdir()} == expected
    part = {key: results[key] for key in ("timing", "static", "regimes")}
    runs = [[path.read_bytes() for path in plot.save(tmp_path / name, part)] for name in "ab"]
    assert len(runs[0]) == 4
    assert runs[0] == runs[1]
    assert b"<text" not in runs[0][0]


# --- the page


def test_page_stands_alone_and_its_points_have_tips(written: tuple[dict[str, Any], Path]) -> None:
    results, folder = written
    text = (folder / "report.html").read_text("utf-8")
    page = Page(text)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for attribute in ("src", "href", "xlink:href"):
        assert all(value[0] == "#" and value[1:] in ids for value in page.values(attribute))
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
    assert not re.search(r"https?://(?!www\.w3\.org/)|@import|url\([^#]|fetch\(", text)
    hits = page.with_class("hit")
    assert all(hit["data-tip"] and hit["tabindex"] in ("0", "-1") for hit in hits)
    assert sum(hit["tabindex"] == "0" for hit in hits) == 4  # two regimes, two charts
    tips = "\n".join(str(hit["data-tip"]) for hit in hits)
    for network in results["static"]:
        assert network["name"] in tips
    lines = {hit["data-line"] for hit in page.with_class("series")}
    assert lines == {key["data-line"] for key in page.with_class("key")}
    for section in ("macs", "time", "targets", "significant", "classes", "drift", "guarantees"):
        assert section in ids


def test_page_shows_what_failed_and_why(written: tuple[dict[str, Any], Path]) -> None:
    shown = Page((written[1] / "report.html").read_text("utf-8")).words
    assert "joint, seed 1 failed: the loss is <nan>" in shown
    assert "fixed (joint): the cheapest exit_1 costs 0.35 & more" in shown
    assert "not certified (no threshold passes on 500 images)" in shown
    assert "<b>bird</b>" in shown


def test_hostile_text_is_escaped() -> None:
    results = lean(make_comparison(policies=(BAD,), regimes=(BAD,)), dataset=BAD, notice=BAD)
    results |= {"command": BAD, "failed": [{"cell": BAD, "error": BAD}], "network": BAD}
    results["static"][0]["name"] = BAD
    page = Page(report.html(results))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert not page.values("onerror")
    assert BAD in page.words


@pytest.mark.parametrize(
    "part",
    [[], ["rows"], ["curves", "regimes", "rows"], ["static", "timing"], ["agreement", "reference"]],
)
def test_parts_may_be_missing(part: list[str]) -> None:
    results = lean(make_comparison(seeds=1, regimes=("joint",), policies=FEW))
    for key in part:
        del results[key]
    text = report.html(results)
    assert "nan" not in Page(text).words.replace("<nan>", "")
    assert tables.csv_text(results).startswith("regime,")
    tables.tex_text(results)
    assert shown(results, 80)


def test_a_comparison_of_nothing_has_a_page(tmp_path: Path) -> None:
    report.write(tmp_path, {"dataset": "digits"})
    assert "No difference was tested" in (tmp_path / "report.html").read_text("utf-8")
    assert list((tmp_path / "figures").iterdir()) == []


def test_many_policies_are_all_in_the_chart_and_look_different() -> None:
    names = (*POLICIES, "more", "and_more")
    results = make_comparison(policies=names)
    looks = plot.looks(results)
    assert list(looks) == list(names)
    assert len(set(looks.values())) == len(names)
    (panel, *_) = plot.mac_panels(results)
    assert {series.name for series in panel.series} >= set(names)
    text = charts(plot.mac_panels(results), "x")
    assert all(f"{name}</li>" in text for name in names)


def test_one_seed_has_no_band() -> None:
    for seeds, expected in ((1, 0), (3, 4)):
        results = make_comparison(seeds=seeds, regimes=("joint",), policies=FEW)
        panels = plot.mac_panels(results)
        assert sum(bool(s.band) for s in panels[0].series) == expected
    for curve in results["curves"]:  # a spread of nothing is none
        for point in curve["points"]:
            point["low"] = point["high"] = point["accuracy"]
    panels = plot.mac_panels(results)
    assert not any(s.band for s in panels[0].series)
    assert "over seeds" not in panels[0].series[0].points[0][2]


def test_points_far_below_are_counted_not_silently_left_out() -> None:
    results = make_comparison(policies=("max_prob",), regimes=("joint",))
    points = results["curves"][0]["points"]
    points[0] |= {"accuracy": 0.1, "low": 0.09, "high": 0.11}
    panels = plot.mac_panels(results)
    _, (low, high), below = plot.bounds(panels)
    ys = [y for s in panels[0].series for _, y, _ in s.points]
    assert below == sum(y < low for y in ys) >= 1
    assert low > 50
    assert high > max(ys)
    shown = Page(report.html(lean(results))).words
    assert f"{below} points below {low:.1f}\xa0% are not shown" in shown


def test_heat_map_writes_every_number() -> None:
    text = heat(["a", "b"], ["x", "y"], [[0.0, 1.0], [0.256, math.nan]])
    assert re.findall(r">([^<>\s]+)<", text) == ["x", "y", "a", "0", "100", "b", "26", "-"]


# --- the words


def test_headline_tells_the_reference_beside_the_plain_network() -> None:
    results = make_comparison(policies=FEW)
    first = words.headline(results)[0]
    assert first.startswith("At 50 % of the plain network's multiply-accumulates, max_prob (joint)")
    assert f"answers {spread_words(results['rows'][0]['accuracy'])} %" in first
    assert "the plain network answers 93.5 ± 0.4 %" in first


@pytest.mark.parametrize(
    ("mean", "significant", "verb"),
    [(0.01, True, "beats"), (-0.01, True, "loses to"), (0.01, False, ""), (-0.01, False, "")],
)
def test_a_win_is_claimed_only_where_it_is_significant(
    mean: float, significant: bool, verb: str
) -> None:
    results = make_comparison(policies=FEW)
    results["differences"] = results["differences"][:1]
    gap = results["differences"][0]
    gap |= {"difference": mean, "significant": significant, "low": mean - 0.002,
            "high": mean + 0.002, "cost_difference": 0.0}  # fmt: skip
    ((heading, said),) = words.significant(results)
    assert heading == "At cost <= 0.50"
    (text,) = said
    if verb:
        assert text == f"entropy (joint) {verb} max_prob (joint) by 1.00 points (0.80 to 1.20)."
    else:
        assert text.startswith("Cannot be told apart from max_prob (joint)")
        assert f"entropy (joint) {100 * mean:+.2f}" in text
    counts = f"{int(significant and mean > 0)} "
    assert f"at this target, {counts}" in words.headline(results)[1]
    change = next(r for r in tables.target_cells(results, BUDGETS[0]).rows if r[1] == "entropy")
    assert any(cell.endswith(tables.MARK) for cell in change) == significant


def test_a_difference_seen_from_the_other_side_is_the_same() -> None:
    results = make_comparison(policies=FEW)
    straight = tables.target_cells(results, BUDGETS[0])
    for d in results["differences"]:
        d["a"], d["b"] = d["b"], d["a"]
        d["difference"], d["low"], d["high"] = -d["difference"], -d["high"], -d["low"]
    assert tables.target_cells(results, BUDGETS[0]) == straight
    assert gaps(results)[0].flipped().flipped() == gaps(results)[0]


def test_more_accuracy_for_more_cost_is_no_win_over_the_static_networks() -> None:
    results = make_comparison(policies=FEW)
    pair = {"target": BUDGETS[0], "a": {"regime": "joint", "policy": "max_prob"},
            "b": {"regime": "static", "policy": "width 0.5"}, "difference": 0.02, "low": 0.01,
            "high": 0.03, "significant": True}  # fmt: skip
    for cost, count in ((0.0, 1), (0.2, 0), (-0.2, 1)):
        results["differences"] = [pair | {"cost_difference": cost}]
        (text,) = words.frontier(results)
        assert f"wins {count} of 1" in text
        assert "loses 0" in text


def test_random_exits_are_beaten_only_beyond_the_interval() -> None:
    results = make_comparison(policies=("max_prob", "entropy"), regimes=("joint",))
    rows = results["rows"]
    rows[0]["random"] = rows[0]["accuracy"]["low"] - 0.001
    rows[1]["random"] = rows[1]["accuracy"]["mean"] - 0.001  # within the interval
    said = words.randomness(results)
    assert "2 of 3 schemes" in said[0]
    assert said[1] == "Not so: entropy (joint)."


def test_guarantees_held_broken_and_not_given() -> None:
    said = words.promises(make_comparison(policies=FEW))
    assert said[0].startswith("Of 4 guarantees asked for, 3 could be certified, and 1 of those")
    told = "\n".join(said)
    assert f"{target_words(CERTIFICATE)}: held in 2 of 3 on the clean" in told
    assert "(crc, thresholds shared): broken on the clean test images (risk 6.1 %)" in told
    assert "delta" not in next(text for text in said if "(crc" in text)
    assert target_words(BETTING) not in told  # it held: no news


def test_a_row_may_lack_numbers_or_seeds() -> None:
    results = lean(make_comparison(policies=FEW))
    first, second = results["rows"][:2]
    for key in set(first) - {"regime", "policy", "target", "search"}:
        del first[key]
    first["error"] = "no exit is cheap enough"
    second |= {"met": "1 of 3", "error": "seed 2 has none"}
    promise = next(row for row in results["rows"] if row["target"] == BETTING)
    promise |= {"certified": 2, "met": "2 of 3", "error": "seed 1 has none"}
    assert words.headline(results)[0].startswith("max_prob (joint) has no result")
    said = "\n".join(words.promises(results))
    assert "certified for 2 of 3 seeds only (seed 1 has none).\n" in said
    page = Page(report.html(results)).words
    assert "max_prob (joint): no exit is cheap enough" in page
    assert "entropy (joint): seed 2 has none" in page
    assert "\\mathbf" not in tables.tex_text(results).split("entropy")[1].split("&")[1]


def test_a_guarantee_that_breaks_under_shift_is_told() -> None:
    results = make_comparison(policies=FEW)
    noise, blur, contrast = words.drifts(results)
    assert "is broken from severity 3 (risk 6.0 %, interval 5.2 to 6.8 %); unclear at 2" in noise
    assert "holds up to severity 5" in blur
    assert "is not refuted up to severity 5" in contrast
    assert "1 of 3 cases" in words.headline(results)[-1]
    for row in results["drift"]:
        row["holds"] = row["holds"] and "no"
    assert all("broken on the clean images already" in text for text in words.drifts(results))


# --- the terminal


def shown(results: dict[str, Any], width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(report.console_table(results))
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_terminal_at_80_columns_has_every_number_whole() -> None:
    results = make_comparison()
    narrow, wide = shown(results, 80), shown(results, 400)
    assert max(map(len, narrow.splitlines())) <= 80
    assert sorted(re.findall(r"\d[\d.]*\d", narrow)) == sorted(re.findall(r"\d[\d.]*\d", wide))
    assert "geometric" not in narrow
    assert "product_of_experts" in narrow
    assert "…" not in narrow
    assert "+0.40 *" in narrow
