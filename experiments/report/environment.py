"""What a measurement depends on besides its flags: device, versions, date, and the command."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
from collections.abc import Sequence

import jax

import eejax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "numpy")


def describe(module: str, argv: Sequence[str]) -> dict[str, str | dict[str, str]]:
    """`command`, `date`, `device` and `versions`, in words.

    Args:
      module: the argument of `python -m`.
      argv: the arguments of the module.
    """
    return {
        "command": shlex.join(["python", "-m", module, *argv]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device(),
        "versions": {"eejax": eejax.__version__, **versions()},
    }


def device() -> str:
    """The first device, the number of devices and cores, and the machine's architecture."""
    first = jax.devices()[0]
    return (
        f"{first.platform} ({first.device_kind}), {jax.device_count()} device(s), "
        f"{os.cpu_count()} CPU cores, {platform.machine()}"
    )


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that compute."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **packages}
