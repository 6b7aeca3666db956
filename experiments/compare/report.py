"""The report of a comparison: results.json, results.csv, report.html, table.tex and figures/.

    write(workdir, results, table)
    console.print(console(results, table))

`results` is the dict of results.json, see `experiments.compare.results`; `table` is the results
table, from which everything comes that is a figure of one scheme, seed and target.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Group
from rich.text import Text

from experiments.files import write_json, write_text
from experiments.report import page, plots
from experiments.report import table as results_table
from experiments.report.plots import Series
from experiments.report.report import DESCRIPTION, overthinking, provenance
from experiments.report.table import over_seeds, shown, target_words

Results = Mapping[str, Any]
MARK = "*"
"""After a change that is significant."""

_MOST_CLASSES = 40
_TARGET_COLUMNS = ["regime", "policy", "search", "accuracy", "cost", "met", "ece"]
_TARGET_COLUMNS += ["random", "oracle", "exit_fractions"]
_GUARANTEE_COLUMNS = ["regime", "policy", "target", "seeds", "risk", "accuracy", "cost", "met"]
_TIME_COLUMNS = ["regime", "policy", "target", "executor", "batch", "accuracy", "cost", "ms"]
_TIME_COLUMNS += ["spread", "plain_ms", "ideal_ms", "speedup", "efficiency"]


def write(workdir: Path, results: Results, table: pd.DataFrame) -> None:
    """Writes all files.

    Args:
      workdir: where to; made if need be.
      results: see the module.
      table: the results table.
    """
    write_json(workdir / "results.json", results)
    results_table.write_csv(workdir / "results.csv", table)
    means = over_seeds(table[table["executor"].isna()])
    write_text(workdir / "table.tex", latex(results, means))
    figures = _figures(results, table)
    plots.save(workdir / "figures", figures)
    guarantees = means[means["target_kind"].isin(results_table.GUARANTEES)]
    searched = means[means["target_kind"].isin(results_table.SEARCHED)]
    page.write(
        workdir / "report.html",
        "comparison.html",
        title=f"eejax comparison: {results['dataset']}",
        notices=_notices(results),
        headline=headline(results, means),
        figures=figures,
        summary=summary(results, means),
        target=leading_target(searched),
        reference=_name(results["reference"]),
        targets={
            str(name): _target_table(results, rows)
            for name, rows in searched.groupby("target", sort=False)
        },
        errors=shown(means[means["error"].notna()], ["regime", "policy", "target", "error"]),
        differences=_difference_table(results),
        tested=tested(results),
        exits=shown(
            means[means["target_kind"] == "exit"], ["regime", "target", "accuracy", "cost", "ece"]
        ),
        overthinking={r["name"]: overthinking(r["overthinking"]) for r in results["regimes"]},
        static=shown(
            means[means["target_kind"] == "network"], ["policy", "macs", "cost", "accuracy"]
        ),
        areas=_area_table(results),
        time=shown(results_table.timed(table), _TIME_COLUMNS),
        guarantees=shown(guarantees, _GUARANTEE_COLUMNS),
        drift=_drift_groups(results),
        placement=_placement_table(results),
        provenance=provenance(results),
        columns=DESCRIPTION,
    )


def console(results: Results, table: pd.DataFrame) -> Group:
    """The headline and the summary for the terminal, in plain ASCII."""
    means = over_seeds(table[table["executor"].isna()])
    parts: list[Any] = [Text(f"NOTICE: {n}", style="bold yellow") for n in _notices(results)]
    parts += [Text(headline(results, means).replace("±", "+-")), Text("")]
    parts += [results_table.rich_table(summary(results, means))]
    return Group(*parts, Text(f"{MARK} significant. {tested(results)}", style="dim"))


def headline(results: Results, means: pd.DataFrame) -> str:
    """The result of the reference, which is not picked by its accuracy on the test images, and how
    many others differ from it; a loss reads like a gain."""
    reference = results["reference"]
    rows = leading_rows(means)
    same = (rows["regime"] == reference["regime"]) & (rows["policy"] == reference["policy"])
    row = rows[same].dropna(subset="accuracy")
    plain = means[(means["target_kind"] == "network") & (means["policy"] == "plain network")]
    if row.empty or plain.empty:
        return f"{_name(reference)} has no result at {leading_target(means)}."
    words = (
        f"At {100 * row['cost'].iloc[0]:.0f} % of the plain network's multiply-accumulates, "
        f"{_name(reference)} classifies {_spread(row)} % of the test images correctly; the plain "
        f"network classifies {_spread(plain)} %."
    )
    gaps = [g for g in _gaps(results, rows["target"].iloc[0]) if g["b"] == reference]
    if not gaps:
        return words
    better = sum(g["significant"] and g["difference"] > 0 for g in gaps)
    worse = sum(g["significant"] and g["difference"] < 0 for g in gaps)
    return (
        f"{words} Of {len(gaps)} other schemes, {better} differ from it significantly for the "
        f"better and {worse} for the worse."
    )


def summary(results: Results, means: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and cost at the leading target: a row a policy, two columns a regime."""
    rows = leading_rows(means).dropna(subset="accuracy")
    cells = shown(rows, ["accuracy", "cost"])
    gaps = [_gap(results, row) for _, row in rows.iterrows()]
    cells["accuracy %"] = [
        word + (f" {MARK}" if gap and gap["significant"] else "")
        for word, gap in zip(cells["accuracy %"], gaps, strict=True)
    ]
    cells["policy"] = [
        f"{p} (cascade)" if r == "cascade" else p
        for r, p in zip(rows["regime"], rows["policy"], strict=True)
    ]
    cells["regime"] = [r if r != "cascade" else "" for r in rows["regime"]]
    regimes = [r for r in dict.fromkeys(cells["regime"]) if r] or [""]
    policies = list(dict.fromkeys(cells["policy"]))
    cells.loc[cells["regime"] == "", "regime"] = regimes[0]
    wide = cells.pivot(index="policy", columns="regime").reindex(policies).fillna("")
    columns = {
        f"{regime}: {name}": wide[name, regime]
        for regime in regimes
        for name in ("accuracy %", "cost")
    }
    return pd.DataFrame(columns).rename_axis("policy").reset_index()


def leading_target(means: pd.DataFrame) -> str:
    """The leading target: the first budget that some scheme reached, else the first target."""
    able = means[means["target_kind"].isin(results_table.SEARCHED)].dropna(subset="accuracy")
    budgets = able[able["target_kind"] == "budget"]
    return str(next(iter([*budgets["target"], *able["target"]]), "any target"))


def leading_rows(means: pd.DataFrame) -> pd.DataFrame:
    """The rows of `over_seeds` at the leading target, without the geometric search."""
    kinds = means["target_kind"].isin(results_table.SEARCHED)
    same = means["target"] == leading_target(means)
    return means[kinds & same & (means["search"] != "geometric")]


def tested(results: Results) -> str:
    """How the differences were tested."""
    return (
        f"Paired bootstrap over test images and seeds, {results['draws']:,} draws; "
        f"{100 * results['level']:g} % intervals that hold together for {results['comparisons']} "
        "comparisons, and p-values multiplied by that number (Bonferroni). A difference is "
        "significant where the difference of every seed has its sign too."
    )


def latex(results: Results, means: pd.DataFrame) -> str:
    """A table for a paper: a row a scheme, a column a target without a guarantee.

    Beneath a budget stands the accuracy, beneath an accuracy drop the cost. The best of each column
    among those that met the target with every seed is bold.
    """
    rows = means[means["target_kind"].isin(results_table.SEARCHED)]
    rows = rows[rows["search"] != "geometric"].dropna(subset="accuracy")
    words, bold = {}, {}
    for name, column in rows.groupby("target", sort=False):
        column = column.set_index(results_table.SCHEME)
        drop = (column["target_kind"] == "drop").all()
        cells = shown(column.reset_index(), ["accuracy", "cost"])
        heading = f"{'cost' if drop else '%'} at {name}"
        words[heading] = cells["cost" if drop else "accuracy %"].set_axis(column.index)
        value = column["cost"].round(3) if drop else column["accuracy"].round(3)
        able = value[column["met"] == 1]
        best = (able.min() if drop else able.max()) if len(able) else np.nan
        bold[heading] = (value == best) & (column["met"] == 1)
    # Columns of different schemes would be joined in the order of the alphabet.
    schemes = pd.MultiIndex.from_frame(rows[results_table.SCHEME].drop_duplicates())
    table = pd.DataFrame(words).reindex(schemes).fillna("-")
    marks = pd.DataFrame(bold).reindex(table.index).eq(other=True)
    names = schemes.to_frame(index=False)
    caption = (
        f"Early exits on {results['dataset']}: test accuracy in percent at each target (for an "
        "accuracy drop the cost, as a fraction of the plain network's multiply-accumulates), mean "
        f"and half of the range over {len(results['seeds'])} seeds. Bold: the best that met the "
        "target with every seed."
    )
    plain = names.map(lambda _: False)
    return results_table.latex(
        pd.concat([names, table.reset_index(drop=True)], axis=1),
        caption,
        pd.concat([plain, marks.reset_index(drop=True)], axis=1),
    )


# --- figures


def _figures(results: Results, table: pd.DataFrame) -> dict[str, Figure]:
    """Every figure that there are numbers for, by name."""
    figures = {
        "accuracy_macs": plots.tradeoff(
            _panels(results), "mean cost (fraction of the plain network's multiply-accumulates)"
        )
    }
    timed = results_table.timed(table).dropna(subset="accuracy")
    if len(timed):
        batches = ", ".join(map(str, timed["batch"].unique()))
        figures["accuracy_time"] = plots.tradeoff(
            _time_panels(timed), f"measured time (ms for a batch of {batches})"
        )
    first = [
        d for d in results["differences"] if d["target"] == results["differences"][0]["target"]
    ]
    if first:
        figures["differences"] = plots.intervals(
            [f"{_name(d['a'])} - {_name(d['b'])}" for d in first],
            [(d["low"], d["difference"], d["high"]) for d in first],
            [d["significant"] for d in first],
        )
    for i, rows in enumerate(_drift_groups(results).values()):
        figures["drift" if i == 0 else f"drift_{i}"] = plots.drift(rows)
    for entry in results["agreement"]:
        same = {f"{entry['regime']}: same exit": entry["exits"]}
        same["same prediction"] = entry["answers"]
        figures[f"agreement_{entry['regime']}"] = plots.shares(
            same, entry["policies"], entry["policies"]
        )
    figures |= _class_figure(results)
    return figures


def _panels(results: Results) -> dict[str, list[Series]]:
    """Accuracy against cost: a panel a regime, with the cascade and the static networks in each."""

    def series(curve: Mapping[str, Any], name: str) -> Series:
        points = pd.DataFrame(curve["points"]).astype("float64")
        x, y, low, high = (points[k].to_numpy() for k in ("cost", "accuracy", "low", "high"))
        return Series(name, x, y, low=low, high=high)

    cascades = [
        series(c, f"cascade by {c['policy']}")
        for c in results["curves"]
        if c["regime"] == "cascade"
    ]
    cost = np.array([s["cost"] for s in results["static"]])
    accuracy = np.array([s["accuracy"]["mean"] for s in results["static"]])
    panels = {}
    for regime in results["regimes"]:
        curves = [c for c in results["curves"] if c["regime"] == regime["name"]]
        oracle = pd.DataFrame(regime["oracle"])
        panels[regime["name"]] = [
            *(series(c, c["policy"]) for c in curves),
            *cascades,
            *([Series("plain networks", cost, accuracy, "networks")] if len(cost) else []),
            Series(
                "oracle (upper bound)",
                oracle["cost"].to_numpy(),
                oracle["accuracy"].to_numpy(),
                "bound",
            ),
        ]
    return panels


def _time_panels(timed: pd.DataFrame) -> dict[str, list[Series]]:
    def series(rows: pd.DataFrame, name: str, kind: Any = "policy") -> Series:
        return Series(name, rows["ms"].to_numpy(), rows["accuracy"].to_numpy(), kind)

    plain = series(timed[timed["regime"] == "static"], "plain networks", "networks")
    cascade = timed[timed["regime"] == "cascade"].groupby("policy", sort=False)
    cascades = [series(rows, f"cascade by {name}") for name, rows in cascade]
    panels = {}
    early = timed[~timed["regime"].isin(["static", "cascade"])]
    for regime, rows in early.groupby("regime", sort=False):
        lines = [series(r, str(name)) for name, r in rows.groupby("policy", sort=False)]
        panels[str(regime)] = [*lines, *cascades, plain]
    return panels or {"": [*cascades, plain]}


def _class_figure(results: Results) -> dict[str, Figure]:
    """Where the test images of each class leave, for the reference at the leading target."""
    rows = [
        row
        for row in results["rows"]
        if row["target"]["kind"] == "budget"
        and row.get("class_exit_fractions")
        and {k: row[k] for k in ("regime", "policy")} == results["reference"]
    ]
    if not rows:
        return {}
    values = np.asarray(rows[0]["class_exit_fractions"], float)
    order = np.arange(len(values))
    if len(values) > _MOST_CLASSES:  # those that leave first, and those that leave last
        order = np.argsort(values @ np.arange(values.shape[1]), kind="stable")
        order = np.concatenate([order[: _MOST_CLASSES // 2], order[-_MOST_CLASSES // 2 :]])
    names = [str(results["classes"][c]) for c in order]
    exits = [f"exit {e + 1}" for e in range(values.shape[1])]
    title = f"{_name(results['reference'])}, {target_words(rows[0]['target'])}"
    return {"classes": plots.shares({title: values[order]}, names, exits)}


# --- tables


def _gaps(results: Results, target: str) -> list[Mapping[str, Any]]:
    return [d for d in results["differences"] if target_words(d["target"]) == target]


def _gap(results: Results, row: pd.Series) -> Mapping[str, Any] | None:
    """The tested difference of a row of `over_seeds` to the reference."""
    scheme = {"regime": row["regime"], "policy": row["policy"]}
    for gap in _gaps(results, row["target"]):
        if gap["a"] == scheme and gap["b"] == results["reference"]:
            return gap if row["search"] == "optimal" else None
    return None


def _target_table(results: Results, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of a target with their change against the reference, in points."""
    words = shown(rows, _TARGET_COLUMNS)
    gaps = [_gap(results, row) for _, row in rows.iterrows()]
    changes = ["-" if gap is None else _points(gap) for gap in gaps]
    if "accuracy %" in words and set(changes) != {"-"}:
        words.insert(list(words.columns).index("accuracy %") + 1, "change (points)", changes)
    return words


def _points(gap: Mapping[str, Any]) -> str:
    mean, low, high = (100 * gap[name] for name in ("difference", "low", "high"))
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" + (f" {MARK}" if gap["significant"] else "")


def _difference_table(results: Results) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "target": target_words(d["target"]),
                "first": _name(d["a"]),
                "minus second": _name(d["b"]),
                "points": _points(d),
                "corrected p": "< 0.001" if d["adjusted_p"] < 1e-3 else f"{d['adjusted_p']:.3f}",
                "cost": f"{d['cost_difference']:+.3f}",
            }
            for d in results["differences"]
        ]
    )


def _area_table(results: Results) -> pd.DataFrame:
    rows = sorted(results["curves"], key=lambda c: -c["area"]["mean"])
    return pd.DataFrame(
        [
            {
                "regime": c["regime"],
                "policy": c["policy"],
                "mean accuracy %": f"{100 * c['area']['mean']:.2f}",
            }
            for c in rows
        ]
    )


def _placement_table(results: Results) -> pd.DataFrame:
    names = {"budget_ms": "budget ms", "accuracy": "accuracy", "ms": "ms"}
    names |= {"all_accuracy": "all exits: accuracy", "all_ms": "all exits: ms"}
    rows = []
    for row in results["placement"]:
        numbers = {
            new: "-" if row.get(old) is None else f"{row[old]:.3f}" for old, new in names.items()
        }
        kept = " ".join(str(e + 1) for e in row.get("kept") or ()) or "-"
        words = {"regime": row["regime"], "policy": row["policy"], "keep exits": kept}
        rows.append({**words, **numbers, "search": row.get("search") or row.get("error", "-")})
    return pd.DataFrame(rows)


def _drift_groups(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of drift by scheme and target, in words."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in results["drift"]:
        groups.setdefault(f"{_name(row)}, {target_words(row['target'])}", []).append(row)
    return groups


def _notices(results: Results) -> list[str]:
    failed = [f"{f['cell']} failed: {f['error']}" for f in results["failed"]]
    left = results.get("left_out") or []
    words = f"{len(left)} networks were left out by --budget-hours: {', '.join(left)}."
    return [*filter(None, [results.get("notice"), words if left else ""]), *failed]


def _name(scheme: Mapping[str, Any]) -> str:
    return f"{scheme['policy']} ({scheme['regime']})"


def _spread(rows: pd.DataFrame) -> str:
    return str(shown(rows, ["accuracy"]).iloc[0, 0])
