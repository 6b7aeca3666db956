"""The command line of the comparison: flags and files to a checked `Comparison`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from experiments import command_line
from experiments.cifar.config import Config
from experiments.command_line import load_config, of_family
from experiments.compare.config import Comparison, check
from experiments.data.splits import resolve

CONFIGS = command_line.CONFIGS / "compare"


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
    """Reads and checks a command line; the data set that it names can be had.

    Returns:
      The arguments, with the data set and the directory named; `resume` is true only if there is
      a comparison to continue.

    Raises:
      ValueError, FileNotFoundError: a one-line reason, before anything is downloaded, compiled or
        written.
      SystemExit: after `--help`.
    """
    start = command_line.parse_start(argv)
    stored = command_line.stored_config(start, Comparison)
    file = Comparison() if start.config is None else load_config(start.config, Comparison)
    arguments = _parse(argv, of_family(file, start.family) if stored is None else stored)
    asked = arguments.run.data.name
    name = resolve(arguments.run.data)
    if stored is None and start.config is None:
        arguments = _parse(argv, of_family(_default(name), start.family))
    # The data set's name, unless "auto" has to tell that this is a fall-back.
    fell_back = asked == "auto" and name == "digits"
    data = dataclasses.replace(arguments.run.data, name="auto" if fell_back else name)
    run = dataclasses.replace(arguments.run, data=data)
    check(run)
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs {arguments.jobs}: give at least 1.")
    workdir = arguments.workdir or Path("runs") / f"compare-{name}"
    return dataclasses.replace(arguments, run=run, workdir=workdir, resume=stored is not None)


def _default(name: str) -> Comparison:
    """The comparison for a data set: its own, else one around its main job's configuration."""
    path = CONFIGS / f"{name}.py"
    if path.is_file():
        return load_config(path, Comparison)
    job = load_config(command_line.CONFIGS / f"{name}.py", Config)
    data = dataclasses.replace(job.data, certify=1_000)
    return Comparison(data=data, network=job.network, train=job.train)


def _parse(argv: Sequence[str], run: Comparison) -> Arguments:
    prog = "python -m experiments.compare"
    return command_line.parse(Arguments, prog, argv, Arguments(run=run))
