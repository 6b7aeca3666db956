"""Checkpoints: the only file that imports Orbax."""

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
    """A checkpoint that is not there or cannot be read; the message says which and why."""


@contextlib.contextmanager
def _manager(directory: Path, keep: int) -> Iterator[ocp.CheckpointManager]:
    """Orbax's manager, and its remarks on how it goes about it kept from the terminal."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, enable_async_checkpointing=False
    )
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with ocp.CheckpointManager(directory.absolute(), options=options) as manager:
            yield manager
    finally:
        log.setLevel(before)


def save(directory: Path, step: int, state: PyTree, *, keep: int = 2) -> None:
    """Writes `state` under `directory/step`, all or nothing, and keeps the newest `keep`.

    A checkpoint of the same step that is there already is left alone.
    """
    with _manager(directory, keep) as manager:
        if step not in manager.all_steps():
            manager.save(step, args=ocp.args.StandardSave(state))


def steps(directory: Path) -> list[int]:
    """The steps that have a checkpoint, oldest first; none where there is no directory."""
    if not directory.is_dir():
        return []
    with _manager(directory, 2) as manager:
        return sorted(manager.all_steps())


def restore(
    directory: Path, like: PyTree, report: Callable[[str], Any] = print
) -> tuple[int, PyTree]:
    """The newest checkpoint that can be read.

    Args:
      directory: as for `save`.
      like: a state of the same structure, shapes and dtypes; its arrays' placement is used.
      report: told of each checkpoint that is damaged and passed over.

    Returns:
      The step, and the state.

    Raises:
      CheckpointError: there is none, or none of them can be read.
    """
    found = steps(directory)
    if not found:
        raise CheckpointError(f"no checkpoint in {directory}")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    for step in reversed(found):
        with _manager(directory, 2) as manager:
            try:
                return step, manager.restore(step, args=ocp.args.StandardRestore(abstract))
            # Orbax, TensorStore and JSON each raise their own kinds for a file cut short.
            except Exception as error:
                reason = str(error).strip().splitlines() or [type(error).__name__]
                report(f"checkpoint {step} in {directory} cannot be read: {reason[0][:200]}")
    raise CheckpointError(f"none of the checkpoints {found} in {directory} can be read")
