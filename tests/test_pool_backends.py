"""The same jobs on every backend: results, failures, and processes that are killed."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pool_jobs
import pytest
from rich.console import Console

from experiments.pool import run as pool
from experiments.pool import slurm
from experiments.pool.config import PoolConfig, RayConfig, SlurmConfig
from experiments.pool.jobs import Job, Unavailable

pytestmark = [
    # Ray and submitit start processes by fork and exec, with JAX's threads in this one.
    pytest.mark.filterwarnings("ignore:os.fork\\(\\) was called:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to:DeprecationWarning"),
]
TESTS = Path(__file__).resolve().parent
SUBMITIT = SlurmConfig(cluster="local", tasks=3)
BACKENDS = {
    "local": PoolConfig("local", 2, 2),
    "submitit": PoolConfig("submitit", 2, 2, slurm=SUBMITIT),
    "ray": PoolConfig("ray", 2, 2, ray=RayConfig(cpus=1)),
}


@pytest.fixture(autouse=True)
def workers_import_this_folder(monkeypatch):
    paths = os.pathsep.join(map(str, (TESTS, TESTS.parent)))
    monkeypatch.setenv("PYTHONPATH", paths)
    monkeypatch.setenv("RAY_prestart_worker_first_driver", "0")


@pytest.fixture
def quick(monkeypatch):
    """Looks often at what tasks left."""
    monkeypatch.setattr(slurm, "POLL", 0.02)
    monkeypatch.setitem(slurm.LATE, "slurm", 0.5)


def run(config, folder, *jobs):
    """Results, failures and what was printed."""
    console = Console(file=io.StringIO(), width=200)
    results, failures = pool.map("tests", jobs, config, folder / "pool", console)
    return results, failures, console.file.getvalue()  # pyright: ignore


def test_a_cluster_of_its_own_is_started_for_each_call(tmp_path):
    """As a comparison does, for its networks and for its decisions."""
    pytest.importorskip("ray")
    for number in (1, 2):
        results, failures, _ = run(
            BACKENDS["ray"], tmp_path, Job("a", pool_jobs.divide, (number, 2))
        )
        assert results == {"a": number / 2}
        assert not failures
    assert run(BACKENDS["ray"], tmp_path)[:2] == ({}, [])


def calls(folder, name):
    return len((folder / name).read_text())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_keeps_what_a_pool_promises(backend, tmp_path):
    if backend == "ray":
        pytest.importorskip("ray")
    results, failures, printed = run(
        BACKENDS[backend],
        tmp_path,
        Job("half", pool_jobs.divide, (1, 2), lambda: "a status that cannot be pickled"),
        Job("endless", pool_jobs.divide, (1, 0)),
        Job("killed once", pool_jobs.die_at_first, (tmp_path, "once")),
        Job("quarter", pool_jobs.divide, (1, 4)),
        Job("killed always", pool_jobs.die, (tmp_path, "always")),
        Job("told to end", pool_jobs.be_told_to_end_at_first, (tmp_path, "told")),
        Job("eighth", pool_jobs.divide, (1, 8)),
    )
    assert results == {
        **{"half": 0.5, "quarter": 0.25, "eighth": 0.125},
        **{"killed once": "once at last", "told to end": "told at last"},
    }
    errors = {failure.name: failure.error for failure in failures}
    assert errors.pop("endless") == "ZeroDivisionError: division by zero"
    assert errors.pop("killed always").startswith("its process was killed 3 times")
    assert not errors
    assert calls(tmp_path, "always") == 1 + BACKENDS[backend].retries
    assert "FAILED endless: ZeroDivisionError: division by zero\n" in printed
    assert "killed once: its process was killed; it is tried again\n" in printed
    assert "tests: 7/7 " in printed


@pytest.mark.usefixtures("quick")
def test_a_task_that_is_killed_has_lost_only_the_job_that_it_was_at(tmp_path):
    config = PoolConfig("submitit", 1, 1, slurm=SlurmConfig(cluster="local", tasks=1))
    results, failures, _ = run(
        config,
        tmp_path,
        Job("a", pool_jobs.note, (tmp_path, "a")),
        Job("b", pool_jobs.die, (tmp_path, "b")),
        Job("c", pool_jobs.note, (tmp_path, "c")),
    )
    assert list(results) == ["a", "c"]
    assert [failure.name for failure in failures] == ["b"]
    assert [calls(tmp_path, name) for name in "abc"] == [1, 2, 1]


@pytest.mark.usefixtures("quick")
def test_a_result_that_cannot_be_pickled_is_a_failure(tmp_path):
    config = BACKENDS["submitit"]
    jobs = [Job("a", pool_jobs.unpicklable, ()), Job("b", pool_jobs.divide, (1, 2))]
    results, (failure,), _ = run(config, tmp_path, *jobs)
    assert results == {"b": 0.5}
    assert "cannot be pickled" in failure.error


@pytest.mark.usefixtures("quick")
def test_what_cannot_be_imported_is_a_failure_and_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent))
    results, failures, printed = run(
        BACKENDS["submitit"], tmp_path, Job("a", pool_jobs.divide, (1, 2))
    )
    assert not results
    assert failures[0].name == "a"
    assert "pool_jobs" in failures[0].error
    assert "tried again" not in printed


# --- SLURM, whose commands are played by scripts -------------------------------------------------

SBATCH = """#!{python}
import os, re, subprocess, sys
text = open(sys.argv[1]).read()
with open("{place}/scripts", "a") as file:
    file.write(text)
number = len(os.listdir("{place}/jobs")) + 1
array = re.search(r"--array=0-(\\d+)", text)
environment = {{**os.environ, "SLURM_JOB_ID": f"{{number}}", "SUBMITIT_EXECUTOR": "slurm"}}
environment |= dict(SLURM_NTASKS="1", SLURM_JOB_NUM_NODES="1", SLURM_NODEID="0",
                    SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_JOB_NODELIST="here")
os.mkdir(f"{place}/jobs/{{number}}")
for index in range(int(array[1]) + 1) if array else [None]:
    own = dict(environment)
    if array:
        own |= dict(SLURM_ARRAY_JOB_ID=f"{{number}}", SLURM_ARRAY_TASK_ID=f"{{index}}")
    end = open(f"{place}/jobs/{{number}}/{{index}}", "w")
    run = f"bash {{sys.argv[1]}}; echo $? >&3"
    subprocess.Popen(["bash", "-c", "exec 3>&1; " + run], env=own, stdout=end,
                     stderr=subprocess.DEVNULL, start_new_session=True)
print(f"Submitted batch job {{number}}")
"""
SRUN = """#!{python}
import os, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words = words[2:] if words[0] in ("--output", "--error") else words[1:]
os.execvp(words[0], words)
"""
SACCT = """#!{python}
import os
print("JobID|State|NodeList")
for number in os.listdir("{place}/jobs"):
    for index in os.listdir(f"{place}/jobs/{{number}}"):
        code = open(f"{place}/jobs/{{number}}/{{index}}").read().strip()
        state = "RUNNING" if not code else "COMPLETED" if code == "0" else "FAILED"
        name = number if index == "None" else f"{{number}}_{{index}}"
        print(f"{{name}}|{{state}}|here")
"""


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Commands that do what SLURM's do, on this machine; what was submitted."""
    place = tmp_path / "slurm"
    (place / "jobs").mkdir(parents=True)
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT), ("scancel", SRUN)):
        file = place / name
        file.write_text(text.format(python=sys.executable, place=place))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    return place / "scripts"


@pytest.mark.usefixtures("quick")
def test_slurm_gets_an_array_with_what_was_asked_for(tmp_path, scripts):
    asked = SlurmConfig(partition="short", account="us", hours=1.5, memory_gb=3, cpus=4, gpus=1)
    config = PoolConfig("submitit", 7, 1, slurm=asked)
    results, failures, _ = run(
        config,
        tmp_path,
        Job("half", pool_jobs.divide, (1, 2)),
        Job("endless", pool_jobs.divide, (1, 0)),
        Job("killed once", pool_jobs.die_at_first, (tmp_path, "once")),
    )
    assert results == {"half": 0.5, "killed once": "once at last"}
    assert [failure.name for failure in failures] == ["endless"]
    first, second = scripts.read_text().split("#!/bin/bash")[1:]
    flags = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", first))
    wanted = {"partition": "short", "account": "us", "time": "90", "mem": "3GB"}
    wanted |= {"cpus-per-task": "4", "gpus-per-node": "1", "array": "0-2%3", "job-name": "eejax"}
    assert {name: flags[name] for name in wanted} == wanted
    assert "--array" not in second, "the one that was killed"


def test_without_slurm_a_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unavailable, match=r"no srun here; .*--slurm.cluster local"):
        run(PoolConfig("submitit"), tmp_path, Job("half", pool_jobs.divide, (1, 2)))


@pytest.mark.usefixtures("quick")
def test_a_task_that_is_queued_again_goes_on_where_it_was(tmp_path):
    files = [tmp_path / f"answer {i}" for i in range(2)]
    jobs = [Job(name, pool_jobs.note, (tmp_path, name)) for name in "ab"]
    task = slurm.Task()
    task(jobs[:1], files[:1])
    again = task.checkpoint(jobs, files)
    again.result()
    assert [calls(tmp_path, name) for name in "ab"] == [1, 1]
    assert all(file.exists() for file in files)


@pytest.mark.parametrize("backend", ["submitit", "ray"])
def test_an_interruption_ends_the_workers(backend, tmp_path):
    if backend == "ray":
        pytest.importorskip("ray")
    code = (
        "import pathlib, sys, test_pool_backends as t\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "job = t.Job('runs', t.pool_jobs.run_on, (folder,))\n"
        f"try: t.run(t.BACKENDS[{backend!r}], folder, job)\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as driver:
        try:
            until((tmp_path / "runs").exists)
            until(lambda: (tmp_path / "runs").read_text())
            driver.send_signal(signal.SIGTERM)
            printed, _ = driver.communicate(timeout=60)
        finally:
            driver.kill()
    assert printed == "interrupted\n"
    worker = int((tmp_path / "runs").read_text())
    until(lambda: ended(worker))


def ended(process):
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, 0)
        return "zombie" in Path(f"/proc/{process}/status").read_text()
    return True


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
