"""The results table: one tidy row a result, the same columns for the main job and for a comparison.

A row says what one scheme, a training regime and a policy, came to on the test images with one seed
at one target. `COLUMNS` documents every column. `results.csv`, the tables of the pages, of the
terminal and of LaTeX are all made from this one pandas DataFrame; the statistics over seeds are
`over_seeds`.

Kinds of rows, by `target_kind`:

    budget, ms, drop    thresholds searched for a mean cost, a mean time, a loss of accuracy
    risk, certificate   thresholds with a guarantee: of a risk, or of a risk and a mean cost
    given               thresholds from the command line
    curve               a budget of the cost curve
    exit                no policy: every image leaves at exit `target_value`, counted from 1
    network             no exits: a plain network that was trained alone

A row with an `executor` is a measurement of the compiled program. It repeats the scheme, target,
accuracy and cost of the row whose thresholds were timed. Everything else has no time columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text
from scipy import stats

from experiments.files import write_text


class Column(NamedTuple):
    """A column of the results table.

    Attributes:
      dtype: of pandas; `object` holds a tuple of numbers, or None.
      unit: of the numbers, or "" for words.
      meaning: one line.
      heading: in tables for people.
      digits: decimals in tables for people.
      scale: factor in tables for people: 100 turns a fraction into percent.
    """

    dtype: str
    unit: str
    meaning: str
    heading: str = ""
    digits: int = 0
    scale: float = 1.0


COLUMNS: dict[str, Column] = {
    "regime": Column("string", "", "training regime, or `static`, or `cascade`", "regime"),
    "policy": Column("string", "", "when to stop; of a static network its name", "policy"),
    "seed": Column("Int64", "", "seed of training and of the held-out splits", "seed"),
    "target": Column("string", "", "the target in words", "target"),
    "target_kind": Column("string", "", "see the list of kinds", "kind"),
    "target_value": Column("float64", "fraction, ms or number", "what is to be kept", "value", 3),
    "target_cost": Column("float64", "fraction", "certificates: the certified mean cost", "", 2),
    "loss": Column("string", "", "guarantees: which loss the risk is the mean of", "loss"),
    "method": Column("string", "", "guarantees: how the risk is bounded", "method"),
    "path": Column("string", "", "guarantees: one threshold for all exits, or one each", "path"),
    "delta": Column("float64", "probability", "guarantees: how often the bound may fail", "", 2),
    "search": Column("string", "", "how the thresholds were chosen", "search"),
    "accuracy": Column("float64", "fraction", "of the test images", "accuracy %", 1, 100),
    "accuracy_low": Column("float64", "fraction", "95 % interval, test images drawn", "", 1, 100),
    "accuracy_high": Column("float64", "fraction", "its other end", "", 1, 100),
    "cost": Column("float64", "fraction", "mean MACs over the plain network's", "cost", 3),
    "macs": Column("float64", "MACs an image", "mean multiply-accumulates", "MACs"),
    "expected_ms": Column("float64", "ms a batch", "mean of stage times", "expected ms", 2),
    "ece": Column("float64", "fraction", "expected calibration error", "ECE", 3),
    "random": Column("float64", "fraction", "of random exits, same rates", "random %", 1, 100),
    "oracle": Column("float64", "fraction", "bound of accuracy at this cost", "oracle %", 1, 100),
    "risk": Column("float64", "fraction", "guarantees: mean loss on test images", "risk %", 1, 100),
    "met": Column("boolean", "", "whether the target holds on the test images", "met"),
    "exit_fractions": Column("object", "fractions", "that leave at each exit", "% at exit", 0, 100),
    "thresholds": Column("object", "scores", "all exits but the last", "thresholds", 3),
    "exits": Column("object", "", "exits or cascade members in use, from 0", "exits"),
    "chosen_accuracy": Column("float64", "fraction", "on held-out images", "held-out %", 1, 100),
    "chosen_cost": Column("float64", "fraction", "on held-out images", "held-out cost", 3),
    "forecast_accuracy": Column("object", "fractions", "95 %, new data", "forecast %", 1, 100),
    "forecast_cost": Column("object", "fractions", "95 %, new data", "forecast cost", 3),
    "certificate": Column("string", "", "what was certified, in words", "certificate"),
    "error": Column("string", "", "why there is no result", "error"),
    "executor": Column("string", "", "compiled program; `plain` without exits", "executor"),
    "batch": Column("Int64", "images", "images a call", "batch"),
    "ms": Column("float64", "ms a batch", "median time", "ms", 3),
    "plain_ms": Column("float64", "ms a batch", "plain network, timed alternately", "plain ms", 3),
    "ideal_ms": Column("float64", "ms a batch", "stages that the images need", "ideal ms", 3),
    "speedup": Column("float64", "ratio", "plain_ms over ms", "speedup", 2),
    "efficiency": Column("float64", "ratio", "ideal_ms over ms", "efficiency", 2),
    "spread": Column("float64", "ratio", "interquartile range of ms over ms", "spread %", 0, 100),
}  # fmt: skip
"""Cost is a fraction of the plain network's MACs in a comparison, and of the MACs up to the last
exit of the same network in a main job."""

SCHEME = ["regime", "policy"]
TARGET = ["target_kind", "target_value", "target_cost", "loss", "method", "path", "delta", "target"]
KEYS = [*SCHEME, *TARGET, "search"]
SEARCHED = ("budget", "ms", "drop", "given")
GUARANTEES = ("risk", "certificate")


def frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The table from rows that may leave columns out.

    Raises:
      ValueError: if a row has a key that is no column.
    """
    rows = list(rows)
    unknown = {key for row in rows for key in row} - COLUMNS.keys()
    if unknown:
        raise ValueError(f"{sorted(unknown)} are no columns; give some of {list(COLUMNS)}.")
    columns = {}
    for name, column in COLUMNS.items():
        values = [row.get(name) for row in rows]
        if column.dtype == "object":
            values = [None if value is None else tuple(value) for value in values]
        columns[name] = pd.Series(values, dtype=column.dtype)
    return pd.DataFrame(columns)


def target_columns(target: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a target `{kind, value, ...}` as the JSON files hold it."""
    keys = {"target_kind": "kind", "target_value": "value", "target_cost": "budget"}
    row = {column: target.get(key) for column, key in keys.items()}
    row |= {name: target.get(name) for name in ("loss", "method", "path", "delta")}
    return {**row, "target": target_words(target)}


def target_words(target: Mapping[str, Any]) -> str:
    """A target in words: "cost <= 0.50", "drop <= 1.0 points", "disagreement <= 5.0 % (crc)"."""
    kind: str = target["kind"]
    value: Any = target.get("value")
    if kind in ("budget", "curve"):
        return f"cost <= {value:.2f}"
    if kind == "ms":
        return f"time <= {value:.4g} ms"
    if kind == "drop":
        return f"drop <= {100 * value:.1f} points"
    if kind not in GUARANTEES:
        return {"given": "given", "exit": f"exit {value}", "network": "plain"}.get(kind, kind)
    words = f"{target['loss']} <= {100 * value:.1f} %"
    if target.get("budget") is not None:
        words += f" and cost <= {target['budget']:.2f}"
    notes = [target["method"].replace("_", "-"), f"thresholds {target['path']}"]
    # Conformal risk control bounds an expectation, so delta is no part of it.
    notes += [f"delta {target['delta']:g}"] if target["method"] != "crc" else []
    return f"{words} ({', '.join(notes)})"


def timed_row(row: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `decided` with the columns of `eejax.benchmark.benchmark_rows`."""
    names = ("batch", "ms", "plain_ms", "ideal_ms", "speedup", "efficiency", "spread")
    return {**row, "executor": measured["strategy"], **{name: measured[name] for name in names}}


def accuracy_columns(correct: np.ndarray) -> dict[str, float]:
    """Accuracy and its Clopper-Pearson interval, from `[N]` bool: which test images are correct."""
    count = int(correct.sum())
    interval = stats.binomtest(count, len(correct)).proportion_ci(0.95, "exact")
    ends = {"accuracy_low": float(interval.low), "accuracy_high": float(interval.high)}
    return {"accuracy": count / len(correct), **ends}


def decided(table: pd.DataFrame, *kinds: str) -> pd.DataFrame:
    """The rows of some kinds that are no measurements of time."""
    return table[table["executor"].isna() & table["target_kind"].isin(kinds)]


def timed(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that are measurements of time."""
    return table[table["executor"].notna()]


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """One row a scheme, target and search: means over the seeds that have a result.

    Beside the means there are `seeds`, their number; `accuracy_min`, `accuracy_max` and
    `accuracy_std` over seeds; and `met`, a share of the seeds.
    """
    groups = table.groupby(KEYS, dropna=False, sort=False)
    numbers = [name for name, c in COLUMNS.items() if c.dtype == "float64" and name not in KEYS]
    means = groups[numbers].mean().drop(columns=["accuracy_low", "accuracy_high"])
    means["seeds"] = groups["accuracy"].count()
    for end in ("min", "max", "std"):
        means[f"accuracy_{end}"] = groups["accuracy"].agg(end)
    means["met"] = groups["met"].mean().astype("float64")
    means["error"] = groups["error"].first()
    means["exit_fractions"] = groups["exit_fractions"].agg(_mean_fractions)
    return means.reset_index()


def _mean_fractions(values: pd.Series) -> tuple[float, ...] | None:
    # Members of a cascade differ from seed to seed, and their exits cannot be averaged.
    parts = [value for value in values if value is not None]
    if len({len(part) for part in parts}) != 1:
        return None
    return tuple(np.mean(parts, axis=0).tolist())


# --- tables for people


def text(value: Any, name: str) -> str:
    """A value of a column as tables for people show it; "-" where it is not known."""
    column = COLUMNS.get(name, Column("Int64", "", ""))
    if isinstance(value, tuple):
        if name == "exits":
            return " ".join(str(exit_ + 1) for exit_ in value)
        return " ".join(_number(part, column) for part in value)
    if value is None or pd.isna(value):
        return "-"
    if column.dtype == "boolean":
        # A mean over seeds is a share.
        return {0.0: "no", 1.0: "yes"}.get(float(value), f"{100 * float(value):.0f} % of seeds")
    if name == "macs":
        return macs_words(value)
    return _number(value, column) if column.dtype == "float64" else str(value)


def shown(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Some columns as words under their headings. Columns without any value are left out.

    Accuracies of `over_seeds` get half their range over seeds: "97.8 ± 0.4".
    """
    columns = {}
    for name in names:
        words = [text(value, name) for value in table[name]]
        if name == "accuracy" and "accuracy_min" in table:
            half = (table["accuracy_max"] - table["accuracy_min"]) / 2
            several = table["seeds"] > 1
            words = [
                f"{word} ± {100 * width:.1f}" if many else word
                for word, width, many in zip(words, half, several, strict=True)
            ]
        if len(table) == 0 or set(words) != {"-"}:
            heading = COLUMNS[name].heading if name in COLUMNS else ""
            columns[heading or name.replace("_", " ")] = words
    return pd.DataFrame(columns)


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Writes `results.csv`: numbers in full, tuples as words with spaces, unknown values empty."""
    flat = table.copy()
    for name, column in COLUMNS.items():
        if column.dtype == "object":
            values = [None if v is None else " ".join(map(str, v)) for v in table[name]]
            flat[name] = pd.Series(values, index=table.index, dtype="string")
    write_text(path, flat.to_csv(index=False))


def read_csv(path: Path) -> pd.DataFrame:
    """The table that `write_csv` wrote."""
    flat = pd.read_csv(path, dtype={n: c.dtype for n, c in COLUMNS.items() if c.dtype != "object"})
    for name, column in COLUMNS.items():
        if column.dtype == "object":
            values = [None if pd.isna(v) else tuple(map(float, str(v).split())) for v in flat[name]]
            flat[name] = pd.Series(values, dtype="object")
    return flat


def latex(words: pd.DataFrame, caption: str, bold: pd.DataFrame | None = None) -> str:
    """A table of words for LaTeX; needs `\\usepackage{booktabs}`.

    Args:
      words: what stands in the cells; escaped here.
      caption: escaped here.
      bold: bool of the same shape, which cells are bold.
    """
    style = words.style.hide(axis="index").format(escape="latex")
    style = style.format_index(escape="latex", axis=1)
    if bold is not None:
        marks = bold.map(lambda mark: "textbf:--rwrap;" if mark else "")
        style = style.apply(lambda _: marks, axis=None)
    escaped = pd.DataFrame({"": [caption]}).style.format(escape="latex").hide(axis="index")
    line = escaped.to_latex().splitlines()[2].removesuffix(r"\\").strip()
    return style.to_latex(hrules=True, caption=line, position_float="centering")


def rich_table(words: pd.DataFrame) -> Table:
    """A table of words for the terminal, in plain ASCII."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(words.columns):
        justify = "left" if i == 0 else "right"
        table.add_column(
            Text(name.replace(": ", "\n")), justify=justify, no_wrap=True, overflow="fold"
        )
    for row in words.itertuples(index=False):
        table.add_row(*(Text(word.replace("±", "+-")) for word in row))
    return table


def macs_words(macs: float) -> str:
    """MACs with a unit: "40.8 M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if macs >= size:
            return f"{macs / size:.3g} {unit}"
    return f"{macs:.0f}"


def _number(value: float, column: Column) -> str:
    if math.isinf(value):
        return "off" if value > 0 else "always"
    if math.isnan(value):
        return "-"
    return f"{round(column.scale * value, column.digits) + 0.0:.{column.digits}f}"  # no "-0.0"
