"""From a network's configuration to the network, of any family of `eejax.models`."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from eejax.models import FAMILIES
from eejax.network import EarlyExitNetwork
from experiments.config import NetworkConfig


def network(config: NetworkConfig, classes: int, image: Sequence[int]) -> EarlyExitNetwork:
    """The network, on images `(height, width, channels)` in float32.

    Raises:
      ValueError: a family or an argument that there is not, or one that the family refuses.
    """
    build = FAMILIES[config.name].build if config.name in FAMILIES else None
    if build is None:
        raise ValueError(
            f"network.name: {config.name} is no family; give one of {', '.join(FAMILIES)}."
        )
    given = {"depth": config.depth, "width": config.width, "exits": config.exits}
    arguments: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    for option in config.options:
        name, _, value = option.partition("=")
        if name in ("depth", "width") or name in arguments:
            raise ValueError(f"network.options: {option}; give it as --network.{name}.")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
    signature = inspect.signature(build).parameters
    taken = [name for name in signature if name not in _OURS]
    for name, value in arguments.items():
        if name not in taken:
            raise ValueError(
                f"network.{name}: the family {config.name} takes none; it takes {', '.join(taken)}."
            )
        wanted = type(signature[name].default)
        # Exits have several forms, which the family checks.
        if name != "exits" and wanted in _FITTING and type(value) not in _FITTING[wanted]:
            raise ValueError(f"network.{name}: {value!r}; give {_WORDS[wanted]}.")
    common = {
        "image": tuple(image),
        "gate": "features" if config.gate else None,
        "dtype": jnp.dtype(config.dtype),
    }
    return build(classes, **{**common, **arguments})


_OURS = ("classes", "image", "head", "gate", "dtype")
# What may stand for a default of each type.
_FITTING = {int: (int,), float: (int, float), str: (str,), bool: (bool,), tuple: (tuple, list)}
_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a word",
    bool: "True or False",
    tuple: "numbers with commas between them",
}


@functools.cache
def counts(config: NetworkConfig) -> tuple[int, int]:
    """`(blocks, exits)` of a family that the configuration does not know by itself.

    Raises:
      ValueError: as `network`.
    """
    # Neither depends on classes or images. This side is a multiple of most patches, and no array is
    # made of it; the images themselves are checked once they are known.
    image = (3360, 3360, 3)
    options = tuple(o for o in config.options if not o.startswith("exits="))
    everywhere = dataclasses.replace(config, exits=None, options=(*options, "exits=all"))
    blocks = network(everywhere, 10, image).num_exits
    if config.exits is not None and any(e < 1 for e in config.exits):
        return blocks, len(config.exits) + 1
    return blocks, network(config, 10, image).num_exits


def narrowed(config: NetworkConfig, share: float) -> float:
    """That share of the network's width: whole channels, at least one, or a factor.

    Raises:
      ValueError: the family's width follows from something else, and none is given.
    """
    own = inspect.signature(FAMILIES[config.name].build).parameters["width"].default
    width = own if config.width is None else config.width
    if width is None:
        raise ValueError(
            f"static.widths: {config.name} has no width of its own; give --network.width, or "
            "--static.widths without a number."
        )
    return share * width if isinstance(own, float) else max(round(share * width), 1)
