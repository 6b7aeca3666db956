"""Many jobs at once: what they return, what fails alone, and that a signal leaves nothing behind.

Nothing here imports JAX at the top: worker processes import this module.
"""

from __future__ import annotations

import io
import operator
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from experiments.pool import local
from experiments.pool import run as pool
from experiments.pool.config import PoolConfig
from experiments.pool.jobs import Failure, Job

PATIENCE = 30.0  # seconds, for what takes about one
NOWHERE = Path("/nowhere")  # processes of this machine need no folder


def run(*jobs, workers, retries=0):
    """Results, failures and what was printed."""
    console = Console(file=io.StringIO(), width=200)
    config = PoolConfig(jobs=workers, retries=retries)
    results, failures = pool.map("tests", jobs, config, NOWHERE, console)
    return results, failures, console.file.getvalue()  # pyright: ignore


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


# --- jobs, which workers import from here --------------------------------------------------------


def complain(words):
    raise ValueError(words)


def meet(folder, own, other):
    """Returns only if the other job runs at the same time."""
    (folder / own).touch()
    until((folder / other).exists)
    return os.getpid(), local.cores()


def say_where(folder, name):
    """Tells which process this is, all at once."""
    (folder / "draft").write_text(str(os.getpid()))
    (folder / "draft").rename(folder / name)


def run_on(folder):
    """Dies of SIGTERM, as most jobs do."""
    say_where(folder, "runs on")
    time.sleep(PATIENCE)


def end_in_good_order(folder):
    """Saves something when SIGTERM comes, as a training does, and returns."""
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    until((folder / "runs on").exists)
    say_where(folder, "ends")
    until(lambda: told)
    (folder / "saved").touch()


def be_interrupted(folder):
    """The process that the tests send a signal to."""
    # A shell's background job, such as the tests may be, hands on an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    jobs = [Job("a", end_in_good_order, (folder,)), Job("b", run_on, (folder,))]
    try:
        pool.map("tests", jobs, PoolConfig(jobs=2), NOWHERE, Console())
    except KeyboardInterrupt:
        print("interrupted")


# --- results and failures ------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_one_that_raises_is_a_failure_of_one_line_and_the_others_go_on(workers):
    results, failures, printed = run(
        Job("half", operator.truediv, (1, 2), lambda: "a status that cannot be pickled"),
        Job("endless", operator.truediv, (1, 0)),
        Job("wordy", complain, ("first line\nsecond line",)),
        Job("wordless", complain, ("",)),
        Job("power", pow, (2, 5)),
        workers=workers,
    )
    assert results == {"half": 0.5, "power": 32}
    assert {f.name: f.error for f in failures} == {
        "endless": "ZeroDivisionError: division by zero",
        "wordy": "ValueError: first line",
        "wordless": "ValueError: ",
    }
    assert all("Traceback" in f.trace for f in failures)
    assert "FAILED wordy: ValueError: first line\n" in printed
    assert "tests: 5/5 " in printed


def test_a_process_that_dies_costs_the_job_that_it_was_at():
    results, failures, printed = run(
        Job("ends", os._exit, (3,)),
        Job("half", operator.truediv, (1, 2)),
        Job("killed", signal.raise_signal, (signal.SIGKILL,)),
        Job("power", pow, (2, 5)),
        workers=2,
    )
    assert results == {"half": 0.5, "power": 32}
    assert sorted(failures) == [
        Failure("ends", "its process was killed", ""),
        Failure("killed", "its process was killed", ""),
    ]
    assert "FAILED ends: its process was killed\n" in printed


def test_workers_run_side_by_side_on_cores_of_their_own_and_are_kept(tmp_path):
    results, failures, _ = run(
        Job("a", meet, (tmp_path, "a", "b")),
        Job("b", meet, (tmp_path, "b", "a")),
        Job("c", meet, (tmp_path, "c", "d")),
        Job("d", meet, (tmp_path, "d", "c")),
        workers=2,
    )
    assert not failures
    processes = {process for process, _ in results.values()}
    assert len(processes) == 2
    assert os.getpid() not in processes
    (_, mine), (_, others), whole = results["a"], results["b"], local.cores()
    if hasattr(os, "sched_setaffinity") and len(whole) > 1:
        assert sorted(mine + others) == whole, "each its share"
    else:
        assert mine == others == whole


@pytest.mark.parametrize(("jobs", "workers"), [(3, 1), (1, 4), (0, 4)])
def test_one_worker_or_one_job_is_this_process(jobs, workers):
    names = "abc"[:jobs]
    results, failures, _ = run(*[Job(n, os.getpid, ()) for n in names], workers=workers)
    assert results == dict.fromkeys(names, os.getpid())
    assert list(results) == list(names), "in order"
    assert not failures


def test_a_terminal_is_told_what_is_under_way():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    jobs = [Job(n, os.getpid, (), lambda n=n: f"is at {n.upper()}") for n in "ab"]
    pool.map("tests", jobs, PoolConfig(jobs=1), NOWHERE, console)
    shown = console.file.getvalue()  # pyright: ignore
    assert "2/2" in shown
    assert "b is at B" in shown


# --- signals -------------------------------------------------------------------------------------


def test_sigterm_is_an_interruption_here_too():
    before, ran = signal.getsignal(signal.SIGTERM), []
    jobs = [Job("told", signal.raise_signal, (signal.SIGTERM,)), Job("next", ran.append, (1,))]
    with pytest.raises(KeyboardInterrupt):
        run(*jobs, workers=1)
    assert not ran
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_training_that_was_told_to_stop_ends_everything(tmp_path, monkeypatch):
    """It saves its state, and the next one does not begin."""
    from experiments.compare import cells as compare_cells
    from experiments.compare.config import Comparison
    from experiments.data.config import DataConfig
    from experiments.store import Store
    from experiments.train import loop

    begun = []

    def train(cell, place):
        begun.append(cell.name)
        raise loop.Stopped("SIGTERM: saved after step 3 of 8", 143)

    monkeypatch.setattr(compare_cells, "_train", train)
    config = Comparison(data=DataConfig(name="digits", calibrate=100, choose=100))
    cells = compare_cells.cells(config)
    jobs = [Job(c.key, compare_cells.prepare, (c, config.drift, Store(tmp_path))) for c in cells]
    with pytest.raises(KeyboardInterrupt):
        run(*jobs, workers=1)
    assert begun == [cells[0].name]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_workers_and_waits_for_what_they_save(number, tmp_path):
    code = "import pathlib, test_compare_pool as t; t.be_interrupted(pathlib.Path({!r}))"
    root = Path(__file__).parent
    started = subprocess.Popen(
        [sys.executable, "-c", code.format(str(tmp_path))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root.parent)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with started as process:
        try:
            until((tmp_path / "ends").exists)
            process.send_signal(number)
            printed, complaints = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert (process.returncode, printed, complaints) == (0, "interrupted\n", "")
    assert (tmp_path / "saved").exists()
    for name in ("ends", "runs on"):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / name).read_text()), 0)
