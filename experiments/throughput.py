"""Images a second of a training step, with one exit and with many, and of its input.

python -m experiments.throughput
python -m experiments.throughput --data.name files --data.dir DIR --data.crop random
python -m experiments.throughput --data.name digits --network.name resnet --network.depth 20
python -m experiments.throughput --network.width 64 --train.batch 512 --dtypes float32
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from eejax import cost
from eejax.benchmark import paired_seconds
from eejax.training import placement
from experiments import command_line
from experiments.checks import require
from experiments.cifar.config import Config
from experiments.data import splits
from experiments.data.config import DataConfig
from experiments.data.config import check as check_data
from experiments.files import write_json
from experiments.latency.arguments import check_parents
from experiments.memory import use_huge_pages
from experiments.report.environment import describe
from experiments.train import trained
from experiments.train.config import PLAIN_REGIME, NetworkConfig, TrainConfig
from experiments.train.config import check as check_training

_WARM = 2  # steps before those that are timed with their input


@dataclass(frozen=True)
class Arguments:
    """Time a training step of the plain network, which has the last exit alone, and of the network
    with all of its exits: augmentation, forward and backward pass, optimiser. All programs run in
    turn in one process, so that other work on the machine slows them alike. Then the input is timed
    alone, and beside the steps of the network with all exits, as in training. Without flags:
    network, regime and batch of configs/cifar10.py. A regime with several phases is timed in its
    first."""

    repeats: int = 10
    """Timed rounds; every program takes a step in each."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Arithmetic of the backbone; takes the place of --network.dtype."""
    json: Path | None = None
    """File for the rows, as a list."""
    data: DataConfig = field(default_factory=lambda: DataConfig(calibrate=100, choose=100))
    network: NetworkConfig = field(default_factory=NetworkConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def main(argv: Sequence[str]) -> int:
    """Runs a command line; returns the exit status: 0, 2 for a mistake, or 130 after Ctrl-C."""
    console = Console(soft_wrap=True)

    def begin() -> Arguments:
        family = command_line.parse_start(argv).family
        config = command_line.load_config(command_line.CONFIGS / "cifar10.py", Config)
        config = command_line.of_family(config, family)
        default = Arguments(network=config.network, train=config.train)
        arguments = command_line.parse(Arguments, "python -m experiments.throughput", argv, default)
        require(arguments.repeats >= 1, "repeats", arguments.repeats, "at least 1")
        require(bool(arguments.dtypes), "dtypes", "nothing", "float32, bfloat16 or both")
        check_data(arguments.data)
        check_training(arguments.network, arguments.train)
        check_parents(arguments, "json")
        images = len(trained.dataset(_runs(arguments, arguments.dtypes[0])[0]).train.images)
        batch = arguments.train.batch
        require(batch <= images, "train.batch", batch, f"at most {images}, the training images")
        return arguments

    def work(arguments: Arguments) -> None:
        environment = describe("experiments.throughput", argv)
        with console.status("compiling and timing"):
            rows = measure(arguments)
        console.print(f"{rows[0]['network']}, batch {rows[0]['batch']}\n{environment['device']}")
        console.print(_table(rows))
        console.print(_input_table(rows[1::2]))
        if arguments.json is not None:
            write_json(arguments.json, [{**row, **environment} for row in rows])

    return command_line.execute(begin, work, (OSError,))


def measure(arguments: Arguments) -> list[dict[str, Any]]:
    """A row for each dtype and number of exits.

    The columns: `network`; `data`; `regime`; `dtype`; `exits`; `batch`; `ms`, the median time of a
    step; `spread`, the interquartile range of the rounds as a fraction of `ms`;
    `images_per_second`; `macs`, multiply-accumulates of the forward pass for an image, with all
    heads; and for many exits `time_ratio`, the median over the rounds of the time against one
    exit's in the same round, `macs_ratio`, likewise of the multiply-accumulates, and `overhead`,
    `time_ratio / macs_ratio`. An overhead of 1 is a step that takes longer by exactly what its
    further multiply-accumulates explain.
    """
    runs = [run for dtype in arguments.dtypes for run in _runs(arguments, dtype)]
    times = paired_seconds([_step(run) for run in runs], arguments.repeats, warmup=1)
    rows = []
    for run, seconds in zip(runs, times, strict=True):
        low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75))
        rows.append(
            {
                "network": arguments.network.words.rpartition(", ")[0],
                "data": trained.dataset(run).name,
                "regime": run.train.regime,
                "dtype": run.network.dtype,
                "exits": trained.network(run).num_exits,
                "batch": run.train.batch,
                "ms": float(1e3 * median),
                "spread": float((high - low) / median),
                "images_per_second": float(run.train.batch / median),
                "macs": _macs(run),
            }
        )
    for i in range(0, len(rows), 2):
        one, many = rows[i], rows[i + 1]
        many["time_ratio"] = float(np.median(times[i + 1] / times[i]))
        many["macs_ratio"] = many["macs"] / one["macs"]
        many["overhead"] = many["time_ratio"] / many["macs_ratio"]
        many.update(_fed(runs[i + 1], arguments.repeats))
    return rows


def _fed(run: trained.TrainRun, repeats: int) -> dict[str, Any]:
    """The columns on the input, from `repeats` steps."""
    batch = run.train.batch
    mesh = placement.make_mesh(jax.local_devices()[:1])
    key = placement.replicate(mesh, jax.random.key(0))
    init, train_steps, _ = trained.program(run, mesh)
    state = init(key)
    seconds, began, waited = [], 0.0, 0.0
    for steps in (False, True):
        with contextlib.closing(trained.make_feed(run, key, mesh)) as feed:
            for step in range(_WARM + repeats):
                if step == _WARM:
                    began, waited = time.perf_counter(), 0.0
                before = time.perf_counter()
                fed = jax.block_until_ready(feed(step, 1))
                waited += time.perf_counter() - before
                if steps:
                    state, metrics = train_steps(state, key, *fed, 1)
                    jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - began)
    alone, together = seconds
    resident = isinstance(trained.dataset(run).train, splits.Split)
    return {
        "feed": "resident" if resident else "streamed",
        "input_images_per_second": repeats * batch / alone,
        "together_images_per_second": repeats * batch / together,
        "input_wait": waited / together,
    }


def _runs(arguments: Arguments, dtype: Any) -> list[trained.TrainRun]:
    """The plain network and the network with all exits, with one step a dispatch."""
    network = dataclasses.replace(arguments.network, dtype=dtype)
    # An epoch has at least one step, and so many are taken.
    epochs = max(arguments.train.epochs, _WARM + arguments.repeats)
    train = dataclasses.replace(arguments.train, steps_per_dispatch=1, epochs=epochs)
    plain = dataclasses.replace(train, regime=PLAIN_REGIME, exit_weights=())
    return [
        trained.TrainRun(arguments.data, network, plain, ends_at=network.num_exits - 1),
        trained.TrainRun(arguments.data, network, train),
    ]


def _step(run: trained.TrainRun) -> Callable[[], Any]:
    """A call that takes the next training step, always with the same samples."""
    mesh = placement.make_mesh(jax.local_devices()[:1])
    init, train_steps, _ = trained.program(run, mesh)
    key = placement.replicate(mesh, jax.random.key(0))
    with contextlib.closing(trained.make_feed(run, key, mesh)) as feed:
        fed = jax.block_until_ready(feed(0, 1))
    state = init(key)

    def step() -> Any:
        nonlocal state  # donated to the step
        state, metrics = train_steps(state, key, *fed, 1)
        return state, metrics

    return step


def _macs(run: trained.TrainRun) -> float:
    image = jax.ShapeDtypeStruct(trained.dataset(run).train.images[:1].shape, jnp.uint8)
    network = trained.network(run)
    shapes = jax.eval_shape(network.init, jax.random.key(0), image)
    return float(cost.macs(network, shapes, image).cumulative[-1])


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    names = ("dtype", "exits", "ms", "spread", "images/s", "M macs")
    table = Table(*names, "x time", "x macs", "overhead", box=None, pad_edge=False)
    for row in rows:
        ratios = (row.get(name) for name in ("time_ratio", "macs_ratio", "overhead"))
        table.add_row(
            row["dtype"],
            str(row["exits"]),
            f"{row['ms']:.4g}",
            f"{100 * row['spread']:.0f} %",
            f"{row['images_per_second']:,.0f}",
            f"{row['macs'] / 1e6:.3g}",
            *("" if ratio is None else f"{ratio:.3f}" for ratio in ratios),
        )
    return table


def _input_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("dtype", "feed", "input alone", "step alone", "together", "wait", box=None)
    for row in rows:
        rates = [row[f"{name}images_per_second"] for name in ("input_", "", "together_")]
        words = [f"{rate:,.0f}" for rate in rates]
        table.add_row(row["dtype"], row["feed"], *words, f"{100 * row['input_wait']:.1f} %")
    return table


if __name__ == "__main__":
    use_huge_pages()
    sys.exit(main(sys.argv[1:]))
