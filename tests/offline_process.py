"""`eejax predict` in a process that kills itself at its n-th step to or from the disk.

    python offline_process.py N predict ...

A step is a sync, a rename or a link. The process ends before it, at a sync with half of the file
written, as if the machine had stopped there.
"""

import os
import signal
import stat
import sys

from eejax import commands

SYNC = os.fsync


def dying(step, left):
    """A step that ends the process when none is left."""

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            if step is SYNC:
                halve(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args, **kwargs)

    return counted


def halve(descriptor):
    """Cuts a file, but not a directory, to half of its size."""
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode):
        os.ftruncate(descriptor, found.st_size // 2)


if __name__ == "__main__":
    steps = [int(sys.argv[1])]
    for name in ("fsync", "replace", "link"):
        setattr(os, name, dying(getattr(os, name), steps))
    sys.exit(commands.main(sys.argv[2:]))
