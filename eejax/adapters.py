"""Adapters: modules that somebody already has, as the pairs of pure functions of `network`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from eejax import cost, slicing
from eejax.network import EarlyExitNetwork, ExitOutput, Module, PyTree, Variables
from eejax.positions import Exits, blocks_of

if TYPE_CHECKING:
    from flax import nnx


def from_linen(module: nn.Module) -> Module:
    """A Flax Linen module whose `__call__` takes `(*inputs, train)`, as a `Module`.

    Of its collections `params` and `batch_stats` are carried. Equal modules give the same pair, by
    which an executor sees that they can share a program (`compaction.runs`).
    """
    try:
        return _from_linen(module)
    except TypeError:  # a field that cannot be hashed, a list say
        return _from_linen.__wrapped__(module)


@functools.cache
def _from_linen(module: nn.Module) -> Module:
    def init(key: Array, *inputs: Any) -> Variables:
        return module.init(key, *inputs, train=False)

    def apply(variables: Variables, *inputs: Any, train: bool) -> tuple[Any, PyTree]:
        stats = variables.get("batch_stats", {})
        if not (train and stats):
            return module.apply(variables, *inputs, train=train), stats
        outputs, updated = module.apply(variables, *inputs, train=True, mutable=["batch_stats"])
        return outputs, updated["batch_stats"]

    return Module(init, apply)


class Chain(nn.Module):
    """Linen modules one after the other, each called with `(features, train=train)`."""

    blocks: Sequence[nn.Module]

    @nn.compact
    def __call__(self, features: PyTree, *, train: bool) -> PyTree:
        for block in self.blocks:
            features = block(features, train=train)
        return features


def cut(
    blocks: Sequence[nn.Module],
    exits: Exits,
    head: Callable[[int], nn.Module],
    *,
    classifier: nn.Module | None = None,
    image: Sequence[int] | None = None,
) -> EarlyExitNetwork:
    """A network from a sequence of Linen blocks, cut after some of them.

    Args:
      blocks: the backbone; each is called with `(features, train=train)`.
      exits: after which blocks an exit sits: 1-based numbers, shares of the multiply-accumulates, a
        number of exits, or `"all"` (`positions.blocks_of`). The network's own classifier after the
        last block is always there and may be left out of the list.
      head: `head(e)` makes the head of exit e, 0-based.
      classifier: the last head; `head` makes that one too if it is left out.
      image: `(height, width, channels)` of the images; only shares need it.

    Raises:
      ValueError: positions that do not exist, or shares without `image`.
    """

    def assemble(ends: Sequence[int], head: Callable[[int], Module]) -> EarlyExitNetwork:
        stages = [Chain(tuple(blocks[a:b])) for a, b in itertools.pairwise([0, *ends])]
        last = len(ends) - 1
        heads = [head(e) for e in range(last)]
        heads.append(from_linen(classifier) if classifier is not None else head(last))
        return EarlyExitNetwork(tuple(map(from_linen, stages)), tuple(heads))

    def fractions() -> list[float]:
        if image is None:
            raise ValueError("exits at shares of the cost need the shape of an image; give image=.")
        plain = assemble(
            range(1, len(blocks) + 1),
            lambda e: from_linen(head(e)) if e == len(blocks) - 1 else _SILENT,
        )
        shape = jax.ShapeDtypeStruct((1, *image), jnp.float32)
        shapes = jax.eval_shape(plain.init, jax.random.key(0), shape)
        costs = cost.layer_macs(plain, shapes, shape)
        return (np.cumsum(costs.stages) / costs.cumulative[-1]).tolist()

    ends = blocks_of(exits, len(blocks), fractions)
    return assemble(ends, lambda e: from_linen(head(e)))


def _says_nothing(
    variables: Variables, features: PyTree, memory: PyTree, *, train: bool
) -> tuple[ExitOutput, PyTree]:
    del variables, memory, train
    nothing = jnp.zeros(jax.tree.leaves(features)[0].shape[0])
    return ExitOutput(nothing[:, None], nothing, ()), {}


# A head that costs nothing, where only the backbone's cost is wanted.
_SILENT = Module(lambda *_: {}, _says_nothing)


def cut_linen(
    module: nn.Module,
    at: Sequence[str],
    heads: Callable[[int], nn.Module | Module],
    image: jax.ShapeDtypeStruct,
    call: Callable[[Any, Array, bool], Any] = lambda m, x, train: m(x, train=train),
) -> EarlyExitNetwork:
    """A Flax Linen model that was not written for exits, with one at each of K named values.

    What a submodule returns is named by its path, `"layer3"` or `"encoder/block_2"`, what is sown
    into `"intermediates"` by the path there, and `jax.ad_checkpoint.checkpoint_name` names anything
    else. Parts of what a submodule returns are `"path[0]"`, `"path['key']"` and so on.

    No key for `"dropout"` comes here: in training a module that asks for one fails with Flax's own
    message, unless `call` calls it with `deterministic=True`.

    Args:
      module: the model; its own answer, logits `[B, C]`, is the last exit.
      at: K names, in the order in which they are computed; a wrong one is answered with them all.
      heads: `heads(e)` makes the head of exit e, 0-based, for the first K of them.
      image: shape and dtype of one image, without the batch.
      call: how the model is called, `call(module, images, train)`.

    Returns:
      K + 1 exits. Their variables are drawn anew; `slicing.graft` puts a trained model's in.

    Raises:
      ValueError: as for `slicing.stages`.
    """

    def tagged(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = run(*args, **kwargs)
        if context.method_name != "__call__" or not context.module.path:
            return output
        return _tagged(output, "/".join(context.module.path))

    def init(key: Array, images: Array) -> Variables:
        return module.init(key, images, False, method=call)

    def apply(variables: Variables, images: Array, *, train: bool) -> tuple[Any, PyTree]:
        stats = variables.get("batch_stats", {})
        mutable = ["intermediates", *(["batch_stats"] if train and stats else [])]
        with nn.intercept_methods(tagged):
            output, updated = module.apply(variables, images, train, method=call, mutable=mutable)
        sown: dict[str, Any] = flatten_dict(updated.get("intermediates", {}), sep="/")
        for path, values in sown.items():
            _tagged(values[0] if len(values) == 1 else values, path)
        return output, updated.get("batch_stats", stats)

    return slicing.cut_named(Module(init, apply), at, lambda e: _as_module(heads(e)), image)


def cut_nnx(
    model: nnx.Module,
    at: Sequence[str],
    heads: Callable[[int], nn.Module | Module],
    image: jax.ShapeDtypeStruct,
    call: Callable[[Any, Array, bool], Any] = lambda m, x, train: m(x),
) -> EarlyExitNetwork:
    """A Flax NNX model that was not written for exits, with one at each of K named values.

    What a submodule returns is named by its path, `"stem"` or `"blocks/2"`, as in `cut_linen`; so
    are the heads, which are Linen modules or pairs of functions. `Param` and `BatchStat` are
    carried; all else that the model holds stays as it is now.

    Args:
      model: is copied and stays as it is; its own answer, logits `[B, C]`, is the last exit.
      at: K names, in the order in which they are computed; a wrong one is answered with them all.
      heads: `heads(e)` makes the head of exit e, 0-based, for the first K of them.
      image: shape and dtype of one image, without the batch.
      call: how the model is called, `call(model, images, train)`, after `model.train()` or
        `model.eval()`.

    Returns:
      K + 1 exits. `init` gives the model's own variables to the stages and draws the heads'.

    Raises:
      ValueError: as for `slicing.stages`; when trained, also a model that changes state of another
        kind, as dropout does.
    """
    from flax import nnx  # takes a while to import, and only this needs it

    definition, params, stats, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    initial = nnx_variables(model)

    def init(key: Array, images: Array) -> Variables:
        del key, images
        return jax.tree.map(jnp.array, initial)  # a step may donate its copy

    def apply(variables: Variables, images: Array, *, train: bool) -> tuple[Any, PyTree]:
        before = variables.get("batch_stats", {})
        own = _filled(params, variables["params"]), _filled(stats, before)
        fresh = nnx.merge(definition, *own, jax.tree.map(lambda x: x, rest))
        for path, part in list(nnx.iter_modules(fresh)):
            if path and callable(part):
                part.__class__ = _tagged_class(type(part), "/".join(map(str, path)))
        fresh.train() if train else fresh.eval()
        output = call(fresh, images, train)
        _, _, after, others = nnx.split(fresh, nnx.Param, nnx.BatchStat, ...)
        kept = dict(nnx.to_flat_state(rest))
        for path, state in nnx.to_flat_state(others):
            if path in kept and state.get_value() is not kept[path].get_value():
                raise ValueError(
                    f"the model changes its {type(state).__name__} {'/'.join(map(str, path))}, and "
                    "only Param and BatchStat are carried; switch off in `call` what does so "
                    "(dropout, say)."
                )
        return output, _with_strings(nnx.to_pure_dict(after)) if train else before

    return slicing.cut_named(Module(init, apply), at, lambda e: _as_module(heads(e)), image)


def nnx_variables(model: nnx.Module) -> dict[str, Any]:
    """An NNX model's `Param` and `BatchStat` as nested dicts of arrays, whose keys are strings."""
    from flax import nnx

    return {
        "params": _with_strings(nnx.to_pure_dict(nnx.state(model, nnx.Param))),
        "batch_stats": _with_strings(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))),
    }


def update_nnx(model: nnx.Module, variables: Variables) -> None:
    """Writes the variables of a network that `cut_nnx` made back into the model, in its dtypes.

    Raises:
      ValueError: they are not that model's.
    """
    from flax import nnx

    slicing.graft(variables, nnx_variables(model))  # do they fit?
    found = slicing.whole(variables)
    for of, collection in ((nnx.Param, "params"), (nnx.BatchStat, "batch_stats")):
        own = nnx.state(model, of)
        new = _filled(own, found.get(collection, {}))
        nnx.update(model, jax.tree.map(lambda x, o: x.astype(o.dtype), new, own))


def _as_module(head: nn.Module | Module) -> Module:
    return head if isinstance(head, Module) else from_linen(head)


def _tagged(output: PyTree, name: str) -> PyTree:
    """The same, each array in it named."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: checkpoint_name(x, name + jax.tree_util.keystr(path)), output
    )


@functools.cache
def _tagged_class(of: type, name: str) -> type:
    """The class of an NNX module that names what it returns."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _tagged(of.__call__(self, *args, **kwargs), name)

    return type(of.__name__, (of,), {"__call__": __call__})


def _with_strings(tree: Any) -> Any:
    """Nested dicts with strings for keys: neither Orbax nor `jax.export` takes numbers."""
    if not isinstance(tree, dict):
        return tree
    return {str(k): _with_strings(v) for k, v in tree.items()}


def _filled(state: Any, tree: Any) -> Any:
    """An NNX state with the values of a nested dict."""

    def value(path: Sequence[Any], _: Any) -> Any:
        found = tree
        for key in path:
            if isinstance(key, jax.tree_util.DictKey):
                found = found[str(key.key)]
        return found

    return jax.tree_util.tree_map_with_path(value, state)
