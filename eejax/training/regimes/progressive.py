"""Exits added in turn, with gradients between stages: layer-wise training that freezes nothing.

    CE_1, then w_1 CE_1 + w_2 CE_2, ..., then sum_e w_e CE_e, each for an equal share of the steps

Phase e trains the stages and heads up to e on all their exits; the parts after e are not run, so
their exits count as wrong in the metrics of that phase. The earlier heads go on learning, because
the features that they read go on changing. The form with gradients of the layer-wise training in
Scardapane, Scarpiniti, Baccarelli, Uncini, *Why should we add early exits to neural networks?*,
Cognitive Computation 12, 2020, https://arxiv.org/abs/2004.12814.
"""

from __future__ import annotations

from jax import Array

from eejax.network import EarlyExitNetwork, PyTree, Variables, keep_variables
from eejax.training.regime import Batch, LossAux, Phase, Regime, RegimeOptions
from eejax.training.regimes import joint
from eejax.training.regimes.layerwise import padded


def first_exits(share: float, count: int, options: RegimeOptions) -> Phase:
    """The phase that trains the first `count` exits."""
    kept = range(count)
    weighed = options._replace(exit_weights=options.exit_weights[:count])

    def loss(
        network: EarlyExitNetwork, variables: Variables, batch: Batch, key: Array, _: Array
    ) -> tuple[Array, LossAux]:
        outputs, trained = network.keeping(kept).apply_all(
            keep_variables(variables, kept), batch.images, train=True, key=key
        )
        value = joint.losses(outputs, batch.targets, weighed).mean()
        before = variables["batch_stats"]
        stats = {kind: (*trained[kind], *before[kind][count:]) for kind in trained}
        return value, LossAux(stats, padded(outputs, network.num_exits))

    def trains(variables: Variables) -> PyTree:
        exits = len(variables["params"]["stages"])
        first = tuple(e < count for e in range(exits))
        return {name: {"stages": first, "heads": first} for name in variables}

    return Phase(share, loss, trains)


def phases(options: RegimeOptions) -> tuple[Phase, ...]:
    """A phase an exit."""
    exits = len(options.exit_weights)
    return tuple(first_exits(1 / exits, count, options) for count in range(1, exits + 1))


REGIME = Regime(phases, trains_gate=False)
