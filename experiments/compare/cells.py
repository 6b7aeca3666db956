"""A cell of a comparison: one network, trained with one seed, and everything that it said.

A cell lives in a directory of its own under `networks/`, named by what made it: data, network,
training and seed. What is there is not made again. Deciding (policies, thresholds) needs only the
traces; so the expensive part is shared by everything that is compared.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from eejax import checkpoint, cost
from eejax.network import EarlyExitNetwork, Variables
from eejax.trace import Trace, collect, fingerprints, read_trace, save_trace
from eejax.training.state import init_state
from eejax.training.step import make_train_steps
from experiments.compare.config import Comparison, DriftConfig
from experiments.config import DataConfig, NetworkConfig, TrainConfig, to_json
from experiments.data import splits as data
from experiments.data.cache import replacing
from experiments.data.corruptions import corrupt
from experiments.train import build, loop, zoo

FORMAT = 1  # raise it when what a cell holds changes: older ones then are made anew

DONE = "trained.json"
PLAIN = "plain network"


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is trained.

    Attributes:
      name: of the network, the same for all seeds: "joint", "plain network", "width 0.5", ...
      kind: "regime" for early exits, "static" for a plain network.
      seed: of parameters, order and augmentation. Images are held out in the same way for all.
      data: which images.
      network: backbone and exits.
      ends_at: a static network ends at this exit, from 0; None for early exits.
      train: how.
    """

    name: str
    kind: Literal["regime", "static"]
    seed: int
    data: DataConfig
    network: NetworkConfig
    ends_at: int | None
    train: TrainConfig

    @property
    def key(self) -> str:
        """A name for the directory, which changes with everything that changes the result."""
        made_of = to_json(self)
        for where in ("dir", "cache", "download"):
            made_of["data"].pop(where)
        for pace in ("steps_per_dispatch", "checkpoint_seconds"):
            made_of["train"].pop(pace)
        text = json.dumps([FORMAT, made_of], sort_keys=True)
        words = "".join(c if c.isalnum() else "-" for c in self.name).strip("-")
        return f"{words}-seed{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def directory(self, workdir: Path) -> Path:
        """Where it lives."""
        return workdir / "networks" / self.key


def cells(config: Comparison) -> list[Cell]:
    """Everything that a comparison trains; all seeds of a network follow one another."""
    # "auto" could mean other images to a worker, or another day.
    images = dataclasses.replace(config.data, name=dataset(config.data).name)
    full = dataclasses.replace(config.network, gate=True)
    last = full.num_exits - 1
    plain = dataclasses.replace(config.train, loss="joint", exit_weights=(), cost_weight=0.0)
    made: list[tuple[str, Literal["regime", "static"], NetworkConfig, int | None, TrainConfig]] = [
        (regime, "regime", full, None, dataclasses.replace(config.train, loss=regime))
        for regime in config.regimes
    ]
    alone = dataclasses.replace(full, gate=False)
    made.append((PLAIN, "static", alone, last, plain))
    if config.static.enabled:
        for e in config.static.exits or range(1, last + 1):
            made.append((f"depth to exit {e}", "static", alone, e - 1, plain))
        for share in config.static.widths:
            narrow = dataclasses.replace(alone, width=zoo.narrowed(alone, share))
            made.append((f"width {share:g}", "static", narrow, last, plain))
    return [
        Cell(name, kind, seed, images, network, ends_at, train)
        for name, kind, network, ends_at, train in made
        for seed in config.seeds
    ]


class Traces(NamedTuple):
    """What a network said of each split, which has one use each.

    Attributes:
      calibrate: temperatures, and what else is fitted after training.
      choose: thresholds.
      certify: risks.
      test: is reported.
    """

    calibrate: Trace
    choose: Trace
    certify: Trace
    test: Trace


@functools.cache
def dataset(config: DataConfig) -> data.Dataset:
    """The images, read once a process; held out in the same way for every seed of training."""
    return data.load(config, 0)


@functools.cache
def network(config: NetworkConfig, ends_at: int | None, images: DataConfig) -> EarlyExitNetwork:
    """The network of a cell; the same object for every seed, so that it is compiled once."""
    whole = build.network(config, dataset(images))
    return whole if ends_at is None else whole.keeping([ends_at])


@functools.cache
def fractions(config: NetworkConfig, ends_at: int | None, images: DataConfig) -> cost.Costs:
    """Multiply-accumulates of its stages and heads."""
    made = network(config, ends_at, images)
    image = jnp.asarray(dataset(images).train.images[:1])
    shapes = jax.eval_shape(made.init, jax.random.key(0), image)
    return cost.xla_macs(made, shapes, image)


@functools.cache
def _training(
    config: NetworkConfig, ends_at: int | None, images: DataConfig, train: TrainConfig
) -> Any:
    """How a fresh state is made from a key, the compiled step, and the learning rate; what does not
    depend on the seed is made, and compiled, once."""
    made, held = network(config, ends_at, images), dataset(images)
    steps = len(held.train.images) // train.batch * train.epochs
    optimiser = build.optimiser(train, steps)
    costs = fractions(config, ends_at, images)
    step = make_train_steps(
        made,
        optimiser,
        build.objective(train, costs.fractions),
        build.augmentation(images, held.mean),
    )
    image = jnp.asarray(held.train.images[:1])
    fresh = jax.jit(lambda key: init_state(made, optimiser, key, image))
    return fresh, step, build.schedule(train, train.learning_rate, steps)


def macs(cell: Cell) -> np.ndarray:
    """`[E]`, multiply-accumulates of leaving at each exit of a cell's network."""
    return fractions(cell.network, cell.ends_at, cell.data).cumulative


def prepare(cell: Cell, drift: DriftConfig, workdir: Path) -> None:
    """Trains a cell and records its traces; what is there already is left alone.

    Early exits are also tried on corrupted images.

    Raises:
      FloatingPointError: training diverged.
      KeyboardInterrupt: a signal came; the state is saved.
    """
    place = cell.directory(workdir)
    place.mkdir(parents=True, exist_ok=True)
    if not (place / DONE).exists():
        try:
            _train(cell, place)
        except loop.Stopped as stopped:
            # Or it would be a failure like others, and the next training would begin.
            raise KeyboardInterrupt(str(stopped)) from stopped
    held = dataset(cell.data)
    made = network(cell.network, cell.ends_at, cell.data)
    variables = trained(cell, workdir)
    for name in missing(cell, drift, workdir):
        if name in ("held_out", "test"):
            split = held.test if name == "test" else held_out(held)
        else:
            kind, severity, count = name.split("-")
            images = corrupt(held.test.images[: int(count)], kind, int(severity), seed=0)
            split = data.Split(images, held.test.labels[: int(count)])
        with replacing(place / f"{name}.npz") as temporary:
            save_trace(temporary, collect(made, variables, *split))


def missing(cell: Cell, drift: DriftConfig, workdir: Path) -> list[str]:
    """The files that `prepare` would write after training."""
    wanted = ["held_out", "test"]
    if cell.kind == "regime" and drift.policies:
        count = min(drift.images, len(dataset(cell.data).test.images))
        wanted += [drift_name(k, s, count) for k in drift.kinds for s in drift.severities]
    place = cell.directory(workdir)
    return [name for name in wanted if not (place / f"{name}.npz").exists()]


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


def held_out(held: data.Dataset) -> data.Split:
    """All images that were held out from training; `traces` cuts them anew for each seed."""
    parts = (held.calibrate, held.choose, held.certify)
    return data.Split(
        np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts])
    )


@functools.lru_cache(maxsize=128)
def traces(cell: Cell, workdir: Path) -> Traces:
    """Its traces. The held-out images are cut into calibrate, choose and certify by the seed, so
    that a band over seeds holds the luck of that cut too. They are the same images for all seeds,
    and so are those of training: what other images would have done is not in the band."""
    place = cell.directory(workdir)
    pool = read_trace(place / "held_out.npz")
    sizes = cell.data.calibrate, cell.data.choose
    rng = np.random.Generator(np.random.PCG64(cell.seed))
    calibrate, choose, certify = (
        select(pool, rows) for rows in data.stratified(pool.labels, sizes, rng)
    )
    return Traces(calibrate, choose, certify, read_trace(place / "test.npz"))


def select(trace: Trace, rows: np.ndarray) -> Trace:
    """Some of a trace's samples."""
    return Trace(*(part[rows] for part in trace))


@functools.cache
def training_ids(images: DataConfig) -> np.ndarray:
    """Which samples networks were trained on."""
    return fingerprints(dataset(images).train.images)


def trained(cell: Cell, workdir: Path) -> Variables:
    """Its variables."""
    fresh, _, _ = _training(cell.network, cell.ends_at, cell.data, cell.train)
    like = jax.eval_shape(fresh, jax.random.key(0))
    _, state = checkpoint.restore(cell.directory(workdir) / loop.CHECKPOINTS, like)
    return state.variables


def _train(cell: Cell, place: Path) -> None:
    held = dataset(cell.data)
    made = network(cell.network, cell.ends_at, cell.data)
    fresh, step, rate = _training(cell.network, cell.ends_at, cell.data, cell.train)
    key = jax.random.key(cell.seed)

    def watch(state: Any) -> list[float]:
        trace = collect(made, state.variables, *held.calibrate)
        return (trace.logits.argmax(-1) == trace.labels[:, None]).mean(0).tolist()

    with (place / "log.txt").open("a") as log:
        _, rows = loop.train(
            step,
            fresh(key),
            key,
            held.train,
            loop.Plan(
                cell.train.epochs,
                cell.train.batch,
                cell.train.steps_per_dispatch,
                cell.train.checkpoint_seconds,
            ),
            workdir=place,
            resume=(place / loop.METRICS).exists(),
            watch=watch,
            learning_rate=rate,
            console=Console(file=log, width=120),
        )
    costs = fractions(cell.network, cell.ends_at, cell.data)
    facts = {
        "cell": to_json(cell),
        "seconds": rows[-1]["seconds"],
        "macs": costs.cumulative.tolist(),
        "gate_mean": rows[-1]["gate_mean"],
    }
    with replacing(place / DONE) as temporary:
        temporary.write_text(json.dumps(facts, indent=1))
