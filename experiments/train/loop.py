"""The training loop: dispatches, progress, metrics.jsonl, checkpoints, signals."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.progress import TextColumn, TimeRemainingColumn

from eejax import checkpoint
from eejax import gates as soft
from eejax.training import Metrics, TrainState
from experiments.data.splits import Split
from experiments.progress import progress_bar
from experiments.train.augment import epoch_order, mirrored
from experiments.train.config import TrainConfig

_order = jax.jit(epoch_order, static_argnums=(1, 2))

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
    split: Split,
    config: TrainConfig,
    *,
    flip: bool,
    workdir: Path,
    watch: Callable[[TrainState], list[float]],
    learning_rate: Callable[[Any], Any],
    console: Console,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Trains to the end, from the newest checkpoint in `workdir` on, if there is one.

    Args:
      train_steps: of `make_train_steps`.
      init: makes a fresh state from a key.
      key: of parameters, order and augmentation; what step s draws depends on `key` and s alone.
      split: images and labels, moved to the device whole.
      config: how long, and how often to save.
      flip: whether images are mirrored in every other epoch. Not for digits or letters.
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
    per_epoch = len(split.images) // config.batch
    total = per_epoch * config.epochs
    if checkpoint.steps(workdir / CHECKPOINTS):
        step, state, rows = _restore(workdir, init, key, console)
    else:
        step, state, rows = 0, init(key), []
    if step == total:
        return state, rows
    (workdir / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    upright, labels = jnp.asarray(split.images), jnp.asarray(split.labels)
    images = upright
    began = time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)
    saved, order = time.monotonic(), None

    with (
        _signals() as caught,
        progress_bar(console, *_COLUMNS) as bar,
        (workdir / METRICS).open("a") as file,
    ):
        task = bar.add_task("training", total=total, completed=step, status="compiling")
        while step < total:
            epoch, start = divmod(step, per_epoch)
            if order is None or start == 0:
                epoch_key = jax.random.fold_in(jax.random.fold_in(key, 1), epoch)
                order = _order(epoch_key, len(split.images), config.batch)
                if flip:
                    images = mirrored(jax.random.fold_in(key, 3), upright, epoch)
            count = min(config.steps_per_dispatch, per_epoch - start)
            before = time.monotonic()
            state, metrics = train_steps(
                state, jax.random.fold_in(key, 2), images, labels, order, start, count
            )
            metrics = jax.device_get(metrics)
            step += count
            row = _row(metrics, step, step / per_epoch, count)
            row["learning_rate"] = float(learning_rate(step - 1))
            row["images_per_second"] = count * config.batch / (time.monotonic() - before)
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
                console.print(f"epoch {epoch + 1}/{config.epochs}  {status}")
            late = time.monotonic() - saved >= config.checkpoint_seconds
            if late or step == total or caught:
                checkpoint.save(workdir / CHECKPOINTS, step, state)
                saved = time.monotonic()
            if caught:
                raise Stopped(
                    f"{signal.Signals(caught[0]).name}: saved after step {step} of {total}; "
                    f"continue with --workdir {workdir} --resume",
                    128 + caught[0],
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
    workdir: Path, init: Callable[[Array], TrainState], key: Array, console: Console
) -> tuple[int, TrainState, list[dict[str, Any]]]:
    """The newest checkpoint that can be read, and the metrics up to it."""

    def warn(message: str) -> None:
        console.print(f"WARNING: {message}; using the one before it", style="yellow")

    # On this process's device, whatever device wrote it.
    here = SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), jax.eval_shape(init, key)
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
