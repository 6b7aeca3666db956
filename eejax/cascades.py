"""A cascade of plain networks behind the same seam as a network with early exits.

Each member answers if it is sure, and else says "I don't know" and hands the image to the next one
(Wang et al., *IDK cascades: fast deep learning by learning not to overthink*, UAI 2018,
https://arxiv.org/abs/1706.00885). A cascade is a network whose stages hand on the images and whose
heads are whole networks. So it is traced, costed, thresholded and executed like any other, and is
the baseline that early exits have to beat: it shares nothing between its members.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from eejax.network import EarlyExitNetwork, ExitOutput, Module, PyTree, Variables


def cascade(members: Sequence[EarlyExitNetwork]) -> EarlyExitNetwork:
    """The cascade of these networks, of which each gives its last exit's answer.

    Args:
      members: cheapest first; they read the same images. The last one answers what is left.

    Raises:
      ValueError: no members.
    """
    if not members:
        raise ValueError("a cascade of no networks; give at least one.")
    return EarlyExitNetwork((_HAND_ON,) * len(members), tuple(_head(m) for m in members))


def cascade_variables(variables: Sequence[Variables]) -> Variables:
    """The variables of a cascade, from those of its members in the same order."""
    return {
        collection: {
            "stages": tuple({} for _ in variables),
            "heads": tuple(v[collection] for v in variables),
        }
        for collection in ("params", "batch_stats")
    }


def _hand_on_init(key: Array, images: PyTree) -> Variables:
    del key, images
    return {"params": {}}


def _hand_on(
    variables: Variables, images: PyTree, *, train: bool, key: Array | None = None
) -> tuple[PyTree, PyTree]:
    del train, key
    return images, variables.get("batch_stats", {})


_HAND_ON = Module(_hand_on_init, _hand_on)


def _head(member: EarlyExitNetwork) -> Module:
    def init(key: Array, images: Array, memory: PyTree) -> Variables:
        del memory
        return member.init(key, images)

    def apply(
        variables: Variables,
        images: Array,
        memory: PyTree,
        *,
        train: bool,
        key: Array | None = None,
    ) -> tuple[ExitOutput, PyTree]:
        del memory
        if not train:
            logits = member.apply_plain(variables, images)
            gate = jnp.zeros(logits.shape[0], jnp.float32)
            return ExitOutput(logits, gate, ()), variables["batch_stats"]
        outputs, stats = member.apply_all(variables, images, train=True, key=key)
        return ExitOutput(outputs.logits[-1], outputs.gate[-1], ()), stats

    return Module(init, apply)
