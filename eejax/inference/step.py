"""What all executors share: their signature, their result, and the step through one exit.

At exit e the stage and the head run, the policy scores the head's output, and a sample leaves if

    score_e >= threshold_e    or    e = E - 1.

The last exit takes every sample that reaches it, also one whose score is NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eejax.network import EarlyExitNetwork, Module, PyTree, Variables, part
from eejax.policies.base import Policy


class Prediction(NamedTuple):
    """Predictions of a batch; NumPy arrays where they come from a `predictor`.

    Attributes:
      labels: `[B]` int32.
      exits: `[B]` int32, 0-based: the exit that each sample took.
      logits: `[B, C]` float32, the policy's logits at that exit.
    """

    labels: Array | np.ndarray
    exits: Array | np.ndarray
    logits: Array | np.ndarray

    @classmethod
    def of(cls, logits: Any, exits: Any) -> Prediction:
        """The prediction of these logits and exits, JAX or NumPy arrays."""
        return cls(logits.argmax(-1).astype(np.int32), exits, logits)


class Executor(Protocol):
    """A pure function that can be traced inside a caller's own `jax.jit`.

    Thresholds are arguments of the program: changing them compiles nothing.
    """

    def __call__(
        self,
        network: EarlyExitNetwork,
        policy: Policy,
        variables: Any,
        thresholds: Array,
        images: Array,
        count: Any = None,
        /,
    ) -> Prediction:
        """Predicts a batch.

        Args:
          network: E exits.
          policy: scores the exits.
          variables: as `network.init` returns; `loop` also takes what `stack` returns.
          thresholds: `[E - 1]` float32.
          images: `[B, ...]`.
          count: number of valid images, int32; later images are padding with undefined predictions.
            By default all B are valid.
        """
        ...


class Samples(NamedTuple):
    """Samples between two exits; every leaf leads with the batch axis.

    Attributes:
      features: output of the stage before, or images.
      memory: memory of the head before; `()` before the first.
      state: the policy's state.
      indices: `[B]` int32, position in the batch; `()` where samples are never reordered.
    """

    features: PyTree
    memory: PyTree
    state: PyTree
    indices: Any = ()


def first_samples(policy: Policy, images: Any, indices: Any = ()) -> Samples:
    """Images `[B, ...]` before the first stage."""
    return Samples(images, (), policy.init(len(images)), indices)


class Exit(NamedTuple):
    """One exit of a network with everything that it needs to run.

    Attributes:
      stage, head: modules.
      policy: scores the exit.
      variables: `(stage's, head's)`.
      thresholds: `[E - 1]`, of all exits.
      index: e, a Python integer, or an int32 scalar inside a loop over depth.
    """

    stage: Module
    head: Module
    policy: Policy
    variables: tuple[Variables, Variables]
    thresholds: Array
    index: Any

    @property
    def is_last(self) -> Any:
        """Whether it is the last exit: bool, traced if `index` is."""
        return self.index == len(self.thresholds)


def bind_exits(
    network: EarlyExitNetwork, policy: Policy, variables: Variables, thresholds: Array
) -> list[Exit]:
    """All E exits; arguments as for `Executor`."""
    return [
        Exit(stage, head, policy, exit_variables(variables, e), thresholds, e)
        for e, (stage, head) in enumerate(zip(network.stages, network.heads, strict=True))
    ]


def exit_variables(variables: Variables, e: int) -> tuple[Variables, Variables]:
    """Variables of stage e and of head e."""
    return part(variables, "stages", e), part(variables, "heads", e)


def exit_step(exit: Exit, samples: Samples) -> tuple[Samples, Array, Array]:
    """Runs stage, head and policy of one exit.

    Args:
      exit: exit e.
      samples: B samples that reach it.

    Returns:
      The samples as the next exit reads them; the policy's logits `[B, C]`; and which samples leave
      here, `[B]` bool.
    """
    stage_variables, head_variables = exit.variables
    features, _ = exit.stage.apply(stage_variables, samples.features, train=False)
    output, _ = exit.head.apply(head_variables, features, samples.memory, train=False)
    logits, score, state = exit.policy.step(output, samples.state, exit.index)
    # One more threshold, since `index` may be traced; the last exit does not depend on it.
    thresholds = jnp.append(jnp.asarray(exit.thresholds, jnp.float32), jnp.float32(-jnp.inf))
    leaves = (score >= thresholds[exit.index]) | exit.is_last
    return Samples(features, output.memory, state, samples.indices), logits, leaves


def output_shapes(exit: Exit, samples: Samples) -> tuple[Samples, Any]:
    """Shapes and dtypes of the next exit's samples and of the logits; nothing is computed, and
    shapes alone of variables and samples will do."""

    def run(variables: Any, samples: Samples) -> tuple[Samples, Array]:
        return exit_step(exit._replace(variables=variables), samples)[:2]

    return jax.eval_shape(run, exit.variables, samples)


def pad_batch(images: Any, size: int) -> Any:
    """Images `[B, ...]` followed by zeros, `[size, ...]`; on the device if they are there."""
    if len(images) == size:
        return images
    padding = [(0, size - len(images))] + [(0, 0)] * (np.ndim(images) - 1)
    return (jnp if isinstance(images, Array) else np).pad(images, padding)


def check_images(images: Any) -> None:
    """Raises ValueError if a batch holds no images."""
    if len(images) == 0:
        raise ValueError("a batch of no images; give at least one.")
