"""The tables of a comparison: their cells as words, results.csv, and a LaTeX table for a paper."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.compare.terms import (
    Results,
    distinct,
    gap_to,
    gaps,
    half_width,
    is_promise,
    ms_words,
    number,
    real,
    reference,
    row_of,
    rows_at,
    scheme,
    scheme_words,
    spread_words,
    target_words,
    targets,
)
from experiments.compare.words import held
from experiments.report.words import Cells, macs_words

_WORDS = ("regime", "policy")
MARK = "*"
"""Behind a change that is significant after correction."""

CSV_COLUMNS = {
    "regime": "training regime, or cascade",
    "policy": "when to stop",
    "search": "how the thresholds were chosen",
    "target_kind": "budget, ms, drop, risk or certificate",
    "target_value": "a fraction; with kind ms milliseconds a batch",
    "target": "the target in words",
    "accuracy": "on the test images, mean over seeds, a fraction",
    "accuracy_low": "lower end of its spread over seeds",
    "accuracy_high": "upper end",
    "accuracy_std": "standard deviation over seeds",
    "accuracy_seeds": "of each seed, separated by spaces",
    "cost": "mean multiply-accumulates over the plain network's, mean over seeds",
    "cost_std": "standard deviation over seeds",
    "cost_seeds": "of each seed, separated by spaces",
    "risk": "on the test images, mean over seeds; of guarantees only",
    "certified": "number of seeds for which the guarantee could be given",
    "met": "whether the target holds on the test images",
    "ece": "expected calibration error of the routed answers",
    "random": "accuracy of exits drawn at random at the same rates",
    "oracle": "upper bound of the accuracy at the same cost",
    "exit_fractions": "share of test images at exit 1, 2, ..., separated by spaces",
    "difference": "accuracy minus the reference's at the same target",
    "difference_low": "lower end of its corrected interval",
    "difference_high": "upper end",
    "adjusted_p": "p-value after Holm's correction",
    "significant": "yes, no, or empty where it was not tested",
    "error": "why the target cannot be met",
}
"""The columns of results.csv and what they hold. A field that is not known is empty."""


# --- cells


def target_cells(results: Results, target: Any, *, brief: bool = False) -> Cells:
    """A row a scheme at one target, against the reference; `brief` for 80 columns."""
    rows = rows_at(results, target, usual=brief)
    searched = not brief and len({row.get("search") for row in rows}) > 1
    columns = ["regime", "policy", *(["search"] if searched else []), "accuracy %", "cost"]
    columns += ["change" if brief else "change (points)", "met"]
    columns += [] if brief else ["ECE", "random %", "oracle %"]
    made = []
    for row in rows:
        words = list(scheme(row)) + ([str(row.get("search") or "-")] if searched else [])
        words += [spread_words(row.get("accuracy")), number(row.get("cost"), 2)]
        words += [_change(results, row, brief=brief), str(row.get("met") or "-")]
        if not brief:
            words += [number(row.get("ece"), 3)]
            words += [number(row.get(key), 1, scale=100) for key in ("random", "oracle")]
        made.append(tuple(words))
    return Cells(tuple(columns), tuple(made), frozenset({*_WORDS, "search"}))


def area_cells(results: Results) -> Cells:
    """A row a curve, the largest area first."""
    curves = [c for c in results.get("curves") or () if math.isfinite(real(c.get("area")))]
    curves.sort(key=lambda c: -real(c["area"]))
    columns = (*_WORDS, "mean accuracy %")
    rows = [(*scheme(c), spread_words(c["area"], 2)) for c in curves]
    return Cells(columns, tuple(rows), frozenset(_WORDS))


def static_cells(results: Results) -> Cells:
    """A row a plain network."""
    rows = [
        (str(s["name"]), macs_words(real(s["macs"])) if s.get("macs") else "-",
         number(s.get("cost"), 2), spread_words(s.get("accuracy")), ms_words(s.get("ms")))
        for s in results.get("static") or ()
    ]  # fmt: skip
    columns = ("plain network", "MACs", "cost", "accuracy %", "ms a batch")
    return Cells(columns, tuple(rows), frozenset(columns[:1]))


def difference_cells(results: Results) -> Cells:
    """A row a tested difference, in points."""
    columns = ("target", "first", "minus second", "points", "interval", "corrected p")
    columns += ("cost", "significant")
    rows = []
    for gap in gaps(results):
        words = [target_words(gap.target), scheme_words(gap.a), scheme_words(gap.b)]
        words += [number(gap.mean, 2, scale=100, sign=True), _ends(gap.low, gap.high)]
        words += [_p(gap.adjusted_p), number(gap.cost, 2, sign=True)]
        rows.append((*words, f"yes {MARK}" if gap.significant else "no"))
    return Cells(columns, tuple(rows), frozenset(columns[:3]))


def exit_cells(results: Results) -> Cells:
    """A row an exit of each regime, as if all images left there."""
    columns = ("regime", "exit", "cost", "accuracy %", "ECE")
    rows = [
        (str(regime["name"]), str(e + 1), number(row.get("cost"), 2),
         spread_words(row.get("accuracy")), number(row.get("ece"), 3))
        for regime in results.get("regimes") or ()
        for e, row in enumerate(regime.get("exits") or ())
    ]  # fmt: skip
    return Cells(columns, tuple(rows), frozenset({"regime"}))


def promise_cells(results: Results) -> Cells:
    """A row a guarantee."""
    columns = (*_WORDS, "guarantee", "seeds certified", "risk %", "accuracy %", "cost", "on test")
    rows = []
    for row in results.get("rows") or ():
        if is_promise(row["target"]):
            certified = row.get("certified")
            words = [*scheme(row), target_words(row["target"])]
            words += ["-" if certified is None else str(certified), spread_words(row.get("risk"))]
            words += [spread_words(row.get("accuracy")), number(row.get("cost"), 2), held(row)]
            rows.append(tuple(words))
    return Cells(columns, tuple(rows), frozenset({*_WORDS, "guarantee", "on test"}))


def drift_cells(rows: Sequence[Mapping[str, Any]]) -> Cells:
    """A row a corruption and severity, of one scheme and target."""
    columns = ("corruption", "severity", "accuracy %", "cost", "risk %", "interval", "guarantee")
    words = {"yes": "holds", "no": "BROKEN", "unclear": "unclear"}
    made = [
        (str(r["corruption"]), str(r["severity"]), number(r.get("accuracy"), 1, scale=100),
         number(r.get("cost"), 2), number(r.get("risk"), 1, scale=100),
         _ends(*(r.get("interval") or (None, None)), digits=1, sign=False),
         words.get(str(r.get("holds")), "-"))
        for r in rows
    ]  # fmt: skip
    return Cells(columns, tuple(made), frozenset({"corruption", "guarantee"}))


def timing_cells(results: Results) -> Cells:
    """A row a scheme and target: its measured time beside the plain network's and the ideal."""
    columns = (*_WORDS, "target", "strategy", "batch", "accuracy %", "cost", "ms", "spread")
    columns += ("plain ms", "ideal ms", "speedup", "efficiency")
    rows = []
    for row in results.get("timing") or ():
        words = [*scheme(row), target_words(row.get("target")), str(row.get("strategy") or "-")]
        words += [str(row.get("batch") or "-"), number(row.get("accuracy"), 1, scale=100)]
        words += [number(row.get("cost"), 2), ms_words(row.get("ms"))]
        spread = number(row.get("spread"), 0, scale=100)
        words += [spread if spread == "-" else f"{spread} %", ms_words(row.get("plain_ms"))]
        words += [ms_words(row.get("ideal_ms"))]
        words += [number(row.get(key), 2) for key in ("speedup", "efficiency")]
        rows.append(tuple(words))
    return Cells(columns, tuple(rows), frozenset({*_WORDS, "target", "strategy"}))


def placement_cells(results: Results) -> Cells:
    """A row a budget in time: which exits to keep, beside keeping all of them."""
    columns = (*_WORDS, "budget ms", "batch", "keep exits", "of", "accuracy %", "ms")
    columns += ("all: accuracy %", "all: ms", "search")
    rows = []
    for row in results.get("placement") or ():
        kept = " ".join(str(e + 1) for e in row.get("kept") or ()) or "-"
        words = [*scheme(row), ms_words(row.get("budget_ms")), str(row.get("batch") or "-"), kept]
        words += [str(row.get("of") or "-"), number(row.get("accuracy"), 1, scale=100)]
        words += [ms_words(row.get("ms")), number(row.get("all_accuracy"), 1, scale=100)]
        how = str(row.get("search") or row.get("error") or "-")
        rows.append((*words, ms_words(row.get("all_ms")), how))
    return Cells(columns, tuple(rows), frozenset({*_WORDS, "keep exits", "search"}))


def _change(results: Results, row: Mapping[str, Any], *, brief: bool = False) -> str:
    """The change against the reference; of two searches, only of the one that was tested."""
    if scheme(row) == reference(results) and row.get("search") != "geometric":
        return "reference"
    tested = row_of(results, row["target"], scheme(row))
    if tested is not None and tested.get("search") != row.get("search"):
        return "-"
    gap = gap_to(results, row["target"], scheme(row))
    if gap is None:
        return "-"
    words = number(gap.mean, 2, scale=100, sign=True)
    words += "" if brief else f" {_ends(gap.low, gap.high)}"
    return words + (f" {MARK}" if gap.significant else "")


def _ends(low: Any, high: Any, digits: int = 2, *, sign: bool = True) -> str:
    ends = [number(end, digits, scale=100, sign=sign) for end in (low, high)]
    return "-" if "-" in ends else f"[{', '.join(ends)}]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else number(value, 3)


# --- results.csv


def csv_text(results: Results) -> str:
    """The rows as CSV, see `CSV_COLUMNS`: numbers in full, fractions rather than percent."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(CSV_COLUMNS), lineterminator="\n")
    writer.writeheader()
    for row in results.get("rows") or ():
        writer.writerow(_record(results, row))
    return buffer.getvalue()


def _record(results: Results, row: Mapping[str, Any]) -> dict[str, Any]:
    target = row["target"]
    record: dict[str, Any] = {"regime": scheme(row)[0], "policy": scheme(row)[1]}
    record |= {"target_kind": target.get("kind"), "target": target_words(target)}
    record |= {"target_value": _full(target.get("value"))}
    for key in ("accuracy", "cost", "risk"):
        record[key] = _full(row.get(key))
        spread = _spread(row, key)
        seeds = [real(value) for value in spread.get("seeds") or ()]
        known = [value for value in seeds if math.isfinite(value)]
        if key != "risk":
            record[f"{key}_std"] = _full(np.std(known, ddof=1)) if len(known) > 1 else ""
            record[f"{key}_seeds"] = " ".join(_full(value) or "-" for value in seeds)
    record |= {
        f"accuracy_{end}": _full(_spread(row, "accuracy").get(end)) for end in ("low", "high")
    }
    record |= {key: _full(row.get(key)) for key in ("ece", "random", "oracle")}
    record |= {key: row.get(key) for key in ("search", "certified", "met", "error")}
    record["exit_fractions"] = " ".join(_full(f) or "-" for f in row.get("exit_fractions") or ())
    gap = None if _change(results, row) in ("-", "reference") else (
        gap_to(results, target, scheme(row))
    )  # fmt: skip
    if gap is not None:
        ends = {"": gap.mean, "_low": gap.low, "_high": gap.high}
        record |= {f"difference{end}": _full(value) for end, value in ends.items()}
        record |= {"adjusted_p": _full(gap.adjusted_p)}
        record |= {"significant": "yes" if gap.significant else "no"}
    return record


def _spread(row: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The spread of a row, empty for what is none."""
    found = row.get(key)
    return found if isinstance(found, Mapping) else {}


def _full(value: Any) -> str:
    found = real(value)
    return repr(float(found)) if math.isfinite(found) else ""


# --- table.tex

_ESCAPES = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip
_TARGETS_A_TABLE = 4


def latex(text: str) -> str:
    """Plain text for LaTeX."""
    words = "".join(_ESCAPES.get(letter, letter) for letter in text)
    return words.replace(r"\textless{}=", r"$\le$")


def tex_text(results: Results) -> str:
    """Tables with booktabs: a row a scheme, a column a target; guarantees are left to results.csv.

    Beneath a budget stands the accuracy, beneath an accuracy drop the cost. The best of each column
    among those that met it is bold.
    """
    shown = [target for target in targets(results) if not is_promise(target)]
    parts = ["% Needs \\usepackage{booktabs}.\n"]
    for i in range(0, len(shown), _TARGETS_A_TABLE):
        parts.append(_tex_table(results, shown[i : i + _TARGETS_A_TABLE]))
    return "\n".join(parts)


def _tex_table(results: Results, shown: Sequence[Mapping[str, Any]]) -> str:
    schemes = distinct(scheme(row) for t in shown for row in rows_at(results, t, usual=True))
    columns = [_tex_column(results, target, schemes) for target in shown]
    heads = [f"{'cost' if t['kind'] == 'drop' else '%'} at {target_words(t)}" for t in shown]
    head = " & ".join(["Regime", "Policy", *map(latex, heads)])
    lines, last = [], ""
    for i, (regime, policy) in enumerate(schemes):
        lines += [r"\midrule"] if regime != last else []
        names = [latex(regime) if regime != last else "", latex(policy)]
        lines.append(" & ".join([*names, *(column[i] for column in columns)]) + r" \\")
        last = regime
    count = results.get("comparisons")
    seeds = len(results.get("seeds") or ())
    spread = f", mean and half of the spread over {seeds} seeds"
    caption = latex(
        f"Early exits on {results.get('dataset')}: test accuracy in percent at each target (for an "
        "accuracy drop the cost, as a fraction of the plain network's multiply-accumulates)"
        f"{spread if seeds > 1 else ', one seed'}. Bold: the best of "
        "those that met the target. A star marks a significant difference in accuracy to "
        f"{scheme_words(reference(results))}"
        f"{f', corrected for {count} comparisons' if count else ''}."
    )
    rows = "\n".join(lines)
    return (
        f"\\begin{{table}}\n\\centering\n\\small\n\\caption{{{caption}}}\n"
        f"\\begin{{tabular}}{{ll{'r' * len(shown)}}}\n\\toprule\n{head} \\\\\n{rows}\n"
        "\\bottomrule\n\\end{tabular}\n\\end{table}\n"
    )


def _tex_column(results: Results, target: Mapping[str, Any], schemes: Sequence[Any]) -> list[str]:
    """The cells of one target, the best bold: the largest accuracy, or the smallest cost."""
    drop = target["kind"] == "drop"
    digits, scale = (2, 1.0) if drop else (1, 100.0)
    best: Callable[[list[float]], float] = min if drop else max
    rows = [row_of(results, target, which) or {} for which in schemes]
    values = [row.get("cost" if drop else "accuracy") for row in rows]
    # Compared as shown, so that equal figures are bold together.
    shown = [number(value, digits, scale=scale) for value in values]
    met = [float(s) for s, row in zip(shown, rows, strict=True) if s != "-" and _may_win(row)]
    cells = []
    for row, value, text in zip(rows, values, shown, strict=True):
        if text == "-":
            cells.append("--")
            continue
        bold = met and _may_win(row) and float(text) == best(met)
        cell = f"\\mathbf{{{text}}}" if bold else text
        width = number(half_width(value), digits, scale=scale)
        cell += f" \\pm {width}" if width != "-" else ""
        gap = None if drop else gap_to(results, target, scheme(row))
        cells.append(f"${cell}^{{*}}$" if gap is not None and gap.significant else f"${cell}$")
    return cells


def _may_win(row: Mapping[str, Any]) -> bool:
    return row.get("met") in (None, "yes") and not row.get("error")
