"""Checkpoints of training, written by Orbax, which no other file imports.

With several processes (`jax.distributed`) all of them call these functions alike, on one directory
that all can reach; each writes the parts of the arrays that its devices hold.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from eejax.network import PyTree


class CheckpointError(Exception):
    """No checkpoint can be read; the message tells which and why."""


@contextlib.contextmanager
def _manager(directory: Path, tidy: bool = False) -> Iterator[ocp.CheckpointManager]:
    """Orbax's manager, with its log messages kept from the terminal.

    With `tidy` it removes what a killed process left of a checkpoint.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, cleanup_tmp_directories=tidy)
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        manager = ocp.CheckpointManager(directory.absolute(), options=options)
        try:
            yield manager
        except jax.errors.JaxRuntimeError:
            # Another process is gone: closing would wait for it.
            if jax.process_count() == 1:
                manager.close()
            raise
        except BaseException:
            manager.close()
            raise
        manager.close()
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def writer(directory: Path) -> Iterator[Callable[[int, PyTree], None]]:
    """Yields `save(step, state)`, which writes checkpoints while the caller goes on.

    A checkpoint is `directory/step`, all or nothing; the newest two stay. `save` returns when the
    arrays are copied, so that they may be donated; it waits for the checkpoint before. Leaving the
    context waits for the last one. An existing checkpoint of a step is not overwritten.

    Args:
      directory: of the run's checkpoints; created.
    """
    with _manager(directory, tidy=True) as manager:

        def save(step: int, state: PyTree) -> None:
            if step not in manager.all_steps():
                manager.save(step, args=ocp.args.StandardSave(state))

        yield save


def save(directory: Path, step: int, state: PyTree) -> None:
    """Writes one checkpoint as `writer` does, and returns when it is there.

    Args:
      directory: of the run's checkpoints; created.
      step: the number of steps taken.
      state: a pytree of arrays.
    """
    with writer(directory) as write:
        write(step, state)


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
        state, reason = None, "another process cannot read its part"
        with _manager(directory) as manager:
            try:
                state = manager.restore(step, args=ocp.args.StandardRestore(abstract))
            # Orbax, TensorStore and JSON raise different exceptions for a truncated file.
            except Exception as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if multihost_utils.process_allgather(np.bool_(state is not None)).all():
            return step, state
        report(f"checkpoint {step} in {directory} cannot be read: {reason}")
    raise CheckpointError(f"none of the checkpoints {saved} in {directory} can be read")
