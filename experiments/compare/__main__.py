"""Gating schemes side by side: regimes x policies x targets x seeds, on equal terms.

python -m experiments.compare
python -m experiments.compare --help
python -m experiments.compare --data.name digits
python -m experiments.compare --workdir runs/compare-digits --resume --seeds 0 1 2 3
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Runs a command line; a mistake is one line on stderr, without a traceback.

    Returns:
      The exit status: 0; 2 for a mistake; 1 where nothing could be compared, because every network
      failed; 130 when it was interrupted.
    """
    from experiments.compare.cli import parse

    try:
        try:
            arguments = parse(argv)
            # Only now that the command line is known to be right: JAX takes seconds to import.
            from experiments.compare import job as compare_job

            prepared = compare_job.prepare(arguments, argv)
        except (ValueError, OSError) as error:
            return _complain(f"error: {error}", 2)
        try:
            compare_job.run(arguments, prepared)
        except compare_job.NothingToCompare as error:
            return _complain(f"error: {error}", 1)
    except KeyboardInterrupt:
        words = "interrupted; what is done is kept, continue with the same command"
        return _complain(words, 130)
    return 0


def _complain(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
