"""Greedy training: stage e with head e, in turn, on the frozen stages before.

Phase e minimises `CE_e`, for an equal share of the steps. The stages before e keep their bits,
running statistics included, and run in inference mode; the parts after e are not run, so their
exits count as wrong in the metrics of that phase. Scardapane, Scarpiniti, Baccarelli, Uncini, *Why
should we add early exits to neural networks?*, Cognitive Computation 12, 2020,
https://arxiv.org/abs/2004.12814; Belilovsky, Eickenberg, Oyallon, *Greedy layerwise learning can
scale to ImageNet*, ICML 2019, https://arxiv.org/abs/1812.11446.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from eejax.network import EarlyExitNetwork, ExitOutput, PyTree, Variables
from eejax.training.regime import Batch, LossAux, Phase, Regime, RegimeOptions
from eejax.training.regimes.joint import cross_entropies


def padded(outputs: ExitOutput, exits: int) -> ExitOutput:
    """The outputs of the first exits, and of exits that are not run: `[e, B, C]` to `[E, B, C]`.

    What is not run answers with the first class, and has no memory.
    """
    missing, batch, classes = exits - len(outputs.logits), *outputs.logits.shape[1:]
    answer = jnp.where(jnp.arange(classes) == 0, 0.0, -jnp.inf)[None, None]
    logits = jnp.broadcast_to(answer, (missing, batch, classes))
    gate = jnp.zeros((missing, batch), jnp.float32)
    return ExitOutput(
        jnp.concatenate([outputs.logits, logits]), jnp.concatenate([outputs.gate, gate]), ()
    )


def stage_and_head(share: float, e: int) -> Phase:
    """The phase of exit e, from 0."""

    def loss(
        network: EarlyExitNetwork, variables: Variables, batch: Batch, key: Array, _: Array
    ) -> tuple[Array, LossAux]:
        features, memory, outputs = batch.images, (), []
        for before in range(e):
            features, _ = network.apply_stage(variables, before, features)
            output, _ = network.apply_head(variables, before, features, memory)
            memory = output.memory
            outputs.append(output)
        features = jax.lax.stop_gradient(features) if e else features
        keys = jax.random.split(key)
        features, stage_stats = network.apply_stage(variables, e, features, train=True, key=keys[0])
        output, head_stats = network.apply_head(
            variables, e, features, memory, train=True, key=keys[1]
        )
        value = cross_entropies(output.logits[None], batch.targets).mean()
        outputs.append(output)
        stacked = ExitOutput(
            jnp.stack([o.logits for o in outputs]), jnp.stack([o.gate for o in outputs]), ()
        )
        stats = variables["batch_stats"]
        stats = {
            "stages": (*stats["stages"][:e], stage_stats, *stats["stages"][e + 1 :]),
            "heads": (*stats["heads"][:e], head_stats, *stats["heads"][e + 1 :]),
        }
        return value, LossAux(stats, padded(stacked, network.num_exits))

    def trains(variables: Variables) -> PyTree:
        exits = len(variables["params"]["stages"])
        only = tuple(i == e for i in range(exits))
        return {name: {"stages": only, "heads": only} for name in variables}

    return Phase(share, loss, trains)


def phases(options: RegimeOptions) -> tuple[Phase, ...]:
    """A phase an exit; the exit weights are not read."""
    exits = len(options.exit_weights)
    return tuple(stage_and_head(1 / exits, e) for e in range(exits))


REGIME = Regime(phases, trains_gate=False)
