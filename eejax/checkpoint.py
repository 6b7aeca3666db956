"""Checkpoints of training, written by Orbax, which no other file imports."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from eejax.network import PyTree


class CheckpointError(Exception):
    """No checkpoint can be read; the message tells which and why."""


@contextlib.contextmanager
def _manager(directory: Path) -> Iterator[ocp.CheckpointManager]:
    """Orbax's manager, with its log messages kept from the terminal."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, create=True, enable_async_checkpointing=False
    )
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with ocp.CheckpointManager(directory.absolute(), options=options) as manager:
            yield manager
    finally:
        log.setLevel(level)


def save(directory: Path, step: int, state: PyTree) -> None:
    """Writes a checkpoint under `directory/step`, all or nothing; the newest two stay.

    Args:
      directory: of the run's checkpoints; created.
      step: the number of steps taken. An existing checkpoint of this step is not overwritten.
      state: a pytree of arrays.
    """
    with _manager(directory) as manager:
        if step not in manager.all_steps():
            manager.save(step, args=ocp.args.StandardSave(state))


def steps(directory: Path) -> list[int]:
    """The steps that have a checkpoint, in order; empty if there is no such directory."""
    if not directory.is_dir():
        return []
    with _manager(directory) as manager:
        return sorted(manager.all_steps())


def restore(
    directory: Path, like: PyTree, report: Callable[[str], Any] = print
) -> tuple[int, PyTree]:
    """Reads the newest checkpoint that is not damaged.

    Args:
      directory: as for `save`.
      like: a state with the same structure, shapes and dtypes, or these alone. The restored arrays
        are placed on its devices.
      report: called with a message for each damaged checkpoint.

    Returns:
      The step and the state.

    Raises:
      CheckpointError: if there is no checkpoint, or none can be read.
    """
    saved = steps(directory)
    if not saved:
        raise CheckpointError(f"no checkpoint in {directory}")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    for step in reversed(saved):
        with _manager(directory) as manager:
            try:
                return step, manager.restore(step, args=ocp.args.StandardRestore(abstract))
            # Orbax, TensorStore and JSON raise different exceptions for a truncated file.
            except Exception as error:
                reason = str(error).strip().splitlines() or [type(error).__name__]
                report(f"checkpoint {step} in {directory} cannot be read: {reason[0][:200]}")
    raise CheckpointError(f"none of the checkpoints {saved} in {directory} can be read")
