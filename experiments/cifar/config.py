"""Configuration of the main job, and its command line: flags and files to a checked `Config`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from eejax.policies import POLICIES
from eejax.training import REGIMES
from experiments import distributed
from experiments.checks import require, require_all, require_not_negative, require_positive
from experiments.command_line import (
    CONFIGS,
    STORED,
    PolicyName,
    load_config,
    parse_run,
    refuse_changes,
)
from experiments.data.config import DataConfig
from experiments.data.config import check as check_data
from experiments.distributed import DistributedConfig
from experiments.train.config import NetworkConfig, TrainConfig
from experiments.train.config import check as check_training


@dataclass(frozen=True)
class PoliciesConfig:
    """When to stop, and to which targets the thresholds are chosen."""

    names: tuple[PolicyName, ...] = ("max_prob", "entropy", "margin", "gate")
    """Policies to compare. The gate takes part only where the regime trains it."""
    budgets: tuple[float, ...] = (0.5, 0.6, 0.75)
    """Mean cost, as fractions of the whole network's multiply-accumulates."""
    drops: tuple[float, ...] = (0.01,)
    """Accuracy that may be lost against the last exit, as fractions: 0.01 is one point."""
    drop_confidence: float = 0.9
    """How often a drop is to be kept on new data, from 0.5 to below 1."""
    thresholds: tuple[float, ...] = ()
    """Thresholds of your own, reported beside the chosen ones: one for each exit but the last."""
    curve: int = 20
    """Points of the cost curve."""


@dataclass(frozen=True)
class InferenceConfig:
    """How compiled inference is timed."""

    policy: PolicyName = "max_prob"
    """Policy that decides."""
    budget: float = 0.6
    """Budget that its thresholds are chosen for."""
    batch: int = 256
    """Batch of the executor `compact`; `cond` is timed at batch 1."""
    repeats: int = 30
    """Timed passes over the batches: 4 of them, or 50 single images."""


@dataclass(frozen=True)
class Config:
    """A run: train an early-exit network, choose thresholds, measure, report."""

    seed: int = 0
    """Of everything that is drawn: splits, parameters, order, augmentation."""
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    policies: PoliciesConfig = field(default_factory=PoliciesConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)


@dataclass(frozen=True)
class Arguments:
    """Train an early-exit network, choose thresholds on held-out data, time compiled inference, and
    write a report. Without flags: CIFAR-10 where it can be had, else scikit-learn's digits."""

    config: Path | None = None
    """File that sets the fields below; flags override it. Default: configs/DATASET.py."""
    workdir: Path | None = None
    """Directory for everything the run makes. Default: a new one under runs/."""
    resume: bool = False
    """Continue the run in --workdir, with the configuration it has. If there is none yet, begin
    one, so that a job scheduler can restart the same command."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    run: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def parse(argv: Sequence[str]) -> Arguments:
    """Reads a command line, as `command_line.parse_run`, and checks it before anything slow."""
    arguments, stored = parse_run(Arguments, "python -m experiments.cifar", argv, default)
    check(arguments.run)
    distributed.check(arguments.distributed)
    if stored is not None:
        refuse_changes(stored, arguments.run)
    elif arguments.workdir is not None and (arguments.workdir / STORED).exists():
        raise ValueError(
            f"{arguments.workdir} holds a run already; add --resume to continue it, or give "
            "another --workdir."
        )
    return arguments


def default(name: str) -> Config:
    """The configuration of a data set."""
    return load_config(CONFIGS / f"{name}.py", Config)


def check(config: Config) -> None:
    """Checks all that can be checked without reading an image.

    Raises:
      ValueError: if a value cannot be used; one line with the field, its value and what to give.
    """
    check_data(config.data)
    check_training(config.network, config.train)
    limit, batch = config.data.limit, config.train.batch
    require(limit is None or limit >= batch, "data.limit", limit, f"at least one batch, {batch}")
    exits = config.network.num_exits
    trains_gate = REGIMES[config.train.regime].trains_gate
    _check_evaluation(config.policies, config.inference, exits, trains_gate)


def _check_evaluation(
    policies: PoliciesConfig, inference: InferenceConfig, exits: int, trains_gate: bool
) -> None:
    """Raises ValueError if a value does not fit.

    Args:
      policies: policies and targets.
      inference: timing.
      exits: E of the network.
      trains_gate: whether the regime trains the gates.
    """
    thresholds = policies.thresholds
    if thresholds and len(thresholds) != exits - 1:
        raise ValueError(
            f"policies.thresholds: {len(thresholds)} thresholds for {exits} exits; give "
            f"{exits - 1}, one for each exit but the last."
        )
    fraction = "fractions of the whole network, in (0, 1]"
    require_all("policies", policies, "budgets", lambda budget: 0 < budget <= 1, fraction)
    require_not_negative("policies", policies, "drops")
    confidence = policies.drop_confidence
    expected = "at least 0.5 and below 1"
    require(0.5 <= confidence < 1, "policies.drop_confidence", confidence, expected)
    require(policies.curve >= 2, "policies.curve", policies.curve, "at least 2 points")
    policy, expected = inference.policy, "another, because the regime trains no gate"
    usable = trains_gate or not POLICIES[policy].needs_gate
    require(usable, "inference.policy", policy, expected)
    require_positive("inference", inference, "batch repeats budget")
