"""What a measurement depends on besides its flags: device, versions, date, and the command."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
from collections.abc import Sequence
from typing import Any

import jax

import eejax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "numpy")


def describe(module: str, argv: Sequence[str], now: datetime.datetime) -> dict[str, Any]:
    """`command`, `date`, `device` and `versions`, in words.

    Args:
      module: the argument of `python -m`.
      argv: the arguments of the module.
      now: with a time zone.
    """
    device = jax.devices()[0]
    return {
        "command": shlex.join(["python", "-m", module, *argv]),
        "date": now.isoformat(timespec="seconds"),
        "device": f"{device.platform} ({device.device_kind}), {jax.device_count()} device(s), "
        f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "eejax": eejax.__version__,
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }
