"""The command line of the comparison: flags and files to a checked `Comparison`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from experiments.cifar.config import Config
from experiments.command_line import CONFIGS, load_config, parse_run
from experiments.compare.config import Comparison, check


@dataclass(frozen=True)
class Arguments:
    """Compare ways of stopping early on equal terms: every regime of training, every policy, every
    target and seed, with baselines, statistics and pictures. What is in --workdir already is not
    computed again, so that a comparison can be interrupted, and grow. Without flags: CIFAR-10 where
    it can be had, else scikit-learn's digits."""

    config: Path | None = None
    """File that sets the fields below; flags override it. Default: configs/compare/DATASET.py."""
    workdir: Path | None = None
    """Directory for everything. Default: runs/compare-DATASET."""
    resume: bool = False
    """Take the configuration that --workdir was begun with; flags override it. If there is none
    yet, begin one, so that a job scheduler can restart the same command."""
    jobs: int | None = None
    """Trainings, and choices, at a time. Default: one a core; one where there is an accelerator."""
    run: Annotated[Comparison, tyro.conf.arg(name="")] = field(default_factory=Comparison)


def parse(argv: Sequence[str]) -> Arguments:
    """Reads a command line, as `command_line.parse_run`, and checks it before anything slow."""
    arguments, _ = parse_run(Arguments, "python -m experiments.compare", argv, default)
    check(arguments.run)
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs {arguments.jobs}: give at least 1.")
    name = arguments.run.data.name
    workdir = Path("runs") / f"compare-{'digits' if name == 'auto' else name}"
    return dataclasses.replace(arguments, workdir=arguments.workdir or workdir)


def default(name: str) -> Comparison:
    """The comparison for a data set: its own, else one around its main job's configuration."""
    path = CONFIGS / "compare" / f"{name}.py"
    if path.is_file():
        return load_config(path, Comparison)
    job = load_config(CONFIGS / f"{name}.py", Config)
    data = dataclasses.replace(job.data, certify=1_000)
    return Comparison(data=data, network=job.network, train=job.train)
