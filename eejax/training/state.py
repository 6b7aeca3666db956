"""All that training changes."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from eejax.network import EarlyExitNetwork, PyTree, Variables


class TrainState(NamedTuple):
    """All that training changes.

    Attributes:
      step: int32, steps taken.
      params: as in the network's variables.
      batch_stats: as in the network's variables.
      opt_state: optax's.
    """

    step: Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree

    @property
    def variables(self) -> Variables:
        """What `EarlyExitNetwork` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_state(
    network: EarlyExitNetwork,
    optimiser: optax.GradientTransformation,
    key: Array,
    images: Array,
) -> TrainState:
    """A fresh state; of `images` `[B, ...]` only the shape counts."""

    def build(key: Array, images: Array) -> TrainState:
        variables = network.init(key, images)
        params = variables["params"]
        return TrainState(jnp.int32(0), params, variables["batch_stats"], optimiser.init(params))

    return jax.jit(build)(key, images)
