"""Gradients of the exits, fused with weights that are learned (Meta-GF).

    g = sum_e s(m_e) g_e / sum_e s(m_e),    s the logistic function

for each tensor of a stage, over the exits above the stage, with the gradients `g_e` of `w_e CE_e`.
The numbers `m_e`, one for each tensor and exit, are learned by Adam so that `sum_e w_e CE_e` falls
after a step along g: they are moved along its gradient at the parameters minus `STEP` g, and the
network's own step follows the new fusion. A head has the gradient of its own exit. Sun, Li, Xu,
*Meta-GF: training dynamic-depth neural networks harmoniously*, ECCV 2022,
https://www.ecva.net/papers/eccv_2022/papers_ECCV/html/6337_ECCV_2022_paper.php.

There a `g_e` is what training on exit e changes in an epoch, with a small weight for the other
exits, the numbers are learned in a pass over the training images, and a moving average smooths them
from epoch to epoch; here all of it happens in each step, on one batch. Their Adam has a rate of
0.1, ours 0.01; they learn the numbers on SDN's growing weights of the exits, and have one a channel
in VGG, where we have `w_e` and one a tensor. A step takes a backward pass for each exit, and one
more for the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax import Array

from eejax.network import EarlyExitNetwork, PyTree, Variables
from eejax.training.regime import Batch, Phase, Regime, RegimeOptions, Update
from eejax.training.regimes import joint
from eejax.training.regimes.pcgrad import exit_gradients, total

STEP = 0.1
_ADAM = optax.adam(0.01)


def begin(variables: Variables, key: Array) -> PyTree:
    """Equal weights and a fresh optimiser: for stage s, leaves `[E - s]`."""
    del key
    stages = variables["params"]["stages"]

    def equal(stage: PyTree, count: int) -> PyTree:
        return jax.tree.map(lambda _: jnp.ones(count, jnp.float32), stage)

    numbers = tuple(equal(stage, len(stages) - s) for s, stage in enumerate(stages))
    return {"numbers": numbers, "adam": _ADAM.init(numbers)}


def fused(terms: Sequence[PyTree], numbers: PyTree) -> PyTree:
    """The gradient in all parameters, from that of each exit's term and the numbers."""

    def one(number: Array, *gradients: Array) -> Array:
        weights = jax.nn.sigmoid(number) / jax.nn.sigmoid(number).sum()
        return jnp.tensordot(weights, jnp.stack(gradients), 1)

    stages = tuple(
        jax.tree.map(one, number, *[term["stages"][s] for term in terms[s:]])
        for s, number in enumerate(numbers)
    )
    return {"stages": stages, "heads": total([term["heads"] for term in terms])}


def phases(options: RegimeOptions) -> tuple[Phase, ...]:
    """One phase."""
    (plain,) = joint.REGIME.phases(options)

    def gradients(
        network: EarlyExitNetwork,
        variables: Variables,
        state: PyTree,
        batch: Batch,
        key: Array,
        progress: Array,
    ) -> Update:
        value, aux, terms = exit_gradients(network, variables, batch, key, options)

        def after_a_step(numbers: PyTree) -> Array:
            step = fused(terms, numbers)
            params = jax.tree.map(lambda p, g: p - STEP * g, variables["params"], step)
            return plain.loss(network, {**variables, "params": params}, batch, key, progress)[0]

        slope = jax.grad(after_a_step)(state["numbers"])
        with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in int32
            change, adam = _ADAM.update(slope, state["adam"])
        numbers = jax.tree.map(jnp.add, state["numbers"], change)
        return Update(value, aux, fused(terms, numbers), {"numbers": numbers, "adam": adam})

    return (plain._replace(gradients=gradients, begin=begin),)


REGIME = Regime(phases, trains_gate=False)
