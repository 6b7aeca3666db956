"""The training step: pure, compiled once, and many steps a dispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from eejax import gates as soft
from eejax.compiling import compiler_options
from eejax.network import EarlyExitNetwork, PyTree
from eejax.training.state import TrainState


class Objective(NamedTuple):
    """What is minimised: `loss(logits, gates, targets, weights) + cost_weight * expected cost`.

    Attributes:
      loss: one of `losses`: `[E, B, C], [E, B], [B, C], [E] -> [B]`.
      weights: `[E]`, of the exits.
      cost_weight: lambda of the soft gates' cost regulariser; 0 leaves it out.
      cumulative_cost: `[E]`, as fractions of the whole network.
      label_smoothing: in [0, 1).
    """

    loss: Callable[[Array, Array, Array, Array], Array]
    weights: Array
    cost_weight: float
    cumulative_cost: Array
    label_smoothing: float


class Metrics(NamedTuple):
    """Sums over the steps of one dispatch.

    Attributes:
      loss: sum over steps.
      correct: `[E]`, samples that each exit got right in training mode.
      exit_mean: `[E]`, sum over steps of the gates' mean exit distribution.
      seen: samples.
      first_bad: the first step whose loss or gradient was not finite, or -1.
    """

    loss: Array
    correct: Array
    exit_mean: Array
    seen: Array
    first_bad: Array


Augment = Callable[[Array, Array], Array]


def make_train_steps(
    network: EarlyExitNetwork,
    optimiser: optax.GradientTransformation,
    objective: Objective,
    augment: Augment,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The compiled `train_steps(state, key, images, labels, order, start, count)`.

    It takes `count` steps, from row `start` of `order`; both are arguments, so that one program
    serves any number of steps. The state is donated.

    On an accelerator that is one dispatch. On a CPU it is one for each step, which costs nothing
    there: XLA brings the convolutions of a gradient into the form that its fast kernels take in a
    program's outermost computation only, and inside a loop they run 20 times slower
    (docs/architecture.md).

    Its arguments: a `TrainState`; a key, from which each step draws by its number alone, so that
    a run which stops and goes on draws the same; images `[N, ...]` and labels `[N]` of the
    whole split, on the device; `order` `[S, B]` int32, the samples of each step.
    """
    step = make_train_step(network, optimiser, objective)
    zero = Metrics(
        jnp.float32(0),
        jnp.zeros(network.num_exits, jnp.int32),
        jnp.zeros(network.num_exits, jnp.float32),
        jnp.int32(0),
        jnp.int32(-1),
    )

    def one(
        carry: tuple[TrainState, Metrics],
        key: Array,
        images: Array,
        labels: Array,
        order: Array,
        i: Array,
    ) -> tuple[TrainState, Metrics]:
        state, total = carry
        rows = lax.dynamic_index_in_dim(order, i, keepdims=False)
        batch = augment(jax.random.fold_in(key, state.step), images[rows])
        state, now = step(state, batch, labels[rows])
        return state, _add(total, now)

    def many(
        carry: tuple[TrainState, Metrics],
        key: Array,
        images: Array,
        labels: Array,
        order: Array,
        start: Array,
        count: Array,
    ) -> tuple[TrainState, Metrics]:
        def body(i: Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            return one(carry, key, images, labels, order, i)

        return lax.fori_loop(start, start + count, body, carry)

    on_cpu = jax.default_backend() == "cpu"
    compiled = jax.jit(
        one if on_cpu else many, donate_argnums=0, compiler_options=compiler_options()
    )

    def train_steps(
        state: TrainState,
        key: Array,
        images: Array,
        labels: Array,
        order: Array,
        start: int,
        count: int,
    ) -> tuple[TrainState, Metrics]:
        # The sums are donated with the state, so each call begins with fresh ones.
        carry = state, jax.tree.map(jnp.copy, zero)
        if not on_cpu:
            return compiled(carry, key, images, labels, order, start, count)
        for i in range(start, start + count):
            carry = compiled(carry, key, images, labels, order, i)
        return carry

    return train_steps


def make_train_step(
    network: EarlyExitNetwork, optimiser: optax.GradientTransformation, objective: Objective
) -> Callable[[TrainState, Array, Array], tuple[TrainState, Metrics]]:
    """The pure `train_step(state, images [B, ...], labels [B]) -> (state, metrics)`."""

    def mean_loss(params: PyTree, batch_stats: PyTree, images: Array, labels: Array) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        outputs, batch_stats = network.apply_all(variables, images, train=True)
        logits = outputs.logits
        targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
        targets = optax.smooth_labels(targets, objective.label_smoothing)
        loss = objective.loss(logits, outputs.gate, targets, objective.weights)
        if objective.cost_weight:
            cost = soft.expected_cost(outputs.gate, objective.cumulative_cost)
            loss = loss + objective.cost_weight * cost
        correct = (logits.argmax(-1) == labels[None]).sum(1, dtype=jnp.int32)
        return loss.mean(), (batch_stats, correct, soft.mean_exit_distribution(outputs.gate))

    def train_step(state: TrainState, images: Array, labels: Array) -> tuple[TrainState, Metrics]:
        (loss, (batch_stats, correct, exit_mean)), gradients = jax.value_and_grad(
            mean_loss, has_aux=True
        )(state.params, state.batch_stats, images, labels)
        # Some of optax's arithmetic relies on implicit promotion, which a caller may have
        # forbidden.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimiser.update(gradients, state.opt_state, state.params)
        fine = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradients))
        metrics = Metrics(
            loss,
            correct,
            exit_mean,
            jnp.int32(len(labels)),
            jnp.where(fine, -1, state.step),
        )
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    return train_step


def _add(a: Metrics, b: Metrics) -> Metrics:
    first_bad = jnp.where(a.first_bad >= 0, a.first_bad, b.first_bad)
    return jax.tree.map(jnp.add, a, b)._replace(first_bad=first_bad)
