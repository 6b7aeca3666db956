"""Many independent jobs on all cores, with progress; a job that fails costs no other.

On a CPU each worker is a process that keeps to its own share of the cores: two small trainings side
by side are quicker than one after the other on both cores, because compiling and small operations
use one core only. An accelerator is not shared: there jobs run one after the other in this process.

A worker is a `ProcessPoolExecutor` of one process. Executors of several processes lose all that is
under way when one process dies.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import MofNCompleteColumn, TimeElapsedColumn

from experiments.progress import progress_bar


class Job(NamedTuple):
    """A call to make.

    Attributes:
      name: for people.
      function: of a module, so that another process can import it. If a signal ends it, it raises
        KeyboardInterrupt; any other exception is a failure of this job alone.
      arguments: its arguments.
      status: tells how far it is, or "".
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    status: Callable[[], str] = lambda: ""


class Failure(NamedTuple):
    """A job that failed.

    Attributes:
      name: the job's.
      error: one line.
      trace: traceback; empty if its process was killed.
    """

    name: str
    error: str
    trace: str


def default_workers() -> int:
    """Jobs to run at once on this machine: one a core, or one if there is an accelerator."""
    import jax

    return max(len(_cores()), 1) if jax.default_backend() == "cpu" else 1


def run(
    title: str, jobs: Sequence[Job], workers: int, console: Console
) -> tuple[dict[str, Any], list[Failure]]:
    """Runs all jobs; one that fails is reported, and the others go on.

    Args:
      title: of the progress display.
      jobs: with different names.
      workers: processes; with 1 all jobs run in this one.
      console: for progress.

    Returns:
      The result of each job, by name, and the failures.

    Raises:
      KeyboardInterrupt: after SIGINT or SIGTERM, once the jobs under way have ended.
    """
    results: dict[str, Any] = {}
    failures: list[Failure] = []
    began = time.monotonic()
    with (
        progress_bar(console, MofNCompleteColumn(), TimeElapsedColumn()) as bar,
        _sigterm_interrupts(),
    ):
        task = bar.add_task(title, total=len(jobs), status="")

        def show(running: Sequence[Job]) -> None:
            words = (f"{job.name} {job.status()}".strip() for job in running)
            bar.update(task, status="; ".join(words))

        serial = workers == 1 or len(jobs) < 2
        outcomes = _here(jobs, show) if serial else _beside(jobs, show, min(workers, len(jobs)))
        with contextlib.closing(outcomes):  # ends the workers, wherever an interruption comes
            for job, outcome in outcomes:
                bar.advance(task)
                if isinstance(outcome, Failure):
                    failures.append(outcome)
                    words = f"FAILED {job.name}: {outcome.error}"
                    console.print(words, style="red", highlight=False)
                else:
                    results[job.name] = outcome
                if not console.is_terminal:
                    done, passed = len(results) + len(failures), time.monotonic() - began
                    words = f"{title}: {done}/{len(jobs)} {job.name} ({passed:.0f} s)"
                    console.print(words, highlight=False)
    return results, failures


def _here(jobs: Sequence[Job], show: Callable[[Sequence[Job]], None]) -> Generator[tuple[Job, Any]]:
    for job in jobs:
        show([job])
        yield job, _outcome(job)


def _beside(
    jobs: Sequence[Job], show: Callable[[Sequence[Job]], None], workers: int
) -> Generator[tuple[Job, Any]]:
    cores = _cores()
    shares = [cores[i::workers] if len(cores) >= workers else cores for i in range(workers)]
    executors = [_start(share) for share in shares]
    idle, waiting = list(range(workers)), list(reversed(jobs))
    running: dict[Future[Any], tuple[int, Job]] = {}
    try:
        while waiting or running:
            while idle and waiting:
                worker, job = idle.pop(), waiting.pop()
                sent = job._replace(status=str)  # a closure, which cannot be sent
                running[executors[worker].submit(_outcome_in_worker, sent)] = worker, job
            show([job for _, job in running.values()])
            for future in wait_for(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                worker, job = running.pop(future)
                try:
                    outcome = future.result()
                except BrokenProcessPool:
                    outcome = Failure(job.name, "its process was killed", "")
                    executors[worker].shutdown()
                    executors[worker] = _start(shares[worker])
                idle.append(worker)
                yield job, outcome
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()  # on SIGTERM a training saves its state and ends
        raise
    finally:
        for executor in executors:
            executor.shutdown()


def _start(cores: list[int]) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, _prepare_worker, (cores,))


def _prepare_worker(cores: list[int]) -> None:
    # Ctrl-C reaches every process of the terminal; the parent decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)

    def end_with_the_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_the_parent, daemon=True).start()


def _outcome(job: Job) -> Any:
    try:
        return job.function(*job.arguments)
    except Exception as error:
        words = str(error).strip().splitlines() or [""]
        return Failure(job.name, f"{type(error).__name__}: {words[0]}", traceback.format_exc())


def _outcome_in_worker(job: Job) -> Any:
    try:
        return _outcome(job)
    except KeyboardInterrupt as stop:
        return Failure(job.name, str(stop) or "interrupted", "")


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


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
