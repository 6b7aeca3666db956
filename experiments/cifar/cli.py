"""The command line of the main job: flags and files to a checked `Config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from experiments import command_line
from experiments.cifar.config import Config, check
from experiments.command_line import CONFIGS, load_config, of_family
from experiments.data.splits import resolve


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
    """Reads and checks a command line; the data set that it names can be had.

    Returns:
      The arguments; `resume` is true only if there is a run to continue.

    Raises:
      ValueError, FileNotFoundError: a one-line reason, before anything is downloaded, compiled or
        written.
      SystemExit: after `--help`.
    """
    start = command_line.parse_start(argv)
    stored = command_line.stored_config(start, Config)
    if stored is not None:
        arguments = _parse(argv, stored)
        command_line.refuse_changes(stored, arguments.run)
        check(arguments.run)
        return arguments
    file = Config() if start.config is None else load_config(start.config, Config)
    arguments = _parse(argv, of_family(file, start.family))
    # Checked before and after the data set is known: a mistake should not wait for a look at the
    # network, and the data set may bring another configuration.
    check(arguments.run)
    name = resolve(arguments.run.data)
    if start.config is None:
        asked = arguments.run.data.name
        file = load_config(CONFIGS / f"{name}.py", Config)
        arguments = _parse(argv, of_family(file, start.family))
        check(arguments.run)
        # "auto" stays, so that loading the images can say that they are a fall-back.
        data = dataclasses.replace(arguments.run.data, name=asked)
        run = dataclasses.replace(arguments.run, data=data)
        arguments = dataclasses.replace(arguments, run=run)
    workdir = arguments.workdir
    if workdir is not None and (workdir / command_line.STORED).exists():
        raise ValueError(
            f"{workdir} holds a run already; add --resume to continue it, or give another "
            "--workdir."
        )
    return dataclasses.replace(arguments, resume=False)


def _parse(argv: Sequence[str], run: Config) -> Arguments:
    prog = "python -m experiments.cifar"
    return command_line.parse(Arguments, prog, argv, Arguments(run=run))
