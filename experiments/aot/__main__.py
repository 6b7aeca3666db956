"""What XLA's compiler for TPUs makes of executors and training steps; needs libtpu and no TPU.

python -m experiments.aot
python -m experiments.aot --networks vit-s16 --topologies v6e:2x2 --batches 256
python -m experiments.aot --networks resnet20 --train v5e:4x4 --fsdp 1 16 --executors
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console
from rich.table import Table

from eejax.inference.tiles import check_tiles
from experiments import command_line
from experiments.aot import inference, topology, training
from experiments.checks import require
from experiments.files import write_json
from experiments.latency.arguments import check_parents
from experiments.report.environment import describe

Name = Literal["resnet8", "resnet20", "resnet56", "fast", "isotropic12", "vit-s16", "resnet50"]
Executor = Literal["cond", "compact", "loop", "host"]


@dataclass(frozen=True)
class Arguments:
    """Compile executors, and training steps, for TPUs that are not here, and print what the
    compiler says of the programs. Estimates come from the compiler's model of the chip: they
    compare forms of one program, and are no times. `full` at the same batch is the reference of
    each row; 40, 25, 15 and 20 % of the images leave at the four exits."""

    networks: tuple[Name, ...] = ("resnet20",)
    """Networks, with images of their usual size."""
    topologies: tuple[str, ...] = ("v5e:2x2",)
    """One device of each is compiled for."""
    executors: tuple[Executor, ...] = ("cond", "compact", "host")
    """Beside `full`; `cond` is compiled for one image. None to compile training steps alone."""
    batches: tuple[int, ...] = (1024,)
    """Images of a program."""
    tiles: tuple[int, ...] = ()
    """Samples a tile, falling; without, those of the device."""
    train: tuple[str, ...] = ()
    """Topologies on all of whose devices a training step is compiled, such as v5e:4x4."""
    train_batch: int = 2048
    """Images of a step, of all devices together."""
    fsdp: tuple[int, ...] = (1,)
    """Devices that divide parameters and optimiser state among them; 1 for none."""
    json: Path | None = None
    """File for the rows."""


def main(argv: Sequence[str]) -> int:
    """Runs a command line; returns the exit status: 0, 2 for a mistake, or 130 after Ctrl-C."""
    # With libtpu installed, JAX would look for a TPU.
    jax.config.update("jax_platforms", "cpu")
    console = Console(soft_wrap=True, width=150)

    def begin() -> tuple[Arguments, dict[str, list[Any]]]:
        arguments = command_line.parse(Arguments, "python -m experiments.aot", argv, Arguments())
        require(min(arguments.batches) >= 1, "batches", arguments.batches, "at least 1")
        check_tiles(arguments.tiles or None)
        check_parents(arguments, "json")
        try:
            names = {*arguments.topologies, *arguments.train}
            devices = {name: topology.devices(name) for name in sorted(names)}
        except ModuleNotFoundError as error:
            raise ValueError(str(error)) from None
        for name in arguments.train:
            for fsdp in arguments.fsdp:
                fits = fsdp >= 1 and len(devices[name]) % fsdp == 0
                require(fits, "fsdp", fsdp, f"a divisor of the {len(devices[name])} devices")
                divides = arguments.train_batch % len(devices[name]) == 0
                require(divides, "train-batch", arguments.train_batch, "a multiple of the devices")
        return arguments, devices

    def work(begun: tuple[Arguments, dict[str, list[Any]]]) -> None:
        arguments, devices = begun
        environment = describe("experiments.aot", argv)
        with console.status("compiling"):
            rows = list(_inference(arguments, devices))
            steps = list(_training(arguments, devices))
        for name, table in ((rows, _table), (steps, _training_table)):
            if name:
                console.print(table(name))
        if arguments.json is not None:
            content = {**environment, "inference": rows, "training": steps}
            write_json(arguments.json, content)

    return command_line.execute(begin, work, (OSError,))


def _inference(arguments: Arguments, devices: dict[str, list[Any]]) -> Any:
    for name in arguments.networks if arguments.executors else ():
        for place in arguments.topologies:
            case = inference.case(name, devices[place][0])
            measured: dict[tuple[str, int], dict[str, Any]] = {}
            for batch in arguments.batches:
                for executor in ("full", *arguments.executors):
                    size = 1 if executor == "cond" else batch
                    for e in ("full", executor):
                        if (e, size) not in measured:
                            tiles = arguments.tiles or None
                            measured[e, size] = inference.measure(case, e, size, tiles)
            for (_, size), row in measured.items():
                full = measured["full", size]
                ratio = row["temporary_bytes"] / max(full["temporary_bytes"], 1)
                speedup = full["cycles"] / row["cycles"]
                yield {**row, "topology": place, "temporary_ratio": ratio, "speedup": speedup}


def _training(arguments: Arguments, devices: dict[str, list[Any]]) -> Any:
    for name in arguments.networks:
        for place in arguments.train:
            for fsdp in arguments.fsdp:
                yield training.measure(name, place, devices[place], arguments.train_batch, fsdp)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("network", "topology", "executor", "batch", "tiles", box=None, pad_edge=False)
    for name in ("compiled", "temporary", "of full", "branches", "loops", "copies"):
        table.add_column(name, justify="right")
    for name in ("M cycles", "estimate", "speed-up"):
        table.add_column(name, justify="right")
    for row in rows:
        copies = row["buffer_copies"]
        table.add_row(
            row["network"],
            row["topology"],
            row["executor"],
            str(row["batch"]),
            ", ".join(map(str, row["tiles"])),
            f"{row['compile_seconds']:.0f} s",
            f"{row['temporary_bytes'] / 2**20:.1f} MiB",
            f"{row['temporary_ratio']:.2f}",
            str(row["conditionals"]),
            str(row["loops"]),
            "" if copies is None else str(copies),
            f"{row['cycles'] / 1e6:.3f}",
            f"{row['microseconds']:.0f} us",
            f"{row['speedup']:.2f}",
        )
    return table


def _training_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("network", "topology", "fsdp", "batch", "compiled", box=None, pad_edge=False)
    for name in ("state and batch", "temporary", "collectives", "M cycles", "estimate"):
        table.add_column(name)
    for row in rows:
        kinds = (
            f"{some['count']} {kind}, {some['bytes'] / 1e6:.1f} MB, "
            f"{some['asynchronous']} overlapped"
            for kind, some in row["collectives"].items()
        )
        table.add_row(
            row["network"],
            row["topology"],
            str(row["fsdp"]),
            str(row["batch"]),
            f"{row['compile_seconds']:.0f} s",
            f"{row['argument_bytes'] / 2**20:.1f} MiB",
            f"{row['temporary_bytes'] / 2**20:.1f} MiB",
            "; ".join(kinds),
            f"{row['cycles'] / 1e6:.3f}",
            f"{row['microseconds']:.0f} us",
        )
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
