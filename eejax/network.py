"""The seam: a backbone cut into stages, and a head after each, as pairs of pure functions.

Everything outside `models`, `heads` and `adapters` sees a network only through this file and never
learns which library the modules were written in.
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
    """A pair of pure functions, any number of inputs.

    Attributes:
      init: `init(key, *inputs) -> variables`, a plain nested dict with the collections
        `"params"` and, where there are running statistics, `"batch_stats"`.
      apply: `apply(variables, *inputs, train, key=None) -> (outputs, batch_stats)`. With
        `train=True`, `batch_stats` are the statistics after this batch, and `key` is a JAX key for
        dropout and stochastic depth; with `train=False` the statistics are those that came in, and
        `key` is None.
    """

    init: Callable[..., Variables]
    apply: Callable[..., tuple[Any, PyTree]]


class ExitOutput(NamedTuple):
    """What a head puts out.

    Attributes:
      logits: `[B, C]` float32.
      gate: `[B]` float32, the logit of "stop here"; zeros where the head has no learned gate.
      memory: what this head hands to the next one, a pytree whose leaves lead with the batch axis;
        `()` for most heads.
    """

    logits: Array
    gate: Array
    memory: PyTree


@dataclasses.dataclass(frozen=True)
class EarlyExitNetwork:
    """A backbone cut into E stages, and E heads; head e reads what stage e puts out.

    The last head is the network's ordinary classifier, so `E == 1` is a plain network. `features`,
    what a stage hands to its head and to the next stage, is any pytree whose leaves all lead with
    the batch axis: that is what lets the samples that go on be gathered.

    Variables are `{"params": {"stages": (...), "heads": (...)}, "batch_stats": {the same}}`, one
    entry a stage and one a head.

    Attributes:
      stages: `stage(variables, features) -> features`; the first one reads the images.
      heads: `head(variables, features, memory) -> ExitOutput`; the first one gets `memory=()`.

    Raises:
      ValueError: no stages, or not one head for each stage.
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
        """E, the number of exits, the last one included."""
        return len(self.stages)

    def init(self, key: Array, images: Array) -> Variables:
        """Initial variables, from a key and images `[B, ...]` of which only the shape counts."""
        stages, heads = [], []
        features, memory = images, ()
        for stage, head in zip(self.stages, self.heads, strict=True):
            key, stage_key, head_key = jax.random.split(key, 3)
            stages.append(stage.init(stage_key, features))
            features, _ = stage.apply(stages[-1], features, train=False)
            heads.append(head.init(head_key, features, memory))
            output, _ = head.apply(heads[-1], features, memory, train=False)
            memory = output.memory
        of_stages, of_heads = _collected(stages), _collected(heads)
        return {c: {"stages": of_stages[c], "heads": of_heads[c]} for c in of_stages}

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
        """The plain network, logits `[B, C]`: every stage, and of the heads only the last.

        Where heads hand on `memory` the earlier ones are run too, since the last one reads theirs;
        where they do not, nothing reads the others' logits and the compiler leaves those heads out.
        """
        features, memory, logits = images, (), None
        for e in range(self.num_exits):
            features, _ = self.apply_stage(variables, e, features)
            output, _ = self.apply_head(variables, e, features, memory)
            memory, logits = output.memory, output.logits
        assert logits is not None
        return logits

    def reading(self, preprocess: Callable[[Array], Array]) -> EarlyExitNetwork:
        """The same network, reading `preprocess(images)`; raw uint8 images, say, to be normalised.

        What comes before the first stage then is part of it: of its cost, of every executor and of
        an exported artifact. Variables do not change.
        """
        first = self.stages[0]

        def init(key: Array, images: Array) -> Variables:
            return first.init(key, preprocess(images))

        def apply(
            variables: Variables, images: Array, *, train: bool, key: Array | None = None
        ) -> tuple[PyTree, PyTree]:
            return first.apply(variables, preprocess(images), train=train, key=key)

        return dataclasses.replace(self, stages=(Module(init, apply), *self.stages[1:]))

    def keeping(self, exits: Sequence[int]) -> EarlyExitNetwork:
        """The network with some of its exits, which `keep_variables` gives its variables to.

        Stages between two kept exits become one; the other heads, and the stages after the last
        kept exit, are gone and cost nothing. So `keeping([e])` is the plain network that ends at
        exit e, to run or to train from scratch. A stage that needs no merging stays the same
        `Module`, and merged stages of equal modules are equal: they still share a `loop`.

        A head cannot do without the `memory` that it reads. Modules do not tell before they are
        run, so a kept head whose predecessor is gone is refused when it is handed memory or hands
        any on; one that reads and hands on nothing fails in its own way.

        Args:
          exits: 0-based and increasing.

        Raises:
          ValueError: none, one that does not exist, or not in order.
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
    """The variables of `network.keeping(exits)`, out of the whole network's.

    Nothing is computed or copied, so shapes or `{"params": params}` do as well. Exits, and what is
    wrong with them, as for `keeping`.
    """

    def keep(stages: Sequence[PyTree], heads: Sequence[PyTree]) -> dict[str, tuple]:
        groups = kept_groups(exits, len(stages))
        merged = (stages[a] if b - a == 1 else tuple(stages[a:b]) for a, b in groups)
        return {"stages": tuple(merged), "heads": tuple(heads[b - 1] for _, b in groups)}

    return {c: keep(tree["stages"], tree["heads"]) for c, tree in variables.items()}


def kept_groups(exits: Sequence[int], num_exits: int) -> list[tuple[int, int]]:
    """For each kept exit the stages `[start, stop)` that lead to it from the one before."""
    kept = [int(e) for e in exits]
    if not kept or not all(a < b for a, b in itertools.pairwise([-1, *kept, num_exits])):
        raise ValueError(f"exits {kept}; give at least one, increasing, 0 to {num_exits - 1}.")
    return list(itertools.pairwise([0, *(e + 1 for e in kept)]))


def _collected(each: Sequence[Variables]) -> dict[str, tuple]:
    """The variables of several modules by collection, a tuple with an entry a module."""
    return {c: tuple(v.get(c, {}) for v in each) for c in ("params", "batch_stats")}


def _folded(key: Array | None, number: int) -> Array | None:
    return None if key is None else jax.random.fold_in(key, number)


# Both are cached so that equal modules are merged to equal ones, in one network and in the next.
@functools.cache
def _in_turn(modules: tuple[Module, ...]) -> Module:
    """Stages one after the other as one; each collection is a tuple of theirs."""

    def init(key: Array, features: PyTree) -> Variables:
        each = []
        for module, own in zip(modules, jax.random.split(key, len(modules)), strict=True):
            each.append(module.init(own, features))
            features, _ = module.apply(each[-1], features, train=False)
        return _collected(each)

    def apply(
        variables: Variables, features: PyTree, *, train: bool, key: Array | None = None
    ) -> tuple[PyTree, PyTree]:
        stats = []
        for i, module in enumerate(modules):
            own = {c: tree[i] for c, tree in variables.items()}
            features, after = module.apply(own, features, train=train, key=_folded(key, i))
            stats.append(after)
        return features, tuple(stats)

    return Module(init, apply)


@functools.cache
def _without_memory(head: Module) -> Module:
    """A head whose predecessor is gone; refuses to run where that one's memory would be missed."""

    def check(memory: PyTree) -> None:
        if jax.tree.leaves(memory):
            raise ValueError(
                "a kept head takes or hands on memory, and the head before it is dropped; keep "
                "every exit up to that head, or train a network that is cut at these exits only."
            )

    def init(key: Array, features: PyTree, memory: PyTree) -> Variables:
        check(memory)
        return head.init(key, features, memory)

    def apply(
        variables: Variables,
        features: PyTree,
        memory: PyTree,
        *,
        train: bool,
        key: Array | None = None,
    ) -> tuple[ExitOutput, PyTree]:
        check(memory)
        output, stats = head.apply(variables, features, memory, train=train, key=key)
        check(output.memory)
        return output, stats

    return Module(init, apply)


def normalise(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Array], Array]:
    """A `preprocess` for images `[B, H, W, C]` in 0..255: `(x - mean) / std`, float32.

    Args:
      mean: per channel, in 0..255.
      std: per channel, in 0..255.

    Raises:
      ValueError: not as many of both, or a standard deviation that is not positive.
    """
    if len(mean) != len(std) or not all(s > 0 for s in std):
        raise ValueError(f"mean {mean} and std {std}; give one of each a channel, std positive.")
    offset = np.asarray(mean, np.float32)[None, None, None]
    scale = 1 / np.asarray(std, np.float32)[None, None, None]

    def preprocess(images: Array) -> Array:
        return (images.astype(jnp.float32) - offset) * scale

    return preprocess
