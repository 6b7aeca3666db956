"""Kills runs of the main job at random moments, resumes them each time, and compares their end with
that of a run that was left alone: a directory, the number of kills, a seed, then flags.

    PYTHONPATH=. python .ci/kills.py runs/kills 20 0 --data.name cifar10 --data.limit 10000 \\
        --network.width 8 --train.epochs 3 --train.checkpoint-seconds 2 --inference.repeats 1

A moment lies between the start of a process and half of the time that the undisturbed run took, so
starts, compilation, training and checkpoints are all hit. A run that ends is compared, and another
is begun.
"""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import safetensors.numpy

from eejax import bundle

directory, kills, seed, *flags = sys.argv[1:]
place, moments = Path(directory), random.Random(int(seed))


def start(name: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.cifar", *flags, "--workdir", str(place / name)]
    return subprocess.Popen([*command, "--resume"], stdout=subprocess.DEVNULL)


def variables(name: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(place / name / bundle.SUBDIRECTORY / bundle.WEIGHTS)


def last_step(name: str) -> int:
    steps = [int(p.name) for p in (place / name / "checkpoints").glob("*") if p.name.isdigit()]
    return max(steps, default=0)


began = time.monotonic()
assert start("alone").wait() == 0
took = time.monotonic() - began
print(f"undisturbed: {took:.0f} s, {last_step('alone')} steps", flush=True)


def compare() -> None:
    expected, found = variables("alone"), variables("killed")
    assert expected.keys() == found.keys()
    for name in expected:
        if name.startswith(bundle.VARIABLES):
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    print(f"finished: all {len(expected)} arrays are identical", flush=True)


done = 0
while done < int(kills):
    process = start("killed")
    wait = moments.uniform(0, took / 2)
    try:
        code = process.wait(wait)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        done += 1
        print(f"kill {done}: after {wait:.1f} s, at step {last_step('killed')}", flush=True)
    else:
        assert code == 0, code
        compare()
        shutil.rmtree(place / "killed")
assert start("killed").wait() == 0
compare()
