"""The command line of `experiments.compare`, checked. Nothing here imports JAX."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from experiments.cifar import cli
from experiments.compare.config import Comparison, check
from experiments.data.splits import resolve

CONFIGS = cli.CONFIGS / "compare"


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
    """Take the configuration that --workdir was begun with; flags override it."""
    jobs: int | None = None
    """Trainings, and choices, at a time. Default: one a core; one where there is an accelerator."""
    run: Annotated[Comparison, tyro.conf.arg(name="")] = field(default_factory=Comparison)


def parse(argv: Sequence[str]) -> Arguments:
    """Arguments from the command line, checked; the data set that they name can be had, and is
    named, and so is the directory.

    Raises:
      ValueError, FileNotFoundError: a one-line reason, before anything is downloaded, compiled or
        written.
      SystemExit: `--help` was asked for.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--config", type=Path)
    early.add_argument("--workdir", type=Path)
    early.add_argument("--resume", action="store_true")
    early.add_argument("--network.name", dest="family")
    try:
        known, _ = early.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    if known.resume:
        if known.workdir is None:
            raise ValueError("--resume needs --workdir, the directory of the comparison.")
        stored = cli.read_run(known.workdir)["config"]
        start = cli.from_json(Comparison, stored)
    elif known.config is not None:
        start = cli.of_family(cli.load_config(known.config, Comparison), known.family)
    else:
        start = cli.of_family(Comparison(), known.family)
    arguments = _tyro(argv, start)
    asked = arguments.run.data.name
    name = resolve(arguments.run.data)
    if not known.resume and known.config is None:
        arguments = _tyro(argv, cli.of_family(_default(name), known.family))
    # The data set's name, unless "auto" has to tell that this is a fall-back.
    fell_back = asked == "auto" and name == "digits"
    images = dataclasses.replace(arguments.run.data, name="auto" if fell_back else name)
    workdir = arguments.workdir or Path("runs") / f"compare-{name}"
    run = dataclasses.replace(arguments.run, data=images)
    check(run)
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs {arguments.jobs}: give at least 1.")
    return dataclasses.replace(arguments, run=run, workdir=workdir)


def _default(name: str) -> Comparison:
    """The comparison for a data set: its own, else one around its main job's configuration."""
    path = CONFIGS / f"{name}.py"
    if path.is_file():
        return cli.load_config(path, Comparison)
    job = cli.load_config(cli.CONFIGS / f"{name}.py")
    images = dataclasses.replace(job.data, certify=1_000)
    return Comparison(data=images, network=job.network, train=job.train)


def _tyro(argv: Sequence[str], start: Comparison) -> Arguments:
    return cli.command_line(Arguments, "python -m experiments.compare", argv, Arguments(run=start))
