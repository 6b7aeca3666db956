"""The main job: train an early-exit network, choose thresholds, measure, report.

python -m experiments.cifar
python -m experiments.cifar --help
python -m experiments.cifar --data.name digits --workdir runs/digits
python -m experiments.cifar --workdir runs/digits --resume
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Runs a command line; a mistake is one line on stderr, without a traceback.

    Returns:
      The exit status: 0; 2 for a mistake; 1 for a training that diverged or checkpoints that
      cannot be read; 128 + n after signal n.
    """
    from experiments.cifar.cli import parse

    try:
        arguments = parse(argv)
        # Only now that the command line is known to be right: JAX takes seconds to import.
        from experiments.cifar import job

        prepared = job.prepare(arguments, argv)
    except (ValueError, OSError) as error:
        return _complain(f"error: {error}", 2)

    from eejax.checkpoint import CheckpointError
    from experiments.train.loop import Stopped

    try:
        job.run(arguments, prepared)
    except (FloatingPointError, CheckpointError) as error:
        return _complain(f"error: {error}", 1)
    except Stopped as stopped:
        return _complain(str(stopped), stopped.code)
    return 0


def _complain(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
