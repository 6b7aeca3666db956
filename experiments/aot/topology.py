"""Devices of a TPU topology, for compiling alone: `libtpu` holds the compiler, no TPU is needed."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from eejax.network import PyTree

INSTALL = "compiling for a TPU needs libtpu: pip install 'eejax[tpu-aot]'"

# libtpu looks for a TPU machine's metadata, and lets one process at a time use the TPU. Both are
# for machines that have one.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def installed() -> bool:
    """Whether libtpu is there."""
    return importlib.util.find_spec("libtpu") is not None


def devices(name: str) -> list[Any]:
    """The devices of a topology; JAX itself must run on a CPU (`JAX_PLATFORMS=cpu`).

    Args:
      name: such as `"v5e:2x2"`, `"v6e:2x2"` or `"v5p:4x4x4"`.

    Raises:
      ModuleNotFoundError: if libtpu is not installed.
      ValueError: if libtpu does not know the topology.
    """
    if not installed():
        raise ModuleNotFoundError(INSTALL)
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"topology {name!r}: {str(error).splitlines()[0]}") from None


def on(device: Any, tree: PyTree) -> PyTree:
    """Shapes of arrays that lie on a device."""
    sharding = SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
