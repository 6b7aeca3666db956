"""Cuts a model that was not written for it: any traceable function, at named intermediate values.

A model of any framework is in the end a function of variables and images that JAX can trace. In
the traced program some values carry names (`jax.ad_checkpoint.checkpoint_name`), and what is
computed is split at them. Stage k is what the k-th named value needs and those before it did not:
the slice of the program that leads to it, whatever the order in which the program was written. So
an image that leaves at an exit has paid for that exit alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import jaxpr_as_fun
from jax.tree_util import DictKey, GetAttrKey

from eejax.adapters import tracing
from eejax.adapters.tracing import Cuts, Slice, kind
from eejax.network import EarlyExitNetwork, ExitOutput, Module, PyTree, Variables

# Batch sizes at which a model is looked at; values that cross a cut must differ as these do.
_BATCHES = (2, 3)


def cut_named(
    module: Module, at: Sequence[str], heads: Callable[[int], Module], image: jax.ShapeDtypeStruct
) -> EarlyExitNetwork:
    """A network with an exit at each of K named values of a model, and the model's own answer last.

    Args:
      module: the model: `apply(variables, images, train=train) -> (logits, batch_stats)`, in which
        values are named by `jax.ad_checkpoint.checkpoint_name(value, name)`, each with a name of
        its own. `adapters.cut_linen` and `cut_nnx` name them for you.
      at: K names, in the order in which they are computed.
      heads: `heads(e)` makes the head of exit e, 0-based, for the first K of them; it reads the
        named value as its features.
      image: shape and dtype of one image, without the batch.

    Returns:
      K + 1 exits. `graft` gives it a trained model's variables, and `whole` gives them back.

    Raises:
      ValueError: as for `stages`.
    """
    parts = stages(module, at, image)
    early = tuple(on_value(heads(e)) for e in range(len(at)))
    return EarlyExitNetwork(parts, (*early, LAST))


def stages(module: Module, at: Sequence[str], image: jax.ShapeDtypeStruct) -> tuple[Module, ...]:
    """A model cut at K named values into K + 1 stages.

    What stage k hands on is `(v_k, rest)`: its named value, and a tuple of every other value that
    depends on the images and that a later stage reads, all led by the batch axis, wherever that was
    in the model. The last stage hands on the model's outputs. What depends on variables alone is
    computed by the stage that needs it; each variable belongs to one stage. The model is traced
    anew for every batch size. Equations that nothing reads, a debugging print say, are left out.

    Args:
      module: as for `cut_named`; its outputs may be any pytree.
      at: K names, in the order in which they are computed.
      image: shape and dtype of one image, without the batch.

    Raises:
      ValueError: one string for the names; a name that is not there, is there twice or is out of
        order; a variable that two stages read, that is boxed, or of another collection than params
        and batch_stats; a value without batch axis that would have to cross a cut.
    """
    if isinstance(at, str):
        raise ValueError(f"one string, {at!r}, for the names to cut at; give a list: [{at!r}].")
    model = _Model(module, tuple(at), image)
    return tuple(model.stage(k) for k in range(len(at) + 1))


def on_value(head: Module) -> Module:
    """The head that reads the named value out of what a stage of `stages` hands on."""

    def init(key: Array, features: PyTree, memory: PyTree) -> Variables:
        return head.init(key, features[0], memory)

    def apply(
        variables: Variables,
        features: PyTree,
        memory: PyTree,
        *,
        train: bool,
        key: Array | None = None,
    ) -> tuple[ExitOutput, PyTree]:
        return head.apply(variables, features[0], memory, train=train, key=key)

    return Module(init, apply)


def _no_variables(*_: Any) -> Variables:
    return {"params": {}}


def _answer(
    variables: Variables,
    logits: PyTree,
    memory: PyTree,
    *,
    train: bool,
    key: Array | None = None,
) -> tuple[ExitOutput, PyTree]:
    del memory, train, key
    if not isinstance(logits, Array) or logits.ndim != 2:
        found = jax.tree.map(kind, logits)
        raise ValueError(f"the model puts out {found}; cut one that puts out logits [B, C] alone.")
    gate = jnp.zeros(logits.shape[0], jnp.float32)
    return ExitOutput(logits.astype(jnp.float32), gate, ()), variables.get("batch_stats", {})


LAST = Module(_no_variables, _answer)
"""The last head of a model that was cut: the model's own logits, in float32."""


def graft(variables: Variables, original: Variables) -> Variables:
    """The variables of a network that was cut, with a trained model's in its stages.

    Args:
      variables: of the network, as its `init` gives. The heads keep theirs.
      original: the model's own: a nested dict for each collection. Floats of another dtype become
        the network's.

    Raises:
      ValueError: leaves that the model lacks, that nothing in the network takes, of another shape,
        or of another dtype where either is no float.
    """
    given = dict(_leaves(original))
    stages = {c: tree["stages"] for c, tree in variables.items()}
    wanted = dict(_leaves(stages))
    for problem, odd in (
        ("the network takes and the model lacks", wanted.keys() - given.keys()),
        ("the model has and the network does not take", given.keys() - wanted.keys()),
    ):
        if odd:
            raise ValueError(
                f"{problem} {_some(odd)}; give the variables of the model that was cut."
            )

    def take(path: Any, own: Any) -> Any:
        new = given[_leaf(path)]
        floats = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (new, own))
        if floats and new.shape == own.shape and new.dtype != own.dtype:
            return jnp.asarray(new.astype(own.dtype))
        if kind(new) != kind(own):
            raise ValueError(
                f"{'/'.join(_leaf(path))} is {kind(new)} in the model and {kind(own)} in the "
                "network; give the variables of the model that was cut."
            )
        return new

    taken = jax.tree_util.tree_map_with_path(take, stages)
    return {c: {**tree, "stages": taken[c]} for c, tree in variables.items()}


def whole(variables: Variables) -> dict[str, Any]:
    """The original model's variables out of the network's, a nested dict for each collection.

    Only the stages' are taken: the early heads are no part of the model. A collection that is empty
    is left out.
    """
    return _nested(_leaves({c: tree["stages"] for c, tree in variables.items()}))


class _Model:
    """A model, where it is cut, and which stage each of its variables belongs to."""

    def __init__(self, module: Module, at: tuple[str, ...], image: jax.ShapeDtypeStruct) -> None:
        self.module, self.at, self.image = module, at, image
        shapes = jax.eval_shape(module.init, jax.random.key(0), self.one_image())
        found, self.tree = jax.tree_util.tree_flatten_with_path(shapes)
        self.leaves = [_checked(path) for path, _ in found]
        self.shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in found]
        self.names = ["/".join(leaf) for leaf in self.leaves]
        # JAX keeps what it has traced, and traces anew where anything that matters has changed.
        self.traced = jax.jit(self.flat, static_argnames="train")
        self.known: dict[int, tuple[Any, tuple[Slice, ...], Any]] = {}
        modes = [False, True] if self.trains() else [False]
        cuts = {train: self.cuts(self.trace(_BATCHES[0], train)) for train in modes}
        self.owners = tracing.owners(list(cuts.values()), self.names)
        self.axes = {train: self.batch_axes(of, train) for train, of in cuts.items()}

    def one_image(self) -> Array:
        return jnp.zeros((1, *self.image.shape), self.image.dtype)

    def flat(
        self, leaves: Sequence[Array], images: Array, key: Array, train: bool
    ) -> tuple[PyTree, PyTree]:
        variables = jax.tree.unflatten(self.tree, leaves)
        outputs, stats = self.module.apply(
            variables, images, train=train, key=key if train else None
        )
        return outputs, stats if train else {}

    def trace(self, batch: Any, train: bool, key: Array | None = None) -> Any:
        images = jax.ShapeDtypeStruct((batch, *self.image.shape), self.image.dtype)
        key = jax.random.key(0) if key is None else key
        return self.traced.trace(self.shapes, images, key, train=train)

    def trains(self) -> bool:
        try:
            self.trace(_BATCHES[0], True)
        except Exception:  # a model that cannot train can still be cut for inference
            return False
        return True

    def cuts(self, traced: Any) -> Cuts:
        updated = [leaf for leaf, _ in _leaves({"batch_stats": traced.out_info[1]})]
        own = [i for i, leaf in enumerate(self.leaves) if leaf[0] == "batch_stats"]
        if updated and updated != [self.leaves[i] for i in own]:
            raise ValueError(
                f"in training the model returns {_some(updated)} for the batch statistics "
                f"{_some(self.leaves[i] for i in own)}; return the same structure."
            )
        graph = tracing.graph(traced.jaxpr, own if updated else ())
        return tracing.cuts(graph, self.at)

    def batch_axes(self, of: Cuts, train: bool) -> list[list[int]]:
        """Of what each stage reads."""
        other = self.cuts(self.trace(_BATCHES[1], train))
        tracing.place_updates(other, self.owners, self.names)
        return [[0], *tracing.batch_axes(of, other, self.owners, _BATCHES)]

    def slices(self, batch: Any, train: bool, key: Array | None) -> tuple[tuple[Slice, ...], Any]:
        """Every stage's program for a batch size, and the structure of the model's outputs."""
        traced = self.trace(batch, train, key)
        number = id(traced.jaxpr)  # unique, since the program is kept
        if number not in self.known:
            if train not in self.axes:
                raise ValueError(
                    f"the model trains with {batch} images and does not with {_BATCHES[0]}, by "
                    "which it is looked at; cut one that does with any number."
                )
            cuts = self.cuts(traced)
            tracing.place_updates(cuts, self.owners, self.names)
            slices = tracing.slices(cuts, self.owners)
            if [len(s.features) for s in slices] != [len(axes) for axes in self.axes[train]]:
                raise ValueError(
                    f"with {batch} images other values cross the cuts than with {_BATCHES[0]}; cut "
                    "a model that computes alike for any number."
                )
            self.known[number] = traced.jaxpr, slices, jax.tree.structure(traced.out_info[0])
        return self.known[number][1:]

    def stage(self, k: int) -> Module:
        mine = [i for i, owner in enumerate(self.owners) if owner == k]

        def init(key: Array, features: PyTree) -> Variables:
            del features  # the model's own init reads images
            values = self.tree.flatten_up_to(self.module.init(key, self.one_image()))
            return {"params": {}} | _nested((self.leaves[i], values[i]) for i in mine)

        def apply(
            variables: Variables, features: PyTree, *, train: bool, key: Array | None = None
        ) -> tuple[PyTree, PyTree]:
            given = [features] if k == 0 else [features[0], *features[1]]
            slices, outputs = self.slices(given[0].shape[0], train, key)
            own = slices[k]
            axes = self.axes[train][k]
            if len(given) == len(axes):
                given = [_moved(x, 0, axis) for x, axis in zip(given, axes, strict=True)]
            if [kind(x) for x in given] != [kind(x) for x in own.features]:
                raise ValueError(
                    f"{'features' if k else 'images'} {', '.join(map(kind, given))}; the model was "
                    f"cut for {', '.join(map(kind, own.features))}."
                )
            if own.random and key is None:
                raise ValueError("the model draws random numbers in training; give a key.")
            read = [self.value(variables, i) for i in own.reads]
            made = jaxpr_as_fun(own.run)(*read, *([key] if own.random else []), *given)
            stats = variables.get("batch_stats", {})
            if own.updates:
                split = len(made) - len(own.updates)
                names = (self.leaves[i] for i in own.updates)
                stats = _nested(zip(names, made[split:], strict=True))["batch_stats"]
                made = made[:split]
            if k == len(self.at):
                return jax.tree.unflatten(outputs, made), stats
            axes = self.axes[train][k + 1]
            value, *rest = (_moved(x, axis, 0) for x, axis in zip(made, axes, strict=True))
            return (value, tuple(rest)), stats

        return Module(init, apply)

    def value(self, variables: Variables, i: int) -> Array:
        """The value of one variable out of a stage's own."""
        found: Any = variables
        for key in self.leaves[i]:
            found = found[key]
        if kind(found) != kind(self.shapes[i]):
            raise ValueError(
                f"{self.names[i]} is {kind(found)}; the model was cut with {kind(self.shapes[i])}."
            )
        return jnp.asarray(found)


def _moved(x: Any, source: int, to: int) -> Array:
    return jnp.asarray(x) if source == to else jnp.moveaxis(jnp.asarray(x), source, to)


def _leaf(path: Sequence[Any]) -> tuple[str, ...]:
    """Collection and keys of a variable; of which stage it is a part is left out."""
    return tuple(p.key for p in path if isinstance(p, DictKey))


def _checked(path: Sequence[Any]) -> tuple[str, ...]:
    """`_leaf` of a model's variable."""
    if isinstance(path[0], DictKey) and path[0].key not in ("params", "batch_stats"):
        raise ValueError(
            f"a collection {path[0].key!r} of variables; only params and batch_stats are carried. "
            'A Linen module may sow into "intermediates" what is only looked at.'
        )
    if any(isinstance(p, GetAttrKey) for p in path):
        raise ValueError(
            f"{'/'.join(_leaf(path))} is in a box, as flax.linen.with_partitioning makes them; "
            "take variables out of their boxes where they are made, by nn.unbox."
        )
    if not all(isinstance(p, DictKey) and isinstance(p.key, str) for p in path):
        raise ValueError(
            f"a variable at {jax.tree_util.keystr(tuple(path))}; give nested dicts with keys of "
            "type str."
        )
    return _leaf(path)


def _leaves(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    return [(_leaf(path), x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _nested(leaves: Iterable[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    """The nested dict of leaves by their paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves:
        inner = tree
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = leaf
    return tree


def _some(leaves: Iterable[tuple[str, ...]]) -> str:
    """The first few of some variables, for a message."""
    names = sorted("/".join(leaf) for leaf in leaves)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "no") + more
