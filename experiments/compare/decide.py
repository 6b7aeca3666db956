"""The decisions of a comparison: one policy on one model, for every target, kept on disk.

Decisions are `experiments.evaluate.decide`'s, over the exits of a network or over the members that
a cascade may have, with guarantees and corrupted images beside them. No network runs here: traces
are all that is read.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eejax import policies
from eejax.evaluation import metrics
from eejax.evaluation.routing import route, score
from eejax.policies import Policy
from eejax.trace import Trace, read_trace
from experiments.command_line import to_json
from experiments.compare import cells as compare_cells
from experiments.compare.cells import Cell
from experiments.compare.certify import certified
from experiments.compare.config import Comparison, DriftConfig
from experiments.evaluate import decide as evaluate
from experiments.evaluate.decide import Targets, Traces, View, outcome
from experiments.files import digest
from experiments.store import Store, draft, fetch

CASCADE = "cascade"
DECISIONS = "decisions"
MOST_MEMBERS = 3

_WORDS = "decided"  # everything that is no array, as JSON in UTF-8

# A decision depends on the source of every module that this one imports, directly or not, but for
# these: what they change is in the traces, or in the configuration, or is no part of a decision.
APART = ("eejax.training", "eejax.models", "eejax.pretrained", "eejax.adapters", "eejax.inference")
APART += ("eejax.checkpoint", "experiments.train", "experiments.data.sources")
APART += ("experiments.files", "experiments.command_line", "experiments.cifar")
APART += ("experiments.pool", "experiments.store", "experiments.distributed")


class Model(NamedTuple):
    """What a policy decides on: a network with early exits, or a cascade of plain networks.

    Attributes:
      name: the regime's, or "cascade".
      seed: of all its cells.
      cells: one for early exits; the members of the cascade, cheapest first.
      cost: multiply-accumulates of leaving at each exit, or of each member alone, as fractions of
        the plain network's.
      ms: the same in milliseconds for a batch, as measured; empty where no target is in them.
    """

    name: str
    seed: int
    cells: tuple[Cell, ...]
    cost: tuple[float, ...]
    ms: tuple[float, ...]


class Decided(NamedTuple):
    """What a policy decided on a model.

    Attributes:
      rows: in the columns of the results table, one a target, and its dict as `json_target`;
        `class_exit_fractions` [C][E] beside them.
      curve: rows of the cost curve.
      policies: by the exits in use, as `eejax.policies.to_arrays` describes the fitted policy; of
        a cascade those that some row uses.
      drift: a row for each corruption, severity and target.
      arrays: `exits`, `predictions` and `correct`, each `[rows, N]` on the test split;
        `drift_0`, `drift_1`, ...: the losses `[images]` of each row of `drift`; and the arrays of
        each policy.
    """

    rows: list[dict[str, Any]]
    curve: list[dict[str, Any]]
    policies: dict[str, Any]
    drift: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]


class Choice(NamedTuple):
    """A policy on a model, and what it decided."""

    model: Model
    policy: str
    decided: Decided


def name(model: Model, policy: str, config: Comparison) -> str:
    """Of the file of a decision; it changes with everything that changes the result."""
    made_of = [
        sources(),
        [cell.key for cell in model.cells],
        model.cost,
        model.ms,
        policy,
        [to_json(part) for part in (config.targets, config.guarantee, config.drift)],
        config.timing.batch,
    ]
    return f"{model.name}-seed{model.seed}-{policy}-{digest(made_of)}.npz"


@functools.cache
def sources() -> str:
    """A hash of the code that decides."""
    text = b"".join(file.read_bytes() for file in deciding().values())
    return hashlib.sha256(text).hexdigest()


@functools.cache
def deciding() -> dict[str, Path]:
    """The modules that decide, and their files: this one and all that it imports, but for APART."""
    waiting, files = [__name__], {}
    while waiting:
        name = waiting.pop()
        if name in files or name.startswith(APART) or not name.startswith(("eejax", "experiments")):
            continue
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # a function or class: `from module import name`
            continue
        if spec is None or spec.origin is None:
            continue
        files[name] = Path(spec.origin)
        # What a package gathers for its users (`eejax.policies`) counts; `eejax` gathers all.
        if name in ("eejax", "experiments"):
            continue
        for node in ast.walk(ast.parse(files[name].read_text())):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return dict(sorted(files.items()))


def decide(model: Model, policy: str, config: Comparison, store: Store) -> None:
    """Decides and writes."""
    for cell in model.cells:
        compare_cells.bring(cell, config.drift, store)
    *parts, arrays = _decided(model, policy, config, store.workdir)
    words = np.frombuffer(json.dumps(parts).encode(), np.uint8)
    target = f"{DECISIONS}/{name(model, policy, config)}"
    with draft(store, target) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays, **{_WORDS: words})  # type: ignore[arg-type]


def read(model: Model, policy: str, config: Comparison, store: Store) -> Decided:
    """Reads what `decide` wrote."""
    with np.load(fetch(store, f"{DECISIONS}/{name(model, policy, config)}")) as stored:
        arrays = dict(stored)
    rows, curve, fitted, drift = json.loads(arrays.pop(_WORDS).tobytes())
    return Decided(rows, curve, fitted, drift, arrays)


def _decided(model: Model, policy: str, config: Comparison, workdir: Path) -> Decided:
    traces = model_traces(model, workdir)
    views = _views(model, policy, traces)
    targets = Targets(**dataclasses.asdict(config.targets), batch=config.timing.batch)
    decisions, points = evaluate.decide(views, targets, highest=max(model.cost))
    if policy in config.guarantee.policies and model.name != CASCADE:
        ids = compare_cells.training_ids(model.cells[0].run)
        decisions += certified(views[0], traces, config.guarantee, ids)
    rows, labels = [], traces.test.labels
    exits = np.full((len(decisions), len(labels)), 255, np.uint8)
    predictions = np.full((len(decisions), len(labels)), -1, np.int16)
    for i, decision in enumerate(decisions):
        row, routed = outcome(decision, traces.test)
        row["json_target"] = decision.target
        if routed is not None:
            exits[i], predictions[i] = routed.exits, routed.logits.argmax(-1)
            classes = decision.view.test.logits.shape[-1]
            by_class = metrics.exit_fractions_by_class(
                routed.exits, labels, classes, len(decision.view.cost)
            )
            row["class_exit_fractions"] = by_class.tolist()
        rows.append(row)
    arrays = {"exits": exits, "predictions": predictions, "correct": predictions == labels[None]}
    drift, losses = [], {}
    if policy in config.drift.policies and model.name != CASCADE:
        drift, losses = _drifted(model, views[0], traces, rows, config.drift, workdir)
    curve = [outcome(point, traces.test)[0] for point in points]
    descriptions = {}
    for view in {d.view.exits: d.view for d in decisions}.values():
        key = _policy_key(view.exits)
        descriptions[key], parts = policies.to_arrays(view.policy)
        arrays |= {f"{key}:{name}": part for name, part in parts.items()}
    return Decided(rows, curve, descriptions, drift, arrays | losses)


def fitted(decided: Decided, exits: Sequence[int]) -> Policy:
    """The policy that a decision fitted for these exits, or members of a cascade."""
    prefix = f"{_policy_key(exits)}:"
    arrays = {
        name.removeprefix(prefix): array
        for name, array in decided.arrays.items()
        if name.startswith(prefix)
    }
    return policies.from_arrays(decided.policies[_policy_key(exits)], arrays)


def _policy_key(exits: Sequence[int]) -> str:
    return "policy " + " ".join(map(str, exits))


def model_traces(model: Model, workdir: Path) -> Traces:
    """The traces of a model; those of a cascade have a member where a network has an exit."""
    members = [compare_cells.traces(cell, workdir) for cell in model.cells]
    return Traces(*(_together(parts) for parts in zip(*members, strict=True)))


def _together(parts: tuple[Trace, ...]) -> Trace:
    assert all((part.ids == parts[0].ids).all() for part in parts)
    logits = np.concatenate([part.logits for part in parts], axis=1)
    gates = np.concatenate([part.gates for part in parts], axis=1)
    return parts[0]._replace(logits=logits, gates=gates)


def _views(model: Model, policy: str, traces: Traces) -> list[View]:
    """All exits of a network; of a cascade every choice of up to three members."""
    every = range(len(model.cost))
    cost, ms = np.asarray(model.cost), np.asarray(model.ms)
    if model.name != CASCADE:
        return [evaluate.view(policy, traces, tuple(every), cost, ms)]
    counts = range(1, MOST_MEMBERS + 1)
    choices = itertools.chain(*(itertools.combinations(every, count) for count in counts))
    return [
        evaluate.view(
            policy,
            traces,
            members,
            np.cumsum(cost[list(members)]),
            np.cumsum(ms[list(members)]) if len(ms) else ms,
        )
        for members in choices
    ]


def _drifted(
    model: Model,
    view: View,
    traces: Traces,
    rows: Sequence[dict[str, Any]],
    config: DriftConfig,
    workdir: Path,
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The thresholds of the first budget and of the first risk on corrupted test images.

    Returns:
      A row for each corruption, severity and target, clean images first, as severity 0; and the
      losses of each row.
    """
    count = min(config.images, len(traces.test.labels))
    place = model.cells[0].directory(workdir)
    sets = [("clean", 0, compare_cells.select(traces.test, np.arange(count)))]
    for kind, severity in itertools.product(config.kinds, config.severities):
        file = f"{compare_cells.drift_name(kind, severity, count)}.npz"
        sets.append((kind, severity, read_trace(place / file)))
    drift, losses = [], {}
    for kind, severity, trace in sets:
        scored = score(view.policy, trace)
        for row in _shown(rows):
            routed = route(scored, row["thresholds"])
            result = metrics.outcome(routed, trace.labels, view.cost)
            labels = trace.labels if row["loss"] == "error" else scored.predictions[:, -1]
            losses[f"drift_{len(drift)}"] = routed.logits.argmax(-1) != labels
            words = {"corruption": kind, "severity": severity, "target": row["json_target"]}
            drift.append({**words, "accuracy": result.accuracy, "cost": result.mean_cost})
    return drift, losses


def _shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first budget's row, and the first risk's, by betting where that was asked; the same for
    every seed, without those that cannot be met."""
    budgets = [row for row in rows if row["target_kind"] == "budget"]
    risks = [row for row in rows if row["target_kind"] == "risk"]
    betting = [row for row in risks if row["method"] == "betting"]
    return [row for row in (*budgets[:1], *(betting or risks)[:1]) if "error" not in row]
