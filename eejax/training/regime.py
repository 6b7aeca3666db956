"""What a training regime is: phases, each with its share of the steps, its loss, and what it moves.

A phase is trained like a network of its own: what it does not train keeps its bits, and it begins
with a fresh optimiser state and a schedule over its own steps. So a recipe such as "the backbone
first, then every exit" is two phases, and a step's number alone tells which phase it belongs to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import optax
from jax import Array

from eejax.network import ExitOutput, PyTree, Variables


class Batch(NamedTuple):
    """The samples of one step.

    Attributes:
      images: `[B, ...]`, augmented.
      labels: `[B]` int32.
      targets: `[B, C]` float32, the labels as distributions, smoothed.
    """

    images: Array
    labels: Array
    targets: Array


class LossAux(NamedTuple):
    """What a loss returns beside its value.

    Attributes:
      batch_stats: the running statistics after this batch, shaped like those that came in.
      outputs: logits `[E, B, C]` and gates `[E, B]` of every exit, for the metrics.
    """

    batch_stats: PyTree
    outputs: ExitOutput


class Update(NamedTuple):
    """What `Phase.gradients` returns.

    Attributes:
      value: `[]`, the loss, for the metrics.
      aux: as of a loss.
      gradients: shaped like the parameters; those of what is not trained are not read.
      state: the regime's own state after this step.
    """

    value: Array
    aux: LossAux
    gradients: PyTree
    state: PyTree


Loss = Callable[..., tuple[Array, LossAux]]


def everything(variables: Variables) -> PyTree:
    """All parameters and all running statistics."""
    del variables
    return True


class Phase(NamedTuple):
    """A part of the training with one loss.

    Attributes:
      share: of all steps, in (0, 1]; the shares of a regime's phases add up to 1.
      loss: `loss(network, variables, batch, key, progress) -> (value [], LossAux)`. It runs the
        network in whatever way it needs: a stage run with `train=False` normalises with its running
        statistics, `jax.lax.stop_gradient` cuts or scales a gradient. `key` is a JAX key of this
        step, for dropout; `progress` is a float32 scalar in [0, 1), the share of the phase's steps
        already taken, for ramps.
      trains: `trains(variables) -> bools`, a tree with the structure of the variables or of its
        upper part: `True` for everything, `{"params": {"stages": False, "heads": True},
        "batch_stats": False}` for the heads' parameters alone. A parameter that is not trained gets
        no gradient, no decay and no momentum; a running statistic that is not trained keeps its
        value.
      begin: `begin(variables, key) -> state` makes the regime's own state when the phase begins, a
        pytree of arrays that checkpoints hold, such as a frozen teacher; the loss then gets it as a
        sixth argument. The phases of a regime that have it return the same structure. Without it
        there is no state, or that of the phase before stays.
      gradients: `gradients(network, variables, state, batch, key, progress) -> Update` replaces the
        gradient of the loss, for regimes that combine the gradients of several losses or learn
        something beside the network. The loss is then not called.
    """

    share: float
    loss: Loss
    trains: Callable[[Variables], PyTree] = everything
    begin: Callable[[Variables, Array], PyTree] | None = None
    gradients: Callable[..., Update] | None = None


class RegimeOptions(NamedTuple):
    """What the formulas of the regimes need.

    Attributes:
      exit_weights: `[E]`, of the exits' own losses.
      cost_weight: lambda, the price of the expected cost in the losses that train the gate; 0
        leaves the term out.
      cumulative_cost: `[E]`, the cost of leaving at each exit as a fraction of the whole network.
      budget: the mean cost that `soft_budget` holds the gates at, as such a fraction.
    """

    exit_weights: Array
    cost_weight: float
    cumulative_cost: Array
    budget: float = 0.5


class Regime(NamedTuple):
    """A way to train an early-exit network.

    Attributes:
      phases: `phases(options)` gives the phases, in order.
      trains_gate: whether the gates' parameters get a gradient.
      link: how the heads of its network read the answer of the head before, a name in
        `eejax.links.LINKS`; None for heads that do not.
    """

    phases: Callable[[RegimeOptions], tuple[Phase, ...]]
    trains_gate: bool
    link: str | None = None


def phase_starts(phases: Sequence[Phase], steps: int) -> tuple[int, ...]:
    """The first step of each phase, then `steps`; shares are rounded to whole steps.

    Args:
      phases: in order.
      steps: of the whole training.

    Returns:
      `len(phases) + 1` increasing numbers from 0: phase i takes the steps from `starts[i]` to
      `starts[i + 1] - 1`.

    Raises:
      ValueError: if the shares do not add up to 1, or a phase gets no step.
    """
    shares = [phase.share for phase in phases]
    if not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ValueError(f"the shares of the phases, {shares}, add up to {sum(shares):g}; give 1.")
    starts = tuple(round(steps * share) for share in itertools.accumulate(shares, initial=0.0))
    if any(b <= a for a, b in itertools.pairwise(starts)):
        raise ValueError(
            f"a phase gets no step: {steps} steps for phases with shares {shares}; train longer."
        )
    return starts


def joined(
    schedule: Callable[[int], optax.Schedule], phases: Sequence[Phase], steps: int
) -> optax.Schedule:
    """The learning rate over the whole training, phase after phase.

    Args:
      schedule: `schedule(count)`, of a phase of `count` steps.
      phases: in order.
      steps: of the whole training.

    Raises:
      ValueError: as `phase_starts`.
    """
    starts = phase_starts(phases, steps)
    parts = [schedule(b - a) for a, b in itertools.pairwise(starts)]
    return optax.join_schedules(parts, list(starts[1:-1]))
