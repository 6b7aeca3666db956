"""The same thresholds on corrupted test images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eejax import policies
from eejax.evaluation import metrics
from eejax.evaluation.routing import route, score
from eejax.trace import read_trace
from experiments.compare import cells as compare_cells
from experiments.compare.cells import Traces
from experiments.compare.choose import Subject
from experiments.compare.config import DriftConfig


def drifted(
    subject: Subject,
    name: str,
    traces: Traces,
    rows: Sequence[dict[str, Any]],
    config: DriftConfig,
    workdir: Path,
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """What the thresholds of the first budget and of the first risk come to on corrupted images.

    Returns:
      A row for each corruption, severity and target, clean images first, as severity 0; and the
      losses of each row, `drift_0`, `drift_1`, ..., bool `[images]`.
    """
    cost = np.asarray(subject.cost)
    policy = policies.fit(name, traces.calibrate, cost)
    count = min(config.images, len(traces.test.labels))
    place = subject.cells[0].directory(workdir)
    sets = [("clean", 0, compare_cells.select(traces.test, np.arange(count)))]
    for kind in config.kinds:
        for severity in config.severities:
            file = f"{compare_cells.drift_name(kind, severity, count)}.npz"
            sets.append((kind, severity, read_trace(place / file)))
    found, losses = [], {}
    for kind, severity, trace in sets:
        scored = score(policy, trace)
        for row in _shown(rows):
            routed = route(scored, row["thresholds"])
            result = metrics.outcome(routed, trace.labels, cost)
            errors = row["target"].get("loss") == "error"
            wanted = trace.labels if errors else scored.predictions[:, -1]
            losses[f"drift_{len(found)}"] = routed.logits.argmax(-1) != wanted
            words = {"corruption": kind, "severity": severity, "target": row["target"]}
            found.append({**words, "accuracy": result.accuracy, "cost": result.mean_cost})
    return found, losses


def _shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first budget's row, and the first risk's, by betting where that was asked; the same ones
    for every seed, without those that could not be met."""
    budgets = [row for row in rows if row["target"]["kind"] == "budget"]
    risks = [row for row in rows if row["target"]["kind"] == "risk"]
    betting = [row for row in risks if row["target"]["method"] == "betting"]
    return [row for row in (*budgets[:1], *(betting or risks)[:1]) if "error" not in row]
