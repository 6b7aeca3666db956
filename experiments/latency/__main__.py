"""How long early-exit inference takes: strategies, batch sizes and distributions of exits.

python -m experiments.latency
python -m experiments.latency --help
python -m experiments.latency --network fast --strategies cond compact --batches 1 64
python -m experiments.latency --run runs/digits --json latency.json --picture latency.svg
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.command_line import complain, execute
from experiments.files import write_json
from experiments.latency import plot
from experiments.latency import rows as latency_rows
from experiments.latency.arguments import Arguments, parse
from experiments.latency.distributions import exit_rates
from experiments.latency.plot import milliseconds
from experiments.latency.strategies import is_stream, note
from experiments.latency.workload import Workload, random_workload, run_workload
from experiments.report.environment import describe

COLUMNS = ("images leave", "strategy", "ms", "spread", "ideal", "eff.", "speedup")
COLUMNS += ("eff.*", "speedup*", "pays")
LEGEND = """ms: median for all images of a call; ideal: the plain network's, times the share of the
stages' time that the images need; eff.: ideal / ms; speedup: plain / ms; *: with the plain network
at its best batch; pays: share of images that must leave at the first exit, the others leaving
at the last, to be as fast as that"""


def main(argv: Sequence[str]) -> int:
    """Runs a command line; a mistake is one line on stderr, without a traceback.

    Returns:
      The exit status: 0; 1 if a strategy failed and its rows are missing; 2 for a mistake; 130
      after Ctrl-C.
    """
    console = Console(soft_wrap=True)

    def begin() -> tuple[Arguments, Workload]:
        arguments = parse(argv)
        with console.status("building the network and scoring the images"):
            return arguments, workload(arguments)

    return execute(begin, lambda begun: measure(*begun, argv, console), (OSError,))


def workload(arguments: Arguments) -> Workload:
    """The network and the images that the flags describe.

    Raises:
      ValueError, OSError: if they cannot be had, or have other exits than a distribution; one line.
    """
    count = latency_rows.count_images(arguments)
    if arguments.run is not None:
        served = run_workload(arguments.run, count)
        for name in arguments.distributions:
            exit_rates(name, served.network.num_exits)
        return served
    config, rates = arguments.network_config(), arguments.rates
    for name in ("trained", *arguments.distributions):
        exit_rates(name, config.num_exits, rates)
    served = random_workload(
        config, arguments.policy, arguments.seed, count, arguments.image_size, arguments.classes
    )
    return dataclasses.replace(served, rates=rates)


def measure(arguments: Arguments, workload: Workload, argv: Sequence[str], console: Console) -> int:
    """Times everything, prints and writes it; returns the exit status."""
    environment = describe("experiments.latency", argv)
    console.print(f"{workload.name}\n{environment['device']}")
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    status = 0
    try:
        with console.status("") as spinner:
            progress = latency_rows.Progress(spinner.update, failures.append)
            for group in latency_rows.measured(workload, arguments, progress):
                rows += [{**row, "seed": arguments.seed, **environment} for row in group]
                console.print(*([table(group)] if group else []))
                if arguments.json is not None:
                    write_json(arguments.json, rows)
    except KeyboardInterrupt:
        status = complain("stopped; the rows above were timed.", 130)
    if not rows:
        return status or complain(f"error: nothing could be timed: {'; '.join(failures)}", 1)
    console.print(LEGEND)
    notes = [
        f"a call's fixed overhead: {r['overhead_ms']:.3f} ms" for r in rows if "overhead_ms" in r
    ]
    notes = notes[:1] + [f"auto: {row['explanation']}" for row in rows if "explanation" in row]
    notes += filter(None, (note(name, workload) for name in arguments.strategies))
    console.print("\n".join(notes), markup=False)
    if arguments.picture is not None:
        plot.latency(rows).savefig(arguments.picture, dpi=150)
    for line in failures:
        complain(f"not timed: {line}", 1)
    return status or (1 if failures else 0)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of one batch size for the terminal; 80 columns are enough."""
    first = rows[0]
    stream = is_stream(first["strategy"])
    served = f"a stream of {first['batch']:,} images" if stream else f"batch {first['batch']}"
    title = f"{served}: plain network {milliseconds(first['plain_ms'])} ms, at its best "
    title += f"{milliseconds(first['plain_best_ms'])} (batch {first['plain_best_batch']})"
    shown = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0), pad_edge=False
    )
    for i, name in enumerate(COLUMNS):
        justify = "left" if i < 2 else "right"
        shown.add_column(name, justify=justify, no_wrap=i > 0, overflow="fold")
    order = list(dict.fromkeys(row["distribution"] for row in rows))
    before = ""
    for row in sorted(rows, key=lambda row: order.index(row["distribution"])):
        shown.add_row(
            "" if row["distribution"] == before else row["distribution"],
            row["strategy"],
            milliseconds(row["ms"]),
            _percent(row["spread"]),
            milliseconds(row["ideal_ms"]),
            _percent(row["efficiency"]),
            f"{row['speedup']:.2f}",
            _percent(row["efficiency_best"]),
            f"{row['speedup_best']:.2f}",
            _percent(row["break_even"]),
        )
        before = row["distribution"]
    return shown


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
