"""Jobs in processes of this machine.

On a CPU each worker is a process that keeps to its own share of the cores: two small trainings side
by side are quicker than one after the other on both cores, because compiling and small operations
use one core only. An accelerator is not shared: there jobs run one after the other in this process.

A worker is a `ProcessPoolExecutor` of one process. Executors of several processes lose all that is
under way when one process dies.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool

from experiments.pool.jobs import Ended, Job, Killed, Queue, call, call_in_worker

Outcomes = Generator[tuple[Job, Ended | Killed]]


def default_workers() -> int:
    """Jobs to run at once on this machine: one a core, or one if there is an accelerator."""
    import jax

    return max(len(cores()), 1) if jax.default_backend() == "cpu" else 1


def in_this_process(queue: Queue, show: Callable[[], None]) -> Outcomes:
    """One job after the other."""
    while (job := queue.take()) is not None:
        show()
        yield job, call(job)


def in_processes(queue: Queue, show: Callable[[], None], workers: int) -> Outcomes:
    """As many jobs at a time as there are workers."""
    own = cores()
    shares = [own[i::workers] if len(own) >= workers else own for i in range(workers)]
    executors: list[ProcessPoolExecutor | None] = [None] * workers
    idle = list(range(workers))
    running: dict[Future[Ended | Killed], tuple[int, Job]] = {}
    try:
        while True:
            while idle and (job := queue.take()) is not None:
                worker = idle.pop()
                executor = executors[worker] = executors[worker] or _start(shares[worker])
                try:
                    future = executor.submit(call_in_worker, job._replace(status=str))
                except BrokenProcessPool:  # it died while it had nothing to do
                    future = Future()
                    future.set_exception(BrokenProcessPool())
                running[future] = worker, job
            if not running:
                return
            show()
            for future in wait_for(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                worker, job = running.pop(future)
                try:
                    ended = future.result()
                except BrokenProcessPool:
                    ended = Killed()
                    broken, executors[worker] = executors[worker], None
                    if broken is not None:
                        broken.shutdown()
                idle.append(worker)
                yield job, ended
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()  # on SIGTERM a training saves its state and ends
        raise
    finally:
        for executor in executors:
            if executor is not None:
                executor.shutdown()


def cores() -> list[int]:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _start(share: list[int]) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, _prepare_worker, (share,))


def _prepare_worker(share: list[int]) -> None:
    # Ctrl-C reaches every process of the terminal; the parent decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if share and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, share)

    def end_with_the_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
