"""From decisions to the results of a comparison: spreads over seeds, differences and what they are
worth, agreement, drift. `compare_report` says how the results look."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eejax import metrics
from eejax.bounds import interval
from experiments import compare_cells
from experiments.compare_cells import PLAIN, Cell
from experiments.compare_config import Comparison
from experiments.compare_differences import DRAWS, LEVEL, Answer, Group, against, agreement, named
from experiments.compare_pool import Failure

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
    rows = [row for key, group in groups.items() for row in _rows(key, group, config, workdir)]
    found, low, high = _curves(groups)
    differences = against(groups, reference, cells, config, workdir)
    return {
        **facts.opening,
        "seeds": list(config.seeds),
        "network": f"{config.network.name}, width {config.network.width}, "
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
        "comparisons": len(differences),
        "level": LEVEL,
        "draws": DRAWS,
        "agreement": agreement(groups, config),
        "timing": [dict(row) for row in facts.timing if "placement" not in row],
        "drift": _drift(groups),
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
        right = [(t.logits[:, -1].argmax(-1) == t.labels).mean() for t in traces]
        cost = compare_cells.macs(group[0])[-1]
        rows.append(
            {
                "name": name,
                "cost": float(cost / whole),
                "macs": float(cost),
                "accuracy": spread(right),
                "ms": ms.get(name),
            }
        )
    return sorted(rows, key=lambda row: row["cost"])


def _regimes(cells: Sequence[Cell], whole: float, workdir: Path) -> list[dict[str, Any]]:
    rows = []
    for name, group in named(cells, "regime").items():
        tests = [compare_cells.traces(cell, workdir).test for cell in group]
        cost = compare_cells.macs(group[0]) / whole
        right = [t.logits.argmax(-1) == t.labels[:, None] for t in tests]
        over = [metrics.overthinking(t.logits.argmax(-1), t.labels) for t in tests]
        budgets = np.linspace(cost[0], cost[-1], CURVE_POINTS)
        oracle = [[metrics.oracle_accuracy(r, cost, b) for b in budgets] for r in right]
        gate = [_stored(cell, workdir)["gate_mean"] for cell in group]
        rows.append(
            {
                "name": name,
                "exits": [
                    {
                        "cost": float(cost[e]),
                        "accuracy": spread([r[:, e].mean() for r in right]),
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


def _rows(
    key: tuple[str, str], group: Group, config: Comparison, workdir: Path
) -> list[dict[str, Any]]:
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
        lasts = [
            _last_accuracy(a, workdir)
            for a, part in zip(group, parts, strict=True)
            if "accuracy" in part
        ]
        met = [_met(part, last) for part, last in zip(able, lasts, strict=True)]
        row |= {name: spread([part[name] for part in able]) for name in ("accuracy", "cost")}
        row |= {
            name: float(np.mean([part[name] for part in able]))
            for name in ("ece", "random", "oracle")
        }
        # Members of a cascade differ from seed to seed, and exits then cannot be averaged.
        if len({tuple(part["exits"]) for part in able}) == 1:
            for name in ("exit_fractions", "class_exit_fractions"):
                row[name] = np.mean([part[name] for part in able], axis=0).tolist()
        row["thresholds"] = [[_threshold(t) for t in part["thresholds"]] for part in able]
        row["met"] = _count(met, len(parts))
        if "ms" in able[0] and able[0]["ms"] is not None:
            row["expected_ms"] = float(np.mean([part["ms"] for part in able]))
        if first["target"]["kind"] in ("risk", "certificate"):
            row["risk"] = spread([_risk(part) for part in able])
            row["certified"] = len(able)
            row["certificate"] = able[0]["certificate"]
        if len(able) < len(parts):
            row["error"] = next(part["error"] for part in parts if "error" in part)
        made.append(row)
    return made


def _last_accuracy(answer: Answer, workdir: Path) -> float:
    test = compare_cells.traces(answer.subject.cells[-1], workdir).test
    return float((test.logits[:, -1].argmax(-1) == test.labels).mean())


def _risk(part: Mapping[str, Any]) -> float:
    """The loss on the test split that the target bounds."""
    return 1 - part["accuracy"] if part["target"]["loss"] == "error" else part["disagreement"]


def _met(part: Mapping[str, Any], last: float) -> bool:
    """Whether the target, chosen for on other data, holds on the test split."""
    target = part["target"]
    kind, value = target["kind"], target["value"]
    if kind == "budget":
        return part["cost"] <= value
    if kind == "ms":
        return part["ms"] <= value
    if kind == "drop":
        return part["accuracy"] >= last - value
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
    high = max(min(float(line[0].max()) for line in every), low)
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


def _drift(groups: Mapping[tuple[str, str], Group]) -> list[dict[str, Any]]:
    """Rows of drift over seeds. A guarantee holds, or does not, where an interval for its risk, of
    the loss of each image averaged over seeds, lies on one side of epsilon."""
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
            row |= {"regime": regime, "policy": policy}
            for name in ("accuracy", "cost"):
                row[name] = float(np.mean([part[name] for _, _, part in parts]))
            if first["target"]["kind"] == "risk":
                lost = np.mean([a.decided.arrays[f"drift_{i}"] for a, i, _ in parts], axis=0)
                low, high = (float(v) for v in interval(lost, LEVEL))
                epsilon = first["target"]["value"]
                holds = "yes" if high <= epsilon else "no" if low > epsilon else "unclear"
                row |= {"risk": float(lost.mean()), "interval": [low, high]}
                row |= {"epsilon": epsilon, "holds": holds}
            made.append(row)
    return made


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
