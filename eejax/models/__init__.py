"""The zoo. A new family takes one file, which ends in its `Family`, and a line in this list."""

import inspect
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from eejax.links import LINKS
from eejax.models import (
    alexnet,
    densenet,
    efficientnet,
    fast,
    isotropic,
    lenet,
    mobilenet,
    msdnet,
    resnet,
    vgg,
    vit,
    wideresnet,
)
from eejax.models.family import Family, Published
from eejax.network import EarlyExitNetwork

FAMILIES: dict[str, Family] = {
    "alexnet": alexnet.FAMILY,
    "densenet": densenet.FAMILY,
    "efficientnet": efficientnet.FAMILY,
    "fast": fast.FAMILY,
    "isotropic": isotropic.FAMILY,
    "lenet": lenet.FAMILY,
    "mobilenet": mobilenet.FAMILY,
    "msdnet": msdnet.FAMILY,
    "resnet": resnet.SMALL_IMAGES,
    "resnet_imagenet": resnet.IMAGENET,
    "vgg": vgg.FAMILY,
    "vit": vit.FAMILY,
    "wideresnet": wideresnet.FAMILY,
}


def build(
    family: str,
    classes: int,
    image: Sequence[int],
    *,
    link: str | None = None,
    **arguments: Any,
) -> EarlyExitNetwork:
    """Builds a network of the zoo by name, from arguments that a file or a command line may hold.

    Args:
      family: a name in `FAMILIES`.
      classes: C.
      image: `(height, width, channels)`.
      link: how heads read the answer of the head before: `"boosted"` or `"cascaded"`, as in
        `eejax.links`; None for heads that do not.
      **arguments: of the family's function; the others keep the family's defaults. `dtype` may be a
        name, `"bfloat16"`.

    Raises:
      ValueError: if there is no such family or link, if the family takes no such argument or one of
        another type, or if its function refuses a value.
    """
    if family not in FAMILIES:
        raise ValueError(f"{family!r} is no family; give one of {', '.join(FAMILIES)}.")
    if link is not None and link not in LINKS:
        raise ValueError(f"{link!r} is no link; give one of {', '.join(LINKS)}, or None.")
    function = FAMILIES[family].build
    parameters = inspect.signature(function).parameters
    names = [name for name in parameters if name not in ("classes", "image")]
    for name, value in arguments.items():
        if name not in names:
            raise ValueError(f"the family {family} takes no {name}; it takes {', '.join(names)}.")
        if name == "head" and value is not None and not callable(value):
            raise ValueError(f"head {value!r}; give a function of the exit's number.")
        # The family checks exits, which have several forms, and what has no default to go by.
        types, words = _TYPES.get(type(parameters[name].default), ((), ""))
        if types and name != "exits" and type(value) not in types:
            raise ValueError(f"the family {family} got {name} {value!r}; give {words}.")
    if "dtype" in arguments:
        try:
            arguments["dtype"] = jnp.dtype(arguments["dtype"])
        except TypeError as error:
            raise ValueError(f"dtype {arguments['dtype']!r}; give float32 or bfloat16.") from error
    network = function(classes, image=tuple(image), **arguments)
    return network if link is None else LINKS[link](network)


# What an argument may be, by the type of its default.
_TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a word"),
    bool: ((bool,), "True or False"),
    tuple: ((tuple, list), "a list of numbers"),
}

__all__ = ["FAMILIES", "Family", "Published", "build"]
