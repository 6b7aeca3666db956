"""Cuts any traceable function of variables and images at named intermediate values.

A model of any framework is such a function. In its traced program some values carry names
(`jax.ad_checkpoint.checkpoint_name`). Stage k is the slice of the program that leads to the k-th
named value, without the equations that earlier stages need, whatever the order of the program. So
an image that leaves at an exit has paid for nothing beyond that exit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax import Array
from jax.extend.core import jaxpr_as_fun
from jax.tree_util import DictKey, GetAttrKey

from eejax.adapters import tracing
from eejax.adapters.tracing import Cuts, Slice, kind
from eejax.network import EarlyExitNetwork, ExitOutput, Module, PyTree, Variables

# A model is traced at two batch sizes, which tell the batch axis of the values that cross a cut.
_BATCHES = (2, 3)


def cut_named(
    module: Module, at: Sequence[str], heads: Callable[[int], Module], image: jax.ShapeDtypeStruct
) -> EarlyExitNetwork:
    """Puts an exit at each of K named values of a model; the model's output is the last exit.

    Args:
      module: the model, `apply(variables, images, train, key) -> (logits, batch_stats)`. It names
        values by `jax.ad_checkpoint.checkpoint_name(value, name)`, each by another name;
        `adapters.cut_linen` and `cut_nnx` do so for their models.
      at: K names, in the order of computation.
      heads: `heads(e)` makes the head of exit e, 0-based, for the first K exits; its features are
        the named value.
      image: shape and dtype of one image, without the batch axis.

    Returns:
      A network of K + 1 exits. `graft` inserts the variables of a trained model, and `whole`
      extracts them.

    Raises:
      ValueError: as `stages`.
    """
    parts = stages(module, at, image)
    early = tuple(on_value(heads(e)) for e in range(len(at)))
    return EarlyExitNetwork(parts, (*early, LAST))


def stages(module: Module, at: Sequence[str], image: jax.ShapeDtypeStruct) -> tuple[Module, ...]:
    """Cuts a model at K named values into K + 1 stages.

    Stage k returns `(v_k, rest)`: its named value, and a tuple of all other values that depend on
    the images and that a later stage reads. The batch axis is moved to the front. The last stage
    returns the model's outputs. Values that depend on variables or on the key alone are computed by
    each stage that needs them, so random numbers that two stages read are drawn twice, each time
    from the key of the stage. Every variable belongs to one stage. The model is traced once for
    every batch size. Equations without a reader, a debugging print for example, are dropped.

    Args:
      module: as for `cut_named`; its outputs may be any pytree.
      at: K names, in the order of computation.
      image: shape and dtype of one image, without the batch axis.

    Raises:
      ValueError: if `at` is one string; if a name does not exist, exists twice or is out of order;
        if two stages read a variable, or it is boxed or in another collection than params and
        batch_stats; if a value without batch axis would cross a cut.
    """
    if isinstance(at, str):
        raise ValueError(f"one string, {at!r}, for the names to cut at; give a list: [{at!r}].")
    model = _Model(module, tuple(at), image)
    return tuple(model.stage(k) for k in range(len(at) + 1))


def on_value(head: Module) -> Module:
    """The head that reads the named value from the features of a stage of `stages`."""

    def init(key: Array, features: PyTree, memory: PyTree) -> Variables:
        return head.init(key, features[0], memory)

    def apply(
        variables: Variables, features: PyTree, memory: PyTree, **mode: Any
    ) -> tuple[ExitOutput, PyTree]:
        return head.apply(variables, features[0], memory, **mode)

    return Module(init, apply)


def _last(
    variables: Variables, logits: PyTree, memory: PyTree, **mode: Any
) -> tuple[ExitOutput, PyTree]:
    del memory, mode
    if not isinstance(logits, Array) or logits.ndim != 2:
        outputs = jax.tree.map(kind, logits)
        raise ValueError(
            f"the model puts out {outputs}; give one that puts out [B, C] logits alone."
        )
    gate = jnp.zeros(logits.shape[0], jnp.float32)
    return ExitOutput(logits.astype(jnp.float32), gate, ()), variables.get("batch_stats", {})


LAST = Module(lambda *_: {"params": {}}, _last)
"""The last head of a model that was cut: the logits of the model, in float32."""


def graft(variables: Variables, original: Variables) -> Variables:
    """Inserts the variables of a trained model into the stages of the network cut from it.

    Args:
      variables: of the network. The heads keep theirs.
      original: of the model, a nested dict for each collection. Floats are cast to the dtypes of
        the network.

    Raises:
      ValueError: if a leaf is missing or left over, has another shape, or has another dtype where
        either is not a float.
    """
    given = dict(_leaves(original))
    stages = {c: tree["stages"] for c, tree in variables.items()}
    expected = dict(_leaves(stages))
    for problem, odd in (
        ("the network takes and the model lacks", expected.keys() - given.keys()),
        ("the model has and the network does not take", given.keys() - expected.keys()),
    ):
        if odd:
            raise ValueError(
                f"{problem} {_some(odd)}; give the variables of the model that was cut."
            )

    def take(path: Any, old: Any) -> Any:
        new = given[_leaf(path)]
        floats = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (new, old))
        if floats and new.shape == old.shape and new.dtype != old.dtype:
            return jnp.asarray(new.astype(old.dtype))
        if kind(new) != kind(old):
            raise ValueError(
                f"{'/'.join(_leaf(path))} is {kind(new)} in the model and {kind(old)} in the "
                "network; give the variables of the model that was cut."
            )
        return new

    taken = jax.tree_util.tree_map_with_path(take, stages)
    return {c: {**tree, "stages": taken[c]} for c, tree in variables.items()}


def whole(variables: Variables) -> dict[str, Any]:
    """The variables of the model from those of the network, a nested dict for each collection.

    They are those of the stages, without the heads. An empty collection is left out.
    """
    return unflatten_dict(dict(_leaves({c: tree["stages"] for c, tree in variables.items()})))


class _Model:
    """A model, its cuts, and the stage that each of its variables belongs to."""

    def __init__(self, module: Module, at: tuple[str, ...], image: jax.ShapeDtypeStruct) -> None:
        self.module, self.at, self.image = module, at, image
        shapes = jax.eval_shape(module.init, jax.random.key(0), self.one_image())
        leaves, self.tree = jax.tree_util.tree_flatten_with_path(shapes)
        self.leaves = [_checked(path) for path, _ in leaves]
        self.shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in leaves]
        self.names = ["/".join(leaf) for leaf in self.leaves]
        # JAX caches traces, and traces again if anything that matters has changed.
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
        stats = [i for i, leaf in enumerate(self.leaves) if leaf[0] == "batch_stats"]
        if updated and updated != [self.leaves[i] for i in stats]:
            raise ValueError(
                f"in training the model returns {_some(updated)} for the batch statistics "
                f"{_some(self.leaves[i] for i in stats)}; return the same structure."
            )
        graph = tracing.graph(traced.jaxpr, stats if updated else ())
        return tracing.cuts(graph, self.at)

    def batch_axes(self, of: Cuts, train: bool) -> list[list[int]]:
        """The batch axis of each value that each stage reads."""
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
                    f"the model trains with {batch} images and does not with {_BATCHES[0]}, the "
                    "batch at which it was traced first; give one that trains with any number."
                )
            cuts = self.cuts(traced)
            tracing.place_updates(cuts, self.owners, self.names)
            slices = tracing.slices(cuts, self.owners)
            if [len(s.features) for s in slices] != [len(axes) for axes in self.axes[train]]:
                raise ValueError(
                    f"with {batch} images other values cross the cuts than with {_BATCHES[0]}; "
                    "give a model that computes the same for any number."
                )
            self.known[number] = traced.jaxpr, slices, jax.tree.structure(traced.out_info[0])
        return self.known[number][1:]

    def stage(self, k: int) -> Module:
        owned = [i for i, owner in enumerate(self.owners) if owner == k]

        def init(key: Array, features: PyTree) -> Variables:
            del features  # the init of the model reads images
            values = self.tree.flatten_up_to(self.module.init(key, self.one_image()))
            return {"params": {}} | unflatten_dict({self.leaves[i]: values[i] for i in owned})

        def apply(
            variables: Variables, features: PyTree, *, train: bool, key: Array | None = None
        ) -> tuple[PyTree, PyTree]:
            given = [features] if k == 0 else [features[0], *features[1]]
            slices, structure = self.slices(given[0].shape[0], train, key)
            piece = slices[k]
            axes = self.axes[train][k]
            if len(given) == len(axes):
                given = [_moved(x, 0, axis) for x, axis in zip(given, axes, strict=True)]
            if [kind(x) for x in given] != [kind(x) for x in piece.features]:
                raise ValueError(
                    f"{'features' if k else 'images'} {', '.join(map(kind, given))}; the model was "
                    f"cut for {', '.join(map(kind, piece.features))}."
                )
            if piece.random and key is None:
                raise ValueError("the model draws random numbers in training; give a key.")
            read = [self.value(variables, i) for i in piece.reads]
            results = jaxpr_as_fun(piece.run)(*read, *([key] if piece.random else []), *given)
            stats = variables.get("batch_stats", {})
            if piece.updates:
                split = len(results) - len(piece.updates)
                names = (self.leaves[i] for i in piece.updates)
                updated = dict(zip(names, results[split:], strict=True))
                stats = unflatten_dict(updated)["batch_stats"]
                results = results[:split]
            if k == len(self.at):
                return jax.tree.unflatten(structure, results), stats
            axes = self.axes[train][k + 1]
            value, *rest = (_moved(x, axis, 0) for x, axis in zip(results, axes, strict=True))
            return (value, tuple(rest)), stats

        return Module(init, apply)

    def value(self, variables: Variables, i: int) -> Array:
        """The value of variable i, from the variables of its stage."""
        leaf: Any = variables
        for key in self.leaves[i]:
            leaf = leaf[key]
        if kind(leaf) != kind(self.shapes[i]):
            raise ValueError(
                f"{self.names[i]} is {kind(leaf)}; the model was cut with {kind(self.shapes[i])}."
            )
        return jnp.asarray(leaf)


def _moved(x: Any, source: int, to: int) -> Array:
    return jnp.asarray(x) if source == to else jnp.moveaxis(jnp.asarray(x), source, to)


def _leaf(path: Sequence[Any]) -> tuple[str, ...]:
    """Collection and keys of a variable, without the number of its stage."""
    return tuple(p.key for p in path if isinstance(p, DictKey))


def _checked(path: Sequence[Any]) -> tuple[str, ...]:
    """`_leaf` of a variable of a model; raises ValueError if it cannot be one of a stage."""
    if isinstance(path[0], DictKey) and path[0].key not in ("params", "batch_stats"):
        raise ValueError(
            f"a collection {path[0].key!r} of variables; only params and batch_stats are kept. "
            'A Linen module may sow into "intermediates" what is only to be inspected.'
        )
    if any(isinstance(p, GetAttrKey) for p in path):
        raise ValueError(
            f"{'/'.join(_leaf(path))} is in a box, as flax.linen.with_partitioning makes them; "
            "take variables out of their boxes in `init`, by nn.unbox."
        )
    if not all(isinstance(p, DictKey) and isinstance(p.key, str) for p in path):
        raise ValueError(
            f"a variable at {jax.tree_util.keystr(tuple(path))}; give nested dicts with keys of "
            "type str."
        )
    return _leaf(path)


def _leaves(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    return [(_leaf(path), x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _some(leaves: Iterable[tuple[str, ...]]) -> str:
    """The first few of some variables, for a message."""
    names = sorted("/".join(leaf) for leaf in leaves)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "no") + more
