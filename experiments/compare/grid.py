"""The report of a grid: a table for each block, and one over all.

Over all, a scheme, a regime and a policy, is compared at each block's leading target, which may be
another in each. Where data sets differ, accuracies cannot be averaged; the mean change against the
reference and the mean rank can: Demsar, *Statistical Comparisons of Classifiers over Multiple Data
Sets*, JMLR 2006, https://jmlr.org/papers/v7/demsar06a.html. They are of the schemes that have a
result in every block, and no test is made: a grid has few blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from rich.console import Group
from rich.text import Text

from experiments.compare import report
from experiments.files import write_json
from experiments.report import page
from experiments.report import table as results_table
from experiments.report.report import provenance


class Part(NamedTuple):
    """A block's results.

    Attributes:
      name: of the block and its directory.
      results: of its results.json.
      table: its results table.
    """

    name: str
    results: Mapping[str, Any]
    table: pd.DataFrame


def write(workdir: Path, parts: Sequence[Part], notices: Sequence[str]) -> pd.DataFrame:
    """Writes report.html and results.json over all blocks, whose own lie in their directories.

    Returns:
      The table over all.
    """
    rows = over_all(parts)
    blocks = [
        {"name": part.name, "dataset": part.results["dataset"], "network": part.results["network"]}
        for part in parts
    ]
    write_json(
        workdir / "results.json",
        {"blocks": blocks, "over_all": rows.to_dict("records"), "notices": list(notices)},
    )
    page.write(
        workdir / "report.html",
        "grid.html",
        title="eejax comparison: " + ", ".join(part.name for part in parts),
        notices=notices,
        over_all=words(rows, parts),
        blocks=[
            {
                "name": part.name,
                "headline": report.headline(part.results, means),
                "summary": report.summary(part.results, means),
                "target": report.leading_target(means),
            }
            for part in parts
            for means in [_means(part)]
        ],
        provenance=provenance(parts[0].results),
    )
    return rows


def console(parts: Sequence[Part], rows: pd.DataFrame) -> Group:
    """The table over all, for the terminal in plain ASCII."""
    lines = [
        f"[{i}] {part.name}: {report.leading_target(_means(part))}"
        for i, part in enumerate(parts, 1)
    ]
    shown = words(rows, parts)
    # Headings as wide as the names of blocks would leave no room for the numbers.
    ways = {name: f"[{i}] %" for i, name in enumerate(shown.columns[2 : 2 + len(parts)], 1)}
    ways |= {"mean change (points)": "change", "mean rank": "rank"}
    return Group(
        Text(""),
        *(Text(line) for line in lines),
        Text(""),
        results_table.rich_table(shown.rename(columns=ways)),
    )


def over_all(parts: Sequence[Part]) -> pd.DataFrame:
    """A row a scheme that has a result in every block, the best mean rank first.

    Columns: `regime`, `policy`; for each block its accuracy, a fraction, under the block's name;
    `change`, the mean over blocks of the difference to the block's reference; `rank`, the mean over
    blocks of its rank among these schemes, 1 for the highest accuracy, equal ones sharing theirs.
    """
    columns, changes = {}, {}
    for part in parts:
        means = _means(part)
        rows = report.leading_rows(means).dropna(subset="accuracy")
        accuracy = rows.set_index(results_table.SCHEME)["accuracy"].astype("float64")
        columns[part.name] = accuracy[~accuracy.index.duplicated()]
        reference = part.results["reference"]
        base = columns[part.name].get((reference["regime"], reference["policy"]))
        changes[part.name] = columns[part.name] - (float("nan") if base is None else base)
    table = pd.DataFrame(columns).dropna()
    ranks = table.rank(ascending=False).mean(axis=1)
    rows = table.assign(
        **{"change": pd.DataFrame(changes).loc[table.index].mean(axis=1), "rank": ranks}
    )
    return rows.sort_values("rank", kind="stable").reset_index()


def words(rows: pd.DataFrame, parts: Sequence[Part]) -> pd.DataFrame:
    """The same for people: percent, points, and each block's target in the heading."""
    targets = {part.name: report.leading_target(_means(part)) for part in parts}
    shown = {name: rows[name] for name in results_table.SCHEME}
    shown |= {
        f"{name}: % at {target}": rows[name].map(lambda value: f"{100 * value:.1f}")
        for name, target in targets.items()
    }
    shown["mean change (points)"] = rows["change"].map(
        lambda value: "-" if pd.isna(value) else f"{100 * value:+.2f}"
    )
    shown["mean rank"] = rows["rank"].map(lambda value: f"{value:.2f}")
    return pd.DataFrame(shown)


def _means(part: Part) -> pd.DataFrame:
    return results_table.over_seeds(part.table[part.table["executor"].isna()])
