"""A cell of a comparison: one network, trained with one seed, and its outputs on every split.

A cell has a directory under `networks/`, named by a hash of data, network, training and seed. It is
prepared in a directory of another name, where its checkpoints are and a training that was killed
goes on, and committed whole. Decisions (policies, thresholds) need only its traces, so the
expensive part is shared by everything that is compared.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

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
from experiments.store import Store, claimed, commit, draft, fetch, names
from experiments.train import loop
from experiments.train import trained as training
from experiments.train.config import PLAIN_REGIME, NetworkConfig, TrainConfig, narrowed
from experiments.train.trained import TrainRun

FORMAT = 1  # raise it when the content of a cell changes, so that older ones are made anew

DONE = "trained.json"
NETWORKS = "networks"
PLAIN = "plain network"
SPLITS: tuple[str, ...] = ("held_out", "test")

# What a key is made of. A field that came later counts only where it differs from its default, so
# that what was trained before keeps its name; its default means what was done before.
_FIELDS = {
    "data": {"name", "calibrate", "choose", "certify", "limit", "flip", "shift", "cutout"},
    "network": {"name", "depth", "width", "exits", "options", "gate", "gate_reads", "dtype"},
    "train": {
        *("regime", "exit_weights", "cost_weight", "budget", "label_smoothing", "epochs", "batch"),
        *("optimiser", "learning_rate", "adam_learning_rate", "momentum", "weight_decay"),
        *("schedule", "warmup"),
    },
}
# What changes where things are, or how fast, and no result.
_APART = {
    "data": {"dir", "cache", "download", "memory", "threads", "workers", "ahead"},
    "train": {"steps_per_dispatch", "checkpoint_seconds"},
}


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
        for section, part in (
            ("data", DataConfig()),
            ("network", NetworkConfig()),
            ("train", TrainConfig()),
        ):
            default = to_json(part)
            settings[section] = {
                name: value
                for name, value in settings[section].items()
                if name in _FIELDS[section]
                or (name not in _APART.get(section, ()) and value != default[name])
            }
        if self.data.name == "files":  # which images, is told by where they are
            settings["data"]["dir"] = str(self.data.dir)
        words = "".join(c if c.isalnum() else "-" for c in self.name).strip("-")
        return f"{words}-seed{self.seed}-{digest([FORMAT, settings])}"

    @property
    def any_seed(self) -> str:
        """A name that is the same for all seeds."""
        return dataclasses.replace(self, seed=0).key

    @property
    def place(self) -> str:
        """Its directory, relative to the store."""
        return f"{NETWORKS}/{self.key}"

    def directory(self, workdir: Path) -> Path:
        """Its directory."""
        return workdir / self.place


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


def prepare(cell: Cell, drift: DriftConfig, store: Store) -> None:
    """Trains a cell and records its traces, as far as they are not there already.

    Early exits are also tried on corrupted images. Two calls at a time train it twice, and the one
    that ends first counts.

    Raises:
      FloatingPointError: if training diverges.
      KeyboardInterrupt: after a signal; the state is saved.
    """
    place = cell.directory(store.workdir)
    if not trained([cell], store):
        with claimed(place) as scratch:
            if not trained([cell], store):
                # Begun by an older version, or not in the bucket yet. In this order: what another
                # process commits meanwhile has DONE in it from the first moment.
                begun = place.is_dir() and (store.bucket or not (place / DONE).exists())
                if begun and not any(scratch.iterdir()):
                    os.replace(place, scratch)
                _train(cell, scratch)
                for name in SPLITS:
                    with replacing(scratch / f"{name}.npz") as file:
                        _trace(cell, name, scratch, file)
                commit(store, scratch, cell.place)
    fetch(store, cell.place)
    for name in missing(cell, drift, names(store, cell.place), store):
        with draft(store, f"{cell.place}/{name}.npz") as file:
            _trace(cell, name, place, file)


def trained(cells: Sequence[Cell], store: Store) -> list[Cell]:
    """Those whose training has ended, here or in the bucket."""
    there = names(store, NETWORKS)
    done = [cell for cell in cells if cell.key in there]
    if store.bucket is not None:
        return done
    return [cell for cell in done if (cell.directory(store.workdir) / DONE).exists()]


def missing(cell: Cell, drift: DriftConfig, there: set[str], store: Store) -> list[str]:
    """The traces that `prepare` would record of a trained cell.

    Args:
      cell: the cell.
      drift: corrupted images to try it on.
      there: what is committed in its directory.
      store: where that is.
    """
    # A bucket has them in the cell's archive.
    packed = SPLITS if store.bucket is not None else ()
    return [
        name for name in traced(cell, drift) if f"{name}.npz" not in there and name not in packed
    ]


def traced(cell: Cell, drift: DriftConfig) -> list[str]:
    """The traces of a cell, by their names."""
    wanted = list(SPLITS)
    if cell.kind == "regime" and drift.policies:
        count = min(drift.images, len(training.dataset(cell.run).test.images))
        wanted += [drift_name(k, s, count) for k in drift.kinds for s in drift.severities]
    return wanted


def bring(cell: Cell, drift: DriftConfig, store: Store) -> None:
    """Makes sure that a trained cell and its traces are in `workdir`."""
    fetch(store, cell.place)
    for name in traced(cell, drift):
        fetch(store, f"{cell.place}/{name}.npz")


def record(cell: Cell, workdir: Path) -> dict[str, Any]:
    """What was noted of a trained cell in `workdir`: `seconds` of training, `macs` of each exit."""
    return json.loads((cell.directory(workdir) / DONE).read_text())


def progress(cell: Cell, workdir: Path) -> str:
    """How far its training is, in words."""
    place = cell.directory(workdir)
    rows = []
    for path in place.parent.glob(f".{place.name}.*.work/{loop.METRICS}"):
        try:
            rows.append(json.loads(path.read_text().splitlines()[-1])["epoch"])
        except (FileNotFoundError, IndexError, json.JSONDecodeError):
            continue
    return f"epoch {max(rows):.1f}/{cell.train.epochs}" if rows else ""


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
    """Fingerprints of the samples that a network was trained on.

    Empty if they are decoded while it trains: cropped at random they have none, and that the
    splits have no image in common rests on the division alone.
    """
    train = training.dataset(run).train
    return fingerprints(train.images) if isinstance(train, splits.Split) else np.zeros(0, np.uint64)


def variables(cell: Cell, workdir: Path) -> Variables:
    """Variables of a trained cell."""
    return _variables(cell, cell.directory(workdir))


def _trace(cell: Cell, name: str, place: Path, to: Path) -> None:
    """Records a trace of the trained cell in `place`."""
    images = training.dataset(cell.run)
    if name in SPLITS:
        split = images.test if name == "test" else held_out(images)
    else:
        kind, severity, count = name.split("-")
        test = images.test.images[: int(count)]
        corrupted = corrupt(test, kind, int(severity), seed=0)
        split = splits.Split(corrupted, images.test.labels[: int(count)])
    save_trace(to, collect(training.network(cell.run), _variables(cell, place), *split))


def _variables(cell: Cell, place: Path) -> Variables:
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
