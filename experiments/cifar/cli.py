"""The command line of the main job: flags and files to a checked `Config`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from experiments.cifar.config import Config, check
from experiments.command_line import CONFIGS, STORED, load_config, parse_run, refuse_changes


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
    run: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def parse(argv: Sequence[str]) -> Arguments:
    """Reads a command line, as `command_line.parse_run`, and checks it before anything slow."""
    arguments, stored = parse_run(Arguments, "python -m experiments.cifar", argv, default)
    check(arguments.run)
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
