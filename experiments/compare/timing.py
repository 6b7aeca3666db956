"""Wall-clock time of what is compared: one interleaved run of every scheme on the same images.

Everything that a user pays for is inside the timer: dispatch, heads, scores, gathering, transfers,
fetching the answer. Nothing else of the comparison runs meanwhile.
"""

from __future__ import annotations

import functools
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
from eejax.selection.placement import choose_exits, keep_trace
from experiments.compare import cells as compare_cells
from experiments.compare.cells import Cell
from experiments.files import digest, write_json
from experiments.report.environment import device, versions
from experiments.train import trained

FORMAT = 4  # raise it when what is measured, or how, changes
BATCHES = 4


class Scheme(NamedTuple):
    """A plain network, or a policy with thresholds, to be timed.

    Attributes:
      row: columns of the results; the times are added to them.
      cells: its networks, in order; more than one is a cascade.
      keep: exits that are kept of the network, or None for all.
      policy: fitted, or None for a plain network.
      thresholds: of the policy.
    """

    row: dict[str, Any]
    cells: tuple[Cell, ...]
    keep: tuple[int, ...] | None = None
    policy: Policy | None = None
    thresholds: tuple[float, ...] = ()


def unit_ms(cell: Cell, workdir: Path, batch: int, repeats: int) -> cost.Costs:
    """Measured milliseconds of each stage and head for a batch, kept for the next time."""

    def measure() -> Any:
        images = jnp.asarray(trained.dataset(cell.run).test.images[:batch])
        network = trained.network(cell.run)
        seconds = benchmark.seconds(
            network, compare_cells.variables(cell, workdir), images, repeats
        )
        return [(1e3 * part).tolist() for part in seconds]

    ms = _kept(workdir, "units", [cell.key, batch, repeats], measure)
    return cost.Costs(*map(np.asarray, ms))


def timed(
    schemes: Sequence[Scheme], units: cost.Costs, workdir: Path, batch: int, repeats: int
) -> list[dict[str, Any]]:
    """Each scheme's row with the columns of `benchmark_rows`; the first scheme is the plain
    network that the others are compared with.

    Of a plain network the fastest compiled form counts, and it returns labels alone; a predictor
    has one form and returns labels, exits and logits. Both are to the disadvantage of early exits.

    Args:
      schemes: at least one.
      units: of `unit_ms`, what stages and heads weigh against each other, the same for all regimes.
      workdir: of the comparison.
      batch: images a call, of executor `compact`.
      repeats: interleaved passes over the batches; the median counts.
    """
    words = [[s.row, [c.key for c in s.cells], s.keep, s.thresholds] for s in schemes]
    made_of = [words, batch, repeats, [part.tolist() for part in units]]
    return _kept(workdir, "times", made_of, lambda: _timed(schemes, units, workdir, batch, repeats))


def _timed(
    schemes: Sequence[Scheme], units: cost.Costs, workdir: Path, batch: int, repeats: int
) -> list[dict[str, Any]]:
    images = trained.dataset(schemes[0].cells[0].run).test.images
    count = min(BATCHES, len(images) // batch)
    pieces = [images[i * batch : (i + 1) * batch] for i in range(count)]
    largest = 1 << (batch - 1).bit_length()
    ready: dict[Any, Predictor] = {}  # one program serves all thresholds

    def entry(scheme: Scheme) -> BenchmarkEntry:
        if scheme.policy is None:
            return plain_entry(plain_programs(*_network(scheme, workdir)), pieces)
        decides = scheme.cells, scheme.keep, scheme.row["policy"]
        if decides not in ready:
            network, variables = _network(scheme, workdir)
            ready[decides] = predictor(
                network, scheme.policy, variables, compact, max_batch=largest
            )
        costs = units if scheme.keep is None else units.keeping(scheme.keep)
        # The units are the stages of one network; a cascade of several has no ideal here.
        stages = costs.stages + costs.heads if len(scheme.cells) == 1 else None
        thresholds = jnp.asarray(scheme.thresholds, jnp.float32)
        return predictor_entry("compact", ready[decides], thresholds, pieces, stages)

    rows = benchmark_rows(list(map(entry, schemes)), batch, repeats, units.cumulative[-1])
    return [{**scheme.row, **row} for scheme, row in zip(schemes, rows, strict=True)]


def _network(scheme: Scheme, workdir: Path) -> tuple[EarlyExitNetwork, Variables]:
    networks = [trained.network(c.run) for c in scheme.cells]
    variables = [compare_cells.variables(c, workdir) for c in scheme.cells]
    if len(networks) > 1:
        return cascade(networks), cascade_variables(variables)
    if scheme.keep is None:
        return networks[0], variables[0]
    return networks[0].keeping(scheme.keep), keep_variables(variables[0], scheme.keep)


def placed(
    cell: Cell, policy: str, ms: cost.Costs, budget_ms: float, workdir: Path
) -> tuple[list[Scheme], dict[str, Any]]:
    """Chooses which exits to keep for a budget in measured time.

    Args:
      cell: a network with early exits.
      policy: its name.
      ms: measured time of stages and heads.
      budget_ms: mean time for a batch.
      workdir: of the comparison.

    Returns:
      What is to be timed, the kept exits and all of them; nothing where the budget is below the
      first exit's time. And a row with what both come to on the test split, or the error.
    """
    traces, macs = compare_cells.traces(cell, workdir), trained.costs(cell.run)

    @functools.cache
    def fit(exits: tuple[int, ...]) -> Policy:
        return policies.fit(
            policy, keep_trace(traces.calibrate, exits), macs.keeping(exits).cumulative
        )

    row: dict[str, Any] = {"regime": cell.name, "policy": policy, "budget_ms": budget_ms}
    try:
        placement = choose_exits(traces.choose, fit, ms, budget_ms)
    except ValueError as error:
        return [], {**row, "error": str(error)}
    row |= {
        "kept": list(placement.exits),
        "of": len(ms.stages),
        "search": placement.search,
        "looked_at": placement.looked_at,
    }
    every = tuple(range(len(ms.stages)))
    both = [("", placement.exits, placement.thresholds)]
    if placement.whole is not None:
        both.append(("all_", every, placement.whole.thresholds))
    schemes = []
    for prefix, exits, thresholds in both:
        scored = score(fit(exits), keep_trace(traces.test, exits))
        routed = route(scored, thresholds)
        result = metrics.outcome(routed, traces.test.labels, ms.keeping(exits).cumulative)
        row |= {f"{prefix}accuracy": result.accuracy, f"{prefix}expected_ms": result.mean_cost}
        words = {"regime": cell.name, "policy": policy, "placement": budget_ms}
        kept, values = None if prefix else exits, tuple(map(float, thresholds))
        schemes.append(Scheme({**words, "all": bool(prefix)}, (cell,), kept, fit(exits), values))
    return schemes, row


def _kept(workdir: Path, kind: str, made_of: Any, measure: Callable[[], Any]) -> Any:
    """What was measured before in the same environment, else measured now."""
    name = digest([FORMAT, made_of, device(), versions()])
    path = workdir / "timing" / f"{kind}-{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    measured = measure()
    write_json(path, measured)
    return measured
