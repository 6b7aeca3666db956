"""Gating schemes side by side: regimes x policies x targets x seeds, on equal terms.

python -m experiments.compare
python -m experiments.compare --help
python -m experiments.compare --data.name digits
python -m experiments.compare --workdir runs/compare-digits --resume --seeds 0 1 2 3
python -m experiments.compare --datasets digits fashion_mnist --backbones fast "resnet depth=20"
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.command_line import execute
from experiments.compare import job
from experiments.compare.config import parse_grid
from experiments.memory import use_huge_pages
from experiments.pool.jobs import Unavailable


def main(argv: Sequence[str]) -> int:
    """Runs a command line; a mistake is one line on stderr, without a traceback.

    Returns:
      The exit status: 0; 2 for a mistake; 1 where nothing could be compared, because every network
      failed or a cluster does not answer; 130 when it was interrupted.
    """
    failures = job.NothingToCompare, Unavailable
    return execute(lambda: job.prepare(*parse_grid(argv), argv), job.run, failures)


if __name__ == "__main__":
    use_huge_pages()
    sys.exit(main(sys.argv[1:]))
