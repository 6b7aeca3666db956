"""A cascade of plain networks, with the interface of a network with early exits.

Each member answers an image if it is confident, and otherwise passes it to the next member (Wang
et al., *IDK cascades: fast deep learning by learning not to overthink*, UAI 2018,
https://arxiv.org/abs/1706.00885). The stages of a cascade return the images unchanged, and its
heads are whole networks, so traces, costs, thresholds and executors work as for any network. It is
the baseline for early exits, because its members share nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from eejax.network import EarlyExitNetwork, ExitOutput, Module, PyTree, Variables


def cascade(members: Sequence[EarlyExitNetwork]) -> EarlyExitNetwork:
    """The cascade of these networks; exit e is the last exit of member e.

    Args:
      members: networks that read the same images, the cheapest first.

    Raises:
      ValueError: if there are no members.
    """
    if not members:
        raise ValueError("a cascade of no networks; give at least one.")
    return EarlyExitNetwork((_IDENTITY,) * len(members), tuple(_head(m) for m in members))


def cascade_variables(variables: Sequence[Variables]) -> Variables:
    """The variables of a cascade, from those of its members in the same order."""
    return {
        collection: {
            "stages": tuple({} for _ in variables),
            "heads": tuple(v[collection] for v in variables),
        }
        for collection in ("params", "batch_stats")
    }


def _identity(variables: Variables, images: PyTree, **mode: Any) -> tuple[PyTree, PyTree]:
    del mode
    return images, variables.get("batch_stats", {})


_IDENTITY = Module(lambda key, images: {"params": {}}, _identity)


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
