"""Loads the weights of a PyTorch network into one of the same architecture.

The source is a `.safetensors` file or a dict of NumPy arrays, never a pickle. The names of its
arrays come from a table of `names`.

    network = resnet_imagenet(1000, image=(224, 224, 3), depth=50, exits=(0.25, 0.5, 0.75))
    variables = jax.jit(network.init)(jax.random.key(0), images[:1])
    variables = convert.load(variables, "resnet50.safetensors", names.torchvision_resnet(50))

The early heads keep their values. In a process with PyTorch,
`safetensors.torch.save_file(model.state_dict(), "resnet50.safetensors")` writes the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from eejax.network import Variables
from eejax.pretrained.names import Names

KeyPath = tuple[Any, ...]
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def load(
    variables: Variables,
    source: str | Path | Mapping[str, Any],
    names: Names,
    *,
    classifier: bool = True,
) -> Variables:
    """Puts the weights of `source` into the backbone and the last head.

    Args:
      variables: of a network of `eejax.models`, with any exits.
      source: a `.safetensors` file, or arrays by the names of a `state_dict()`. A leading `module.`
        (from PyTorch's DataParallel) is stripped. Arrays of integers are ignored.
      names: the table of the source.
      classifier: whether the last head is loaded too; with another number of classes it cannot be.

    Returns:
      The same tree of JAX arrays, in the dtypes of `variables`.

    Raises:
      ValueError: if a weight is missing or left over, or a shape does not fit.
      OSError: if the file cannot be read.
    """
    arrays = dict(source) if isinstance(source, Mapping) else read(source)
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    if all(name.startswith("module.") for name in arrays):
        arrays = {name.removeprefix("module."): array for name, array in arrays.items()}
    arrays = {name: a for name, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    known = parameter_names(variables, names)
    loaded = {path: name for path, name in known.items() if classifier or not _is_head(path)}
    missing = sorted(set(loaded.values()) - set(arrays))
    left_over = sorted(set(arrays) - set(known.values()))
    if missing or left_over:
        problems = [
            f"{len(some)} {what} ({', '.join(some[:3])}{', ...' if len(some) > 3 else ''})"
            for some, what in ((missing, "not there"), (left_over, "with no place here"))
            if some
        ]
        prefix = _prefix(arrays, set(known.values()), set(loaded.values()))
        if prefix:
            raise ValueError(
                f"weights with {prefix!r} before every name, without which they would fit; give "
                f"{{name.removeprefix({prefix!r}): array for name, array in arrays.items()}}, "
                "where arrays = convert.read(path) for a file."
            )
        raise ValueError(
            f"weights of another network: {'; '.join(problems)}. Make the network with the depth "
            "and options that they were trained with."
        )

    def take(path: KeyPath, ours: Any) -> Any:
        if path not in loaded:
            return jnp.asarray(ours)
        array = _transposed(arrays[loaded[path]], path)
        if array.shape != ours.shape:
            hint = ""
            if _is_head(path):
                hint = "; classifier=False leaves the last head as it is"
            elif path[-1].key == "pos_embed":
                hint = "; make the network for the image size that it was trained on"
            raise ValueError(
                f"{loaded[path]}: {array.shape} there and {tuple(ours.shape)} here, in our order "
                f"of axes{hint}."
            )
        return jnp.asarray(array.astype(ours.dtype))

    return jax.tree_util.tree_map_with_path(take, variables)


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a `.safetensors` file by name.

    Raises:
      ValueError: if the file is of another kind. A `.pt`, `.pth` or `.bin` file is a pickle, which
        can run any code when it is read.
      OSError: if it cannot be read.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path}: not a .safetensors file. Where PyTorch is, write one by "
            "safetensors.torch.save_file(model.state_dict(), path); or give a dict of arrays."
        )
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None


def parameter_names(variables: Variables, names: Names) -> dict[KeyPath, str]:
    """The name in the source of each leaf of `variables`, by its path.

    Raises:
      ValueError: if the network and the table have different numbers of blocks.
    """
    blocks = _blocks(variables["params"]["stages"], (jax.tree_util.DictKey("stages"),))
    if len(blocks) != len(names.blocks):
        raise ValueError(
            f"a network of {len(blocks)} blocks, and names for {len(names.blocks)}; give both the "
            "same depth."
        )
    prefixes = dict(zip(blocks, names.blocks, strict=True))
    heads = len(variables["params"]["heads"])
    result = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(variables):
        inside = path[1:]
        if _is_head(path):
            number = inside[1].idx
            if number < heads - 1 and not names.exits:
                continue
            prefix = "head" if number == heads - 1 else f"exit.{number}"
            size = 2
        else:
            size = next(n for n in range(len(inside)) if inside[:n] in prefixes)
            prefix = prefixes[inside[:size]]
        name = ".".join([*([prefix] if prefix else []), *_words(inside[size:])])
        for pattern, replacement in names.rename:
            name = re.sub(pattern, replacement, name)
        result[path] = name
    return result


def _prefix(arrays: Mapping[str, Any], known: set[str], loaded: set[str]) -> str:
    """A common prefix of all names without which they would fit, or an empty string."""
    parts = next(iter(arrays), "").split(".")
    for i in range(1, len(parts)):
        prefix = ".".join(parts[:i]) + "."
        inside = {name.removeprefix(prefix) for name in arrays if name.startswith(prefix)}
        if len(inside) == len(arrays) and loaded <= inside <= known:
            return prefix
    return ""


def _blocks(tree: Any, path: KeyPath) -> list[KeyPath]:
    """The path of each block, in order, out of chains, nested or not."""
    if isinstance(tree, tuple):
        children = [(jax.tree_util.SequenceKey(i), child) for i, child in enumerate(tree)]
    elif tree and all(re.fullmatch(r"blocks_\d+", key) for key in tree):
        keys = sorted(tree, key=lambda key: int(key.removeprefix("blocks_")))
        children = [(jax.tree_util.DictKey(key), tree[key]) for key in keys]
    else:
        return [path]
    return [block for key, child in children for block in _blocks(child, (*path, key))]


def _is_head(path: KeyPath) -> bool:
    return path[1].key == "heads"


def _words(path: KeyPath) -> list[str]:
    # `layers.Norm` wraps a BatchNorm, which PyTorch's names do not show.
    words = [str(key.key) for key in path if key.key != "BatchNorm_0"]
    return [*words[:-1], _LEAVES.get(words[-1], words[-1])]


def _transposed(array: np.ndarray, path: KeyPath) -> np.ndarray:
    """PyTorch's kernels are `[O, I]` and `[O, I, H, W]`, ours `[I, O]` and `[H, W, I, O]`."""
    if path[-1].key != "kernel":
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
