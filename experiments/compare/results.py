"""From decisions to the results of a comparison: the results table, and results.json.

`results.json` holds one dict of plain data. Costs are fractions of the plain network's
multiply-accumulates (`whole_macs`); accuracies and risks are fractions. S is a spread over seeds,
{mean, low, high, seeds}: the mean, the smallest and the largest (None for one seed), and each
value. T is a target:

    {kind: budget, value} | {kind: ms, value, batch} | {kind: drop, value}
    {kind: risk, value, loss, delta, method, path} | {kind: certificate, value, budget, loss, ...}

    dataset, data_source, notice, command, date, device, versions, seeds, network, seconds, samples,
    classes, whole_macs, failed [{cell, error}], reference {regime, policy}
    regimes      [{name, exits [{cost, accuracy S, ece}], overthinking, oracle [{cost, accuracy}]}]
    static       [{name, cost, macs, accuracy S, ms}]: plain networks trained alone
    rows         [{regime, policy, target T, search, accuracy S, cost S, exit_fractions [E], ece,
                   random, oracle, met, error, class_exit_fractions [C][E], thresholds}]; a risk or
                   certificate has `risk` S and `certified`, a number of seeds, too
    curves       [{regime, policy, points [{cost, accuracy, low, high}], area S}], area_range
    differences, comparisons, level, draws; agreement: see `experiments.compare.differences`
    timing       [{regime or static or cascade, policy, target, strategy, batch, ms, spread,
                   plain_ms, ideal_ms, speedup, efficiency, accuracy, cost}]
    drift        [{corruption, severity, regime, policy, target, accuracy, cost, seeds, risk,
                   interval, epsilon, broken, holds}]; severity 0 is the clean test images, broken
                   and seeds are numbers of seeds
    placement    [{regime, policy, budget_ms, batch, kept, of, accuracy, ms, all_accuracy, all_ms,
                   search}], or an error
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from eejax.evaluation import metrics
from eejax.evaluation.routing import Scored
from eejax.selection.bounds import interval
from experiments.compare import cells as compare_cells
from experiments.compare.cells import PLAIN, Cell
from experiments.compare.config import Comparison
from experiments.compare.decide import Choice
from experiments.compare.differences import LEVEL, against, agreement, by_name, correct_at_last
from experiments.evaluate.decide import exit_rows
from experiments.report import table
from experiments.report.table import accuracy_columns, target_columns

CURVE_POINTS = 40
Groups = Mapping[tuple[str, str], Sequence[Choice]]
Row = dict[str, Any]


def assemble(
    config: Comparison,
    cells: Sequence[Cell],
    choices: Sequence[Choice],
    timing: Sequence[Row],
    placement: Sequence[Row],
    workdir: Path,
) -> tuple[Row, pd.DataFrame]:
    """Everything that the report shows.

    Args:
      config: of the comparison.
      cells: the trained ones.
      choices: the decisions.
      timing: of `experiments.compare.timing.timed`.
      placement: of `experiments.compare.timing.placed`.
      workdir: of the comparison.

    Returns:
      The keys of results.json that are figures, and the results table.
    """
    groups: dict[tuple[str, str], list[Choice]] = {}
    for choice in sorted(choices, key=lambda c: c.model.seed):
        groups.setdefault((choice.model.name, choice.policy), []).append(choice)
    reference = (config.regimes[0], config.policies[0])
    whole = float(next(compare_cells.macs(cell)[-1] for cell in cells if cell.name == PLAIN))
    results = _table(groups, cells, timing, whole, config.seeds[0], workdir)
    curves, low, high = _curves(groups)
    differences, comparisons, draws = against(groups, reference, cells, config, workdir)
    figures = {
        "network": f"{config.network.words}, "
        f"{config.network.num_exits} exits, {whole / 1e6:.2f} M multiply-accumulates",
        "reference": {"regime": reference[0], "policy": reference[1]},
        "whole_macs": whole,
        "regimes": _regimes(cells, results, workdir),
        "static": _static(results, timing),
        "rows": [row for key, group in groups.items() for row in _rows(key, group, config)],
        "curves": curves,
        "area_range": [low, high],
        "differences": differences,
        "comparisons": comparisons,
        "level": LEVEL,
        "draws": draws,
        "agreement": agreement(groups, config),
        "timing": [dict(row) for row in timing if "placement" not in row],
        "drift": _drift(groups, config.drift.kinds),
        "placement": _placement(placement, timing, config.timing.batch),
    }
    return figures, results


def spread(values: Sequence[float]) -> Row:
    """Mean, smallest and largest over seeds; with one seed there is no spread."""
    several = len(values) > 1
    return {
        "mean": float(np.mean(values)),
        "low": float(np.min(values)) if several else None,
        "high": float(np.max(values)) if several else None,
        "seeds": [float(v) for v in values],
    }


def _table(
    groups: Groups,
    cells: Sequence[Cell],
    timing: Sequence[Row],
    whole: float,
    timed_seed: int,
    workdir: Path,
) -> pd.DataFrame:
    """The results table: decisions, exits of each network, plain networks, and times."""
    rows: list[Row] = []
    for (regime, policy), group in groups.items():
        for choice in group:
            scheme = {"regime": regime, "policy": policy, "seed": choice.model.seed}
            decided = [*choice.decided.rows, *choice.decided.curve]
            rows += [{n: row.get(n) for n in table.COLUMNS} | scheme for row in decided]
    for cell in cells:
        test = compare_cells.traces(cell, workdir).test
        cost = compare_cells.macs(cell) / whole
        if cell.kind == "regime":
            exits = exit_rows(Scored(test.logits, test.gates), test, cost)
            rows += [{**row, "regime": cell.name, "seed": cell.seed} for row in exits]
        else:
            row = {**target_columns({"kind": "network"}), "policy": cell.name, "seed": cell.seed}
            row |= accuracy_columns(correct_at_last(test))
            rows.append({**row, "regime": "static", "cost": float(cost[-1])})
    for row in timing:
        if "placement" not in row:
            scheme = {name: row.get(name) for name in ("regime", "policy", "accuracy", "cost")}
            target = target_columns(row.get("target") or {"kind": "network"})
            rows.append(table.timed_row({**scheme, **target, "seed": timed_seed}, row))
    for row in rows:
        row["macs"] = None if row.get("cost") is None else whole * row["cost"]
    return table.frame(rows)


def _static(results: pd.DataFrame, timing: Sequence[Row]) -> list[Row]:
    ms = {row["policy"]: row["ms"] for row in timing if row["regime"] == "static"}
    rows = [
        {
            "name": name,
            "cost": float(group["cost"].iloc[0]),
            "macs": float(group["macs"].iloc[0]),
            "accuracy": spread(group["accuracy"].tolist()),
            "ms": ms.get(name),
        }
        for name, group in table.decided(results, "network").groupby("policy", sort=False)
    ]
    return sorted(rows, key=lambda row: row["cost"])


def _regimes(cells: Sequence[Cell], results: pd.DataFrame, workdir: Path) -> list[Row]:
    exits = table.decided(results, "exit")
    rows = []
    for name, group in by_name(cells, "regime").items():
        tests = [compare_cells.traces(cell, workdir).test for cell in group]
        alone = exits[exits["regime"] == name].groupby("target_value")
        cost = alone["cost"].first().to_numpy()
        correct = [t.logits.argmax(-1) == t.labels[:, None] for t in tests]
        over = [metrics.overthinking(t.logits.argmax(-1), t.labels) for t in tests]
        budgets = np.linspace(cost[0], cost[-1], CURVE_POINTS)
        oracle = [[metrics.oracle_accuracy(c, cost, b) for b in budgets] for c in correct]
        stored = [(cell.directory(workdir) / compare_cells.DONE).read_text() for cell in group]
        gate = [json.loads(text)["gate_mean"] for text in stored]
        rows.append(
            {
                "name": name,
                "exits": [
                    {
                        "cost": float(one["cost"].iloc[0]),
                        "accuracy": spread(one["accuracy"].tolist()),
                        "ece": float(one["ece"].mean()),
                    }
                    for _, one in alone
                ],
                "overthinking": {key: float(np.mean([o[key] for o in over])) for key in over[0]},
                "oracle": [
                    {"cost": float(b), "accuracy": float(a)}
                    for b, a in zip(budgets, np.mean(oracle, axis=0), strict=True)
                ],
                "gate_mean": np.mean(gate, axis=0).tolist(),
            }
        )
    return rows


def _rows(key: tuple[str, str], group: Sequence[Choice], config: Comparison) -> list[Row]:
    """A row a target: what the rows of all seeds come to together."""
    rows = []
    for i, first in enumerate(group[0].decided.rows):
        parts = [choice.decided.rows[i] for choice in group]
        able = [part for part in parts if "error" not in part]
        row: Row = {"regime": key[0], "policy": key[1]}
        row |= {"target": first["json_target"], "search": first["search"]}
        if not able:
            rows.append({**row, "error": parts[-1]["error"]})
            continue
        row |= {name: spread([part[name] for part in able]) for name in ("accuracy", "cost")}
        row |= {
            name: None if able[0][name] is None else float(np.mean([part[name] for part in able]))
            for name in ("ece", "random", "oracle")
        }
        # Members of a cascade differ from seed to seed, and exits then cannot be averaged.
        if len({tuple(part["exits"]) for part in able}) == 1:
            for name in ("exit_fractions", "class_exit_fractions"):
                row[name] = np.mean([part[name] for part in able], axis=0).tolist()
        row["thresholds"] = [[_threshold(t) for t in part["thresholds"]] for part in able]
        # A certificate that could not be given is no guarantee that was broken.
        guarantee = first["target_kind"] in table.GUARANTEES
        met = [part["met"] for part in able]
        row["met"] = _count(met, len(able) if guarantee else len(config.seeds))
        if able[0]["expected_ms"] is not None:
            row["expected_ms"] = float(np.mean([part["expected_ms"] for part in able]))
        if guarantee:
            row["risk"] = spread([part["risk"] for part in able])
            row["certified"] = len(able)
            row["certificate"] = able[0]["certificate"]
        if len(able) < len(parts):
            row["error"] = next(part["error"] for part in parts if "error" in part)
        rows.append(row)
    return rows


def _count(met: Sequence[bool], of: int) -> str:
    if all(met) and len(met) == of:
        return "yes"
    return f"{sum(met)} of {of}" if any(met) else "no"


def _threshold(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else ("off" if value > 0 else "always")


def _curves(groups: Groups) -> tuple[list[Row], float, float]:
    """Curves on a common grid of costs, and the area under each over the range that all have."""
    lines = {
        key: [
            np.array([[p["cost"], p["accuracy"]] for p in choice.decided.curve]).T
            for choice in group
        ]
        for key, group in groups.items()
    }
    every = [line for key in lines for line in lines[key]]
    low = max(float(line[0].min()) for line in every)
    # A curve that ends early stays as it is: more budget does not have to be spent.
    high = max(float(line[0].max()) for line in every)
    rows = []
    for (regime, policy), seeds in lines.items():
        start = max(float(line[0].min()) for line in seeds)
        stop = max(float(line[0].max()) for line in seeds)
        at = np.linspace(start, stop, CURVE_POINTS)
        values = np.array([metrics.curve_at(line[0], line[1], at) for line in seeds])
        points = [
            {
                "cost": float(c),
                "accuracy": float(v.mean()),
                "low": float(v.min()),
                "high": float(v.max()),
            }
            for c, v in zip(at, values.T, strict=True)
        ]
        area = [metrics.area_under_curve(line[0], line[1], low, high) for line in seeds]
        rows.append({"regime": regime, "policy": policy, "points": points, "area": spread(area)})
    return rows, low, high


def _drift(groups: Groups, kinds: Sequence[str]) -> list[Row]:
    """Rows of drift over seeds."""
    rows = []
    for (regime, policy), group in groups.items():
        cases: dict[tuple[Any, ...], list[Row]] = {}
        for choice in group:
            for i, row in enumerate(choice.decided.drift):
                case = row["corruption"], row["severity"], json.dumps(row["target"])
                part = {**row, "lost": choice.decided.arrays[f"drift_{i}"]}
                cases.setdefault(case, []).append(part)
        for same in cases.values():
            row = {key: same[0][key] for key in ("corruption", "severity", "target")}
            row |= {"regime": regime, "policy": policy, "seeds": len(same)}
            row |= {n: float(np.mean([part[n] for part in same])) for n in ("accuracy", "cost")}
            if row["target"]["kind"] == "risk":
                lost = [part["lost"] for part in same]
                row |= _judged(lost, row["target"]["value"], len(cases))
            # Every corruption begins at the clean images, as severity 0.
            clean = row["severity"] == 0
            rows += [{**row, "corruption": k} for k in kinds] if clean else [row]
    return rows


def _judged(lost: Sequence[np.ndarray], epsilon: float, intervals: int) -> Row:
    """Whether a promised risk holds for the losses `[images]` of each seed's own thresholds.

    Each seed's interval is widened, so that all that are looked at hold together.
    """
    order = np.random.default_rng(0).permutation(len(lost[0]))  # test images may come sorted
    level = 1 - (1 - LEVEL) / (intervals * len(lost))
    ends = np.array([interval(losses[order], level) for losses in lost])  # [S, 2]
    broken = int((ends[:, 0] > epsilon).sum())
    holds = "no" if broken else "yes" if (ends[:, 1] <= epsilon).all() else "unclear"
    return {
        "risk": float(np.mean([losses.mean() for losses in lost])),
        "interval": [float(ends[:, 0].min()), float(ends[:, 1].max())],
        "epsilon": epsilon,
        "broken": broken,
        "holds": holds,
    }


def _placement(placement: Sequence[Row], timing: Sequence[Row], batch: int) -> list[Row]:
    """The chosen exits with their measured times."""
    rows = []
    for row in placement:
        full = {**row, "batch": batch}
        for timed in timing:
            if timed.get("placement") == row["budget_ms"]:
                full["all_ms" if timed["all"] else "ms"] = timed["ms"]
        rows.append(full)
    return rows
