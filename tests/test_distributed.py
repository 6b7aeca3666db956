"""Training in several processes: the same numbers, one stop for all, and kills at any moment.

The processes listen on the loopback interface. No test depends on when a signal arrives.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import distributed
from experiments.distributed import DistributedConfig

TESTS = Path(__file__).parent
LIMIT = 120


def begun(workdir, environment=None, **options):
    """The program in a process of its own, which ends with the test."""
    workdir.mkdir(exist_ok=True)
    for path in workdir.glob("pid-*"):
        path.unlink()
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=4", "")
    return subprocess.Popen(
        [sys.executable, "-m", "distributed_training", str(workdir), json.dumps(options)],
        cwd=TESTS.parent,
        env={
            **os.environ,
            **(environment or {}),
            "XLA_FLAGS": flags,
            "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(workdir, **options):
    """Runs the program to its end; the final parameters, and what was trained on."""
    with begun(workdir, **options) as process:
        try:
            _, errors = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    return dict(np.load(workdir / "final.npz"))


def arrays(result):
    return [result[f"arr_{i}"] for i in range(len(result) - 2)]


def orders(result):
    return dict(json.loads(str(result["orders"])))


def processes(workdir):
    """The identifiers of the processes that train."""
    return [int(path.read_text() or 0) for path in sorted(workdir.glob("pid-?"))]


def until(condition):
    """Waits for a condition, within bounds."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def kill_at_random(workdir, draw, process, longest):
    """Kills the starter or one of its processes after a random time; returns which."""
    time.sleep(draw.uniform(0, longest))
    victims = [process.pid, *processes(workdir)]
    victim = draw.randrange(len(victims))
    if process.poll() is None:
        try:
            os.kill(victims[victim], signal.SIGKILL)
        except ProcessLookupError:
            return "nobody"
    process.wait(LIMIT)
    until(lambda: not any(map(alive, processes(workdir))))
    return ("starter", *range(9))[victim]


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The final state of a run in one process and in two."""
    place = tmp_path_factory.mktemp("whole")
    return run(place / "one"), run(place / "two", processes=2, fsdp=2)


def assert_close(a, b):
    for x, y in zip(arrays(a), arrays(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5)


def test_two_processes_train_as_one(undisturbed):
    one, two = undisturbed
    assert_close(one, two)
    assert orders(one) == orders(two)
    assert len(orders(one)) == 30


def test_four_processes_train_as_one(undisturbed, tmp_path):
    assert_close(undisturbed[0], run(tmp_path / "run", processes=4, fsdp=2))


def test_a_run_goes_on_with_other_numbers_of_processes_and_devices(undisturbed, tmp_path):
    """Each time a signal to one process alone stops all; the order of samples stays."""
    workdir, saved = tmp_path / "run", 0
    kinds = {"processes": 1}, {"processes": 2}, {"devices": 4, "fsdp": 2}
    for stop, options in zip((5, 17, 35), kinds, strict=True):
        with begun(workdir, stop=stop, **options) as process:
            try:
                _, errors = process.communicate(timeout=LIMIT)
            finally:
                process.kill()
        assert process.returncode == 128 + signal.SIGTERM, errors
        saved = int(errors.split("saved after step ")[1].split()[0])
        assert saved > stop
        assert (workdir / "checkpoints" / str(saved)).is_dir()
    final = run(workdir)
    assert_close(undisturbed[0], final)
    whole = orders(undisturbed[0])
    assert orders(final) == {step: order for step, order in whole.items() if int(step) >= saved}


def test_processes_killed_at_random_moments_leave_a_run_that_ends_with_the_same_bits(
    undisturbed, tmp_path
):
    seed = random.randrange(10**6)
    print("seed", seed)
    draw, workdir = random.Random(seed), tmp_path / "run"
    for _ in range(3):
        with begun(workdir, pause=0.05, every=0.0, processes=2, fsdp=2) as process:
            print(kill_at_random(workdir, draw, process, 8.0))
    final = run(workdir, processes=2, fsdp=2)
    for x, y in zip(arrays(undisturbed[1]), arrays(final), strict=True):
        np.testing.assert_array_equal(x, y)
    assert final["steps"].tolist() == undisturbed[1]["steps"].tolist()


def test_one_process_agrees_with_itself():
    assert distributed.agreed((15, 0)).tolist() == [[15, 0]]
    assert distributed.shared("runs/ä") == "runs/ä"
    assert distributed.first()
    distributed.leave()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (DistributedConfig(processes=0), "distributed.processes: 0"),
        (DistributedConfig(devices=0), "distributed.devices: 0"),
        (DistributedConfig(processes=2, cluster=True), "distributed.processes: 2"),
    ],
)
def test_what_cannot_be_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        distributed.check(config)


def test_a_mesh_has_the_first_devices(capsys):
    assert distributed.mesh(DistributedConfig()).shape == {"data": 4, "fsdp": 1}
    small = distributed.mesh(DistributedConfig(devices=2, fsdp=2))
    assert small.devices.tolist() == [jax.devices()[:2]]
    with pytest.raises(ValueError, match=r"distributed.devices: 5.*at most 4"):
        distributed.mesh(DistributedConfig(devices=5))
    with pytest.raises(ValueError, match=r"distributed.fsdp: 3.*divisor of 4"):
        distributed.mesh(DistributedConfig(fsdp=3))


def test_without_a_cluster_the_flag_is_a_mistake_of_one_line(tmp_path):
    command = [sys.executable, "-m", "experiments.cifar", "--distributed.cluster"]
    flags = ["--data.name", "digits", "--workdir", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, *flags], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --distributed.cluster: JAX finds no cluster here")
    assert len(done.stderr.splitlines()) == 1


def test_slurm_tells_each_process_its_place(undisturbed, tmp_path):
    """Two tasks as `srun` starts them, on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tasks = []
    for task in ("0", "1"):
        tasks.append(
            begun(
                tmp_path,
                cluster=True,
                environment={
                    "SLURM_JOB_ID": "7",
                    "SLURM_STEP_NODELIST": "127.0.0.1",
                    "SLURM_NTASKS": "2",
                    "SLURM_PROCID": task,
                    "SLURM_LOCALID": task,
                    "JAX_COORDINATOR_PORT": str(port),
                    "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
                },
            )
        )
    try:
        for task in tasks:
            _, errors = task.communicate(timeout=LIMIT)
            assert task.returncode == 0, errors
    finally:
        for task in tasks:
            task.kill()
            task.communicate()
    assert_close(undisturbed[0], dict(np.load(tmp_path / "final.npz")))
