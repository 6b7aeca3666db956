"""The main job, from a checked configuration to the report. It reads from top to bottom."""

from __future__ import annotations

import datetime
import itertools
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.panel import Panel

from eejax import benchmark, bundle, cost
from eejax.evaluation import metrics
from eejax.evaluation.routing import Routed, score
from eejax.inference.compaction import compact
from eejax.inference.executors import cond
from eejax.inference.predictors import predictor
from eejax.network import EarlyExitNetwork, Variables
from eejax.policies import POLICIES, Policy
from eejax.runtime import HeldOut
from eejax.trace import collect
from eejax.training import REGIMES
from experiments import distributed
from experiments.checks import require
from experiments.cifar.config import Arguments, Config, InferenceConfig
from experiments.command_line import read_run, write_run
from experiments.data import splits as data
from experiments.evaluate.decide import Targets, Traces, View, decide, exit_rows, outcome, view
from experiments.report import report, table
from experiments.report.environment import describe
from experiments.train import loop, trained
from experiments.train.config import network_arguments

GALLERY = 24
COLLAPSED = 0.2


class Prepared(NamedTuple):
    """What a run begins with.

    Attributes:
      config: checked.
      dataset: its splits.
      network: reads its images.
      workdir: a directory that holds `config.json`.
      environment: data set, device, versions, seed, command and date, for the report.
      console: for messages.
      mesh: devices to train on, of all processes.
    """

    config: Config
    dataset: data.Dataset
    network: EarlyExitNetwork
    workdir: Path
    environment: dict[str, Any]
    console: Console
    mesh: Mesh


class Timed(NamedTuple):
    """The decision that inference is timed with and the bundle holds.

    Attributes:
      view: of the policy `inference.policy`.
      row: of the results table.
      routed: its exits on the test split; None where the target cannot be met.
    """

    view: View
    row: dict[str, Any]
    routed: Routed | None


def prepare(arguments: Arguments, argv: Sequence[str]) -> Prepared:
    """Joins the other processes, reads the images and opens the run's directory.

    Raises:
      ValueError, OSError: the data cannot be had or do not fit the configuration, no such network
        can be made for them, or the directory cannot be written; one line.
    """
    distributed.join(arguments.distributed)
    console = Console(soft_wrap=True, quiet=not distributed.first())
    config, mesh = arguments.run, distributed.mesh(arguments.distributed)
    expected = f"a multiple of {mesh.size}, the number of devices, or --distributed.devices"
    require(config.train.batch % mesh.size == 0, "train.batch", config.train.batch, expected)
    with console.status("reading images"):
        dataset = trained.dataset(_train_run(config))
    if len(dataset.train.images) < config.train.batch:
        raise ValueError(
            f"train.batch: {config.train.batch} for {len(dataset.train.images)} training images; "
            "give a smaller batch."
        )
    network = trained.network(_train_run(config))
    workdir, environment = _begin(arguments, argv, dataset)
    if environment["notice"]:
        console.print(Panel(environment["notice"], title="NOTICE", style="bold yellow"))
    return Prepared(config, dataset, network, workdir, environment, console, mesh)


def run(prepared: Prepared) -> dict[str, Any]:
    """Trains, chooses, measures, and returns the report that it wrote.

    After the training the first of several processes goes on alone; the others return `{}`.

    Raises:
      FloatingPointError: training diverged.
      CheckpointError: `--resume`, and no checkpoint can be read.
      loop.Stopped: a signal came; the state is saved.
    """
    config, dataset, network, workdir, environment, console, mesh = prepared

    # Training.
    training = _train_run(config)
    costs = trained.costs(training)
    shapes = jax.eval_shape(network.init, jax.random.key(0), dataset.train.images[:1])
    size = sum(p.size for p in jax.tree.leaves(shapes["params"]))
    words = (
        f"{config.network.name}, {network.num_exits} exits at "
        f"{', '.join(f'{100 * f:.0f}' for f in costs.fractions)} % of "
        f"{costs.cumulative[-1] / 1e6:.2f} M multiply-accumulates, {size / 1e6:.2f} M parameters"
    )
    console.print(f"{dataset.name}: {dataset.source}\n{words}\neverything goes to {workdir}")
    variables, training_rows = trained.trained(training, config.seed, workdir, console, mesh)
    alone = distributed.first()
    distributed.leave()
    if not alone:
        return {}
    history = loop.epochs(training_rows)
    learned_gate = REGIMES[config.train.regime].trains_gate
    warnings = _collapse_warnings(history) if learned_gate else []

    # Traces, and every decision, once.
    with console.status("recording traces and choosing thresholds"):
        calibrate, choose, test = (
            collect(network, variables, *split)
            for split in (dataset.calibrate, dataset.choose, dataset.test)
        )
        traces = Traces(calibrate, choose, None, test)
        np.savez(workdir / "trace_test.npz", **traces.test._asdict())
        rows, chosen = _decide(config, traces, costs, learned_gate)

    # The bundle, and compiled inference with the policy and thresholds that it holds.
    inference = []
    if chosen.routed is None:
        warnings.append(f"No bundle, and no time: {chosen.row['error']}")
    else:
        policy, thresholds = chosen.view.policy, np.asarray(chosen.row["thresholds"], np.float32)
        names = ("dataset", "seed", "command", "date", "versions")
        metadata = {name: environment[name] for name in names}
        held_out = score(policy, choose)
        whole = bundle.Bundle(
            config.network.name,
            network_arguments(config.network, REGIMES[config.train.regime].link),
            dataset.classes,
            dataset.train.images.shape[1:],
            dataset.mean,
            dataset.std,
            variables,
            policy,
            thresholds,
            costs,
            metadata,
            HeldOut(held_out.scores, held_out.predictions == choose.labels[:, None]),
        )
        bundle.save(whole, workdir / bundle.SUBDIRECTORY)
        with console.status("timing compiled inference"):
            images = dataset.test.images
            inference = _inference_rows(
                network, variables, policy, thresholds, images, config.inference
            )
        inference = [{"policy": chosen.view.name, **row} for row in inference]
    results = table.frame([*rows, *(table.timed_row(chosen.row, row) for row in inference)])

    # The report.
    scored = chosen.view.test
    temperatures = chosen.view.policy.params.temperatures
    exits = table.decided(results, "exit")
    result = {
        **environment,
        "network": words,
        "warnings": warnings,
        "target": _target(config),
        "whole_macs": float(costs.cumulative[-1]),
        "exits": [
            {
                "index": e,
                "macs": float(costs.cumulative[e]),
                "fraction": row.cost,
                "accuracy": row.accuracy,
                "ece": row.ece,
                "temperature": float(temperatures[e]),
            }
            for e, row in enumerate(exits.itertuples())
        ],
        "policies": [_policy(row) for row in rows if row["target_kind"] in table.SEARCHED],
        "curve": {
            name: [_numbers(row) for row in points]
            for name, points in itertools.groupby(
                (row for row in rows if row["target_kind"] == "curve"),
                key=operator.itemgetter("policy"),
            )
        },
        "inference": inference,
        "overthinking": metrics.overthinking(scored.predictions, traces.test.labels),
        "train": {
            "seconds": training_rows[-1]["seconds"],
            "images_per_second": float(np.median([r["images_per_second"] for r in training_rows])),
            "epochs": config.train.epochs,
        },
    }
    report.write(
        workdir,
        result,
        results,
        history=history,
        reliability=[
            metrics.reliability(scored.logits[:, e], traces.test.labels)._asdict()
            for e in range(network.num_exits)
        ],
        gallery=_gallery(chosen.routed, dataset.test, dataset.classes, network.num_exits),
    )
    console.print(report.console(result, results))
    console.print(f"\nreport: {workdir / 'report.html'}")
    return result


def _train_run(config: Config) -> trained.TrainRun:
    """The training of a run; its splits are drawn with the run's seed."""
    return trained.TrainRun(config.data, config.network, config.train, split_seed=config.seed)


def _target(config: Config) -> dict[str, Any]:
    """What inference is timed for: given thresholds where there are any, else a budget."""
    if config.policies.thresholds:
        return {"kind": "given"}
    return {"kind": "budget", "value": config.inference.budget}


def _decide(
    config: Config, traces: Traces, costs: cost.Costs, learned_gate: bool
) -> tuple[list[dict[str, Any]], Timed]:
    """Rows of the results table for every policy and target, and the decision to time."""
    names = [n for n in config.policies.names if learned_gate or not POLICIES[n].needs_gate]
    targets = Targets(
        tuple(dict.fromkeys([*config.policies.budgets, config.inference.budget])),
        config.policies.drops,
        config.policies.drop_confidence,
        given=config.policies.thresholds,
        curve=config.policies.curve,
    )
    scheme = {"regime": config.train.regime, "seed": config.seed}
    every, whole = tuple(range(len(costs.fractions))), float(costs.cumulative[-1])
    rows, timed = [], []
    for name in dict.fromkeys([*names, config.inference.policy]):
        one = view(name, traces, every, costs.fractions, np.empty(0))
        decisions, points = decide([one], targets, highest=1.0)
        for decision in [*decisions, *points]:
            row, routed = outcome(decision, traces.test)
            rows.append({**scheme, "policy": name, **row})
            if name == config.inference.policy and decision.target == _target(config):
                timed.append(Timed(one, rows[-1], routed))
    rows += [
        {**scheme, **row} for row in exit_rows(timed[0].view.test, traces.test, costs.fractions)
    ]
    for row in rows:
        row["macs"] = whole * row["cost"] if "cost" in row else None
    return rows, timed[0]


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """Cost and accuracy of a row, by their names in report.json."""
    names = {"mean_macs": "macs", "mean_fraction": "cost", "accuracy": "accuracy"}
    return {name: row.get(column) for name, column in names.items()}


def _inference_rows(
    network: EarlyExitNetwork,
    variables: Variables,
    policy: Policy,
    thresholds: np.ndarray,
    images: np.ndarray,
    config: InferenceConfig,
) -> list[dict[str, Any]]:
    """A row for `cond` on single images, and one for `compact` on batches.

    A row has the columns of `benchmark_rows`, and `stage_ms` `[E]`.

    Args:
      network, variables, policy, thresholds: as for `eejax.predictor`.
      images: `[N, ...]` on the host, at least one.
      config: batch of `compact`, at most N, and timed passes.
    """
    rows = []
    for strategy, executor, batch, batches in (
        ("cond", cond, 1, 50),
        ("compact", compact, min(config.batch, len(images)), 4),
    ):
        batches = min(batches, len(images) // batch)
        pieces = [images[i * batch : (i + 1) * batch] for i in range(batches)]
        largest = max(256, 1 << (batch - 1).bit_length())
        predict = predictor(network, policy, variables, executor, max_batch=largest)
        stages = benchmark.stage_seconds(
            network, variables, jnp.asarray(pieces[0]), max(config.repeats, 10)
        )
        entries = [
            benchmark.plain_entry(benchmark.plain_programs(network, variables), pieces),
            benchmark.predictor_entry(strategy, predict, jnp.asarray(thresholds), pieces, stages),
        ]
        row = benchmark.benchmark_rows(entries, batch, config.repeats)[1]
        rows.append({**row, "stage_ms": (1e3 * stages).tolist()})
    return rows


def _policy(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as report.json holds it."""
    target = {"kind": row["target_kind"], "value": row["target_value"]}
    more = ("search", "exit_fractions", "ece", "thresholds", "met", "error")
    return {
        "name": row["policy"],
        "target": {name: value for name, value in target.items() if value is not None},
        **_numbers(row),
        **{name: row.get(name) for name in more},
        "forecast": {
            "accuracy": row.get("forecast_accuracy"),
            "mean_fraction": row.get("forecast_cost"),
        },
        "chosen": {"accuracy": row.get("chosen_accuracy"), "mean_fraction": row.get("chosen_cost")},
    }


def _begin(
    arguments: Arguments, argv: Sequence[str], dataset: data.Dataset
) -> tuple[Path, dict[str, Any]]:
    """The run's directory with its `config.json`, and its environment."""
    now = datetime.datetime.now().astimezone()
    workdir = arguments.workdir or Path("runs") / f"{dataset.name}-{now:%Y%m%d-%H%M%S}"
    if arguments.resume:
        environment = read_run(workdir)
        environment.pop("config")
        return workdir, environment
    workdir = Path(distributed.shared(str(workdir)))  # the name of a new one has the time in it
    environment = {
        "dataset": dataset.name,
        "data_source": dataset.source,
        "notice": dataset.notice,
        "seed": arguments.run.seed,
        **describe("experiments.cifar", argv),
    }
    if distributed.first():
        write_run(workdir, arguments.run, dataset.name, environment)
    return workdir, environment


def _collapse_warnings(history: Sequence[dict[str, Any]]) -> list[str]:
    """Says so if the gates sent nearly all training samples to one exit in the last epoch."""
    mean, entropy = np.asarray(history[-1]["gate_mean"]), history[-1]["gate_entropy"]
    if len(mean) == 1 or entropy >= COLLAPSED:
        return []
    return [
        f"gate collapse: {100 * mean.max():.1f} % of the gates' exit distribution lies on exit "
        f"{int(mean.argmax()) + 1} of {len(mean)} (entropy {entropy:.2f} of 1), so the other heads "
        "have hardly learned through the gates. Try --train.regime "
        "soft_auxiliary with a higher or lower --train.cost-weight."
    ]


def _gallery(
    routed: Routed | None, test: data.Split, classes: Sequence[str], exits: int
) -> list[list[dict[str, Any]]]:
    """For each exit the test images that left there, the most confident first."""
    if routed is None:
        return [[] for _ in range(exits)]
    confidence = metrics.softmax(routed.logits).max(-1)
    predictions = routed.logits.argmax(-1)
    order = np.argsort(-confidence, kind="stable")
    return [
        [
            {
                "image": test.images[i],
                "predicted": classes[int(predictions[i])],
                "truth": classes[int(test.labels[i])],
                "confidence": float(confidence[i]),
            }
            for i in order[routed.exits[order] == e][:GALLERY]
        ]
        for e in range(exits)
    ]
