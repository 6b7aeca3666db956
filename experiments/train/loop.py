"""The training loop: dispatches, progress, metrics.jsonl, checkpoints, signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import TextColumn, TimeRemainingColumn

from eejax import checkpoint
from eejax import gates as soft
from eejax.training import Metrics, TrainState
from eejax.training.placement import state_shardings
from experiments import distributed
from experiments.files import write_text
from experiments.progress import progress_bar
from experiments.train.config import TrainConfig
from experiments.train.feeding import Feed

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
_COLUMNS = TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn()


class Stopped(KeyboardInterrupt):
    """A signal ended the run; the state is saved.

    Attributes:
      code: exit status, 128 plus the signal's number.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def train(
    train_steps: Callable[..., tuple[TrainState, Metrics]],
    init: Callable[[Array], TrainState],
    key: Array,
    feed: Feed,
    config: TrainConfig,
    *,
    mesh: Mesh,
    workdir: Path,
    watch: Callable[[TrainState], list[float]],
    learning_rate: Callable[[Any], Any],
    console: Console,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Trains to the end, from the newest checkpoint in `workdir` on, if there is one.

    Args:
      train_steps: of `make_train_steps`.
      init: makes a fresh state on the mesh from the key.
      key: of parameters and augmentation, on the mesh; what step s draws depends on `key` and s
        alone.
      feed: gives the samples of each step; the caller closes it.
      config: how long, and how often to save.
      mesh: devices of the run.
      workdir: directory of `checkpoints/` and `metrics.jsonl`.
      watch: held-out accuracy of each exit, called after each epoch; nothing is decided by it.
      learning_rate: the schedule, for the record.
      console: for progress.

    Returns:
      The trained state, and the rows of `metrics.jsonl`: one a dispatch. The last of each epoch has
      `held_out_accuracy`.

    Raises:
      FloatingPointError: if a loss or a gradient is not finite; the message has the step.
      CheckpointError: if there are checkpoints and none can be read.
      Stopped: after SIGTERM or SIGINT; the state is saved.
    """
    per_epoch = feed.per_epoch
    total = per_epoch * config.epochs
    if checkpoint.steps(workdir / CHECKPOINTS):
        step, state, rows = _restore(workdir, init, key, mesh, console)
    else:
        step, state, rows = 0, init(key), []
    if step == total:
        return state, rows
    if distributed.first():
        write_text(workdir / METRICS, "".join(json.dumps(row) + "\n" for row in rows))
    augmentation_key = jax.random.fold_in(key, 2)
    began = time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)
    saved = time.monotonic()

    with (
        _signals() as caught,
        progress_bar(console, *_COLUMNS) as bar,
        (workdir / METRICS if distributed.first() else Path(os.devnull)).open("a") as file,
        checkpoint.writer(workdir / CHECKPOINTS) as save,
    ):
        task = bar.add_task("training", total=total, completed=step, status="compiling")
        while step < total:
            count = min(config.steps_per_dispatch, per_epoch - step % per_epoch)
            before = time.monotonic()
            fed = feed(step, count)
            waited = time.monotonic() - before
            state, metrics = train_steps(state, augmentation_key, *fed, count)
            metrics = jax.device_get(metrics)
            step += count
            row = _row(metrics, step, step / per_epoch, count)
            row["learning_rate"] = float(learning_rate(step - 1))
            took = time.monotonic() - before
            row["images_per_second"] = count * config.batch / took
            row["input_wait"] = waited / took  # share of the time without images to train on
            if metrics.first_bad >= 0:
                raise FloatingPointError(
                    f"the loss or its gradient is not finite at step {int(metrics.first_bad)}; "
                    "try a lower --train.learning-rate. The checkpoints before it are kept."
                )
            epoch_ends = step % per_epoch == 0
            if epoch_ends:
                row["held_out_accuracy"] = watch(state)
            row["seconds"] = time.monotonic() - began
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            status = _status(row, config.epochs)
            bar.update(task, completed=step, status=status)
            if epoch_ends and not console.is_terminal:
                console.print(f"epoch {step // per_epoch}/{config.epochs}  {status}")
            late = time.monotonic() - saved >= config.checkpoint_seconds
            # All processes save and stop at the same step: a signal comes to any of them, and only
            # the first one's clock counts.
            told = distributed.agreed((caught[0] if caught else 0, late))
            number, late = int(told[:, 0].max()), bool(told[0, 1])
            if late or step == total or number:
                save(step, state)
                saved = time.monotonic()
            if number:
                raise Stopped(
                    f"{signal.Signals(number).name}: saved after step {step} of {total}; "
                    f"continue with --workdir {workdir} --resume",
                    128 + number,
                )
    return state, rows


def epochs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an epoch, the dispatches' values averaged, for the training curves."""
    result, pending = [], []
    for row in rows:
        pending.append(row)
        if "held_out_accuracy" in row:
            weights = np.array([r["steps"] for r in pending], float)
            mean = {
                name: np.average([r[name] for r in pending], axis=0, weights=weights).tolist()
                for name in ("loss", "train_accuracy", "gate_mean")
            }
            mean["gate_entropy"] = float(soft.normalised_entropy(mean["gate_mean"]))
            result.append({**row, **mean, "epoch": len(result) + 1})
            pending = []
    return result


def _row(metrics: Metrics, step: int, epoch: float, count: int) -> dict[str, Any]:
    gate_mean = metrics.exit_mean / count
    return {
        "step": step,
        "epoch": epoch,
        "steps": count,
        "loss": float(metrics.loss) / count,
        "train_accuracy": (metrics.correct / metrics.seen).tolist(),
        "gate_mean": gate_mean.tolist(),
        "gate_entropy": float(soft.normalised_entropy(gate_mean)),
    }


def _status(row: dict[str, Any], epochs: int) -> str:
    accuracy = " ".join(f"{100 * a:4.1f}" for a in row["train_accuracy"])
    held_out = row.get("held_out_accuracy")
    suffix = "  held out " + " ".join(f"{100 * a:4.1f}" for a in held_out) if held_out else ""
    return (
        f"epoch {row['epoch']:.1f}/{epochs}  {row['images_per_second']:,.0f} images/s  "
        f"loss {row['loss']:.3f}  exits {accuracy} %{suffix}"
    )


def _restore(
    workdir: Path, init: Callable[[Array], TrainState], key: Array, mesh: Mesh, console: Console
) -> tuple[int, TrainState, list[dict[str, Any]]]:
    """The newest checkpoint that can be read, and the metrics up to it."""

    def warn(message: str) -> None:
        console.print(f"WARNING: {message}; using the one before it", style="yellow")

    # On the devices of this run, whatever devices wrote it.
    shapes = jax.eval_shape(init, key)
    like = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(mesh, shapes),
    )
    step, state = checkpoint.restore(workdir / CHECKPOINTS, like, warn)
    rows = []
    for line in (workdir / METRICS).read_text().splitlines():
        # A kill may have cut the last line short; it belongs to a later step anyway.
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows += [row] if row["step"] <= step else []
    console.print(f"continuing after step {step}")
    return step, state, rows


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT; a second one kills as usual."""
    caught: list[int] = []
    before = {}

    def note(number: int, frame: Any) -> None:
        del frame
        caught.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
