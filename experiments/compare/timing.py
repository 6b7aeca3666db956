"""Wall-clock time of what is compared: one interleaved run of every contender on the same images.

Everything that a user pays for is inside the timer: dispatch, heads, scores, gathering, transfers,
fetching the answer. Nothing else of the comparison runs meanwhile.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from eejax import benchmark, cost, policies
from eejax.benchmark import (
    BenchmarkEntry,
    benchmark_rows,
    plain_entry,
    plain_programs,
    predictor_entry,
)
from eejax.cascades import cascade, cascade_variables
from eejax.evaluation import metrics
from eejax.evaluation.routing import route, score
from eejax.inference.compaction import compact
from eejax.inference.predictors import Predictor, predictor
from eejax.network import EarlyExitNetwork, Variables, keep_variables
from eejax.policies.base import Policy
from eejax.selection.placement import Placement, choose_exits, keep_trace
from experiments.compare import cells as compare_cells
from experiments.compare.cells import Cell
from experiments.compare.choose import CASCADE, Subject, subject_traces
from experiments.data.cache import replacing
from experiments.report.environment import PACKAGES, circumstances
from experiments.train import trained

FORMAT = 3  # raise it when what is measured, or how, changes
BATCHES = 4


class Contender(NamedTuple):
    """Something to be timed.

    Attributes:
      row: what the report says of it; times are added to it.
      cells: its networks, in order; more than one is a cascade.
      keep: exits that are kept of the network, or None for all.
      policy: what decides, or None for a plain network.
      thresholds: of the policy.
    """

    row: dict[str, Any]
    cells: tuple[Cell, ...]
    keep: tuple[int, ...] | None
    policy: str | None
    thresholds: tuple[float, ...]


def unit_ms(cell: Cell, workdir: Path, batch: int, repeats: int) -> cost.Costs:
    """Measured milliseconds of each stage and head for a batch, kept for the next time."""

    def measure() -> Any:
        images = jnp.asarray(trained.dataset(cell.run).test.images[:batch])
        network = trained.network(cell.run)
        found = benchmark.seconds(network, compare_cells.variables(cell, workdir), images, repeats)
        return [(1e3 * part).tolist() for part in found]

    found = _kept(workdir, "units", [cell.key, batch, repeats], measure)
    return cost.Costs(*map(np.asarray, found))


def timed(
    contenders: Sequence[Contender], units: cost.Costs, workdir: Path, batch: int, repeats: int
) -> list[dict[str, Any]]:
    """Each contender's row with the columns of `benchmark_rows`; the first contender is the plain
    network that the others are compared with.

    Of a plain network the fastest compiled form counts, and it returns labels alone; a predictor
    has one form and returns labels, exits and logits. Both are to the disadvantage of early exits.

    Args:
      contenders: at least one.
      units: of `unit_ms`, what stages and heads weigh against each other, the same for all regimes.
      workdir: of the comparison.
      batch: images a call, of executor `compact`.
      repeats: interleaved passes over the batches; the median counts.
    """
    words = [[c.row, [x.key for x in c.cells], *c[2:]] for c in contenders]
    made_of = [words, batch, repeats, [part.tolist() for part in units]]
    return _kept(
        workdir, "times", made_of, lambda: _timed(contenders, units, workdir, batch, repeats)
    )


def _timed(
    contenders: Sequence[Contender], units: cost.Costs, workdir: Path, batch: int, repeats: int
) -> list[dict[str, Any]]:
    images = trained.dataset(contenders[0].cells[0].run).test.images
    count = min(BATCHES, len(images) // batch)
    pieces = [images[i * batch : (i + 1) * batch] for i in range(count)]
    ready: dict[Any, Predictor] = {}  # one program serves all thresholds
    entries = [_entry(contender, units, workdir, pieces, ready) for contender in contenders]
    rows = benchmark_rows(entries, batch, repeats, units.cumulative[-1])
    return [{**c.row, **row} for c, row in zip(contenders, rows, strict=True)]


def _entry(
    contender: Contender,
    units: cost.Costs,
    workdir: Path,
    pieces: list[np.ndarray],
    ready: dict[Any, Predictor],
) -> BenchmarkEntry:
    if contender.policy is None:
        return plain_entry(plain_programs(*_network(contender, workdir)), pieces)
    decides = contender.cells, contender.keep, contender.policy
    if decides not in ready:
        network, variables = _network(contender, workdir)
        largest = 1 << (len(pieces[0]) - 1).bit_length()
        policy = _policy(contender, workdir)
        ready[decides] = predictor(network, policy, variables, compact, max_batch=largest)
    costs = units if contender.keep is None else units.keeping(contender.keep)
    # The units are the stages of one network; a cascade of several has no ideal here.
    stages = costs.stages + costs.heads if len(contender.cells) == 1 else None
    thresholds = jnp.asarray(contender.thresholds, jnp.float32)
    return predictor_entry("compact", ready[decides], thresholds, pieces, stages)


def _network(contender: Contender, workdir: Path) -> tuple[EarlyExitNetwork, Variables]:
    networks = [trained.network(c.run) for c in contender.cells]
    variables = [compare_cells.variables(c, workdir) for c in contender.cells]
    if len(networks) > 1:
        return cascade(networks), cascade_variables(variables)
    if contender.keep is None:
        return networks[0], variables[0]
    return networks[0].keeping(contender.keep), keep_variables(variables[0], contender.keep)


def _policy(contender: Contender, workdir: Path) -> Policy:
    assert contender.policy is not None
    cells, first = contender.cells, contender.cells[0]
    name = CASCADE if len(cells) > 1 else first.name
    subject = Subject(name, first.seed, cells, (1.0,) * len(cells), ())
    trace = subject_traces(subject, workdir).calibrate
    trace = trace if contender.keep is None else keep_trace(trace, contender.keep)
    return policies.fit(contender.policy, trace, _macs(contender))


def _macs(contender: Contender) -> np.ndarray:
    parts = [trained.costs(c.run) for c in contender.cells]
    if len(parts) > 1:
        return np.cumsum([p.cumulative[-1] for p in parts])
    return (parts[0] if contender.keep is None else parts[0].keeping(contender.keep)).cumulative


def placed(
    cell: Cell, policy: str, ms: cost.Costs, budget_ms: float, workdir: Path
) -> tuple[Placement | None, dict[str, Any]]:
    """Which exits to keep for a budget in measured time, and what that comes to on the test split;
    None, and the reason, where the budget is below the first exit's time."""
    traces = compare_cells.traces(cell, workdir)

    macs = trained.costs(cell.run)

    def make(exits: tuple[int, ...]) -> Policy:
        # At the costs that the policy is made with when it is timed.
        return policies.fit(
            policy, keep_trace(traces.calibrate, exits), macs.keeping(exits).cumulative
        )

    row: dict[str, Any] = {"regime": cell.name, "policy": policy, "budget_ms": budget_ms}
    try:
        found = choose_exits(traces.choose, make, ms, budget_ms)
    except ValueError as error:
        return None, {**row, "error": str(error)}
    row |= {
        "kept": list(found.exits),
        "of": len(ms.stages),
        "search": found.search,
        "looked_at": found.looked_at,
    }
    every = tuple(range(len(ms.stages)))
    both = [("", found.exits, found.thresholds)]
    if found.whole is not None:
        both.append(("all_", every, found.whole.thresholds))
    for prefix, exits, limits in both:
        scored = score(make(exits), keep_trace(traces.test, exits))
        routed = route(scored, limits)
        result = metrics.outcome(routed, traces.test.labels, ms.keeping(exits).cumulative)
        row |= {f"{prefix}accuracy": result.accuracy, f"{prefix}expected_ms": result.mean_cost}
    return found, row


def _kept(workdir: Path, kind: str, made_of: Any, measure: Callable[[], Any]) -> Any:
    """What was measured before under the same circumstances, else measured now."""
    here = circumstances("", [], datetime.datetime.now())
    versions = {name: here["versions"][name] for name in ("python", *PACKAGES)}
    text = json.dumps([FORMAT, made_of, here["device"], versions], sort_keys=True)
    path = workdir / "timing" / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    if path.exists():
        return json.loads(path.read_text())
    path.parent.mkdir(parents=True, exist_ok=True)
    found = measure()
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(found))
    return found
