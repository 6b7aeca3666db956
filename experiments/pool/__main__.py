"""Loses no cell: kills workers and the driver at random moments, and looks at what is left.

    python -m experiments.pool
    python -m experiments.pool --backend submitit --slurm.cluster local --slurm.tasks 25
    python -m experiments.pool --backend ray --cells 200 --kills 5

A thousand small jobs commit a result each, twice: undisturbed in one process, and on the backend
that is asked for, while workers end by SIGKILL whenever another share of the results is there, and
once the driver, which begins again. The results must be the same, byte for byte, each committed
once. For workers of this machine: of a cluster elsewhere none can be killed, so give --kills 0.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from experiments.checks import require_not_negative, require_positive
from experiments.command_line import execute, parse
from experiments.pool import config as pool_config
from experiments.pool import run as pool
from experiments.pool.config import PoolConfig
from experiments.pool.jobs import Job, Unavailable
from experiments.pool.killing import RESULTS, WINS, WORKERS, cell, disturb
from experiments.store import Store, names


@dataclass(frozen=True)
class Arguments:
    """Kill workers and the driver of a pool at random moments, and check that each result is there
    once."""

    cells: int = 1000
    """Jobs."""
    kills: int = 20
    """Workers to kill."""
    driver_kills: int = 1
    """How often the driver is killed and begins again."""
    seconds: float = 0.005
    """How long a job takes, about."""
    seed: int = 0
    """Of what is drawn, and of who is killed when."""
    workdir: Path | None = None
    """An empty directory. Default: a temporary one."""
    drive: bool = False
    """Only run what is not there yet in --workdir; the command calls itself so."""
    pool: Annotated[PoolConfig, tyro.conf.arg(name="")] = field(default_factory=PoolConfig)


def drive(arguments: Arguments, workdir: Path) -> list[str]:
    """Runs the jobs whose results are not there; returns what failed."""
    there = names(Store(workdir), RESULTS)
    jobs = [
        Job(f"{i}", cell, (workdir, arguments.seed, i, arguments.seconds))
        for i in range(arguments.cells)
        if f"{i}.json" not in there
    ]
    console = Console(file=(workdir / "log.txt").open("a"), width=120)
    failures = pool.map("cells", jobs, arguments.pool, workdir / "pool", console)[1]
    return [f"{failure.name}: {failure.error}" for failure in failures]


def main(argv: Sequence[str]) -> int:
    """Runs a command line; a mistake is one line on stderr.

    Returns:
      The exit status: 0 if nothing was lost, doubled or changed; 1 if something was; 2 for a
      mistake.
    """
    return execute(lambda: _parse(argv), lambda arguments: _run(arguments, argv), (Unavailable,))


def _parse(argv: Sequence[str]) -> Arguments:
    arguments = parse(Arguments, "python -m experiments.pool", argv, Arguments())
    require_positive("", arguments, "cells")
    require_not_negative("", arguments, "kills driver_kills seconds seed")
    pool_config.check(arguments.pool)
    return arguments


def _run(arguments: Arguments, argv: Sequence[str]) -> int:
    if arguments.drive:
        assert arguments.workdir is not None
        failures = drive(arguments, arguments.workdir)
        for words in failures:
            print(f"FAILED {words}", file=sys.stderr)
        return len(failures) > 0
    with contextlib.ExitStack() as stack:
        workdir = arguments.workdir
        if workdir is None:
            workdir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eejax-pool-")))
        return _compare(arguments, argv, workdir)


def _compare(arguments: Arguments, argv: Sequence[str], workdir: Path) -> int:
    calm, disturbed = workdir / "undisturbed", workdir / "disturbed"
    for place in (calm, disturbed):
        (place / WORKERS).mkdir(parents=True)
    for number in range(arguments.cells):
        cell(calm, arguments.seed, number, 0.0)
    began = time.monotonic()
    # As often as workers are killed: chance may hit one job several times.
    again = ["--retries", str(arguments.kills), "--workdir", str(disturbed), "--drive"]
    command = [sys.executable, "-m", "experiments.pool", *argv, *again]
    workers, drivers, status = disturb(
        command,
        disturbed,
        arguments.cells,
        arguments.kills,
        arguments.driver_kills,
        arguments.seed,
    )
    seconds = time.monotonic() - began
    expected, found = (
        {path.name: path.read_bytes() for path in (place / RESULTS).glob("*.json")}
        for place in (calm, disturbed)
    )
    won = disturbed / WINS
    wins = won.read_text().split() if won.exists() else []
    lost, doubled = expected.keys() - found.keys(), len(wins) - len(set(wins))
    changed = [name for name in found if found[name] != expected.get(name)]
    print(
        f"{arguments.pool.backend}: {len(found)} of {arguments.cells} results in {seconds:.0f} s, "
        f"{workers} workers and {drivers} drivers killed (seed {arguments.seed}): {len(lost)} "
        f"lost, {doubled} committed twice, {len(changed)} different from an undisturbed run."
    )
    if workers < arguments.kills or drivers < arguments.driver_kills:
        print("It was over before all were killed; give more --cells, or more --seconds.")
    return int(bool(status or lost or doubled or changed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
