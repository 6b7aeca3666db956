"""The main job: train an early-exit network, choose thresholds, measure, report.

python -m experiments.cifar
python -m experiments.cifar --help
python -m experiments.cifar --data.name digits --workdir runs/digits
python -m experiments.cifar --workdir runs/digits --resume
python -m experiments.cifar --distributed.processes 2
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from eejax.checkpoint import CheckpointError
from experiments import distributed
from experiments.cifar import job
from experiments.cifar.config import Arguments, parse
from experiments.command_line import execute
from experiments.data.records import RecordError
from experiments.memory import use_huge_pages


def main(argv: Sequence[str]) -> int:
    """Runs a command line; a mistake is one line on stderr, without a traceback.

    Returns:
      The exit status: 0; 2 for a mistake; 1 for a training that diverged, or checkpoints or
      images that cannot be read; 128 + n after signal n.
    """

    def begin() -> Arguments | job.Prepared:
        arguments = parse(argv)
        to_start = distributed.to_start(arguments.distributed)
        return arguments if to_start else job.prepare(arguments, argv)

    def work(begun: Arguments | job.Prepared) -> Any:
        if isinstance(begun, Arguments):
            return distributed.start("experiments.cifar", argv, begun.distributed)
        with distributed.ending_together((*failures, KeyboardInterrupt)):
            return job.run(begun)

    failures = FloatingPointError, CheckpointError, RecordError
    return execute(begin, work, failures)


if __name__ == "__main__":
    use_huge_pages()
    sys.exit(main(sys.argv[1:]))
