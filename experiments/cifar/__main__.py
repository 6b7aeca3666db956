"""The main job: train an early-exit network, choose thresholds, measure, report.

python -m experiments.cifar
python -m experiments.cifar --help
python -m experiments.cifar --data.name digits --workdir runs/digits
python -m experiments.cifar --workdir runs/digits --resume
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from eejax.checkpoint import CheckpointError
from experiments.cifar import job
from experiments.cifar.config import parse
from experiments.command_line import execute
from experiments.memory import use_huge_pages


def main(argv: Sequence[str]) -> int:
    """Runs a command line; a mistake is one line on stderr, without a traceback.

    Returns:
      The exit status: 0; 2 for a mistake; 1 for a training that diverged or checkpoints that
      cannot be read; 128 + n after signal n.
    """
    return execute(
        lambda: job.prepare(parse(argv), argv), job.run, (FloatingPointError, CheckpointError)
    )


if __name__ == "__main__":
    use_huge_pages()
    sys.exit(main(sys.argv[1:]))
