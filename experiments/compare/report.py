"""What a comparison leaves for people: results.json, report.html, results.csv, table.tex, figures.

    write(workdir, results)
    console.print(console_table(results))

`results` is one dict of plain data. Costs are fractions of the plain network's multiply-accumulates
(`whole_macs`), accuracies and risks fractions too. S is a spread over seeds, {mean, low, high,
seeds}: their mean, what range to show around it (None for one seed), and each value. T is a target:

    {kind: budget, value} | {kind: ms, value, batch} | {kind: drop, value}
    {kind: risk, value, loss, delta, method, path} | {kind: certificate, value, budget, loss, ...}

Parts, of which any may be missing or empty but `dataset`:

    dataset, data_source, notice, command, date, device, versions, seeds, network, seconds, samples,
    classes, whole_macs, failed [{cell, error}], reference {regime, policy}
    regimes      [{name, exits [{cost, accuracy S, ece}], overthinking, oracle [{cost, accuracy}]}]
    static       [{name, cost, macs, accuracy S, ms}]: plain networks trained alone
    rows         [{regime, policy, target T, search, accuracy S, cost S, exit_fractions [E], ece,
                   random, oracle, met, error, class_exit_fractions [C][E], thresholds}]; a risk or
                   certificate has `risk` S and `certified`, a number of seeds, too
    curves       [{regime, policy, points [{cost, accuracy, low, high}], area S}], area_range
    differences  [{target T, a, b, difference, low, high, p, adjusted_p, significant, seeds
                   {seed: difference}, cost_difference}], comparisons, level, draws
    agreement    [{regime, target, policies [P], exits [P][P], answers [P][P]}]
    timing       [{regime or static or cascade, policy, target, strategy, batch, ms, spread,
                   plain_ms, ideal_ms, speedup, efficiency, accuracy, cost}]
    drift        [{corruption, severity, regime, policy, target, accuracy, cost, seeds, risk,
                   interval, epsilon, broken, holds}]; severity 0 is the clean test images, broken
                   and seeds are numbers of seeds
    placement    [{regime, policy, budget_ms, batch, kept, of, accuracy, ms, all_accuracy, all_ms,
                   search}], or an error

The regime "cascade" is the cascade of the static networks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from experiments.compare import plot, tables, words
from experiments.compare.page import SCRIPT, STYLE, charts, heat, sentences
from experiments.compare.terms import (
    Results,
    gaps,
    is_promise,
    leading_target,
    number,
    real,
    reference,
    rows_at,
    scheme,
    scheme_words,
    target_words,
    targets,
)
from experiments.data.cache import replacing
from experiments.report import page, report
from experiments.report.words import Cells, listed, macs_words

_MOST_CLASSES = 20


def write(workdir: Path, results: Results) -> None:
    """Writes results.json, report.html, results.csv, table.tex and figures/*.svg, *.pdf.

    Args:
        workdir: where to; it is made if need be.
        results: see the module.
    """
    workdir = Path(workdir)
    report.write_json(workdir / "results.json", results)
    texts = {"report.html": html(results), "results.csv": tables.csv_text(results)}
    texts["table.tex"] = tables.tex_text(results)
    for name, text in texts.items():
        with replacing(workdir / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    plot.save(workdir / "figures", results)


def console_table(results: Results) -> Group:
    """The leading target's rows and the main sentences, in plain ASCII for 80 columns."""
    target = leading_target(results)
    parts: list[Any] = [Text(f"{results['dataset']}: comparison", style="bold")]
    parts += [Text(f"NOTICE: {t}", style="bold yellow") for t in _notes(results)]
    parts += [Text(_ascii(" ".join(words.headline(results)))), Text("")]
    if target is not None:
        cells = tables.target_cells(results, target, brief=True)
        rows = tuple(tuple(map(_ascii, row)) for row in cells.rows)
        parts += [report._rich(f"At {target_words(target)}", cells._replace(rows=rows)), Text("")]
        parts += [Text(f"{tables.MARK} significant. {words.corrected(results)}", style="dim")]
    said = [*words.randomness(results), *words.promises(results)[1:], *words.drifts(results)]
    return Group(*parts, *(Text(_ascii(text)) for text in said))


def html(results: Results) -> str:
    """The page: one file that fetches nothing, and is whole without its script."""
    sections = [
        ("made", "How it was made", [page.facts(_facts(results))]),
        ("macs", "Accuracy against computation", _macs_blocks(results)),
        ("time", "Accuracy against measured time", _time_blocks(results)),
        ("targets", "At each target", _target_blocks(results)),
        ("area", "Area under the curve", _area_blocks(results)),
        ("significant", "What is significant", _significant_blocks(results)),
        ("calibration", "The exits and their calibration", _exit_blocks(results)),
        ("classes", "Where each class leaves", _class_blocks(results)),
        ("agreement", "Agreement between policies", _agreement_blocks(results)),
        ("guarantees", "Guarantees", _promise_blocks(results)),
        ("drift", "Under corrupted images", _drift_blocks(results)),
        ("placement", "Which exits to keep", _placement_blocks(results)),
        ("files", "Files", _file_blocks(results)),
    ]
    body = [page.paragraph(f"Notice: {text}", "note") for text in _notes(results)]
    first, *rest = words.headline(results)
    body += [page.paragraph(first, "lead"), sentences(rest)]
    body += [page.navigation([(identity, heading) for identity, heading, _ in sections])]
    body += [page.section(*parts) for parts in sections]
    title = f"eejax comparison: {results['dataset']}"
    return page.document(title, body, style=STYLE, script=SCRIPT)


# --- the sections of the page


def _macs_blocks(results: Results) -> list[str]:
    panels = plot.mac_panels(results)
    static = tables.static_cells(results)
    text = (
        "A panel a training regime, a line a policy: accuracy on the test images as its thresholds "
        "move, with a band over seeds. Higher and further left is better. Diamonds are plain "
        "networks trained alone with the same training; those that no cheaper one beats are "
        "connected, and a policy below that line is not worth its exits. The oracle knows the "
        "labels: no policy can pass it."
    )
    return [*_charts(panels, text, "chart-macs"), *_table(static, "No plain network was trained.")]


def _time_blocks(results: Results) -> list[str]:
    panels = plot.time_panels(results)
    if not panels:
        return [page.paragraph("No time was measured.", "soft")]
    text = (
        "The same trade in wall-clock time: each point is a policy at one of its targets, run by "
        "a compiled program that really stops, with heads, scores and gathering inside the timer."
    )
    below = page.paragraph(
        "Times are of a batch. Speedup is the plain network's time, run as fast as it goes, over "
        "the measured one, below 1 a loss; efficiency is the ideal time, that of the stages which "
        "the images need, over the measured one. Spread is the interquartile range over the median."
    )
    return [*_charts(panels, text, "chart-time"), below, page.table(tables.timing_cells(results))]


def _target_blocks(results: Results) -> list[str]:
    shown = [target for target in targets(results) if not is_promise(target)]
    if not shown:
        return [page.paragraph("No target was set.", "soft")]
    text = (
        "Thresholds were chosen on held-out images, numbers are of the test images: mean ± half "
        "the spread over seeds. Change is against "
        f"{scheme_words(reference(results))}, in points, with its corrected interval, and "
        f"{tables.MARK} where it is significant. Random is the accuracy of exits drawn at random "
        "at the same rates, oracle an upper bound at the same cost; met says whether the target "
        "holds on the test images, and in how many seeds where they differ."
    )
    blocks = [page.paragraph(text), sentences(words.randomness(results))]
    for target in shown:
        blocks.append(f"<h3>At {page.escape(target_words(target))}</h3>")
        blocks.append(page.table(tables.target_cells(results, target)))
        for row in rows_at(results, target):
            if row.get("error"):
                note = f"{scheme_words(scheme(row))}: {row['error']}"
                blocks.append(page.paragraph(note, "note"))
    return blocks


def _area_blocks(results: Results) -> list[str]:
    low, high = results.get("area_range") or (None, None)
    text = (
        "The mean accuracy over the range of costs that all curves share"
        f" ({number(low, 2)} to {number(high, 2)}): one number for a whole line."
    )
    cells = tables.area_cells(results)
    return [page.paragraph(text), *_table(cells, "No curve has an area.")]


def _significant_blocks(results: Results) -> list[str]:
    found = gaps(results)
    if not found:
        return [page.paragraph("No difference was tested.", "soft")]
    blocks = [page.paragraph(words.corrected(results)), sentences(words.frontier(results))]
    for heading, texts in words.significant(results):
        blocks += [f"<h3>{page.escape(heading)}</h3>", sentences(texts)]
    main = plot.main_gaps(results)
    for i, target in enumerate(plot.distinct(gap.target for gap in main)):
        figure = plot.forest([gap for gap in main if gap.target == target])
        name = target_words(target)
        intro = f"Differences and intervals, {name}; filled where significant."
        blocks += [page.paragraph(intro), page.plot(figure, f"fig-gaps-{i}", intro)]
    return [*blocks, page.table(tables.difference_cells(results))]


def _exit_blocks(results: Results) -> list[str]:
    text = (
        "Each exit when it has to answer every test image. ECE, the expected calibration error, is "
        "the mean distance between confidence and accuracy: where it is large, a threshold on the "
        "confidence lets errors out. That of the routed answers is in the tables above."
    )
    blocks = [page.paragraph(text), *_table(tables.exit_cells(results), "No exit is recorded.")]
    known = {
        "destructive": "are answered correctly by some earlier exit and wrongly by the last",
        "wasteful": "are answered correctly by the last exit, and were by an earlier one already",
    }
    said = [
        f"{regime['name']}: {number(shares[key], 1, scale=100)} % of the test images {text} "
        f"({key} overthinking)."
        for regime in results.get("regimes") or ()
        for shares in [regime.get("overthinking") or {}]
        for key, text in known.items()
        if math.isfinite(real(shares.get(key)))
    ]
    return [*blocks, "<h3>Overthinking</h3>", sentences(said)] if said else blocks


def _class_blocks(results: Results) -> list[str]:
    target = leading_target(results)
    rows = [] if target is None else rows_at(results, target, usual=True)
    rows = [r for r in rows if r.get("class_exit_fractions")]
    first = [r for r in rows if scheme(r) == reference(results)]
    others = [r for r in rows if r not in first and scheme(r)[0] != "cascade"]
    others = [r for r in others if math.isfinite(real(r.get("accuracy")))]
    others.sort(key=lambda r: -real(r["accuracy"]))
    if not first and not others:
        return [page.paragraph("Exits per class were not recorded.", "soft")]
    blocks = [
        page.paragraph(
            f"At {target_words(target)}, the share (%) of each class's test images that leave at "
            "each exit: easy classes leave early. The reference, and the most accurate other "
            "scheme on these test images."
        )
    ]
    for row in [*first, *others[:1]]:
        values = row["class_exit_fractions"]
        names = list(results.get("classes") or ()) or [str(c) for c in range(len(values))]
        order = range(len(values))
        heading = scheme_words(scheme(row))
        if len(values) > _MOST_CLASSES:
            depths = [sum(e * real(f) for e, f in enumerate(line)) for line in values]
            ranked = sorted(order, key=lambda c: (math.isnan(depths[c]), depths[c]))
            half = _MOST_CLASSES // 2
            order = [*ranked[:half], *ranked[-half:]]
            heading += f": the {half} classes that leave first and the {half} that leave last"
        exits = [f"exit {e + 1}" for e in range(len(values[0]))]
        blocks.append(f"<h3>{page.escape(heading)}</h3>")
        blocks.append(heat([names[c] for c in order], exits, [values[c] for c in order]))
    return blocks


def _agreement_blocks(results: Results) -> list[str]:
    entries = results.get("agreement") or ()
    if not entries:
        return [page.paragraph("Agreement was not recorded.", "soft")]
    text = (
        "The share (%) of test images that two policies send to the same exit, and on which they "
        "give the same answer. Columns are numbered as rows are. Where exits agree, a choice "
        "between two policies is one of convenience."
    )
    blocks = [page.paragraph(text)]
    for entry in entries:
        rows = [f"{i + 1} {name}" for i, name in enumerate(entry["policies"])]
        columns = [str(i + 1) for i in range(len(rows))]
        for key, what in (("exits", "same exit"), ("answers", "same answer")):
            heading = f"{entry['regime']}, {target_words(entry.get('target'))}: {what}"
            blocks += [f"<h3>{page.escape(heading)}</h3>", heat(rows, columns, entry[key])]
    return blocks


def _promise_blocks(results: Results) -> list[str]:
    cells = tables.promise_cells(results)
    if not cells.rows:
        return [page.paragraph("No guarantee was asked for.", "soft")]
    text = (
        "Risk is the share of test images that lose by leaving early (disagreement: another answer "
        "than the last exit's; error: a wrong answer). A guarantee speaks of new data like the "
        "images it was certified on. Conformal risk control (crc) bounds the risk on average over "
        "certification splits; the other methods bound it but for a share delta of the splits, so "
        "some may break by chance."
    )
    summary = sentences(words.promises(results))
    return [page.paragraph(text), summary, page.table(cells)]


def _drift_blocks(results: Results) -> list[str]:
    groups = plot.drift_groups(results)
    if not groups:
        return [page.paragraph("No corrupted images were tried.", "soft")]
    text = (
        "The thresholds stay as they were chosen on clean images, while the test images are "
        "corrupted; severity 0 is clean. No guarantee covers this: it speaks of data like that it "
        "was certified on. A guarantee is broken where the whole interval of the risk lies above "
        "the promise, and unclear where the interval contains it."
    )
    said = words.drifts(results)
    blocks = [page.paragraph(text), *([sentences(said)] if said else [])]
    for i, rows in enumerate(groups):
        name = f"{scheme_words(scheme(rows[0]))}, {target_words(rows[0].get('target'))}"
        alt = f"Accuracy, cost and risk against severity: {name}; the numbers are in the table."
        blocks.append(f"<h3>{page.escape(name)}</h3>")
        blocks.append(page.plot(plot.drift([rows]), f"fig-drift-{i}", alt))
        blocks.append(page.table(tables.drift_cells(rows)))
    return blocks


def _placement_blocks(results: Results) -> list[str]:
    cells = tables.placement_cells(results)
    text = (
        "For a budget in measured time, the exits worth keeping and what they give, beside keeping "
        "all of them: a head that is dropped costs no time. Exits are numbered from 1."
    )
    if not cells.rows:
        return [page.paragraph("No choice of exits was made.", "soft")]
    return [page.paragraph(text), page.table(cells)]


def _file_blocks(results: Results) -> list[str]:
    text = (
        "Beside this page lie results.json (everything), results.csv (a row a scheme and target, "
        "columns below), table.tex (for LaTeX with booktabs) and figures/ (SVG and PDF)."
    )
    columns = ("column", "of results.csv")
    cells = Cells(columns, tuple(tables.CSV_COLUMNS.items()), frozenset(columns))
    return [page.paragraph(text), page.table(cells)]


# --- parts


def _charts(panels: Sequence[plot.Panel], text: str, prefix: str) -> list[str]:
    if not panels:
        return [page.paragraph("No curve is recorded.", "soft")]
    _, ys, below = plot.bounds(panels)
    if below:
        text += f" {below} points below {number(ys[0], 1)} % are not shown."
    return [page.paragraph(text), charts(panels, prefix)]


def _table(cells: Cells, otherwise: str) -> list[str]:
    return [page.table(cells) if cells.rows else page.paragraph(otherwise, "soft")]


def _notes(results: Results) -> list[str]:
    failed = [f"{f['cell']} failed: {f['error']}" for f in results.get("failed") or ()]
    return [*listed(results.get("notice")), *failed]


def _facts(results: Results) -> list[tuple[str, str]]:
    """How the comparison was made; what is not recorded is left out."""

    def joined(found: Any, unit: str = "") -> str | None:
        if not isinstance(found, Mapping):
            return found
        return ", ".join(
            f"{name} {value:,.{1 if unit else 0}f}{unit}" if isinstance(value, float | int)
            else f"{name} {value}" for name, value in found.items()
        )  # fmt: skip

    whole = results.get("whole_macs")
    pairs = [
        ("Command", results.get("command")),
        ("Data", ", ".join(filter(None, (results["dataset"], results.get("data_source"))))),
        ("Images", joined(results.get("samples"))),
        ("Network", results.get("network")),
        ("Plain network", f"{macs_words(whole)} MACs an image, cost 1" if whole else None),
        ("Reference", scheme_words(reference(results))),
        ("Seeds", ", ".join(map(str, results.get("seeds") or ())) or None),
        ("Time", joined(results.get("seconds"), " s")),
        ("Device", results.get("device")),
        ("Date", results.get("date")),
        ("Versions", joined(results.get("versions"))),
    ]
    return [(name, str(value)) for name, value in pairs if value]


def _ascii(text: str) -> str:
    return text.replace("±", "+-")
