"""Many independent jobs on all cores, with progress, and nothing lost when one of them fails.

On a CPU each worker is a process that keeps to its own share of the cores: two small trainings side
by side are quicker than one after the other on both cores, because compiling and small operations
use one core only. An accelerator is not shared: there jobs run one after the other in this process.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Job(NamedTuple):
    """One thing to do.

    Attributes:
      name: for people.
      function: of a module, so that another process can import it. One that catches a signal to
        end in good order raises KeyboardInterrupt then; anything else is a failure like others.
      arguments: what it is called with.
      status: tells how far it is, or "".
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    status: Callable[[], str] = lambda: ""


class Failure(NamedTuple):
    """A job that did not end well.

    Attributes:
      name: the job's.
      error: one line.
      trace: where it happened; empty where its process was killed.
    """

    name: str
    error: str
    trace: str


class _Worker(NamedTuple):
    process: Any
    pipe: Connection


def default_workers() -> int:
    """How many jobs to run at once here: one a core, or one where there is an accelerator."""
    import jax

    return max(len(_cores()), 1) if jax.default_backend() == "cpu" else 1


def run(
    title: str, jobs: Sequence[Job], workers: int, console: Console
) -> tuple[dict[str, Any], list[Failure]]:
    """Runs all jobs; one that fails is reported, and the others go on.

    Args:
      title: of the progress display.
      jobs: with different names.
      workers: processes; with 1 everything happens in this one.
      console: where progress goes.

    Returns:
      What each job returned, by name, and the failures.

    Raises:
      KeyboardInterrupt: SIGINT or SIGTERM came; the jobs under way were told, and have ended.
    """
    results: dict[str, Any] = {}
    failures: list[Failure] = []
    began = time.monotonic()
    with _progress(console) as bar, _interrupting():
        task = bar.add_task(title, total=len(jobs), facts="")

        def say(running: Sequence[Job]) -> None:
            words = (f"{job.name} {job.status()}".strip() for job in running)
            bar.update(task, facts="; ".join(words))

        serial = workers == 1 or len(jobs) < 2
        run_all = _here if serial else functools.partial(_beside, workers=min(workers, len(jobs)))
        for job, outcome in run_all(jobs, say):
            bar.advance(task)
            if isinstance(outcome, Failure):
                failures.append(outcome)
                console.print(f"FAILED {job.name}: {outcome.error}", style="red", highlight=False)
            else:
                results[job.name] = outcome
            if not console.is_terminal:
                ended, passed = len(results) + len(failures), time.monotonic() - began
                words = f"{title}: {ended}/{len(jobs)} {job.name} ({passed:.0f} s)"
                console.print(words, highlight=False)
    return results, failures


def _here(jobs: Sequence[Job], say: Callable[[Sequence[Job]], None]) -> Iterator[tuple[Job, Any]]:
    for job in jobs:
        say([job])
        yield job, _guarded(job)


def _beside(
    jobs: Sequence[Job], say: Callable[[Sequence[Job]], None], *, workers: int
) -> Iterator[tuple[Job, Any]]:
    """In processes of their own. One that is killed costs the job that it was at, and no other."""
    cores = _cores()
    shares = [cores[i::workers] if len(cores) >= workers else cores for i in range(workers)]
    waiting = list(reversed(jobs))
    staff = [_hire(share) for share in shares]
    at: dict[int, Job] = {}
    try:
        while waiting or at:
            for i in range(workers):
                if i not in at and waiting:
                    at[i] = waiting.pop()
                    staff[i].pipe.send(at[i]._replace(status=_silent))
            ready = wait([staff[i].pipe for i in at], timeout=0.5)
            say(list(at.values()))
            for i in [i for i in at if staff[i].pipe in ready]:
                job = at.pop(i)
                try:
                    outcome = staff[i].pipe.recv()
                except (EOFError, ConnectionResetError):
                    staff[i].process.join()
                    code = staff[i].process.exitcode
                    outcome = Failure(job.name, f"its process ended with status {code}", "")
                    staff[i] = _hire(shares[i])
                yield job, outcome
    except BaseException:
        for worker in staff:
            worker.process.terminate()  # SIGTERM: a training saves its state and ends
        raise
    finally:
        for worker in staff:
            worker.pipe.close()  # which ends it, or else it would wait for another job
        for worker in staff:
            worker.process.join()


def _hire(cores: list[int]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, cores), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _work(pipe: Connection, cores: list[int]) -> None:
    """A worker's life: one job after another, until nobody has any more."""
    # Ctrl-C reaches every process of the terminal; who decides what then happens is the parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    gone = (EOFError, BrokenPipeError, ConnectionResetError)
    with contextlib.suppress(*gone, KeyboardInterrupt):  # the last where it was told to stop
        while True:
            job = pipe.recv()
            pipe.send(_guarded(job))


def _guarded(job: Job) -> Any:
    try:
        return job.function(*job.arguments)
    except Exception as error:
        words = str(error).strip().splitlines() or [""]
        return Failure(job.name, f"{type(error).__name__}: {words[0]}", traceback.format_exc())


def _silent() -> str:
    return ""


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def _interrupting() -> Iterator[None]:
    """SIGTERM is like Ctrl-C, so that both end the workers in good order."""

    def interrupt(number: int, frame: Any) -> None:
        del number, frame
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[facts]}"),
        console=console,
        disable=not console.is_terminal,
    )
