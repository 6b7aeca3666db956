"""One training run: the network of a configuration, trained, resumed, or read when finished.

The main job and every network of a comparison call `trained`. What does not depend on the seed
(images, network, costs, the compiled step) is built once a process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import SingleDeviceSharding
from optax.contrib import MuonDimensionNumbers, muon
from rich.console import Console

from eejax import checkpoint, cost
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
)
from experiments.data import splits
from experiments.data.config import DataConfig
from experiments.train import loop
from experiments.train.augment import augment
from experiments.train.config import NetworkConfig, TrainConfig, build_network


@dataclass(frozen=True)
class TrainRun:
    """A training run, up to the seed of parameters, order and augmentation.

    Attributes:
      data: images.
      network: backbone and exits.
      train: regime, optimiser and length.
      ends_at: exit, from 0, at which a plain network ends; None for early exits.
      split_seed: seed that images are held out from training with.
    """

    data: DataConfig
    network: NetworkConfig
    train: TrainConfig
    ends_at: int | None = None
    split_seed: int = 0


class Trained(NamedTuple):
    """A trained network.

    Attributes:
      network: E exits, on uint8 images.
      variables: parameters and running statistics.
      costs: multiply-accumulates of its stages and heads.
      dataset: images, by split.
      rows: of `metrics.jsonl`.
    """

    network: EarlyExitNetwork
    variables: Variables
    costs: cost.Costs
    dataset: splits.Dataset
    rows: list[dict[str, Any]]


def trained(run: TrainRun, seed: int, place: Path, console: Console) -> Trained:
    """Trains a network, continues from its newest checkpoint, or reads it if it is finished.

    Args:
      run: the configuration.
      seed: of parameters, order and augmentation.
      place: directory of `checkpoints/` and `metrics.jsonl`.
      console: for progress.

    Raises:
      FloatingPointError: if training diverges.
      CheckpointError: if there are checkpoints and none can be read.
      loop.Stopped: after SIGTERM or SIGINT; the state is saved.
    """
    data, model, program = dataset(run), network(run), _program(run)
    key = jax.random.key(seed)
    resume = bool(checkpoint.steps(place / loop.CHECKPOINTS))

    def held_out_accuracy(state: TrainState) -> list[float]:
        trace = collect(model, state.variables, *data.calibrate)
        return (trace.logits.argmax(-1) == trace.labels[:, None]).mean(0).tolist()

    state, rows = loop.train(
        program.step,
        _shapes(program.init, key) if resume else program.init(key),
        key,
        data.train,
        loop.Plan(
            run.train.epochs,
            run.train.batch,
            run.train.steps_per_dispatch,
            run.train.checkpoint_seconds,
        ),
        workdir=place,
        resume=resume,
        watch=held_out_accuracy,
        learning_rate=program.learning_rate,
        console=console,
    )
    return Trained(model, state.variables, costs(run), data, rows)


def _shapes(init: Callable[[Array], TrainState], key: Array) -> TrainState:
    """Shapes of a state, on this process's device, whatever device wrote the checkpoint."""
    here = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), jax.eval_shape(init, key)
    )


def dataset(run: TrainRun) -> splits.Dataset:
    """The images of a run, read once a process."""
    return _dataset(run.data, run.split_seed)


def network(run: TrainRun) -> EarlyExitNetwork:
    """The network of a run; runs that differ in training alone share it, and what it compiles."""
    return _network(run.data, run.split_seed, run.network, run.ends_at)


def costs(run: TrainRun) -> cost.Costs:
    """Multiply-accumulates of the network's stages and heads."""
    return _costs(run.data, run.split_seed, run.network, run.ends_at)


@functools.cache
def _dataset(config: DataConfig, seed: int) -> splits.Dataset:
    return splits.load(config, seed)


@functools.cache
def _network(
    images: DataConfig, split_seed: int, config: NetworkConfig, ends_at: int | None
) -> EarlyExitNetwork:
    data = _dataset(images, split_seed)
    bare = build_network(config, len(data.classes), data.train.images.shape[1:])
    whole = bare.reading(normalise(data.mean, data.std))
    return whole if ends_at is None else whole.keeping([ends_at])


@functools.cache
def _costs(
    images: DataConfig, split_seed: int, config: NetworkConfig, ends_at: int | None
) -> cost.Costs:
    model = _network(images, split_seed, config, ends_at)
    image = jnp.asarray(_dataset(images, split_seed).train.images[:1])
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    return cost.xla_macs(model, shapes, image)


class _Program(NamedTuple):
    """What is compiled once for all seeds.

    Attributes:
      init: `key -> TrainState`.
      step: as `make_train_steps`.
      learning_rate: the schedule.
    """

    init: Callable[[Array], TrainState]
    step: Callable[..., tuple[TrainState, Metrics]]
    learning_rate: optax.Schedule


@functools.cache
def _program(run: TrainRun) -> _Program:
    train, model, data = run.train, network(run), dataset(run)
    steps = len(data.train.images) // train.batch * train.epochs
    tx = optimiser(train, steps)
    image = jnp.asarray(data.train.images[:1])
    options = RegimeOptions(
        jnp.asarray(train.exit_weights or (1.0,) * model.num_exits, jnp.float32),
        train.cost_weight,
        jnp.asarray(costs(run).fractions, jnp.float32),
    )
    phases = REGIMES[train.regime].phases(options)
    train_steps = make_train_steps(
        model,
        functools.partial(optimiser, train),
        phases,
        _augmentation(run.data, data.mean),
        steps=steps,
        classes=len(data.classes),
        label_smoothing=train.label_smoothing,
    )
    return _Program(
        jax.jit(lambda key: init_state(model, tx, key, image)),
        train_steps,
        joined(functools.partial(schedule, train, train.learning_rate), phases, steps),
    )


def _augmentation(config: DataConfig, mean: tuple[float, ...]) -> Callable[[Array, Array], Array]:
    """`augment(key, images)` on uint8 images; a blanked square gets the mean colour."""
    return functools.partial(
        augment,
        flip=config.flip,
        shift=config.shift,
        cutout=config.cutout,
        fill=tuple(round(m) for m in mean),
    )


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
