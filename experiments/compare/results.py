"""From decisions to the results of a comparison: spreads over seeds, differences and what they are
worth, agreement, drift. `compare_report` says how the results look."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eejax.evaluation import metrics
from eejax.selection.bounds import interval
from experiments.compare import cells as compare_cells
from experiments.compare.cells import PLAIN, Cell
from experiments.compare.config import Comparison
from experiments.compare.differences import (
    LEVEL,
    Answer,
    Group,
    against,
    agreement,
    correct_at_last,
    named,
)
from experiments.train.pool import Failure

CURVE_POINTS = 40


class Facts(NamedTuple):
    """What results hold beside decisions.

    Attributes:
      opening: data set, device, versions, command, date.
      seconds: of each part.
      failures: cells that failed.
      timing: rows of `compare_timing.timed`.
      placement: rows of `compare_timing.placed`.
    """

    opening: Mapping[str, Any]
    seconds: Mapping[str, float]
    failures: Sequence[Failure]
    timing: Sequence[Mapping[str, Any]]
    placement: Sequence[Mapping[str, Any]]


def assemble(
    facts: Facts,
    config: Comparison,
    cells: Sequence[Cell],
    answers: Sequence[Answer],
    workdir: Path,
) -> dict[str, Any]:
    """Everything that the report shows, as plain data."""
    # One group a regime and policy, its seeds in order.
    groups: dict[tuple[str, str], list[Answer]] = {}
    for answer in sorted(answers, key=lambda a: a.subject.seed):
        groups.setdefault((answer.subject.name, answer.policy), []).append(answer)
    reference = (config.regimes[0], config.policies[0])
    plain = [cell for cell in cells if cell.name == PLAIN]
    whole = compare_cells.macs(plain[0])[-1]
    static = _static(cells, whole, facts.timing, workdir)
    rows = [row for key, group in groups.items() for row in _rows(key, group, config)]
    found, low, high = _curves(groups)
    differences, comparisons, draws = against(groups, reference, cells, config, workdir)
    return {
        **facts.opening,
        "seeds": list(config.seeds),
        "network": f"{config.network.words}, "
        f"{config.network.num_exits} exits, {whole / 1e6:.2f} M multiply-accumulates",
        "seconds": {**facts.seconds, "total": sum(facts.seconds.values())},
        "failed": [{"cell": f.name, "error": f.error} for f in facts.failures],
        "reference": {"regime": reference[0], "policy": reference[1]},
        "whole_macs": whole,
        "regimes": _regimes(cells, whole, workdir),
        "static": static,
        "rows": rows,
        "curves": found,
        "area_range": [low, high],
        "differences": differences,
        "comparisons": comparisons,
        "level": LEVEL,
        "draws": draws,
        "agreement": agreement(groups, config),
        "timing": [dict(row) for row in facts.timing if "placement" not in row],
        "drift": _drift(groups, config.drift.kinds),
        "placement": _placement(facts, config),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, smallest and largest over seeds; with one seed there is no spread."""
    some = len(values) > 1
    return {
        "mean": float(np.mean(values)),
        "low": float(np.min(values)) if some else None,
        "high": float(np.max(values)) if some else None,
        "seeds": [float(v) for v in values],
    }


def _static(
    cells: Sequence[Cell], whole: float, timing: Sequence[Mapping[str, Any]], workdir: Path
) -> list[dict[str, Any]]:
    ms = {row["policy"]: row["ms"] for row in timing if row["regime"] == "static"}
    rows = []
    for name, group in named(cells, "static").items():
        traces = [compare_cells.traces(cell, workdir).test for cell in group]
        correct = [correct_at_last(t).mean() for t in traces]
        cost = compare_cells.macs(group[0])[-1]
        rows.append(
            {
                "name": name,
                "cost": float(cost / whole),
                "macs": float(cost),
                "accuracy": spread(correct),
                "ms": ms.get(name),
            }
        )
    return sorted(rows, key=lambda row: row["cost"])


def _regimes(cells: Sequence[Cell], whole: float, workdir: Path) -> list[dict[str, Any]]:
    rows = []
    for name, group in named(cells, "regime").items():
        tests = [compare_cells.traces(cell, workdir).test for cell in group]
        cost = compare_cells.macs(group[0]) / whole
        correct = [t.logits.argmax(-1) == t.labels[:, None] for t in tests]
        over = [metrics.overthinking(t.logits.argmax(-1), t.labels) for t in tests]
        budgets = np.linspace(cost[0], cost[-1], CURVE_POINTS)
        oracle = [[metrics.oracle_accuracy(r, cost, b) for b in budgets] for r in correct]
        gate = [_stored(cell, workdir)["gate_mean"] for cell in group]
        rows.append(
            {
                "name": name,
                "exits": [
                    {
                        "cost": float(cost[e]),
                        "accuracy": spread([r[:, e].mean() for r in correct]),
                        "ece": float(
                            np.mean(
                                [
                                    metrics.expected_calibration_error(t.logits[:, e], t.labels)
                                    for t in tests
                                ]
                            )
                        ),
                    }
                    for e in range(len(cost))
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


def _stored(cell: Cell, workdir: Path) -> dict[str, Any]:
    return json.loads((cell.directory(workdir) / compare_cells.DONE).read_text())


def _rows(key: tuple[str, str], group: Group, config: Comparison) -> list[dict[str, Any]]:
    """A row a target: what the seeds' rows come to together."""
    made = []
    for i, first in enumerate(group[0].decided.facts["rows"]):
        parts = [answer.decided.facts["rows"][i] for answer in group]
        able = [part for part in parts if "accuracy" in part]
        row: dict[str, Any] = {"regime": key[0], "policy": key[1]}
        row |= {"target": first["target"], "search": first["search"]}
        if not able:
            made.append({**row, "error": parts[-1]["error"]})
            continue
        met = [_met(part) for part in able]
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
        # A certificate that was not given is no promise that was broken.
        promise = first["target"]["kind"] in ("risk", "certificate")
        row["met"] = _count(met, len(able) if promise else len(config.seeds))
        if "ms" in able[0] and able[0]["ms"] is not None:
            row["expected_ms"] = float(np.mean([part["ms"] for part in able]))
        if promise:
            row["risk"] = spread([_risk(part) for part in able])
            row["certified"] = len(able)
            row["certificate"] = able[0]["certificate"]
        if len(able) < len(parts):
            row["error"] = next(part["error"] for part in parts if "error" in part)
        made.append(row)
    return made


def _risk(part: Mapping[str, Any]) -> float:
    """The loss on the test split that the target bounds."""
    return 1 - part["accuracy"] if part["target"]["loss"] == "error" else part["disagreement"]


def _met(part: Mapping[str, Any]) -> bool:
    """Whether the target, chosen for on other data, holds on the test split."""
    target = part["target"]
    kind, value = target["kind"], target["value"]
    if kind == "budget":
        return part["cost"] <= value
    if kind == "ms":
        return part["ms"] <= value
    if kind == "drop":
        return part["accuracy"] >= part["last_accuracy"] - value
    held = _risk(part) <= value
    return held and (kind == "risk" or part["cost"] <= target["budget"])


def _count(met: Sequence[bool], of: int) -> str:
    if all(met) and len(met) == of:
        return "yes"
    return f"{sum(met)} of {of}" if any(met) else "no"


def _threshold(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else ("off" if value > 0 else "always")


def _curves(groups: Mapping[Any, Group]) -> tuple[list[dict[str, Any]], float, float]:
    """Curves on a common grid of costs, and the area under each over the range that all have."""
    lines = {
        key: [
            np.array([[p["cost"], p["accuracy"]] for p in answer.decided.facts["curve"]]).T
            for answer in group
        ]
        for key, group in groups.items()
    }
    every = [line for key in lines for line in lines[key]]
    low = max(float(line[0].min()) for line in every)
    # A curve that ends early stays as it is: more budget does not have to be spent.
    high = max(float(line[0].max()) for line in every)
    made = []
    for (regime, policy), some in lines.items():
        start = max(float(line[0].min()) for line in some)
        stop = max(float(line[0].max()) for line in some)
        at = np.linspace(start, stop, CURVE_POINTS)
        values = np.array([metrics.curve_at(line[0], line[1], at) for line in some])
        points = [
            {
                "cost": float(c),
                "accuracy": float(v.mean()),
                "low": float(v.min()),
                "high": float(v.max()),
            }
            for c, v in zip(at, values.T, strict=True)
        ]
        area = [metrics.area_under_curve(line[0], line[1], low, high) for line in some]
        made.append({"regime": regime, "policy": policy, "points": points, "area": spread(area)})
    return made, low, high


def _drift(groups: Mapping[tuple[str, str], Group], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of drift over seeds."""
    made = []
    for (regime, policy), group in groups.items():
        by_what: dict[str, list[tuple[Answer, int, dict[str, Any]]]] = {}
        for answer in group:
            for i, row in enumerate(answer.decided.facts["drift"]):
                what = json.dumps([row["corruption"], row["severity"], row["target"]])
                by_what.setdefault(what, []).append((answer, i, row))
        for parts in by_what.values():
            first = parts[0][2]
            row: dict[str, Any] = {key: first[key] for key in ("corruption", "severity", "target")}
            row |= {"regime": regime, "policy": policy, "seeds": len(parts)}
            for name in ("accuracy", "cost"):
                row[name] = float(np.mean([part[name] for _, _, part in parts]))
            if first["target"]["kind"] == "risk":
                lost = [a.decided.arrays[f"drift_{i}"] for a, i, _ in parts]
                row |= _judged(lost, first["target"]["value"], len(by_what))
            # Every corruption begins at the clean images, as severity 0.
            clean = first["severity"] == 0
            made += [{**row, "corruption": k} for k in kinds] if clean else [row]
    return made


def _judged(lost: Sequence[np.ndarray], epsilon: float, intervals: int) -> dict[str, Any]:
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


def _placement(facts: Facts, config: Comparison) -> list[dict[str, Any]]:
    """The chosen exits with their measured times."""
    made = []
    for row in facts.placement:
        full = dict(row, batch=config.timing.batch)
        for timed in facts.timing:
            if timed.get("placement") == row["budget_ms"]:
                full["all_ms" if timed["all"] else "ms"] = timed["ms"]
        made.append(full)
    return made
