"""Jobs as tasks of Ray Core, on a cluster or on this machine alone.

A worker of Ray is a process that runs one task after the other, so that what jobs share, such as
compiled programs, is made once a worker. Ray places tasks by the cores, GPUs and memory that they
ask for. It is told to retry nothing: the pool does, as everywhere.

Ray Core: https://docs.ray.io/en/latest/ray-core/tasks.html
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import Any

from experiments.pool.config import RayConfig
from experiments.pool.jobs import (
    Ended,
    Failure,
    Job,
    Killed,
    Queue,
    Unavailable,
    call_in_worker,
)

MOST = 256
"""Tasks that wait or run in a cluster, whose autoscaler goes by them."""


def in_cluster(
    queue: Queue, show: Callable[[], None], config: RayConfig, at_a_time: int | None
) -> Generator[tuple[Job, Ended | Killed]]:
    """Jobs as tasks.

    Args:
      queue: of jobs.
      show: called while waiting.
      config: where the cluster is, and what a job asks it for.
      at_a_time: jobs that run at once. Without a cluster a number.

    Raises:
      Unavailable: if no cluster answers.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    started = _connect(ray, config, at_a_time)
    resources: dict[str, Any] = {"num_cpus": config.cpus, "num_gpus": config.gpus}
    if config.memory_gb:
        resources["memory"] = config.memory_gb * 2**30
    remote = ray.remote(**resources, max_retries=0)(call_in_worker)
    running: dict[Any, Job] = {}
    try:
        while True:
            while len(running) < (at_a_time or MOST) and (job := queue.take()) is not None:
                # What tells of the progress is for this process, and cannot be pickled.
                running[remote.remote(job._replace(status=str))] = job
            if not running:
                return
            show()
            for reference in ray.wait(list(running), timeout=0.5)[0]:
                job = running.pop(reference)
                try:
                    yield job, ray.get(reference)
                except RayTaskError as error:  # jobs do not raise; what did is Ray or pickle
                    words = str(error.cause).strip().splitlines() or [type(error.cause).__name__]
                    yield job, Ended(Failure(job.name, words[0], str(error)), 0.0)
                except RayError as error:
                    yield job, Killed(type(error).__name__)
    finally:
        for reference in running:
            ray.cancel(reference)
        if started:
            ray.shutdown()


def _connect(ray: Any, config: RayConfig, at_a_time: int | None) -> bool:
    """Connects to the cluster, unless this process is connected; whether it did."""
    if ray.is_initialized():
        return False
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    # Workers import the same code, which is under the same path on every machine.
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    told = signal.getsignal(signal.SIGTERM)
    try:
        if config.address is not None:
            variables = {"env_vars": {"PYTHONPATH": paths}}
            try:
                ray.init(address=config.address, runtime_env=variables, **common)
            except (ConnectionError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0]
                raise Unavailable(f"--ray.address {config.address}: {reason}") from error
            return True
        variables = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_TOKEN": _token()}
        with _environment(PYTHONPATH=paths, **variables), warnings.catch_warnings():
            # Ray starts its processes by fork and exec, with JAX's threads in this one.
            warnings.filterwarnings("ignore", r"os.fork\(\) was called", RuntimeWarning)
            ray.init(
                num_cpus=max(round((at_a_time or 1) * config.cpus), 1),
                include_dashboard=False,
                object_store_memory=100 << 20,  # results are small: traces go through files
                **common,
            )
        return True
    finally:
        signal.signal(signal.SIGTERM, told)  # Ray ends the process


@functools.cache
def _token() -> str:
    """A secret of this process and its workers. Ray reads it once a process."""
    return os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
