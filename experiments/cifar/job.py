"""The main job, from a checked configuration to the report. It reads from top to bottom."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.panel import Panel

from eejax.evaluation import metrics
from eejax.evaluation.routing import route
from eejax.inference.compaction import compact
from eejax.inference.executors import cond
from eejax.network import EarlyExitNetwork
from eejax.policies import POLICIES
from eejax.selection.thresholds import for_budget
from eejax.trace import collect
from eejax.training import REGIMES
from experiments.cifar.cli import Arguments
from experiments.cifar.config import Config
from experiments.command_line import read_run, to_json
from experiments.data import splits as data
from experiments.evaluate import rows as evaluate
from experiments.evaluate import timing
from experiments.evaluate.artifact import save_bundle
from experiments.report import report
from experiments.report.environment import circumstances
from experiments.train import loop, trained

GALLERY = 24
COLLAPSED = 0.2


class Prepared(NamedTuple):
    """What a run begins with.

    Attributes:
      dataset: its splits.
      network: reads its images.
      workdir: a directory that holds `config.json`.
      facts: what the report opens with: data set, device, versions, seed, command, date.
      console: where everything is shown.
    """

    dataset: data.Dataset
    network: EarlyExitNetwork
    workdir: Path
    facts: dict[str, Any]
    console: Console


def prepare(arguments: Arguments, argv: Sequence[str]) -> Prepared:
    """Reads the images and opens the run's directory.

    Raises:
      ValueError, OSError: the data cannot be had or do not fit the configuration, no such network
        can be made for them, or the directory cannot be written; one line.
    """
    console = Console(soft_wrap=True)
    config = arguments.run
    with console.status("reading images"):
        dataset = trained.dataset(_train_run(config))
    if len(dataset.train.images) < config.train.batch:
        raise ValueError(
            f"train.batch: {config.train.batch} for {len(dataset.train.images)} training images; "
            "give a smaller batch."
        )
    network = trained.network(_train_run(config))
    workdir, facts = _begin(arguments, argv, dataset)
    if facts["notice"]:
        console.print(Panel(facts["notice"], title="NOTICE", style="bold yellow"))
    return Prepared(dataset, network, workdir, facts, console)


def run(arguments: Arguments, prepared: Prepared) -> dict[str, Any]:
    """Trains, chooses, measures, and returns the report that it wrote.

    Raises:
      FloatingPointError: training diverged.
      CheckpointError: `--resume`, and no checkpoint can be read.
      loop.Stopped: a signal came; the state is saved.
    """
    config = arguments.run
    dataset, network, workdir, facts, console = prepared

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
    _, variables, _, _, rows = trained.trained(training, config.seed, workdir, console)
    history = loop.epochs(rows)

    # Traces, temperatures, thresholds.
    learned_gate = REGIMES[config.train.regime].trains_gate
    names = tuple(n for n in config.policies.names if learned_gate or not POLICIES[n].needs_gate)
    with console.status("recording traces and choosing thresholds"):
        traces = evaluate.Traces(
            *(
                collect(network, variables, *split)
                for split in (dataset.calibrate, dataset.choose, dataset.test)
            )
        )
        np.savez(workdir / "trace_test.npz", **traces.test._asdict())
        scored = {n: evaluate.evaluated(n, traces, costs.fractions) for n in names}
        policies, curves = [], {}
        for name in names:
            policies += evaluate.policy_rows(
                name, scored[name], traces, costs.cumulative, config.policies
            )
            curves[name] = evaluate.curve(
                scored[name], traces, costs.cumulative, config.policies.curve
            )

    # Compiled inference, with the thresholds of one policy at one budget.
    chosen = config.inference.policy
    if chosen not in scored:
        scored[chosen] = evaluate.evaluated(chosen, traces, costs.fractions)
    correct = scored[chosen].choose.predictions == traces.choose.labels[:, None]
    limits = for_budget(
        scored[chosen].choose.scores, correct, costs.fractions, config.inference.budget
    ).thresholds
    policy = scored[chosen].policy
    with console.status("timing compiled inference"):
        inference = [
            {
                "policy": chosen,
                **timing.inference_row(
                    strategy,
                    executor,
                    network,
                    variables,
                    policy,
                    limits,
                    dataset.test.images,
                    batch=batch,
                    batches=batches,
                    repeats=config.inference.repeats,
                ),
            }
            for strategy, executor, batch, batches in (
                ("cond", cond, 1, 50),
                ("compact", compact, min(config.inference.batch, len(dataset.test.images)), 4),
            )
        ]

    # The bundle.
    metadata = {name: facts[name] for name in ("dataset", "seed", "command", "date", "versions")}
    save_bundle(workdir, config.network, dataset, variables, policy, limits, costs, metadata)

    # The report.
    test = dataset.test
    warnings = _collapse_warnings(history) if learned_gate else []
    rates = [row["images_per_second"] for row in rows]
    result = {
        **facts,
        "network": words,
        "warnings": warnings,
        "target": {"kind": "budget", "value": config.inference.budget},
        "whole_macs": float(costs.cumulative[-1]),
        "exits": evaluate.exit_rows(
            scored[chosen].test, test.labels, costs.cumulative, policy.params.temperatures
        ),
        "policies": policies,
        "curve": curves,
        "inference": inference,
        "overthinking": metrics.overthinking(scored[chosen].test.predictions, test.labels),
        "train": {
            "seconds": rows[-1]["seconds"],
            "images_per_second": float(np.median(rates)),
            "epochs": config.train.epochs,
        },
    }
    report.write_json(workdir / "report.json", result)
    report.write_html(
        workdir / "report.html",
        result,
        history=history,
        reliability=evaluate.reliability_rows(scored[chosen].test, test.labels),
        gallery=_gallery(route(scored[chosen].test, limits), test, network.num_exits),
        classes=dataset.classes,
    )
    console.print(report.table(result))
    console.print(f"\nreport: {workdir / 'report.html'}")
    return result


def _train_run(config: Config) -> trained.TrainRun:
    """The training of a run; its splits are drawn with the run's seed."""
    return trained.TrainRun(config.data, config.network, config.train, split_seed=config.seed)


def _begin(
    arguments: Arguments, argv: Sequence[str], dataset: data.Dataset
) -> tuple[Path, dict[str, Any]]:
    """The run's directory with its `config.json`, and the facts that the report opens with."""
    now = datetime.datetime.now().astimezone()
    workdir = arguments.workdir or Path("runs") / f"{dataset.name}-{now:%Y%m%d-%H%M%S}"
    if arguments.resume:
        facts = read_run(workdir)
        facts.pop("config")
        return workdir, facts
    facts = {
        "dataset": dataset.name,
        "data_source": dataset.source,
        "notice": dataset.notice,
        "seed": arguments.run.seed,
        **circumstances("experiments.cifar", argv, now),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    config = to_json(arguments.run)
    # A resumed run reads the same images, whatever "auto" would mean by then.
    config["data"]["name"] = dataset.name
    report.write_json(workdir / "config.json", {**facts, "config": config})
    return workdir, facts


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
    routed: Any, test: data.Split, exits: int, count: int = GALLERY
) -> list[report.Gallery]:
    """For each exit the test images that took it, the most confident first."""
    confidence = metrics.softmax(routed.logits).max(-1)
    predictions = routed.logits.argmax(-1)
    pictures = []
    for e in range(exits):
        took = np.flatnonzero(routed.exits == e)
        best = took[np.argsort(-confidence[took], kind="stable")][:count]
        pictures.append(
            report.Gallery(
                e, test.images[best], test.labels[best], predictions[best], confidence[best]
            )
        )
    return pictures
