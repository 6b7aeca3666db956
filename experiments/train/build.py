"""From a configuration to the things it names: network, optimiser, objective, augmentation."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from eejax import policies
from eejax.network import EarlyExitNetwork, normalise
from eejax.policies.base import Policy
from eejax.training import losses
from eejax.training.step import Objective
from experiments.config import DataConfig, NetworkConfig, TrainConfig
from experiments.data.splits import Dataset
from experiments.train import zoo
from experiments.train.augment import augment

LOSSES = {
    "joint": losses.joint,
    "soft_literal": losses.soft_literal,
    "soft_auxiliary": losses.soft_auxiliary,
    "soft_mixture": losses.soft_mixture,
}
POLICIES: dict[str, Policy] = {
    "max_prob": policies.max_prob,
    "entropy": policies.entropy,
    "margin": policies.margin,
    "gate": policies.gate,
}


def network(config: NetworkConfig, data: Dataset) -> EarlyExitNetwork:
    """The network, reading uint8 images `[B, H, W, C]`."""
    bare = zoo.network(config, len(data.classes), data.train.images.shape[1:])
    return bare.reading(normalise(data.mean, data.std))


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
    """Up from a fifth of `peak` over the warm-up, then down to a fiftieth."""
    rise = int(config.warmup * steps)
    fall = max(steps - rise, 1)
    down = (
        optax.linear_schedule(peak, peak / 50, fall)
        if config.schedule == "linear"
        else optax.cosine_decay_schedule(peak, fall, alpha=1 / 50)
    )
    return optax.join_schedules([optax.linear_schedule(peak / 5, peak, max(rise, 1)), down], [rise])


def objective(config: TrainConfig, cost_fractions: np.ndarray) -> Objective:
    """The training objective; `cost_fractions` `[E]` as `Costs.fractions`."""
    exits = len(cost_fractions)
    return Objective(
        LOSSES[config.loss],
        jnp.asarray(config.exit_weights or (1.0,) * exits, jnp.float32),
        config.cost_weight if config.loss != "joint" else 0.0,
        jnp.asarray(cost_fractions, jnp.float32),
        config.label_smoothing,
    )


def augmentation(
    config: DataConfig, mean: tuple[float, ...]
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`augment(key, images)` on uint8 images; a blanked square gets the mean colour."""
    fill = tuple(round(m) for m in mean)

    def apply(key: jax.Array, images: jax.Array) -> jax.Array:
        return augment(
            key, images, flip=config.flip, shift=config.shift, cutout=config.cutout, fill=fill
        )

    return apply


def _matrices(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _convolutions(params: optax.Params) -> optax.Params:
    """A convolution kernel `[h, w, in, out]` as the matrix `[h w in, out]`; the rest is Adam's."""
    return jax.tree.map(
        lambda p: MuonDimensionNumbers((0, 1, 2), 3) if p.ndim == 4 else None, params
    )
