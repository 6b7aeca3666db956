"""The training loop: dispatches, progress, metrics.jsonl, checkpoints, and leaving in good
order."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from eejax import checkpoint
from eejax import gates as soft
from eejax.training.state import TrainState
from eejax.training.step import Metrics
from experiments.data.splits import Split
from experiments.train.augment import epoch_order

_order = jax.jit(epoch_order, static_argnums=(1, 2))

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"


class Stopped(KeyboardInterrupt):
    """A signal ended the run; the state is saved.

    Attributes:
      code: exit status, 128 plus the signal's number.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Plan(NamedTuple):
    """How long to train, and how often to look up.

    Attributes:
      epochs: passes over the training split.
      batch: samples a step.
      steps_per_dispatch: steps a call of the compiled program.
      checkpoint_seconds: between two checkpoints.
    """

    epochs: int
    batch: int
    steps_per_dispatch: int
    checkpoint_seconds: float


def train(
    train_steps: Callable[..., tuple[TrainState, Metrics]],
    state: TrainState,
    key: jax.Array,
    split: Split,
    plan: Plan,
    *,
    workdir: Path,
    resume: bool,
    watch: Callable[[TrainState], list[float]],
    learning_rate: Callable[[Any], Any],
    console: Console,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Trains to the end of the plan, or from the newest checkpoint on.

    Args:
      train_steps: of `training.make_train_steps`.
      state: fresh; of a resumed run only its shapes count.
      key: of order and augmentation; what step s draws depends on `key` and s alone.
      split: images and labels, moved to the device whole.
      plan: how long.
      workdir: where `checkpoints/` and `metrics.jsonl` go.
      resume: continue from the newest checkpoint that can be read.
      watch: held-out accuracy of each exit, called after each epoch; nothing is decided by it.
      learning_rate: the schedule, for the record.
      console: where progress goes.

    Returns:
      The trained state, and the rows of `metrics.jsonl`: one a dispatch, and one an epoch that has
      `held_out_accuracy`.

    Raises:
      FloatingPointError: a loss or a gradient was not finite; the message has the step's number.
      Stopped: SIGTERM or SIGINT; the state was saved.
    """
    per_epoch = len(split.images) // plan.batch
    total = per_epoch * plan.epochs
    rows: list[dict[str, Any]] = []
    step = 0
    if resume:
        step, state, rows = _restore(workdir, state, console)
        if step == total:
            return state, rows
    _write_rows(workdir, rows)
    seconds = rows[-1]["seconds"] if rows else 0.0
    images, labels = jnp.asarray(split.images), jnp.asarray(split.labels)
    began, saved = time.monotonic() - seconds, time.monotonic()
    interactive = console.is_terminal

    with _signals() as caught, _progress(console) as bar:
        task = bar.add_task("training", total=total, completed=step, facts="compiling")
        while step < total:
            epoch, start = divmod(step, per_epoch)
            epoch_rows = _order(
                jax.random.fold_in(jax.random.fold_in(key, 1), epoch), len(split.images), plan.batch
            )
            while start < per_epoch:
                count = min(plan.steps_per_dispatch, per_epoch - start)
                before = time.monotonic()
                state, metrics = train_steps(
                    state, jax.random.fold_in(key, 2), images, labels, epoch_rows, start, count
                )
                metrics = jax.device_get(metrics)
                step, start = step + count, start + count
                row = _row(metrics, step, step / per_epoch, count)
                row["learning_rate"] = float(learning_rate(step - 1))
                row["images_per_second"] = count * plan.batch / (time.monotonic() - before)
                row["seconds"] = time.monotonic() - began
                if metrics.first_bad >= 0:
                    raise FloatingPointError(
                        f"the loss or its gradient is not finite at step {int(metrics.first_bad)}; "
                        "try a lower --train.learning-rate. The checkpoints before it are kept."
                    )
                if start == per_epoch:
                    row["held_out_accuracy"] = watch(state)
                    row["seconds"] = time.monotonic() - began
                rows.append(row)
                _append_row(workdir, row)
                bar.update(task, completed=step, facts=_facts(row, plan.epochs))
                if start == per_epoch and not interactive:
                    console.print(f"epoch {epoch + 1}/{plan.epochs}  {_facts(row, plan.epochs)}")
                late = time.monotonic() - saved >= plan.checkpoint_seconds
                if late or step == total or caught:
                    checkpoint.save(workdir / CHECKPOINTS, step, state)
                    saved = time.monotonic()
                if caught:
                    name = signal.Signals(caught[0]).name
                    raise Stopped(
                        f"{name}: saved after step {step} of {total}; continue with "
                        f"--workdir {workdir} --resume",
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


def _facts(row: dict[str, Any], epochs: int) -> str:
    accuracy = " ".join(f"{100 * a:4.1f}" for a in row["train_accuracy"])
    held_out = row.get("held_out_accuracy")
    held = "  held out " + " ".join(f"{100 * a:4.1f}" for a in held_out) if held_out else ""
    return (
        f"epoch {row['epoch']:.1f}/{epochs}  {row['images_per_second']:,.0f} images/s  "
        f"loss {row['loss']:.3f}  exits {accuracy} %{held}"
    )


def _restore(
    workdir: Path, fresh: TrainState, console: Console
) -> tuple[int, TrainState, list[dict[str, Any]]]:
    """The newest readable checkpoint and the metrics up to it; from the beginning if there is
    none."""

    def warn(message: str) -> None:
        console.print(f"WARNING: {message}; using the one before it", style="yellow")

    if not checkpoint.steps(workdir / CHECKPOINTS):
        console.print("no checkpoint yet: training starts from the beginning")
        return 0, fresh, []
    step, state = checkpoint.restore(workdir / CHECKPOINTS, fresh, warn)
    rows = []
    for line in (workdir / METRICS).read_text().splitlines():
        # The last line may have been cut short by the kill; it is of a later step anyway.
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows += [row] if row["step"] <= step else []
    console.print(f"continuing after step {step}")
    return step, state, rows


def _write_rows(workdir: Path, rows: list[dict[str, Any]]) -> None:
    (workdir / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _append_row(workdir: Path, row: dict[str, Any]) -> None:
    with (workdir / METRICS).open("a") as file:
        file.write(json.dumps(row) + "\n")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
        console=console,
        disable=not console.is_terminal,
    )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying of them; a second one kills as usual."""
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
