"""A run's report (the content of report.json) as arrays, and its targets in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def whole_macs(report: Mapping[str, Any]) -> float:
    """MACs of the whole network: as recorded, else what leaving at the last exit costs."""
    if not report["exits"]:
        raise ValueError("the report lists no exit")
    return float(report.get("whole_macs") or report["exits"][-1]["macs"])


def mean_fraction(row: Mapping[str, Any], whole: float) -> float:
    """`mean_fraction` of a row, else its `mean_macs` over the whole network's; NaN if not known."""
    if row.get("mean_fraction") is not None:
        return float(row["mean_fraction"])
    return math.nan if row.get("mean_macs") is None else float(row["mean_macs"]) / whole


def exit_points(report: Mapping[str, Any]) -> np.ndarray:
    """`[E, 2]`: cost of leaving at each exit as a fraction of the whole network, and accuracy."""
    whole = whole_macs(report)
    rows = report["exits"]
    costs = [r["macs"] / whole if r.get("fraction") is None else r["fraction"] for r in rows]
    return np.asarray([costs, [r["accuracy"] for r in rows]], float).T


def curve_points(report: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Per policy `[P, 2]`: mean cost as a fraction of the whole network, and accuracy."""
    whole = whole_macs(report)
    return {name: _points(rows, whole) for name, rows in (report.get("curve") or {}).items()}


def chosen_points(report: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Per policy `[K, 2]`: mean cost and accuracy with the thresholds chosen for its K targets."""
    rows = policies_with_result(report)
    names = dict.fromkeys(p["name"] for p in rows)
    whole = whole_macs(report)
    return {name: _points([p for p in rows if p["name"] == name], whole) for name in names}


def policies_with_result(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The policies that have numbers; one whose target cannot be hit has none."""

    def known(values: ArrayLike | None) -> bool:
        array = np.asarray([] if values is None else values, float)
        return bool(array.size and np.isfinite(array).all())

    keys = ("accuracy", "exit_fractions")
    return [p for p in report["policies"] if all(known(p.get(key)) for key in keys)]


def leading_policies(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The policies at one target, each once: at `report["target"]`, else at the first one's.

    Of two searches for the same target the geometric one is left out.
    """
    known = [p for p in policies_with_result(report) if p.get("search") != "geometric"]
    target = report.get("target")
    if not any(p.get("target") == target for p in known):
        target = known[0].get("target") if known else None
    return [p for p in known if p.get("target") == target]


def target_words(target: Any) -> str:
    """A policy's target in words: "cost <= 0.60", "drop <= 1.0 points", "fixed"."""
    if not isinstance(target, Mapping):
        return "" if target is None else str(target)
    kind, value = target.get("kind"), target.get("value")
    if value is None:
        return str(kind)
    words = {"budget": f"cost <= {value:.2f}", "drop": f"drop <= {100 * value:.1f} points"}
    return words.get(str(kind), f"{kind} {value}")


def policy_label(policy: Mapping[str, Any]) -> str:
    """A policy and its target, and the search for its thresholds where it is not the usual one."""
    return ", ".join(filter(None, (policy["name"], target_label(policy))))


def target_label(policy: Mapping[str, Any]) -> str:
    """A policy's target, and the search for its thresholds where it is not the usual one."""
    search = policy.get("search") if policy.get("search") == "geometric" else None
    return ", ".join(filter(None, (target_words(policy.get("target")), search)))


def _points(rows: Sequence[Mapping[str, Any]], whole: float) -> np.ndarray:
    columns = [[mean_fraction(row, whole) for row in rows], [row["accuracy"] for row in rows]]
    return np.asarray(columns, float).T
