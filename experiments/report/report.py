"""The main job's report: report.json, results.csv, report.html, and a table on the terminal.

`report` is one dict of plain data. These keys are always there:

    dataset, device, versions, seed
    target     {kind, value}: what the report leads with
    exits      [{index, macs, fraction, accuracy, ece, temperature}]
    policies   [{name, target, search, thresholds, accuracy, mean_macs, exit_fractions, ...}]
    curve      {policy: [{mean_macs, mean_fraction, accuracy}]}
    inference  [{policy, strategy, batch, ms, plain_ms, ideal_ms, speedup, efficiency, ...}]
    train      {seconds, images_per_second, epochs}

Everything that is shown comes from the results table (`experiments.report.table`) and, for the
values of the run, from this dict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Group
from rich.text import Text

from experiments.files import write_json
from experiments.report import page, plots, table
from experiments.report.plots import Series
from experiments.report.table import decided, shown

MOST_ROWS = 8
DESCRIPTION = pd.DataFrame(
    [(name, c.dtype, c.unit, c.meaning) for name, c in table.COLUMNS.items()],
    columns=["column", "type", "unit", "meaning"],
)


def write(
    workdir: Path,
    report: Mapping[str, Any],
    results: pd.DataFrame,
    *,
    history: Sequence[Mapping[str, Any]],
    reliability: Sequence[Mapping[str, Any]],
    gallery: Sequence[Sequence[Mapping[str, Any]]],
) -> None:
    """Writes report.json, results.csv and report.html, a page that fetches nothing.

    Args:
      workdir: of the run.
      report: see the module.
      results: the results table.
      history: one row an epoch, see `plots.training_curves`; empty if nothing was trained.
      reliability: one set of bins an exit, see `plots.reliability`; or empty.
      gallery: for each exit `{image, predicted, truth, confidence}` of images that left there.
    """
    write_json(workdir / "report.json", report)
    table.write_csv(workdir / "results.csv", results)
    searched = decided(results, *table.SEARCHED)
    failed = searched[searched["error"].notna()]
    leading = _leading(report, results)
    fractions = {
        f"{row.policy}, {row.target}": np.asarray(row.exit_fractions, float)
        for row in leading.itertuples()
    }
    exits = decided(results, "exit")
    page.write(
        workdir / "report.html",
        "report.html",
        title=f"eejax: {report['dataset']}, seed {report['seed']}",
        notices=[*filter(None, [report.get("notice")]), *(report.get("warnings") or ())],
        headline=headline(report, results),
        tradeoff=plots.tradeoff({"": _series(report, results)}, "mean cost (fraction of the MACs)"),
        summary=summary(report, results),
        target=next(iter(leading["target"]), "no target that could be met"),
        policies=shown(searched, _POLICY_COLUMNS),
        errors=[f"{row.policy}, {row.target}: {row.error}" for row in failed.itertuples()],
        thresholds=shown(searched[searched["error"].isna()], _THRESHOLD_COLUMNS),
        histogram=plots.exit_histogram(fractions) if fractions else None,
        exits=_exit_table(report, results),
        overthinking=overthinking(report.get("overthinking") or {}),
        reliability=plots.reliability(reliability, exits["ece"]) if reliability else None,
        time=shown(table.timed(results), _TIME_COLUMNS),
        training=_training(report["train"]),
        curves=plots.training_curves(history) if history else None,
        gallery=gallery,
        provenance=provenance(report),
        columns=DESCRIPTION,
    )


_POLICY_COLUMNS = ["policy", "target", "search", "accuracy", "cost", "met", "ece", "exit_fractions"]
_THRESHOLD_COLUMNS = ["policy", "target", "search", "chosen_accuracy", "chosen_cost"]
_THRESHOLD_COLUMNS += ["forecast_accuracy", "forecast_cost", "thresholds"]
_TIME_COLUMNS = ["policy", "target", "executor", "batch", "cost", "ms", "spread", "plain_ms"]
_TIME_COLUMNS += ["ideal_ms", "speedup", "efficiency"]


def console(report: Mapping[str, Any], results: pd.DataFrame) -> Group:
    """The headline and the summary for the terminal, in plain ASCII for 80 columns."""
    parts: list[Any] = [Text(headline(report, results)), Text("")]
    words = summary(report, results)
    narrow = [name for name in words if name != "95 % interval" and "speedup" not in str(name)]
    parts += [table.rich_table(words[narrow])]
    errors = decided(results, *table.SEARCHED).dropna(subset="error")
    parts += [
        Text(f"{row.policy}, {row.target}: {row.error}", style="yellow")
        for row in errors.itertuples()
    ]
    parts += [Text(_training(report["train"]), style="dim")]
    parts += [Text(f"WARNING: {t}", style="bold yellow") for t in report.get("warnings") or ()]
    return Group(*parts)


def headline(report: Mapping[str, Any], results: pd.DataFrame) -> str:
    """The result in one or two sentences, computed from the numbers; a loss reads like a gain.

    It is of the policy that did best on the images that thresholds were chosen on, at the report's
    target. So it is not picked by its accuracy on the test images. With given thresholds it is of
    the policy that was timed.
    """
    whole = decided(results, "exit").iloc[-1]
    leading = _leading(report, results)
    if leading.empty:
        return (
            f"The whole network classifies {100 * whole['accuracy']:.1f} % of the test images "
            "correctly. No policy reached its target, so no computation is saved."
        )
    measured = table.timed(results)
    best = leading["chosen_accuracy"].fillna(0.0).idxmax()
    if report["target"]["kind"] == "given" and len(measured):
        best = (leading["policy"] == measured["policy"].iloc[0]).idxmax()
    row = leading.loc[[best]].iloc[0]
    words = (
        f"At {100 * row['cost']:.0f} % of the whole network's multiply-accumulates, "
        f"{row['policy']} classifies {100 * row['accuracy']:.1f} % of the test images "
        f"correctly; the whole network classifies {100 * whole['accuracy']:.1f} %."
    )
    same = measured[measured["policy"] == row["policy"]]
    times = []
    for timing in same.itertuples():
        images = "one image" if timing.batch == 1 else f"{timing.batch} images"
        times.append(f"{images} in {timing.ms:.3g} ms instead of {timing.plain_ms:.3g} ms")
    return f"{words} It classifies {', and '.join(times)}." if times else words


def summary(report: Mapping[str, Any], results: pd.DataFrame) -> pd.DataFrame:
    """The whole network and the policies at the report's target, at most eight rows in all.

    More policies than that are cut to those with the highest accuracy on the held-out images.
    """
    whole = decided(results, "exit").iloc[-1:]
    leading = _leading(report, results)
    if len(leading) >= MOST_ROWS:
        best = leading["chosen_accuracy"].nlargest(MOST_ROWS - 1).index
        leading = leading[leading.index.isin(best)]
    rows = pd.concat([whole.assign(policy="whole network", target=""), leading])
    words = shown(rows, ["policy", "accuracy", "cost", "met", "exit_fractions"])
    interval = zip(rows["accuracy_low"], rows["accuracy_high"], strict=True)
    at = list(words.columns).index("accuracy %") + 1
    words.insert(at, "95 % interval", [f"{100 * a:.1f} to {100 * b:.1f}" for a, b in interval])
    change = 100 * (rows["accuracy"] - whole["accuracy"].iloc[0])
    words.insert(at + 1, "change", ["", *(f"{c + 0.0:+.1f}" for c in change.round(1).iloc[1:])])
    for timing in table.timed(results).itertuples():
        speedups = [
            f"{timing.speedup:.2f}" if name == timing.policy else "" for name in words["policy"]
        ]
        words[f"speedup, batch {timing.batch}"] = speedups
    return words


def overthinking(shares: Mapping[str, float]) -> list[str]:
    """How often the last exit was not needed, or did harm, in words."""
    known = {
        "destructive": "are correct at some earlier exit and wrong at the last",
        "wasteful": "are correct at the last exit, and were at an earlier one",
    }
    return [
        f"{100 * shares[key]:.1f} % of the test images {words} ({key} overthinking)."
        for key, words in known.items()
        if key in shares
    ]


def provenance(report: Mapping[str, Any]) -> dict[str, str]:
    """How a run or a comparison was made; what it does not hold is left out."""
    pairs = {
        "Command": report.get("command"),
        "Data": ", ".join(filter(None, (report["dataset"], report.get("data_source")))),
        "Images": report.get("samples"),
        "Network": report.get("network"),
        "Whole network": f"{table.macs_words(report['whole_macs'])} MACs an image",
        "Seeds": report.get("seeds", report.get("seed")),
        "Seconds": report.get("seconds"),
        "Device": report.get("device"),
        "Date": report.get("date"),
        "Versions": report.get("versions"),
    }

    def words(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{k} {words(v)}" for k, v in value.items())
        if isinstance(value, list | tuple):
            return ", ".join(map(str, value))
        return f"{value:.1f}" if isinstance(value, float) else str(value)

    return {name: words(value) for name, value in pairs.items() if value is not None}


def _leading(report: Mapping[str, Any], results: pd.DataFrame) -> pd.DataFrame:
    """A row a policy at the report's target; at the first target with results where it has none."""
    rows = decided(results, *table.SEARCHED).dropna(subset="accuracy")
    rows = rows[rows["search"] != "geometric"]
    kind, value = report["target"]["kind"], report["target"].get("value")
    same = rows["target_kind"] == kind
    if value is not None:
        same &= rows["target_value"] == value
    if not same.any():
        same = rows["target"] == next(iter(rows["target"]), "")
    return rows[same]


def _series(report: Mapping[str, Any], results: pd.DataFrame) -> list[Series]:
    curves = decided(results, "curve").groupby("policy", sort=False)
    series = [
        Series(str(name), np.asarray(rows["cost"], float), np.asarray(rows["accuracy"], float))
        for name, rows in curves
    ]
    exits = decided(results, "exit")
    costs, accuracies = (np.asarray(exits[name], float) for name in ("cost", "accuracy"))
    return [*series, Series("all images at one exit", costs, accuracies, "exits")]


def _exit_table(report: Mapping[str, Any], results: pd.DataFrame) -> pd.DataFrame:
    words = shown(decided(results, "exit"), ["target", "macs", "cost", "accuracy", "ece"])
    return words.assign(temperature=[f"{row['temperature']:.2f}" for row in report["exits"]])


def _training(train: Mapping[str, Any]) -> str:
    if not train.get("epochs"):
        return "Nothing was trained in this run."
    return (
        f"{train['epochs']} epochs of training, {train['seconds']:,.0f} s, "
        f"{train['images_per_second']:,.0f} images a second."
    )
