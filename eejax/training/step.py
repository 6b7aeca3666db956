"""The training step: pure, compiled once for each phase, and many steps a dispatch."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import Mesh

from eejax import gates
from eejax.compiling import compiler_options
from eejax.network import EarlyExitNetwork, PyTree
from eejax.training import placement
from eejax.training.regime import Batch, LossAux, Phase, phase_starts
from eejax.training.state import TrainState

# Augmentation draws from the run's key folded with the number of the step. No step has these
# numbers, so what the network draws, and a phase when it begins, is independent of it.
_NETWORK = 2**32 - 1
_BEGIN = 2**32 - 2


class Metrics(NamedTuple):
    """Sums over the steps of one dispatch.

    Attributes:
      loss: sum over steps.
      correct: `[E]`, samples that each exit classifies correctly in training mode.
      exit_mean: `[E]`, sum over steps of the gates' mean exit distribution.
      seen: samples.
      first_bad: the first step whose loss or gradient was not finite, or -1.
    """

    loss: Array
    correct: Array
    exit_mean: Array
    seen: Array
    first_bad: Array


def make_train_steps(
    network: EarlyExitNetwork,
    optimiser: Callable[[int], optax.GradientTransformation],
    phases: Sequence[Phase],
    augment: Callable[[Array, Array], Array],
    *,
    steps: int,
    classes: int,
    label_smoothing: float = 0.0,
    mesh: Mesh | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The compiled `train_steps(state, key, images, labels, order, start, count)`.

    It takes `count` steps with the samples of row `start` of `order` and the rows after it. Both
    are arguments, so one program serves any number of steps. `state.step` alone tells which phase a
    step belongs to. The state is donated.

    On an accelerator the steps of a phase are one dispatch. On a CPU each step is one, which costs
    nothing there: XLA brings the convolutions of a gradient into the form of its fast kernels only
    in a program's outermost computation; inside a loop they run 20 times slower
    (docs/lab/xla.md).

    The arguments of `train_steps`: a `TrainState`; a key, from which each step draws by its number
    alone, so that a resumed run draws the same; images `[N, ...]` and labels `[N]` of the whole
    split, on the device, and `order` `[S, B]` int32, the samples of each step; or images
    `[S, B, ...]` and labels `[S, B]` in the order of the steps, and None; two integers.

    On a mesh each batch is divided over all devices, and statistics of a batch, losses and
    gradients are those of the whole batch, as on one device: XLA adds the sums over devices. All
    arguments but the integers lie on the mesh: the state by `placement.state_shardings`, which it
    keeps, images in batches by `placement.batch_sharding`, the rest replicated.

    Args:
      network: E exits.
      optimiser: `optimiser(count)`, for a phase of `count` steps. Its state must have the same
        structure for every `count`.
      phases: of a regime.
      augment: `augment(key, images [B, ...]) -> images`.
      steps: of the whole training, divided among the phases.
      classes: C.
      label_smoothing: in [0, 1), the share of each target that is spread over all classes.
      mesh: of `placement.make_mesh`; without it, the devices of the arguments.

    Raises:
      ValueError: if the shares of the phases do not add up to 1, or a phase gets no step. The steps
        raise it if the phases have a state of their own and the training state does not.
    """
    starts = phase_starts(phases, steps)
    on_cpu = jax.default_backend() == "cpu"

    @jax.jit
    def zero() -> Metrics:
        exits = network.num_exits
        sums = jnp.float32(0), jnp.zeros(exits, jnp.int32), jnp.zeros(exits, jnp.float32)
        total = Metrics(*sums, jnp.int32(0), jnp.int32(-1))
        return placement.constrain_replicated(mesh, total)

    def program(i: int) -> tuple[Callable[..., PyTree], Callable[..., tuple[TrainState, Metrics]]]:
        """How a phase begins, and its compiled steps."""
        count = starts[i + 1] - starts[i]
        rule = optimiser(count)
        step = make_train_step(
            network,
            rule,
            phases[i],
            classes=classes,
            label_smoothing=label_smoothing,
            first=starts[i],
            count=count,
        )

        def single(
            carry: tuple[TrainState, Metrics],
            key: Array,
            images: Array,
            labels: Array,
            order: Array | None,
            i: Array,
        ) -> tuple[TrainState, Metrics]:
            state, total = carry
            if order is None:
                batch, answers = (
                    lax.dynamic_index_in_dim(x, i, keepdims=False) for x in (images, labels)
                )
            else:
                rows = lax.dynamic_index_in_dim(order, i, keepdims=False)
                rows = placement.constrain_batch(mesh, rows)
                batch, answers = images[rows], labels[rows]
            batch = augment(jax.random.fold_in(key, state.step), batch)
            batch, answers = (placement.constrain_batch(mesh, x) for x in (batch, answers))
            network_key = jax.random.fold_in(jax.random.fold_in(key, _NETWORK), state.step)
            state, metrics = step(state, batch, answers, network_key)
            total = placement.constrain_replicated(mesh, _add(total, metrics))
            return placement.constrain_state(mesh, state), total

        def several(
            carry: tuple[TrainState, Metrics],
            key: Array,
            images: Array,
            labels: Array,
            order: Array | None,
            start: Array,
            count: Array,
        ) -> tuple[TrainState, Metrics]:
            def body(i: Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
                return single(carry, key, images, labels, order, i)

            return lax.fori_loop(start, start + count, body, carry)

        compiled = jax.jit(
            single if on_cpu else several, donate_argnums=0, compiler_options=compiler_options()
        )

        def fresh(state: TrainState, key: Array) -> tuple[PyTree, PyTree]:
            """The optimiser's and the regime's own state, in buffers that can be donated."""
            begin = phases[i].begin
            key = jax.random.fold_in(jax.random.fold_in(key, _BEGIN), i)
            regime = state.regime if begin is None else begin(state.variables, key)
            new = rule.init(state.params), jax.tree.map(jnp.copy, regime)
            return placement.constrain_state(mesh, new)

        return jax.jit(fresh), compiled

    programs = [program(i) for i in range(len(phases))]

    def train_steps(
        state: TrainState,
        key: Array,
        images: Array,
        labels: Array,
        order: Array | None,
        start: int,
        count: int,
    ) -> tuple[TrainState, Metrics]:
        # The metrics are donated with the state, so each call begins with fresh ones.
        carry = state, zero()
        # Reading the step waits for the device, and a single phase does not need it.
        step = int(state.step) if len(phases) > 1 else 0
        end = start + count
        while start < end:
            i = min(bisect.bisect_right(starts, step), len(phases)) - 1
            fresh, compiled = programs[i]
            left = end - start if i == len(phases) - 1 else min(end - start, starts[i + 1] - step)
            if i and step == starts[i]:
                state, total = carry
                opt_state, regime = fresh(state, key)
                carry = state._replace(opt_state=opt_state, regime=regime), total
            if on_cpu:
                for row in range(start, start + left):
                    carry = compiled(carry, key, images, labels, order, row)
            else:
                carry = compiled(carry, key, images, labels, order, start, left)
            start, step = start + left, step + left
        return carry

    return train_steps


def make_train_step(
    network: EarlyExitNetwork,
    optimiser: optax.GradientTransformation,
    phase: Phase,
    *,
    classes: int,
    label_smoothing: float = 0.0,
    first: int = 0,
    count: int = 1,
) -> Callable[[TrainState, Array, Array, Array], tuple[TrainState, Metrics]]:
    """The pure `train_step(state, images [B, ...], labels [B], key) -> (state, metrics)`.

    Args:
      network: E exits.
      optimiser: of this phase.
      phase: gives the loss, and which parameters and running statistics change. The others keep
        their bits; the compiler leaves out what their gradients would need.
      classes: C.
      label_smoothing: as for `make_train_steps`.
      first: the phase's first step.
      count: the phase's number of steps, from which the loss gets its progress.
    """

    def train_step(
        state: TrainState, images: Array, labels: Array, key: Array
    ) -> tuple[TrainState, Metrics]:
        targets = jax.nn.one_hot(labels, classes, dtype=jnp.float32)
        batch = Batch(images, labels, optax.smooth_labels(targets, label_smoothing))
        progress = (state.step - first).astype(jnp.float32) / count
        trains = jax.tree.broadcast(phase.trains(state.variables), state.variables)
        leaves, structure = jax.tree.flatten(state.params)
        moves = jax.tree.leaves(trains["params"])

        def merged(trained: Sequence[Array], frozen: Sequence[Array]) -> PyTree:
            rest = iter(trained)
            return structure.unflatten(
                [next(rest) if m else f for m, f in zip(moves, frozen, strict=True)]
            )

        def chosen(every: Sequence[Array]) -> list[Array]:
            return [leaf for leaf, m in zip(every, moves, strict=True) if m]

        if phase.begin is not None and not jax.tree.leaves(state.regime):
            raise ValueError(
                "the regime has a state of its own, and the training state has none; make it with "
                "init_state(..., begin=phases[0].begin)."
            )
        own = () if phase.begin is None else (state.regime,)

        def loss(trained: Sequence[Array]) -> tuple[Array, LossAux]:
            variables = {"params": merged(trained, leaves), "batch_stats": state.batch_stats}
            return phase.loss(network, variables, batch, key, progress, *own)

        if phase.gradients is None:
            (value, aux), gradients = jax.value_and_grad(loss, has_aux=True)(chosen(leaves))
            regime = state.regime
        else:
            value, aux, tree, regime = phase.gradients(
                network, state.variables, state.regime, batch, key, progress
            )
            gradients = chosen(jax.tree.leaves(tree))
        # Some of optax's arithmetic relies on implicit promotion, which a caller may have
        # forbidden.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimiser.update(
                merged(gradients, [jnp.zeros_like(leaf) for leaf in leaves]),
                state.opt_state,
                state.params,
            )
        changed = optax.apply_updates(state.params, updates)
        params = _where(trains["params"], changed, state.params)
        batch_stats = _where(trains["batch_stats"], aux.batch_stats, state.batch_stats)
        correct = aux.outputs.logits.argmax(-1) == labels[None]
        fine = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(gradients))
        metrics = Metrics(
            value,
            correct.sum(1, dtype=jnp.int32),
            gates.mean_exit_distribution(aux.outputs.gate),
            jnp.int32(len(labels)),
            jnp.where(fine, -1, state.step),
        )
        return TrainState(state.step + 1, params, batch_stats, opt_state, regime), metrics

    return train_step


def _where(trains: PyTree, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda train, n, o: n if train else o, trains, new, old)


def _add(a: Metrics, b: Metrics) -> Metrics:
    first_bad = jnp.where(a.first_bad >= 0, a.first_bad, b.first_bad)
    return jax.tree.map(jnp.add, a, b)._replace(first_bad=first_bad)
