"""The time of a training step on several devices and in several processes of this machine.

python -m experiments.scaling
python -m experiments.scaling --modes strong --repeats 20
python -m experiments.scaling --data.name digits --network.width 16 --train.batch 256
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from eejax.training import placement
from experiments import command_line, distributed
from experiments.checks import require, require_all
from experiments.cifar.config import Config
from experiments.data.config import DataConfig
from experiments.data.config import check as check_data
from experiments.data.splits import Split
from experiments.distributed import DistributedConfig
from experiments.files import write_json
from experiments.latency.arguments import check_parents
from experiments.memory import use_huge_pages
from experiments.report.environment import describe
from experiments.train import trained
from experiments.train.config import NetworkConfig, TrainConfig
from experiments.train.config import check as check_training

# The first argument of a process that takes steps, and how its answers begin.
_WORK = "--work"


@dataclass(frozen=True)
class Arguments:
    """Time a training step on one device, on several, and in several processes: strong scaling,
    with the same batch in all, and weak, with the same batch on each device. Each layout has
    processes of its own, because the number of devices is fixed when a process starts; they take a
    step in turn, so that other work on the machine slows them alike. Without flags: network, regime
    and batch of configs/cifar10.py. On a CPU devices are simulated: they share the cores."""

    repeats: int = 10
    """Timed rounds; every layout takes a step in each."""
    modes: tuple[Literal["strong", "weak"], ...] = ("strong", "weak")
    """The same batch in all, or on each device."""
    devices: tuple[int, ...] = (2, 4)
    """Numbers of devices of one process, beside one."""
    processes: tuple[int, ...] = (2,)
    """Numbers of processes, of one device each."""
    fsdp: bool = False
    """Divide parameters and optimiser state among all devices."""
    json: Path | None = None
    """File for the rows, as a list."""
    data: DataConfig = field(
        default_factory=lambda: DataConfig(calibrate=100, choose=100, limit=2048)
    )
    network: NetworkConfig = field(default_factory=NetworkConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


class Layout(NamedTuple):
    """What is timed.

    Attributes:
      mode: strong or weak.
      processes: their number.
      devices: of each process.
      batch: samples a step, of all devices.
    """

    mode: str
    processes: int
    devices: int
    batch: int


def main(argv: Sequence[str]) -> int:
    """Runs a command line; returns the exit status: 0, 2 for a mistake, or 130 after Ctrl-C."""
    console = Console(soft_wrap=True)

    def begin() -> Arguments:
        family = command_line.parse_start(argv).family
        config = command_line.load_config(command_line.CONFIGS / "cifar10.py", Config)
        config = command_line.of_family(config, family)
        default = Arguments(network=config.network, train=config.train)
        arguments = command_line.parse(Arguments, "python -m experiments.scaling", argv, default)
        require(arguments.repeats >= 1, "repeats", arguments.repeats, "at least 1")
        expected = "at least 2, because one is timed anyway"
        require_all("", arguments, "devices processes", lambda n: n >= 2, expected)
        check_data(arguments.data)
        check_training(arguments.network, arguments.train)
        check_parents(arguments, "json")
        run = trained.TrainRun(arguments.data, arguments.network, arguments.train)
        kind = "images that fit into memory"
        require(
            isinstance(trained.dataset(run).train, Split), "data.name", arguments.data.name, kind
        )
        for layout in layouts(arguments):
            count, batch = layout.processes * layout.devices, layout.batch
            require(batch % count == 0, "train.batch", batch, f"a multiple of {count}")
        return arguments

    def work(arguments: Arguments) -> None:
        environment = describe("experiments.scaling", argv)
        with console.status("compiling and timing"):
            rows = measure(arguments)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        console.print(
            f"{arguments.network.words}, {arguments.train.regime}\n{environment['device']}\n"
            f"All devices and processes share {cores} core(s): more of them add no speed here. "
            "1.00 in the last column says that dividing the step costs nothing."
        )
        console.print(_table(rows))
        if arguments.json is not None:
            write_json(arguments.json, [{**row, **environment} for row in rows])

    return command_line.execute(begin, work, (OSError, RuntimeError))


def layouts(arguments: Arguments) -> list[Layout]:
    """One device first, then several devices and processes, for each mode."""
    batch, result = arguments.train.batch, [Layout("", 1, 1, arguments.train.batch)]
    for mode in arguments.modes:
        for processes, devices in (
            *((1, n) for n in arguments.devices),
            *((n, 1) for n in arguments.processes),
        ):
            factor = processes * devices if mode == "weak" else 1
            result.append(Layout(mode, processes, devices, batch * factor))
    return result


def measure(arguments: Arguments) -> list[dict[str, Any]]:
    """A row for each layout.

    The columns: those of `Layout`; `ms`, the median time of a step; `spread`, the interquartile
    range of the rounds as a fraction of `ms`; `images_per_second`; and `time_ratio`, the median
    over the rounds of the time for a sample against one device's in the same round.

    Raises:
      RuntimeError: if a process ends early.
    """
    every = layouts(arguments)
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_started(arguments, layout)) for layout in every]
        times = np.array(
            [[_step(worker) for worker in workers] for _ in range(arguments.repeats)]
        ).T
    rows = []
    for layout, seconds in zip(every, times, strict=True):
        low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75))
        share = layout.batch / every[0].batch
        rows.append(
            {
                **layout._asdict(),
                "ms": float(1e3 * median),
                "spread": float((high - low) / median),
                "images_per_second": float(layout.batch / median),
                "time_ratio": float(np.median(seconds / times[0])) / share,
            }
        )
    return rows


@contextlib.contextmanager
def _started(arguments: Arguments, layout: Layout) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of a layout, ready to take steps."""
    values = {
        "layout": layout,
        "fsdp": arguments.fsdp,
        "data": command_line.to_json(arguments.data),
        "network": command_line.to_json(arguments.network),
        "train": {**command_line.to_json(arguments.train), "batch": layout.batch},
    }
    config = DistributedConfig(processes=layout.processes, devices=layout.devices)
    command = [sys.executable, "-m", "experiments.scaling", _WORK, json.dumps(values)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = distributed.launch(command, config, **pipes)
    try:
        for process in processes:
            _answer(process)
        yield processes
    finally:
        for process in processes:  # all at once: none is to learn of the end of another
            process.kill()
        for process in processes:
            process.communicate()


def _step(processes: Sequence[subprocess.Popen[str]]) -> float:
    """Seconds until every process of a layout has taken a step."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return max(float(_answer(process)) for process in processes)


def _answer(process: subprocess.Popen[str]) -> str:
    """The next line that a process prints for us."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(_WORK):
            return line.removeprefix(_WORK)
    raise RuntimeError(f"a process of the benchmark ended with status {process.wait()}")


def _work(values: dict[str, Any]) -> None:
    """Takes a step of a layout, as `_started` gives it, for each line of standard input."""
    _, processes, devices, batch = values["layout"]
    config = DistributedConfig(processes, devices, processes * devices if values["fsdp"] else 1)
    distributed.join(config)
    mesh = distributed.mesh(config)
    run = trained.TrainRun(
        command_line.from_json(DataConfig, values["data"]),
        command_line.from_json(NetworkConfig, values["network"]),
        command_line.from_json(TrainConfig, values["train"]),
    )
    init, train_steps, _ = trained.program(run, mesh)
    split = trained.dataset(run).train
    assert isinstance(split, Split)
    rows = np.arange(batch, dtype=np.int32)[None] % len(split.images)
    arguments = placement.replicate(mesh, (split.images, split.labels, rows))
    key = placement.replicate(mesh, jax.random.key(0))
    state = init(key)

    def step() -> float:
        nonlocal state  # donated to the step
        start = time.perf_counter()
        state, metrics = train_steps(state, key, *arguments, 0, 1)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    for _ in range(3):
        step()
    print(_WORK, flush=True)
    for _ in sys.stdin:
        print(_WORK, step(), flush=True)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    names = ("scaling", "processes", "devices", "batch", "ms", "spread", "images/s", "x one device")
    table = Table(*names, box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            row["mode"],
            str(row["processes"]),
            str(row["devices"]),
            str(row["batch"]),
            f"{row['ms']:.4g}",
            f"{100 * row['spread']:.0f} %",
            f"{row['images_per_second']:,.0f}",
            f"{row['time_ratio']:.2f}",
        )
    return table


if __name__ == "__main__":
    use_huge_pages()
    if sys.argv[1:2] == [_WORK]:
        _work(json.loads(sys.argv[2]))
    else:
        sys.exit(main(sys.argv[1:]))
