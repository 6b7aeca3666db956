"""Flax NNX models, cut at named values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from eejax.adapters import slicing
from eejax.adapters.linen import as_module, tag
from eejax.network import EarlyExitNetwork, Module, PyTree, Variables

if TYPE_CHECKING:
    from flax import nnx


def cut_nnx(
    model: nnx.Module,
    at: Sequence[str],
    heads: Callable[[int], nn.Module | Module],
    image: jax.ShapeDtypeStruct,
    call: Callable[[Any, Array, bool], Any] = lambda m, x, train: m(x),
) -> EarlyExitNetwork:
    """Puts an exit at each of K named values of a Flax NNX model.

    Values are named as in `cut_linen`: the output of a submodule by its path, `"stem"` or
    `"blocks/2"`. Heads are Linen modules or pairs of functions. `Param` and `BatchStat` are
    variables of the network; the random streams start from the key of each training step; all other
    state of the model is constant.

    Args:
      model: is copied; its output, logits `[B, C]`, is the last exit.
      at: K names, in the order of computation. The error for an unknown name lists all names.
      heads: `heads(e)` makes the head of exit e, 0-based, for the first K exits.
      image: shape and dtype of one image, without the batch axis.
      call: calls the model, `call(model, images, train)`, after `model.train()` or `model.eval()`.

    Returns:
      A network of K + 1 exits. Its `init` gives the model's variables to the stages and draws new
      ones for the heads.

    Raises:
      ValueError: as `slicing.stages`; or if the model changes other state, or draws random
        numbers in inference.
    """
    from flax import nnx  # takes a while to import, and only this needs it

    kinds = nnx.Param, nnx.BatchStat, nnx.RngState
    definition, params, stats, streams, rest = nnx.split(model, *kinds, ...)
    constant = dict(nnx.to_flat_state(streams)) | dict(nnx.to_flat_state(rest))
    initial = nnx_variables(model)

    def init(key: Array, images: Array) -> Variables:
        del key, images
        return jax.tree.map(jnp.array, initial)  # a step may donate its copy

    def apply(
        variables: Variables, images: Array, *, train: bool, key: Array | None = None
    ) -> tuple[Any, PyTree]:
        before = variables.get("batch_stats", {})
        fresh = nnx.merge(
            definition,
            _filled(params, variables["params"]),
            _filled(stats, before),
            _reseeded(streams, key),
            jax.tree.map(lambda x: x, rest),
        )
        for path, part in list(nnx.iter_modules(fresh)):
            if path and callable(part):
                part.__class__ = _tagging_class(type(part), "/".join(map(str, path)))
        fresh.train() if train else fresh.eval()
        output = call(fresh, images, train)
        _, _, after, drawn, others = nnx.split(fresh, *kinds, ...)
        states = [*(nnx.to_flat_state(drawn) if key is None else ()), *nnx.to_flat_state(others)]
        for path, state in states:
            if path in constant and state.get_value() is not constant[path].get_value():
                raise ValueError(
                    f"the model changes its {type(state).__name__} {'/'.join(map(str, path))}, and "
                    "only Param and BatchStat are kept from one step to the next; switch off in "
                    "`call` what changes it."
                )
        return output, _with_strings(nnx.to_pure_dict(after)) if train else before

    return slicing.cut_named(Module(init, apply), at, lambda e: as_module(heads(e)), image)


def nnx_variables(model: nnx.Module) -> dict[str, Any]:
    """The `Param` and `BatchStat` of an NNX model as nested dicts of arrays with string keys."""
    from flax import nnx

    return {
        "params": _with_strings(nnx.to_pure_dict(nnx.state(model, nnx.Param))),
        "batch_stats": _with_strings(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))),
    }


def update_nnx(model: nnx.Module, variables: Variables) -> None:
    """Writes the variables of a network from `cut_nnx` back into the model, in its dtypes.

    Raises:
      ValueError: if the variables do not fit the model.
    """
    from flax import nnx

    slicing.graft(variables, nnx_variables(model))  # raises ValueError if they do not fit
    whole = slicing.whole(variables)
    for kind, collection in ((nnx.Param, "params"), (nnx.BatchStat, "batch_stats")):
        old = nnx.state(model, kind)
        new = _filled(old, whole.get(collection, {}))
        nnx.update(model, jax.tree.map(lambda x, o: x.astype(o.dtype), new, old))


def _reseeded(streams: Any, key: Array | None) -> Any:
    """A copy of NNX random streams; with a key, each stream draws from it and its own number."""
    leaves, structure = jax.tree.flatten(streams)
    if key is not None:
        leaves = [
            jax.random.split(jax.random.fold_in(key, i), x.shape)
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x
            for i, x in enumerate(leaves)
        ]
    return jax.tree.unflatten(structure, leaves)


@functools.cache
def _tagging_class(module: type, name: str) -> type:
    """A subclass of an NNX module's class that names its output."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return tag(module.__call__(self, *args, **kwargs), name)

    return type(module.__name__, (module,), {"__call__": __call__})


def _with_strings(tree: Any) -> Any:
    """Nested dicts with strings as keys; Orbax and `jax.export` refuse numbers."""
    if not isinstance(tree, dict):
        return tree
    return {str(k): _with_strings(v) for k, v in tree.items()}


def _filled(state: Any, tree: Any) -> Any:
    """An NNX state with the values of a nested dict."""

    def value(path: Sequence[Any], _: Any) -> Any:
        inner = tree
        for key in path:
            if isinstance(key, jax.tree_util.DictKey):
                inner = inner[str(key.key)]
        return inner

    return jax.tree_util.tree_map_with_path(value, state)
