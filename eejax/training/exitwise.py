"""The network run exit by exit, for losses that change what flows between its parts.

`EarlyExitNetwork.apply_all` is the plain way. Regimes that freeze stages, or cut and scale
gradients between a stage, its head and the next stage, run the network by `apply_exits`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from eejax.network import EarlyExitNetwork, ExitOutput, PyTree, Variables

Between = Callable[[int, PyTree], PyTree]


def unchanged(e: int, features: PyTree) -> PyTree:
    """What head e or stage e + 1 reads by default: the features of stage e."""
    del e
    return features


def apply_exits(
    network: EarlyExitNetwork,
    variables: Variables,
    images: Array,
    key: Array | None,
    *,
    to_head: Between = unchanged,
    to_stage: Between = unchanged,
    train_stages: Sequence[bool] | None = None,
    train_heads: Sequence[bool] | None = None,
) -> tuple[ExitOutput, PyTree]:
    """Runs every stage and head in training, as `EarlyExitNetwork.apply_all`.

    Args:
      network: E exits.
      variables: of the network.
      images: `[B, ...]`.
      key: for dropout, folded as by `apply_all`.
      to_head: `to_head(e, features)` gives what head e reads of the features of stage e.
      to_stage: the same for stage e + 1.
      train_stages: `[E]`, which stages run with `train=True`; the others normalise with their
        running statistics and keep them. Default: all.
      train_heads: the same for the heads.

    Returns:
      As `apply_all`: logits `[E, B, C]`, gates `[E, B]` and a tuple of E memories; and the running
      statistics.
    """
    outputs, stage_stats, head_stats = [], [], []
    features, memory = images, ()
    for e in range(network.num_exits):
        train = train_stages is None or train_stages[e]
        features, stats = network.apply_stage(
            variables, e, features, train=train, key=_key(key, 2 * e, train)
        )
        stage_stats.append(stats)
        train = train_heads is None or train_heads[e]
        output, stats = network.apply_head(
            variables, e, to_head(e, features), memory, train=train, key=_key(key, 2 * e + 1, train)
        )
        head_stats.append(stats)
        outputs.append(output)
        memory, features = output.memory, to_stage(e, features)
    stacked = ExitOutput(
        jnp.stack([o.logits for o in outputs]),
        jnp.stack([o.gate for o in outputs]),
        tuple(o.memory for o in outputs),
    )
    return stacked, {"stages": tuple(stage_stats), "heads": tuple(head_stats)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scale_gradient(factor: float, features: PyTree) -> PyTree:
    """The features themselves; their gradient is multiplied by `factor`."""
    del factor
    return features


def _forward(factor: float, features: PyTree) -> tuple[PyTree, None]:
    del factor
    return features, None


def _backward(factor: float, _: None, gradient: PyTree) -> tuple[PyTree]:
    return (jax.tree.map(lambda g: g * jnp.asarray(factor, g.dtype), gradient),)


scale_gradient.defvjp(_forward, _backward)


def _key(key: Array | None, number: int, train: bool) -> Array | None:
    return jax.random.fold_in(key, number) if train and key is not None else None
