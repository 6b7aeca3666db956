"""A cell of a comparison: one network, trained with one seed, and its outputs on every split.

A cell has a directory under `networks/`, named by a hash of data, network, training and seed, and
is computed once. Decisions (policies, thresholds) need only its traces, so the expensive part is
shared by everything that is compared.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console

from eejax.network import Variables
from eejax.trace import Trace, collect, fingerprints, read_trace, save_trace
from experiments.command_line import to_json
from experiments.compare.config import Comparison, DriftConfig
from experiments.data import splits
from experiments.data.config import DataConfig
from experiments.data.corruptions import corrupt
from experiments.evaluate.decide import Traces
from experiments.files import digest, replacing, write_json
from experiments.train import loop
from experiments.train import trained as training
from experiments.train.config import PLAIN_REGIME, NetworkConfig, TrainConfig, narrowed
from experiments.train.trained import TrainRun

FORMAT = 1  # raise it when the content of a cell changes, so that older ones are made anew

DONE = "trained.json"
PLAIN = "plain network"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A network to train with a seed.

    Attributes:
      name: of the network, the same for all seeds: "soft_mixture", "plain network", ...
      kind: "regime" for early exits, "static" for a plain network.
      seed: of parameters, order and augmentation.
      data: images.
      network: backbone and exits.
      ends_at: exit, from 0, at which a static network ends; None for early exits.
      train: regime, optimiser and length.
    """

    name: str
    kind: Literal["regime", "static"]
    seed: int
    data: DataConfig
    network: NetworkConfig
    ends_at: int | None
    train: TrainConfig

    @property
    def run(self) -> TrainRun:
        """Its training, up to the seed. Images are held out in the same way for all seeds."""
        return TrainRun(self.data, self.network, self.train, self.ends_at)

    @property
    def key(self) -> str:
        """Name of the directory; it changes with everything that changes the result."""
        settings = to_json(self)
        for where in ("dir", "cache", "download"):
            settings["data"].pop(where)
        for pace in ("steps_per_dispatch", "checkpoint_seconds"):
            settings["train"].pop(pace)
        words = "".join(c if c.isalnum() else "-" for c in self.name).strip("-")
        return f"{words}-seed{self.seed}-{digest([FORMAT, settings])}"

    def directory(self, workdir: Path) -> Path:
        """Its directory."""
        return workdir / "networks" / self.key


def dataset(config: Comparison) -> splits.Dataset:
    """The images of a comparison."""
    return training.dataset(TrainRun(config.data, config.network, config.train))


def cells(config: Comparison) -> list[Cell]:
    """All networks that a comparison trains; all seeds of a network follow one another."""
    # "auto" could mean other images to a worker, or another day.
    images = dataclasses.replace(config.data, name=dataset(config).name)
    full = dataclasses.replace(config.network, gate=True)
    last = full.num_exits - 1
    plain = dataclasses.replace(config.train, regime=PLAIN_REGIME, exit_weights=(), cost_weight=0.0)
    result = []
    for regime in config.regimes:
        train = dataclasses.replace(config.train, regime=regime)
        result.append(Cell(regime, "regime", 0, images, full, None, train))
    alone = dataclasses.replace(full, gate=False)
    whole = Cell(PLAIN, "static", 0, images, alone, last, plain)
    result.append(whole)
    if config.static.enabled:
        for e in config.static.exits or range(1, last + 1):
            result.append(dataclasses.replace(whole, name=f"depth to exit {e}", ends_at=e - 1))
        for share in config.static.widths:
            narrow = dataclasses.replace(alone, width=narrowed(alone, share))
            result.append(dataclasses.replace(whole, name=f"width {share:g}", network=narrow))
    return [dataclasses.replace(cell, seed=seed) for cell in result for seed in config.seeds]


def macs(cell: Cell) -> np.ndarray:
    """`[E]`, multiply-accumulates of leaving at each exit of a cell's network."""
    return training.costs(cell.run).cumulative


def prepare(cell: Cell, drift: DriftConfig, workdir: Path) -> None:
    """Trains a cell and records its traces, as far as they are not there already.

    Early exits are also tried on corrupted images.

    Raises:
      FloatingPointError: if training diverges.
      KeyboardInterrupt: after a signal; the state is saved.
    """
    place = cell.directory(workdir)
    place.mkdir(parents=True, exist_ok=True)
    if not (place / DONE).exists():
        _train(cell, place)
    network, images = training.network(cell.run), training.dataset(cell.run)
    fitted = variables(cell, workdir)
    for name in missing(cell, drift, workdir):
        if name in ("held_out", "test"):
            split = images.test if name == "test" else held_out(images)
        else:
            kind, severity, count = name.split("-")
            test = images.test.images[: int(count)]
            corrupted = corrupt(test, kind, int(severity), seed=0)
            split = splits.Split(corrupted, images.test.labels[: int(count)])
        with replacing(place / f"{name}.npz") as temporary:
            save_trace(temporary, collect(network, fitted, *split))


def missing(cell: Cell, drift: DriftConfig, workdir: Path) -> list[str]:
    """The files that `prepare` would write after training."""
    names = ["held_out", "test"]
    if cell.kind == "regime" and drift.policies:
        count = min(drift.images, len(training.dataset(cell.run).test.images))
        names += [drift_name(k, s, count) for k in drift.kinds for s in drift.severities]
    place = cell.directory(workdir)
    return [name for name in names if not (place / f"{name}.npz").exists()]


def progress(cell: Cell, workdir: Path) -> str:
    """How far its training is, in words."""
    path = cell.directory(workdir) / loop.METRICS
    try:
        last = path.read_text().splitlines()[-1]
        return f"epoch {json.loads(last)['epoch']:.1f}/{cell.train.epochs}"
    except (FileNotFoundError, IndexError, json.JSONDecodeError):
        return ""


def drift_name(kind: str, severity: int, count: int) -> str:
    """The name of a trace of corrupted images."""
    return f"{kind}-{severity}-{count}"


def held_out(dataset: splits.Dataset) -> splits.Split:
    """All images held out from training; `traces` divides them anew for each seed."""
    parts = (dataset.calibrate, dataset.choose, dataset.certify)
    return splits.Split(
        np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts])
    )


@functools.lru_cache(maxsize=128)
def traces(cell: Cell, workdir: Path) -> Traces:
    """The traces of a cell.

    The held-out images are divided into calibrate, choose and certify by the seed, so a band over
    seeds includes the luck of that division. The held-out images together, and those of training,
    are the same for all seeds: the luck of drawing them is not in the band.
    """
    place = cell.directory(workdir)
    pool = read_trace(place / "held_out.npz")
    sizes = cell.data.calibrate, cell.data.choose
    rng = np.random.Generator(np.random.PCG64(cell.seed))
    calibrate, choose, certify = (
        select(pool, rows) for rows in splits.stratified(pool.labels, sizes, rng)
    )
    return Traces(calibrate, choose, certify, read_trace(place / "test.npz"))


def select(trace: Trace, rows: np.ndarray) -> Trace:
    """Some of a trace's samples."""
    return Trace(*(part[rows] for part in trace))


@functools.cache
def training_ids(run: TrainRun) -> np.ndarray:
    """Fingerprints of the samples that a network was trained on."""
    return fingerprints(training.dataset(run).train.images)


def variables(cell: Cell, workdir: Path) -> Variables:
    """Variables of a trained cell."""
    place = cell.directory(workdir)
    return training.trained(cell.run, cell.seed, place, Console(quiet=True))[0]


def _train(cell: Cell, place: Path) -> None:
    with (place / "log.txt").open("a") as log:
        _, rows = training.trained(cell.run, cell.seed, place, Console(file=log, width=120))
    record = {
        "cell": to_json(cell),
        "seconds": rows[-1]["seconds"],
        "macs": macs(cell).tolist(),
        "gate_mean": rows[-1]["gate_mean"],
    }
    write_json(place / DONE, record)
