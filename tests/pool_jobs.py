"""Jobs that worker processes import. Nothing here imports JAX."""

import os
import signal
import time
from pathlib import Path


def divide(a, b):
    return a / b


def die_at_first(folder, name):
    """Is killed when it is called for the first time."""
    mark = Path(folder) / name
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{name} at last"


def die(folder, name):
    """Is killed every time."""
    with (Path(folder) / name).open("a") as file:
        file.write("x")
    os.kill(os.getpid(), signal.SIGKILL)


def note(folder, name):
    """Tells how often it was called."""
    with (Path(folder) / name).open("a") as file:
        file.write("x")
    return name


def be_told_to_end_at_first(folder, name):
    """Ends as a training does that saves its state on SIGTERM."""
    mark = Path(folder) / name
    if not mark.exists():
        mark.touch()
        raise KeyboardInterrupt("SIGTERM: saved after step 3 of 8")
    return f"{name} at last"


def unpicklable():
    return lambda: None


def run_on(folder):
    (Path(folder) / "runs").write_text(str(os.getpid()))
    time.sleep(60)
