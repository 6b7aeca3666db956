"""One function for many jobs, wherever they run.

    results, failures = map("networks", jobs, pool, folder, console)

A job that raises an exception is a failure of its own, and the others go on. A job whose process
was killed (by the kernel for its memory, by a scheduler, with its machine) is tried again. So jobs
must be such that a second call goes on from what the first one left, and that two at a time do no
harm; `experiments.store` commits their results.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, TimeElapsedColumn

from experiments.pool import local, rays, slurm
from experiments.pool.config import PoolConfig
from experiments.pool.jobs import Costs, Failure, Job, Killed, Queue
from experiments.progress import progress_bar


def map(
    title: str,
    jobs: Sequence[Job],
    config: PoolConfig,
    folder: Path,
    console: Console,
    costs: Costs | None = None,
    budget: float | None = None,
) -> tuple[dict[str, Any], list[Failure]]:
    """Runs all jobs; one that fails is reported, and the others go on.

    Args:
      title: of the progress display.
      jobs: with different names; with a budget the most useful ones first.
      config: where they run. On this machine one worker, or one job, is this process itself, in
        which nothing is tried again.
      folder: for what a cluster's engine writes, shared with its nodes.
      console: for progress.
      costs: what jobs of these kinds took before, for forecasts; it learns.
      budget: seconds of all workers together; see `Queue`. None: no limit.

    Returns:
      The result of each job by name, and the failures. A job that no budget was left for is in
      neither.

    Raises:
      KeyboardInterrupt: after SIGINT or SIGTERM, once the jobs under way have ended.
      Unavailable: if the engine cannot be had; one line.
    """
    results: dict[str, Any] = {}
    failures: list[Failure] = []
    if not jobs:
        return results, failures
    began = time.monotonic()
    with (
        progress_bar(console, MofNCompleteColumn(), TimeElapsedColumn()) as bar,
        _sigterm_interrupts(),
    ):
        task = bar.add_task(title, total=len(jobs), status="")
        alone = config.backend == "local" and min(_at_a_time(config), len(jobs)) < 2
        queue = Queue(jobs, 0 if alone else config.retries, costs, budget)

        def show() -> None:
            words = "; ".join(f"{job.name} {job.status()}".strip() for job in queue.running[:4])
            bar.update(task, status=", ".join(filter(None, (_left(queue), words))))

        outcomes = _outcomes(queue, show, config, folder, alone)
        with contextlib.closing(outcomes):  # ends the workers, wherever an interruption comes
            for job, ended in outcomes:
                if isinstance(ended, Killed):
                    outcome = queue.killed(job, ended.words)
                    if outcome is None:
                        words = f"{job.name}: its process was killed; it is tried again"
                        console.print(words, style="yellow", highlight=False)
                        continue
                else:
                    queue.ended(job, ended)
                    outcome = ended.outcome
                bar.advance(task)
                if isinstance(outcome, Failure):
                    failures.append(outcome._replace(name=job.name))
                    words = f"FAILED {job.name}: {outcome.error}"
                    console.print(words, style="red", highlight=False)
                else:
                    results[job.name] = outcome
                if not console.is_terminal:
                    done, passed = len(results) + len(failures), time.monotonic() - began
                    times = ", ".join(filter(None, (f"{passed:.0f} s", _left(queue))))
                    words = f"{title}: {done}/{len(jobs)} {job.name} ({times})"
                    console.print(words, highlight=False)
    return results, failures


def _outcomes(
    queue: Queue, show: Callable[[], None], config: PoolConfig, folder: Path, alone: bool
) -> local.Outcomes:
    """Empties the queue."""
    if config.backend == "submitit":
        here = config.slurm.cluster == "local"
        at_a_time = _at_a_time(config) if here else config.jobs
        return slurm.in_tasks(queue, show, folder, config.slurm, at_a_time, config.retries)
    if config.backend == "ray":
        at_a_time = _at_a_time(config) if config.ray.address is None else config.jobs
        return rays.in_cluster(queue, show, config.ray, at_a_time)
    if alone:
        return local.in_this_process(queue, show)
    return local.in_processes(queue, show, min(_at_a_time(config), len(queue.left)))


def _at_a_time(config: PoolConfig) -> int:
    """On this machine."""
    return config.jobs or local.default_workers()


def _left(queue: Queue) -> str:
    """How long it goes on, in words, or ""."""
    seconds = queue.seconds_left()
    if not seconds:
        return ""
    for unit, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= unit:
            return f"about {seconds / unit:.1f} {name} left"
    return f"about {seconds:.0f} s left"


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        del number, frame
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
