"""A network with early exits: a backbone cut into stages and a head after each stage.

Stages and heads are pairs of pure functions. Policies, training and executors use a network through
this file alone, whatever library its modules are written in.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

PyTree = Any
Variables = Mapping[str, Any]


class Module(NamedTuple):
    """A pair of pure functions of any number of inputs.

    Attributes:
      init: `init(key, *inputs) -> variables`, a nested dict with the collections `"params"` and,
        if there are running statistics, `"batch_stats"`.
      apply: `apply(variables, *inputs, train, key=None) -> (outputs, batch_stats)`. With
        `train=True`, `batch_stats` are the statistics after this batch, and `key` is a JAX key for
        dropout and stochastic depth; with `train=False` the statistics are those that came in, and
        `key` is None.
    """

    init: Callable[..., Variables]
    apply: Callable[..., tuple[Any, PyTree]]


class ExitOutput(NamedTuple):
    """The output of a head.

    Attributes:
      logits: `[B, C]` float32.
      gate: `[B]` float32, the logit of "stop here"; zeros if the head has no learned gate.
      memory: an input of the next head, a pytree with leaves `[B, ...]`; `()` for most heads.
    """

    logits: Array
    gate: Array
    memory: PyTree


@dataclasses.dataclass(frozen=True)
class EarlyExitNetwork:
    """A backbone cut into E stages, and E heads; head e reads the features of stage e.

    The last head is the classifier of the backbone, so with `E == 1` this is a plain network. The
    features of a stage are a pytree with leaves `[B, ...]`, from which executors gather the samples
    that go on.

    Variables are `{"params": {"stages": (...), "heads": (...)}, "batch_stats": {the same}}`, with
    an entry for each stage and each head.

    Attributes:
      stages: `stage(variables, features) -> features`; the first stage reads the images.
      heads: `head(variables, features, memory) -> ExitOutput`; the first head gets `memory=()`.

    Raises:
      ValueError: if there are no stages, or another number of heads.
    """

    stages: tuple[Module, ...]
    heads: tuple[Module, ...]

    def __post_init__(self) -> None:
        if not self.stages or len(self.stages) != len(self.heads):
            raise ValueError(
                f"{len(self.stages)} stages and {len(self.heads)} heads; give at least one stage "
                "and exactly one head for each."
            )

    @property
    def num_exits(self) -> int:
        """E, the number of exits with the last."""
        return len(self.stages)

    def init(self, key: Array, images: Array) -> Variables:
        """Initial variables, from a key and images `[B, ...]`.

        The images' values matter to layers that begin with statistics of their input, such as
        `eejax.models.fast.Whitening`, and to no others.
        """
        stages, heads = [], []
        features, memory = images, ()
        for stage, head in zip(self.stages, self.heads, strict=True):
            key, stage_key, head_key = jax.random.split(key, 3)
            stages.append(stage.init(stage_key, features))
            features, _ = stage.apply(stages[-1], features, train=False)
            heads.append(head.init(head_key, features, memory))
            output, _ = head.apply(heads[-1], features, memory, train=False)
            memory = output.memory
        by_stage, by_head = _collected(stages), _collected(heads)
        return {c: {"stages": by_stage[c], "heads": by_head[c]} for c in by_stage}

    def apply_stage(
        self,
        variables: Variables,
        e: int,
        features: PyTree,
        *,
        train: bool = False,
        key: Array | None = None,
    ) -> tuple[PyTree, PyTree]:
        """Runs stage e on the features of stage e - 1; returns `(features, batch_stats)`."""
        return self.stages[e].apply(part(variables, "stages", e), features, train=train, key=key)

    def apply_head(
        self,
        variables: Variables,
        e: int,
        features: PyTree,
        memory: PyTree,
        *,
        train: bool = False,
        key: Array | None = None,
    ) -> tuple[ExitOutput, PyTree]:
        """Runs head e; `memory` is that of head e - 1, `()` for the first head.

        Returns:
          `(ExitOutput, batch_stats)`.
        """
        variables = part(variables, "heads", e)
        return self.heads[e].apply(variables, features, memory, train=train, key=key)

    def apply_all(
        self, variables: Variables, images: Array, *, train: bool = False, key: Array | None = None
    ) -> tuple[ExitOutput, PyTree]:
        """Runs every stage and every head, to train or to record a trace.

        Args:
          variables: what `init` returns.
          images: `[B, ...]`.
          train: use the batch's statistics and return updated running ones.
          key: for dropout and stochastic depth in training; stage e draws from it with 2e folded
            in, head e with 2e + 1.

        Returns:
          `ExitOutput` with logits stacked to `[E, B, C]`, gates to `[E, B]`, and a tuple of the E
          memories; and the batch statistics, shaped like `variables["batch_stats"]`.
        """
        outputs, stage_stats, head_stats = [], [], []
        features, memory = images, ()
        for e in range(self.num_exits):
            features, stats = self.apply_stage(
                variables, e, features, train=train, key=_folded(key, 2 * e)
            )
            stage_stats.append(stats)
            output, stats = self.apply_head(
                variables, e, features, memory, train=train, key=_folded(key, 2 * e + 1)
            )
            head_stats.append(stats)
            memory = output.memory
            outputs.append(output)
        stacked = ExitOutput(
            jnp.stack([o.logits for o in outputs]),
            jnp.stack([o.gate for o in outputs]),
            tuple(o.memory for o in outputs),
        )
        return stacked, {"stages": tuple(stage_stats), "heads": tuple(head_stats)}

    def apply_plain(self, variables: Variables, images: Array) -> Array:
        """Runs the plain network, every stage and the last head; returns logits `[B, C]`.

        The early heads are traced too, since the last head may depend on their memory; if it does
        not, the compiler removes them.
        """
        features, memory, logits = images, (), None
        for e in range(self.num_exits):
            features, _ = self.apply_stage(variables, e, features)
            output, _ = self.apply_head(variables, e, features, memory)
            memory, logits = output.memory, output.logits
        assert logits is not None
        return logits

    def reading(self, preprocess: Callable[[Array], Array]) -> EarlyExitNetwork:
        """The network that reads `preprocess(images)`, for example to normalise raw uint8 images.

        Preprocessing becomes part of the first stage, of its cost and of every executor. Variables
        do not change.
        """
        first = self.stages[0]

        def init(key: Array, images: Array) -> Variables:
            return first.init(key, preprocess(images))

        def apply(variables: Variables, images: Array, **mode: Any) -> tuple[PyTree, PyTree]:
            return first.apply(variables, preprocess(images), **mode)

        return dataclasses.replace(self, stages=(Module(init, apply), *self.stages[1:]))

    def keeping(self, exits: Sequence[int]) -> EarlyExitNetwork:
        """The network with only some of its exits; `keep_variables` gives its variables.

        Stages between two kept exits are merged. The other heads and the stages after the last kept
        exit are removed, so `keeping([e])` is the plain network that ends at exit e, to run or to
        train from scratch. Merged stages of equal modules are equal, so they can share a `loop`.

        A kept head whose predecessor is removed raises ValueError when it runs if it receives or
        returns memory.

        Args:
          exits: 0-based and increasing.

        Raises:
          ValueError: if there is no exit, or they are not increasing, or one does not exist.
        """
        stages, heads = [], []
        for a, b in kept_groups(exits, self.num_exits):
            alone = b - a == 1
            stages.append(self.stages[a] if alone else _in_turn(self.stages[a:b]))
            heads.append(self.heads[b - 1] if alone else _without_memory(self.heads[b - 1]))
        return EarlyExitNetwork(tuple(stages), tuple(heads))


def part(variables: Variables, kind: str, e: int) -> Variables:
    """The variables of one module; `kind` is `"stages"` or `"heads"`."""
    return {collection: tree[kind][e] for collection, tree in variables.items()}


def keep_variables(variables: Variables, exits: Sequence[int]) -> Variables:
    """The variables of `network.keeping(exits)`, from those of the whole network.

    Nothing is computed or copied, so shapes or `{"params": params}` alone work too. `exits` and the
    errors are those of `keeping`.
    """

    def keep(stages: Sequence[PyTree], heads: Sequence[PyTree]) -> dict[str, tuple]:
        groups = kept_groups(exits, len(stages))
        merged = (stages[a] if b - a == 1 else tuple(stages[a:b]) for a, b in groups)
        return {"stages": tuple(merged), "heads": tuple(heads[b - 1] for _, b in groups)}

    return {c: keep(tree["stages"], tree["heads"]) for c, tree in variables.items()}


def kept_groups(exits: Sequence[int], num_exits: int) -> list[tuple[int, int]]:
    """For each kept exit the stages `[start, stop)` between the kept exit before and this one."""
    kept = [int(e) for e in exits]
    if not kept or not all(a < b for a, b in itertools.pairwise([-1, *kept, num_exits])):
        raise ValueError(f"exits {kept}; give at least one, increasing, 0 to {num_exits - 1}.")
    return list(itertools.pairwise([0, *(e + 1 for e in kept)]))


def _collected(variables: Sequence[Variables]) -> dict[str, tuple]:
    """The variables of several modules by collection, as tuples with an entry for each module."""
    return {c: tuple(v.get(c, {}) for v in variables) for c in ("params", "batch_stats")}


def _folded(key: Array | None, number: int) -> Array | None:
    return None if key is None else jax.random.fold_in(key, number)


# Both are cached so that equal modules merge into equal modules.
@functools.cache
def _in_turn(modules: tuple[Module, ...]) -> Module:
    """Several stages as one; its collections are tuples of theirs."""

    def init(key: Array, features: PyTree) -> Variables:
        variables = []
        for module, part_key in zip(modules, jax.random.split(key, len(modules)), strict=True):
            variables.append(module.init(part_key, features))
            features, _ = module.apply(variables[-1], features, train=False)
        return _collected(variables)

    def apply(
        variables: Variables, features: PyTree, *, train: bool, key: Array | None = None
    ) -> tuple[PyTree, PyTree]:
        stats = []
        for i, module in enumerate(modules):
            of_module = {c: tree[i] for c, tree in variables.items()}
            features, after = module.apply(of_module, features, train=train, key=_folded(key, i))
            stats.append(after)
        return features, tuple(stats)

    return Module(init, apply)


@functools.cache
def _without_memory(head: Module) -> Module:
    """A head whose predecessor is removed; raises ValueError if it receives or returns memory."""

    def check(memory: PyTree) -> None:
        if jax.tree.leaves(memory):
            raise ValueError(
                "a kept head takes or hands on memory, and the head before it is dropped; keep "
                "every exit up to that head, or train a network that has these exits only."
            )

    def init(key: Array, features: PyTree, memory: PyTree) -> Variables:
        check(memory)
        return head.init(key, features, memory)

    def apply(
        variables: Variables, features: PyTree, memory: PyTree, **mode: Any
    ) -> tuple[ExitOutput, PyTree]:
        check(memory)
        output, stats = head.apply(variables, features, memory, **mode)
        check(output.memory)
        return output, stats

    return Module(init, apply)


def normalise(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Array], Array]:
    """A `preprocess` for images `[B, H, W, C]` in 0..255: `(x - mean) / std`, float32.

    Args:
      mean: per channel, in 0..255.
      std: per channel, in 0..255.

    Raises:
      ValueError: if `mean` and `std` differ in length, or a standard deviation is not positive.
    """
    if len(mean) != len(std) or not all(s > 0 for s in std):
        raise ValueError(f"mean {mean} and std {std}; give both for each channel, std positive.")
    offset = np.asarray(mean, np.float32)[None, None, None]
    scale = 1 / np.asarray(std, np.float32)[None, None, None]

    def preprocess(images: Array) -> Array:
        return (images.astype(jnp.float32) - offset) * scale

    return preprocess
