"""One training run: the network of a configuration, trained, resumed, or read when finished.

The main job and every network of a comparison call `trained`. What does not depend on the seed
(images, network, costs, the compiled step) is built once a process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh
from optax.contrib import MuonDimensionNumbers, muon
from rich.console import Console

from eejax import cost
from eejax.network import EarlyExitNetwork, Variables, normalise
from eejax.trace import collect
from eejax.training import (
    REGIMES,
    Metrics,
    RegimeOptions,
    TrainState,
    init_state,
    joined,
    make_train_steps,
    placement,
)
from experiments import distributed
from experiments.data import splits
from experiments.data.config import DataConfig
from experiments.train import loop
from experiments.train.augment import augment
from experiments.train.config import NetworkConfig, TrainConfig, build_network, exit_weights
from experiments.train.feeding import Feed, Resident
from experiments.train.host_feed import HostFeed

# From which a layer that begins with statistics of its input takes them.
_INIT_IMAGES = 1_000


@dataclass(frozen=True)
class TrainRun:
    """A training run, up to the seed of parameters, order and augmentation.

    Attributes:
      data: images.
      network: backbone and exits.
      train: regime, optimiser and length.
      ends_at: exit, from 0, at which a plain network ends; None for early exits.
      split_seed: decides which images are held out from training.
    """

    data: DataConfig
    network: NetworkConfig
    train: TrainConfig
    ends_at: int | None = None
    split_seed: int = 0


def trained(
    run: TrainRun, seed: int, place: Path, console: Console, mesh: Mesh | None = None
) -> tuple[Variables, list[dict[str, Any]]]:
    """Trains a network, continues from its newest checkpoint, or reads it if it is finished.

    Args:
      run: the configuration.
      seed: of parameters, order and augmentation.
      place: directory of `checkpoints/` and `metrics.jsonl`.
      console: for progress.
      mesh: devices to train on, of all processes; this process's first device by default.

    Returns:
      Parameters and running statistics, on this process's first device, and the rows of
      `metrics.jsonl`.

    Raises:
      FloatingPointError: if training diverges.
      CheckpointError: if there are checkpoints and none can be read.
      loop.Stopped: after SIGTERM or SIGINT; the state is saved.
    """
    mesh = placement.make_mesh(jax.local_devices()[:1]) if mesh is None else mesh
    data, model = dataset(run), network(run)
    init, train_steps, learning_rate = program(run, mesh)
    key = placement.replicate(mesh, jax.random.key(seed))

    def held_out_accuracy(state: TrainState) -> list[float]:
        variables = placement.local(state.variables)
        if not distributed.first():
            return []
        trace = collect(model, variables, *data.calibrate)
        return (trace.logits.argmax(-1) == trace.labels[:, None]).mean(0).tolist()

    with contextlib.closing(make_feed(run, key, mesh)) as feed:
        state, rows = loop.train(
            train_steps,
            init,
            key,
            feed,
            run.train,
            mesh=mesh,
            workdir=place,
            watch=held_out_accuracy,
            learning_rate=learning_rate,
            console=console,
        )
    return placement.local(state.variables), rows


def make_feed(run: TrainRun, key: Array, mesh: Mesh) -> Feed:
    """Training images from the device where they are an array, and from their files otherwise.

    Args:
      run: the configuration.
      key: of the run, on the mesh.
      mesh: of the run.
    """
    train, batch = dataset(run).train, run.train.batch
    if isinstance(train, splits.Split):
        return Resident(train, key, batch, flip=run.data.flip, mesh=mesh)
    return HostFeed(
        train.images,
        key,
        run.data,
        mesh,
        batch=batch,
        epochs=run.train.epochs,
        steps_per_dispatch=run.train.steps_per_dispatch,
    )


def dataset(run: TrainRun) -> splits.Dataset:
    """The images of a run, read once a process."""
    return _load(run.data, run.split_seed)


def network(run: TrainRun) -> EarlyExitNetwork:
    """The network of a run; runs that differ in training alone share it and its programs."""
    return _network(*_architecture(run))


def costs(run: TrainRun) -> cost.Costs:
    """Multiply-accumulates of the network's stages and heads."""
    return _costs(*_architecture(run))


def _architecture(run: TrainRun) -> tuple[TrainRun, str | None]:
    """What decides the network: the run without its training, and the link of the heads."""
    return dataclasses.replace(run, train=TrainConfig()), REGIMES[run.train.regime].link


_load = functools.cache(splits.load)


@functools.cache
def _network(run: TrainRun, link: str | None) -> EarlyExitNetwork:
    data = dataset(run)
    bare = build_network(run.network, len(data.classes), data.train.images.shape[1:], link)
    whole = bare.reading(normalise(data.mean, data.std))
    return whole if run.ends_at is None else whole.keeping([run.ends_at])


@functools.cache
def _costs(run: TrainRun, link: str | None) -> cost.Costs:
    image = jnp.asarray(dataset(run).train.images[:1])
    model = _network(run, link)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    return cost.xla_macs(model, shapes, image)


@functools.cache
def program(
    run: TrainRun, mesh: Mesh | None = None
) -> tuple[
    Callable[[Array], TrainState], Callable[..., tuple[TrainState, Metrics]], optax.Schedule
]:
    """`init(key)`, the compiled steps and the learning rate, which all seeds share."""
    train, model, data = run.train, network(run), dataset(run)
    steps = len(data.train.images) // train.batch * train.epochs
    options = RegimeOptions(
        jnp.asarray(exit_weights(train.exit_weights, model.num_exits), jnp.float32),
        train.cost_weight,
        jnp.asarray(costs(run).fractions, jnp.float32),
        train.budget,
    )
    phases = REGIMES[train.regime].phases(options)
    rule = functools.partial(optimiser, train)
    train_steps = make_train_steps(
        model,
        rule,
        phases,
        functools.partial(
            augment,
            shift=run.data.shift,
            cutout=run.data.cutout,
            fill=tuple(round(m) for m in data.mean),  # a blanked square gets the mean colour
        ),
        steps=steps,
        classes=len(data.classes),
        label_smoothing=train.label_smoothing,
        mesh=mesh,
    )
    learning_rate = joined(functools.partial(schedule, train, train.learning_rate), phases, steps)
    # An argument of the compiled program: XLA would try to fold a constant.
    images = data.train.images[:_INIT_IMAGES]
    first = jnp.asarray(images) if mesh is None else placement.replicate(mesh, images)
    begin = jax.jit(
        lambda key, images: placement.constrain_state(
            mesh, init_state(model, rule(steps), key, images, phases[0].begin)
        )
    )
    return lambda key: begin(key, first), train_steps, learning_rate


def optimiser(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser with its schedule over `steps` steps."""
    rate = schedule(config, config.learning_rate, steps)
    if config.optimiser == "sgd":
        return optax.chain(
            optax.add_decayed_weights(config.weight_decay, mask=_matrices),
            optax.sgd(rate, config.momentum, nesterov=True),
        )
    if config.optimiser == "adam":
        return optax.adamw(rate, weight_decay=config.weight_decay, mask=_matrices)
    return muon(
        rate,
        weight_decay=config.weight_decay,
        weight_decay_mask=_matrices,
        adam_learning_rate=schedule(config, config.adam_learning_rate, steps),
        muon_weight_dimension_numbers=_convolutions,
    )


def schedule(config: TrainConfig, peak: float, steps: int) -> optax.Schedule:
    """Learning rate: up from a fifth of `peak` over the warm-up, then down to a fiftieth."""
    rise = int(config.warmup * steps)
    fall = max(steps - rise, 1)
    down = (
        optax.linear_schedule(peak, peak / 50, fall)
        if config.schedule == "linear"
        else optax.cosine_decay_schedule(peak, fall, alpha=1 / 50)
    )
    return optax.join_schedules([optax.linear_schedule(peak / 5, peak, max(rise, 1)), down], [rise])


def _matrices(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _convolutions(params: optax.Params) -> optax.Params:
    """A convolution kernel `[h, w, in, out]` as the matrix `[h w in, out]`; the rest is Adam's."""
    return jax.tree.map(
        lambda p: MuonDimensionNumbers((0, 1, 2), 3) if p.ndim == 4 else None, params
    )
