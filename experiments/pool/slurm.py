"""Jobs in tasks of SLURM, by submitit, or in the same tasks as processes of this machine.

Pickles and logs go through a folder that all nodes see. A task runs its jobs one after the other
and leaves a file for each that has ended; so when a task is killed, it is known which job it was
at, and those behind it go to another task. A task that SLURM ends at its time limit, or preempts,
is queued again by submitit and goes on where it was.

submitit: https://github.com/facebookincubator/submitit
"""

from __future__ import annotations

import os
import pickle
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.files import replacing
from experiments.pool.config import SlurmConfig
from experiments.pool.jobs import (
    Ended,
    Failure,
    Job,
    Killed,
    Queue,
    Unavailable,
    call_in_worker,
)

POLL = 0.2
ENDING = 10.0
# A file system may show what a task left a while after SLURM says that the task has ended.
LATE = {"slurm": 30.0, "local": 0.5}


class Task:
    """Runs jobs; submitit asks it how to go on after a time limit or a preemption."""

    def __call__(self, jobs: Sequence[Job], files: Sequence[Path]) -> None:
        for job, file in zip(jobs, files, strict=True):
            if file.exists():  # of the same task, before it was queued again
                continue
            ended = call_in_worker(job)
            if isinstance(ended, Killed):
                raise KeyboardInterrupt(ended.words)
            with replacing(file) as temporary:
                temporary.write_bytes(_pickled(job, ended))

    def checkpoint(self, jobs: Sequence[Job], files: Sequence[Path]) -> Any:
        """What is queued then: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, jobs, files)


class Submitted:
    """A task, and which of its jobs have not ended yet."""

    def __init__(self, jobs: Sequence[Job], folder: Path) -> None:
        token = secrets.token_hex(8)
        self.files = [folder / f"{token}-{i}" for i in range(len(jobs))]
        self.jobs = list(zip(jobs, self.files, strict=True))
        self.task: Any = None
        self._over: float | None = None

    def ended(self, there: set[str]) -> Iterator[tuple[Job, Ended]]:
        """Its jobs that ended since."""
        while self.jobs and self.jobs[0][1].name in there:
            job, file = self.jobs.pop(0)
            yield job, pickle.loads(file.read_bytes())
            file.unlink()

    def over(self, late: float) -> bool:
        """Whether the task has ended, long enough ago for its files to be there."""
        if self.task.done() and self._over is None:
            self._over = time.monotonic()
        return self._over is not None and time.monotonic() - self._over > late

    def trace(self) -> str:
        """Of the exception that it raised; "" if it was killed."""
        if not self.task.paths.result_pickle.exists():
            return ""
        # submitit puts the trace between lines of dashes.
        parts = str(self.task.exception() or "it left no answer").split("-" * 22)
        return parts[len(parts) // 2].strip()


def in_tasks(
    queue: Queue,
    show: Callable[[], None],
    folder: Path,
    config: SlurmConfig,
    at_a_time: int | None,
    retries: int,
) -> Generator[tuple[Job, Ended | Killed]]:
    """Jobs in tasks.

    Args:
      queue: of jobs.
      show: called while waiting.
      folder: for pickles and logs, on a file system that all nodes share.
      config: what a task asks for.
      at_a_time: tasks that run at once; None for as many as SLURM starts. Without SLURM a number.
      retries: how often a task is queued again after its time limit.

    Raises:
      Unavailable: if this is no machine of a SLURM cluster.
    """
    executor = _executor(folder, config, at_a_time, retries)
    answers = folder / "answers"
    answers.mkdir(parents=True, exist_ok=True)
    most = config.tasks if config.cluster == "slurm" else at_a_time or 1
    size = -(-len(queue.left) // config.tasks)
    running: list[Submitted] = []
    ending: list[Submitted] = []
    try:
        while True:
            groups = _groups(queue, most - len(running), size)
            running += _submit(executor, [Submitted(group, answers) for group in groups])
            if not running:
                return
            show()
            time.sleep(POLL)
            there = set(os.listdir(answers))
            for submitted in list(running):
                over = submitted.over(LATE[config.cluster])
                yield from submitted.ended(there)
                if submitted.jobs and not over:
                    continue
                running.remove(submitted)
                if not submitted.jobs:
                    ending.append(submitted)
                    continue
                (job, _), *behind = submitted.jobs
                for other, _ in reversed(behind):
                    queue.put_back(other)
                if trace := submitted.trace():
                    # Jobs do not raise; what did is submitit, pickle, or an import.
                    yield job, Ended(Failure(job.name, trace.splitlines()[-1], trace), 0.0)
                else:
                    yield job, Killed(f"task {submitted.task.job_id}, {submitted.task.state}")
    finally:
        for submitted in running:
            submitted.task.cancel(check=False)
        deadline = time.monotonic() + ENDING
        if config.cluster == "local":  # so that none outlives this function
            for submitted in (*running, *ending):
                while not submitted.task.done() and time.monotonic() < deadline:
                    time.sleep(0.02)


def _groups(queue: Queue, count: int, size: int) -> list[list[Job]]:
    """What may begin, in at most `count` groups of at most `size`."""
    groups: list[list[Job]] = []
    while len(groups) < count and (job := queue.take()) is not None:
        group = [job]
        while len(group) < size and (job := queue.take()) is not None:
            group.append(job)
        groups.append(group)
    return groups


def _submit(executor: Any, submitted: list[Submitted]) -> list[Submitted]:
    if submitted:
        # What tells of the progress is for this process, and cannot be pickled.
        jobs = [[job._replace(status=str) for job, _ in one.jobs] for one in submitted]
        tasks = executor.map_array(Task(), jobs, [one.files for one in submitted])
        for one, task in zip(submitted, tasks, strict=True):
            one.task = task
    return submitted


def _pickled(job: Job, ended: Ended) -> bytes:
    try:
        return pickle.dumps(ended)
    except Exception as error:
        words = f"its result cannot be pickled: {error}"
        return pickle.dumps(Ended(Failure(job.name, words, ""), ended.seconds))


def _executor(folder: Path, config: SlurmConfig, at_a_time: int | None, retries: int) -> Any:
    import submitit

    limits = {"slurm_max_num_timeout": retries, "local_max_num_timeout": retries}
    try:
        executor = submitit.AutoExecutor(folder, cluster=config.cluster, **limits)
    except RuntimeError:
        raise Unavailable(
            "--backend submitit: there is no srun here; run it on a machine of a SLURM cluster, or "
            "with --slurm.cluster local to try it out."
        ) from None
    chosen = {
        "name": "eejax",
        "timeout_min": max(round(60 * config.hours), 1),
        "mem_gb": config.memory_gb,
        "cpus_per_task": config.cpus,
        "gpus_per_node": config.gpus or None,
        "slurm_partition": config.partition,
        "slurm_account": config.account,
        "slurm_array_parallelism": at_a_time,
    }
    executor.update_parameters(**{k: v for k, v in chosen.items() if v is not None})
    return executor
