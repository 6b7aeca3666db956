"""Where the arrays of a training lie: a mesh of devices, and the sharding of each array.

A batch is divided over all devices. Parameters, statistics and optimiser state are whole on each
device, or, along the axis `fsdp`, divided among some of them (Rajbhandari et al., *ZeRO: memory
optimizations toward training trillion parameter models*, SC 2020,
https://arxiv.org/abs/1910.02054). The same functions serve one device, many, and many processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from eejax.network import PyTree

DATA, FSDP = "data", "fsdp"

# Below this number of elements an array is whole on each device: gathering it would take longer
# than it saves in memory.
SMALL = 1 << 12


def make_mesh(devices: Sequence[Any] | None = None, fsdp: int = 1) -> Mesh:
    """A mesh `(data, fsdp)`.

    Args:
      devices: in order; all devices of all processes by default.
      fsdp: neighbouring devices that divide parameters and optimiser state among them; 1 for none.

    Raises:
      ValueError: if `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"fsdp={fsdp} for {len(devices)} devices; give a divisor of that number.")
    grid = np.asarray(devices).reshape(-1, fsdp)
    return Mesh(grid, (DATA, FSDP), axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The samples, which lie along `axis`, are divided over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, (DATA, FSDP)))


def state_shardings(mesh: Mesh, state: PyTree, small: int = SMALL) -> PyTree:
    """A sharding for each array of a training state, by its shape alone.

    An array of at least `small` elements is divided along the largest of its axes that the number
    of devices along `fsdp` divides; the others are whole on each device.

    Args:
      mesh: of `make_mesh`.
      state: a pytree of arrays or of their shapes.
      small: number of elements.
    """
    return jax.tree.map(lambda x: NamedSharding(mesh, _spec(x.shape, mesh, small)), state)


def _spec(shape: tuple[int, ...], mesh: Mesh, small: int) -> PartitionSpec:
    parts = mesh.shape[FSDP]
    axes = [a for a, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not axes or np.prod(shape) < small:
        return PartitionSpec()
    largest = max(axes, key=lambda a: (shape[a], a))
    return PartitionSpec(*[None] * largest, FSDP)


def constrain_state(mesh: Mesh | None, state: PyTree) -> PyTree:
    """Fixes the shardings of a state inside a compiled program; without a mesh, nothing."""
    if mesh is None:
        return state
    return lax.with_sharding_constraint(state, state_shardings(mesh, state))


def constrain_batch(mesh: Mesh | None, batch: Array) -> Array:
    """Divides a batch `[B, ...]` inside a compiled program; without a mesh, nothing."""
    return batch if mesh is None else lax.with_sharding_constraint(batch, batch_sharding(mesh))


def constrain_replicated(mesh: Mesh | None, tree: PyTree) -> PyTree:
    """Makes arrays whole on each device inside a compiled program; without a mesh, nothing."""
    return tree if mesh is None else lax.with_sharding_constraint(tree, replicated(mesh))


def replicate(mesh: Mesh, tree: PyTree) -> PyTree:
    """Copies arrays of this process, the same in all processes, to each device."""
    sharding = replicated(mesh)

    def copy(x: Array | np.ndarray) -> Array:
        # `device_put` would have the processes compare their values.
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                copy(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(copy, tree)


def local(tree: PyTree) -> PyTree:
    """Arrays of a mesh, whole and on this process's first device alone.

    All processes call it, because divided arrays are gathered. An array that is whole already is
    not copied: it is deleted if the original is donated.
    """

    def whole(x: Array) -> Array:
        if not x.is_fully_replicated:
            assert isinstance(x.sharding, NamedSharding)
            whole_sharding = NamedSharding(x.sharding.mesh, PartitionSpec())
            x = jax.jit(lambda y: y, out_shardings=whole_sharding)(x)
        return x.addressable_data(0)

    return jax.tree.map(whole, tree)
