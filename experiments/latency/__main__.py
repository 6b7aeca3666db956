"""How long early-exit inference takes: strategies, batch sizes and distributions of exits.

python -m experiments.latency
python -m experiments.latency --help
python -m experiments.latency --network fast --strategies cond compact --batches 1 64
python -m experiments.latency --run runs/digits --json latency.json --picture latency.svg
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from experiments.latency.flags import Arguments

COLUMNS = ("images leave", "strategy", "ms", "spread", "ideal", "eff.", "speedup")
COLUMNS += ("to best", "pays at")
LEGEND = """ms: median for all images of a call; ideal: the time of what each image needs, at the
whole network's best batch; eff.: ideal / ms; speedup: against the whole network at this batch; to
best: against it at its best; pays at: share of images that must leave at the first exit, the
others leaving at the last"""


def main(argv: Sequence[str]) -> int:
    """Runs a command line; a mistake is one line on stderr, without a traceback.

    Returns:
      The exit status: 0; 1 if a strategy failed and its rows are missing; 2 for a mistake; 130
      after Ctrl-C.
    """
    from experiments.latency.flags import parse

    try:
        arguments = parse(argv)
    except (ValueError, OSError) as error:
        return _complain(f"error: {error}", 2)
    # Only now that the command line is known to be right: JAX takes seconds to import.
    from eejax.checkpoint import CheckpointError
    from experiments.latency.subject import subject

    console = Console(soft_wrap=True)
    try:
        with console.status("making the network and setting thresholds"):
            made = subject(arguments)
    except (ValueError, OSError, CheckpointError) as error:
        return _complain(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _complain("stopped; nothing was timed yet.", 130)
    return _measure(arguments, argv, made, console)


def _measure(arguments: Arguments, argv: Sequence[str], subject: Any, console: Console) -> int:
    """Times everything, shows and writes it; the exit status."""
    from experiments.latency import plot as latency_plot
    from experiments.latency.rows import Show, groups
    from experiments.report import report
    from experiments.report.environment import circumstances

    now = datetime.datetime.now().astimezone()
    around = circumstances("experiments.latency", argv, now)
    console.print(f"{subject.name}\n{around['device']}")
    rows: list[dict[str, Any]] = []
    failures: list[str] = []

    def failed(line: str) -> None:
        failures.append(line)
        console.print(line, style="bold yellow", markup=False)

    status = 0
    try:
        with console.status("") as spinner:
            show = Show(spinner.update, lambda line: console.print(line, markup=False), failed)
            for group in groups(subject, arguments, show):
                rows += [{**row, "seed": arguments.seed, **around} for row in group]
                lines = [_title(group[0]), *map(_line, group)] if group else []
                console.print("\n".join(lines), markup=False)
                if arguments.json is not None:
                    report.write_json(arguments.json, rows)
    except KeyboardInterrupt:
        status = _complain("stopped; what follows is what was timed so far.", 130)
    except OSError as error:
        return _complain(f"error: {error}", 2)
    if not rows:
        return status or _complain("error: nothing could be timed.", 1)
    console.print(tables(rows))
    for row in rows:
        if "overhead_ms" in row:
            console.print(f"a call's fixed overhead: {row['overhead_ms']:.3f} ms")
            break
    for row in rows:
        if "explanation" in row:
            console.print(f"auto, {row['distribution']}: {row['explanation']}", markup=False)
    if arguments.picture is not None:
        try:
            latency_plot.save(arguments.picture, rows)
        except OSError as error:
            return _complain(f"error: {error}", 2)
    for line in failures:
        _complain(f"not timed: {line}", 1)
    return status or (1 if failures else 0)


def tables(rows: Sequence[dict[str, Any]]) -> Group:
    """The rows for the terminal, a table a batch size; 80 columns are enough."""
    from experiments.latency.plot import grouped

    parts: list[Any] = []
    for group in grouped(rows):
        shown = Table(
            box=box.SIMPLE_HEAD,
            title=_title(group[0]),
            title_justify="left",
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for name in COLUMNS:
            justify = "left" if name in COLUMNS[:2] else "right"
            shown.add_column(name, justify=justify, no_wrap=name != COLUMNS[0], overflow="fold")
        order = list(dict.fromkeys(row["distribution"] for row in group))
        before = ""
        for row in sorted(group, key=lambda row: order.index(row["distribution"])):
            pays = row["break_even"]
            again = row["distribution"] == before
            before = row["distribution"]
            shown.add_row(
                "" if again else before,
                row["strategy"],
                _ms(row["ms"]),
                f"{100 * row['spread']:.0f} %",
                _ms(row["ideal_ms"]),
                f"{100 * row['efficiency']:.0f} %",
                f"{row['speedup']:.2f}",
                f"{row['speedup_best']:.2f}",
                "-" if pays is None else f"{100 * pays:.0f} %",
            )
        parts.append(shown)
    return Group(*parts, Text(LEGEND))


def _title(row: dict[str, Any]) -> str:
    """What all rows of a batch size share."""
    from experiments.latency.flags import is_stream

    what = f"batch {row['batch']}"
    if is_stream(row["strategy"]):
        what = f"a stream of {row['batch']:,} images"
    return (
        f"{what}: whole network {_ms(row['full_ms'])} ms, at its best {_ms(row['full_best_ms'])} "
        f"(batch {row['full_best_batch']})"
    )


def _line(row: dict[str, Any]) -> str:
    """A row as it is known."""
    left = " ".join(f"{100 * share:.0f}" for share in row["exit_fractions"])
    chosen = f" ({row['chosen']})" if "chosen" in row else ""
    return (
        f"  {row['distribution']}, {row['strategy']}{chosen}: {_ms(row['ms'])} ms, "
        f"ideal {_ms(row['ideal_ms'])}; exits take {left} %"
    )


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _complain(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
