"""A small comparison on the embedded digits, and what is needed to compute its figures anew."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eejax import policies
from eejax.evaluation.routing import Scored, route, score
from eejax.policies import ensembles
from eejax.policies.base import Policy
from eejax.policies.temperature import fit_temperatures, with_temperatures
from eejax.selection import thresholds
from eejax.trace import Trace, read_trace
from experiments.compare import __main__ as compare
from experiments.data import splits as data

SEEDS = (0, 1)
REGIMES = ("joint", "soft_auxiliary")
POLICIES = ("max_prob", "gate", "ztw")
NEW = "patience"
STATIC = ("plain network", "depth to exit 1", "width 0.5")
BUDGET = {"kind": "budget", "value": 0.6}
CONFIDENCE = 0.5  # of the drops
NEVER = {"kind": "budget", "value": 0.05}  # less than the first exit costs
DROP = {"kind": "drop", "value": 0.01}
SCHEMES = [
    *((regime, policy) for regime in REGIMES for policy in POLICIES),
    ("cascade", "max_prob"),
]
SCHEMES.remove(("joint", "gate"))  # the joint loss trains none
EARLY = SCHEMES[:-1]

FLAGS = [
    *("--data.name", "digits", "--data.shift", "0", "--jobs", "1", "--seeds", "0", "1"),
    *("--network.name", "isotropic", "--network.depth", "3", "--network.exits", "1", "2"),
    *("--network.width", "8", "--train.optimiser", "sgd", "--train.learning-rate", "0.2"),
    *("--train.epochs", "3", "--train.batch", "64"),
    *("--policies", *POLICIES, "--targets.budgets", "0.6", "0.05", "--targets.curve", "3"),
    *("--targets.drop-confidence", str(CONFIDENCE)),
    *("--guarantee.methods", "betting", "--guarantee.paths", "shared"),
    *("--static.widths", "0.5", "--static.exits", "1"),
    *("--timing.batch", "64", "--timing.repeats", "2", "--timing.keep-exits", "2", "1e-4"),
    *("--drift.images", "60", "--drift.severities", "3", "--drift.kinds", "noise", "contrast"),
]


def run(workdir: Path, *flags: str) -> int:
    """The command; of a flag that is given twice the last counts."""
    return compare.main([*FLAGS, *flags, "--workdir", str(workdir)])


def read(workdir: Path) -> dict[str, Any]:
    """Its results."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    # Strictly: Infinity and NaN are no JSON.
    return json.loads((workdir / "results.json").read_text(), parse_constant=refuse)


class Made(NamedTuple):
    """What a network's directory holds."""

    place: Path
    macs: np.ndarray
    calibrate: Trace
    choose: Trace
    certify: Trace
    test: Trace


def networks(workdir: Path) -> dict[tuple[str, int], Made]:
    """Every network by name and seed, its held-out samples cut as the seed says."""
    found = {}
    for path in (workdir / "networks").glob("*/trained.json"):
        record = json.loads(path.read_text())
        cell, pool = record["cell"], read_trace(path.with_name("held_out.npz"))
        sizes = cell["data"]["calibrate"], cell["data"]["choose"]
        rng = np.random.Generator(np.random.PCG64(cell["seed"]))
        calibrate, choose, certify = (
            Trace(*(part[rows] for part in pool))
            for rows in data.stratified(pool.labels, sizes, rng)
        )
        found[cell["name"], cell["seed"]] = Made(
            path.parent,
            np.array(record["macs"]),
            calibrate,
            choose,
            certify,
            read_trace(path.with_name("test.npz")),
        )
    return found


def fitted(name: str, calibrate: Trace) -> Policy:
    """A policy as the calibration split makes it."""
    temperatures = fit_temperatures(calibrate)
    warm = calibrate._replace(
        logits=calibrate.logits / np.asarray(temperatures, np.float32)[None, :, None]
    )
    plain = {"max_prob": policies.max_prob, "gate": policies.gate, "patience": policies.patience}
    policy = plain[name] if name in plain else ensembles.ztw(*ensembles.fit_ztw(warm))
    return with_temperatures(policy, temperatures)


def scored(name: str, network: Made) -> tuple[Scored, Scored, Scored]:
    """A policy's view of the splits choose, certify and test."""
    policy = fitted(name, network.calibrate)
    return (
        score(policy, network.choose),
        score(policy, network.certify),
        score(policy, network.test),
    )


def row_of(results: dict[str, Any], scheme: tuple[str, str], **wanted: Any) -> dict[str, Any]:
    """The one row of a scheme with these entries, or with these of its target."""
    rows = [
        row
        for row in results["rows"]
        if (row["regime"], row["policy"]) == scheme
        and all(row.get(k, row["target"].get(k)) == v for k, v in wanted.items())
    ]
    assert len(rows) == 1
    return rows[0]


def zip_seeds(row: dict[str, Any], *names: str) -> Iterator[tuple[Any, ...]]:
    """Thresholds and figures of a row, a tuple for each seed that has them."""
    parts = [row.get(name, {"seeds": []}) for name in names]
    return zip(row.get("thresholds", []), *(part["seeds"] for part in parts), strict=True)


def as_numbers(shown: list[Any]) -> list[float]:
    """Thresholds of a row, which has words for infinity."""
    words = {"off": math.inf, "always": -math.inf}
    return [words[t] if isinstance(t, str) else t for t in shown]


def cascades(
    made: dict[tuple[str, int], Made], seed: int
) -> list[tuple[tuple[float, float], int, float, float]]:
    """Every cascade of static networks, the best on the split choose first: what it is ordered by,
    how many members it has, and its accuracy and cost on the test split."""
    members = sorted((made[name, seed] for name in STATIC), key=lambda m: m.macs[-1])
    whole = made["plain network", seed].macs[-1]
    found = []
    for count in (1, 2, 3):
        for some in itertools.combinations(members, count):
            cost = np.cumsum([m.macs[-1] / whole for m in some])
            if cost[0] > BUDGET["value"]:
                continue
            splits = [
                parts[0]._replace(
                    logits=np.stack([t.logits[:, -1] for t in parts], 1),
                    gates=np.stack([t.gates[:, -1] for t in parts], 1),
                )
                for parts in zip(*(m[2:] for m in some), strict=True)
            ]
            both = Made(some[0].place, cost, *splits)
            choose, _, test = scored("max_prob", both)
            correct = choose.predictions == both.choose.labels[:, None]
            choice = thresholds.for_budget(choose.scores, correct, cost, BUDGET["value"])
            routed = route(test, choice.thresholds)
            accuracy = (routed.logits.argmax(-1) == both.test.labels).mean()
            known = (-choice.accuracy, choice.mean_cost)
            found.append((known, count, accuracy, cost[routed.exits].mean()))
    return sorted(found)
