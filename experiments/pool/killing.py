"""Jobs that commit a small result each, and what kills their workers. It imports no JAX."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.store import Store, claimed, commit, names

RESULTS, WORKERS, WINS = "results", "workers", "wins"


def cell(workdir: Path, seed: int, number: int, seconds: float) -> None:
    """A job: writes its result in two pieces, and commits it."""
    _register(workdir)
    name, store = f"{RESULTS}/{number}.json", Store(workdir)
    with claimed(workdir / name) as scratch:
        if (workdir / name).exists():
            return
        draws = hashlib.sha256(f"{seed} {number}".encode()).digest()
        text = json.dumps({"number": number, "draws": list(draws)})
        draft = scratch / "draft"
        with draft.open("w") as file:
            for piece in (text[:20], text[20:]):
                file.write(piece)
                file.flush()
                time.sleep(seconds / 2)
        if commit(store, draft, name):
            with (workdir / WINS).open("a") as file:
                file.write(f"{number}\n")


def disturb(
    command: Sequence[str], workdir: Path, cells: int, kills: int, driver_kills: int, seed: int
) -> tuple[int, int, int]:
    """Runs a driver until it ends by itself, and kills it and its workers meanwhile.

    Args:
      command: of the driver, which goes on where it was when it is run again.
      workdir: where results and registered workers are.
      cells: results that there will be.
      kills: of workers. Each comes when a number of results is there that is drawn.
      driver_kills: of the driver.
      seed: of what is drawn.

    Returns:
      How many workers and drivers were killed, and the exit status of the last driver.
    """
    rng = random.Random(seed)
    share = range(1, max(int(0.9 * cells), 2))
    moments = sorted(rng.choices(share, k=kills))
    driver_moments = sorted(rng.choices(share, k=driver_kills))
    workers = drivers = 0
    while True:
        driver = subprocess.Popen(command)
        try:
            while driver.poll() is None:
                time.sleep(0.01)
                done = len(names(Store(workdir), RESULTS))
                if workers < kills and done >= moments[workers]:
                    workers += _kill_one(workdir, rng)
                if drivers < driver_kills and done >= driver_moments[drivers]:
                    drivers += 1
                    driver.kill()
                    driver.wait()
                    break
            else:
                return workers, drivers, driver.returncode
        finally:
            driver.kill()


def _register(workdir: Path) -> None:
    """Tells whom to kill: this process, and since when it runs, as numbers are used again."""
    place = workdir / WORKERS / f"{os.getpid()}-{_started(os.getpid())}"
    place.touch()


def _kill_one(workdir: Path, rng: random.Random) -> bool:
    """Kills a worker that runs; whether there was one."""
    registered = sorted(os.listdir(workdir / WORKERS))
    rng.shuffle(registered)
    for name in registered:
        number, started = name.split("-")
        try:
            process = os.pidfd_open(int(number))
        except ProcessLookupError:
            (workdir / WORKERS / name).unlink()
            continue
        try:
            if _started(int(number)) == started:
                signal.pidfd_send_signal(process, signal.SIGKILL)
                (workdir / WORKERS / name).unlink()
                return True
        except ProcessLookupError:
            pass
        finally:
            os.close(process)
    return False


def _started(process: int) -> str:
    """When a process of this machine began, in ticks of its clock; "" if there is none."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return ""
    return stat.rsplit(")", 1)[1].split()[19]
