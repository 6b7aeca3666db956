"""The state of a training run."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from eejax.network import EarlyExitNetwork, PyTree, Variables


class TrainState(NamedTuple):
    """What a training step changes: a pytree of arrays, which a checkpoint holds as it is.

    Attributes:
      step: int32 `[]`, the number of steps taken.
      params: of the network.
      batch_stats: running statistics of the network.
      opt_state: of the optimiser, in the current phase.
      regime: the regime's own state, as `Phase.begin` makes it; `()` for most.
    """

    step: Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    regime: PyTree = ()

    @property
    def variables(self) -> Variables:
        """The variables that `EarlyExitNetwork` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_state(
    network: EarlyExitNetwork,
    optimiser: optax.GradientTransformation,
    key: Array,
    images: Array,
    begin: Callable[[Variables, Array], PyTree] | None = None,
) -> TrainState:
    """Initialises a state.

    Args:
      network: E exits.
      optimiser: of any number of steps; the state does not depend on the schedule.
      key: of the initial parameters.
      images: `[B, ...]`, for `network.init`: some hundred of the training split if a layer begins
        with their statistics, else any.
      begin: of the regime's first phase.
    """

    def build(key: Array, images: Array) -> TrainState:
        variables = network.init(key, images)
        params = variables["params"]
        regime = () if begin is None else begin(variables, jax.random.fold_in(key, 1))
        return TrainState(
            jnp.int32(0), params, variables["batch_stats"], optimiser.init(params), regime
        )

    return jax.jit(build)(key, images)
