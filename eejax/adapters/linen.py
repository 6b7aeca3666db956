"""Flax Linen models, cut at named values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from eejax.adapters import slicing
from eejax.backbone import from_linen
from eejax.network import EarlyExitNetwork, Module, PyTree, Variables


def cut_linen(
    module: nn.Module,
    at: Sequence[str],
    heads: Callable[[int], nn.Module | Module],
    image: jax.ShapeDtypeStruct,
    call: Callable[[Any, Array, bool], Any] = lambda m, x, train: m(x, train=train),
) -> EarlyExitNetwork:
    """Puts an exit at each of K named values of a Flax Linen model.

    The output of a submodule is named by its path, `"layer3"` or `"encoder/block_2"`, and its parts
    by `"path[0]"`, `"path['key']"` and so on; a value sown into `"intermediates"` is named by its
    path there; `jax.ad_checkpoint.checkpoint_name` names any other value.

    In training the module's random numbers come from the stream `"dropout"`.

    Args:
      module: the model; its output, logits `[B, C]`, is the last exit.
      at: K names, in the order of computation. The error for an unknown name lists all names.
      heads: `heads(e)` makes the head of exit e, 0-based, for the first K exits.
      image: shape and dtype of one image, without the batch axis.
      call: calls the model, `call(module, images, train)`.

    Returns:
      A network of K + 1 exits. Its `init` draws new variables; `slicing.graft` inserts those of a
      trained model.

    Raises:
      ValueError: as `slicing.stages`.
    """

    def tagged(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = run(*args, **kwargs)
        if context.method_name != "__call__" or not context.module.path:
            return output
        return tag(output, "/".join(context.module.path))

    def init(key: Array, images: Array) -> Variables:
        return module.init(key, images, False, method=call)

    def apply(
        variables: Variables, images: Array, *, train: bool, key: Array | None = None
    ) -> tuple[Any, PyTree]:
        stats = variables.get("batch_stats", {})
        mutable = ["intermediates", *(["batch_stats"] if train and stats else [])]
        rngs = None if key is None else {"dropout": key}
        with nn.intercept_methods(tagged):
            output, updated = module.apply(
                variables, images, train, rngs=rngs, method=call, mutable=mutable
            )
        sown: dict[str, Any] = flatten_dict(updated.get("intermediates", {}), sep="/")
        for path, values in sown.items():
            tag(values[0] if len(values) == 1 else values, path)
        return output, updated.get("batch_stats", stats)

    return slicing.cut_named(Module(init, apply), at, lambda e: as_module(heads(e)), image)


def as_module(head: nn.Module | Module) -> Module:
    return head if isinstance(head, Module) else from_linen(head)


def tag(output: PyTree, name: str) -> PyTree:
    """The same values, each named by its path in `output`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: checkpoint_name(x, name + jax.tree_util.keystr(path)), output
    )
