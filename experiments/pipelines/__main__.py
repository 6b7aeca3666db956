"""Images a second of input pipelines, from the same files.

    python -m experiments.pipelines
    python -m experiments.pipelines --pythons torch=PATH tf=PATH
    python -m experiments.pipelines --make DIR --images 400

Makes images of about the size of ImageNet's as ArrayRecord, Parquet and JPEG folders, and times
this package's pipeline, torch's DataLoader and tf.data on them. torch and TensorFlow need not be
installed here: --pythons names interpreters of environments that have them.

    python -m venv torch && torch/bin/pip install torch pillow pyarrow tensorflow-datasets
    python -m venv tf && tf/bin/pip install tensorflow pyarrow array_record

All do the same: shuffle, read, decode the whole JPEG, take a random part of 8 to 100 % of its area,
bring it to 224x224 and make batches of uint8. Each runs in a process of its own, and all are timed
in turn, in rounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import command_line
from experiments.checks import require, require_all
from experiments.command_line import execute
from experiments.data.config import cores
from experiments.files import write_json
from experiments.latency.arguments import check_parents
from experiments.pipelines.making import FORMATS, make
from experiments.report.environment import describe

ROOT = Path(__file__).resolve().parents[2]
WARM = 4  # batches before those that are timed


class Loader(NamedTuple):
    """A pipeline: its module, the interpreter it needs ("" is this one), and its options."""

    module: str
    python: str
    workers: bool = False
    antialias: bool = True


LOADERS = {
    "eejax, threads": Loader("own", ""),
    "eejax, processes": Loader("own", "", workers=True),
    "torch DataLoader": Loader("torch_loader", "torch", workers=True),
    "tf.data": Loader("tf_data", "tf"),
    "tf.data, no antialiasing": Loader("tf_data", "tf", antialias=False),
}


@dataclass(frozen=True)
class Arguments:
    """Time input pipelines on the same files, each in a process of its own."""

    pythons: tuple[str, ...] = ()
    """Interpreters of other frameworks, as torch=PATH and tf=PATH; without one, its pipelines are
    left out."""
    images: int = 2_000
    """Training images that are made."""
    size: int = 224
    """Height and width of the result."""
    batch: int = 64
    """Images a batch."""
    batches: int = 20
    """Batches that are timed in a round."""
    rounds: int = 5
    """Times that each pipeline is timed; the median counts."""
    workers: int | None = None
    """Processes, of pipelines that have them. Default: the cores that may be used."""
    seed: int = 0
    """Of the images."""
    make: Path | None = None
    """Only make the files, in this directory."""
    files: Path | None = None
    """Directory that --make made. Default: the files are made in a temporary one."""
    formats: tuple[Literal["folder", "parquet", "array_record"], ...] = FORMATS
    """Formats of the files."""
    json: Path | None = None
    """File for the rows, as a list."""


def main(argv: Sequence[str]) -> int:
    """Runs a command line; a mistake is one line on stderr, and status 2."""
    console = Console(soft_wrap=True)

    def begin() -> Arguments:
        default = Arguments()
        arguments = command_line.parse(Arguments, "python -m experiments.pipelines", argv, default)
        fields = "images size batch batches rounds workers"
        require_all("", arguments, fields, lambda n: n >= 1, "at least 1")
        require(bool(arguments.formats), "formats", "none", "at least one")
        there = arguments.files is None or all((arguments.files / f).is_dir() for f in FORMATS)
        require(there, "files", arguments.files, "a directory that --make made")
        check_parents(arguments, "json")
        pythons(arguments)
        return arguments

    def work(arguments: Arguments) -> None:
        if arguments.make is not None:
            with console.status("making images"):
                make(arguments.make, arguments.images, arguments.seed)
            console.print(f"{', '.join(FORMATS)} in {arguments.make}")
            return
        environment = describe("experiments.pipelines", argv)
        console.print(environment["device"])
        rows = measure(arguments, console)
        console.print(_table(rows))
        if arguments.json is not None:
            write_json(arguments.json, [{**row, **environment} for row in rows])

    return execute(begin, work, (OSError, RuntimeError))


def pythons(arguments: Arguments) -> dict[str, str]:
    """The interpreters by framework.

    Raises:
      ValueError: if one is not given as torch=PATH or tf=PATH, or is not there.
    """
    found = {"": sys.executable}
    for text in arguments.pythons:
        name, _, path = text.partition("=")
        known = name in ("torch", "tf") and os.access(path, os.X_OK)
        require(known, "pythons", text, "torch=PATH or tf=PATH of an interpreter")
        found[name] = path
    return found


def measure(arguments: Arguments, console: Console) -> list[dict[str, Any]]:
    """A row for each format and pipeline.

    The columns: `format`; `pipeline`; `batch`; `workers`; `images_per_second`, the median;
    `spread`, the interquartile range of the rounds as a fraction of it; `lowest` and `highest`.
    """
    found = pythons(arguments)
    rows = []
    for name, loader in LOADERS.items():
        if loader.python not in found:
            console.print(f"{name}: left out; give --pythons {loader.python}=PATH")
    with tempfile.TemporaryDirectory() as scratch, console.status("making images") as spinner:
        root = arguments.files or Path(scratch)
        if arguments.files is None:
            make(root, arguments.images, arguments.seed)
        for kind in arguments.formats:
            spinner.update(f"timing {kind}")
            names = [name for name, loader in LOADERS.items() if loader.python in found]
            rates = _rates(arguments, found, root / kind, kind, names)
            for name, rate in zip(names, rates, strict=True):
                low, median, high = np.quantile(rate, (0.25, 0.5, 0.75))
                rows.append(
                    {
                        "format": kind,
                        "pipeline": name,
                        "batch": arguments.batch,
                        "workers": _workers(arguments, LOADERS[name]),
                        "images_per_second": float(median),
                        "spread": float((high - low) / median),
                        "lowest": float(rate.min()),
                        "highest": float(rate.max()),
                    }
                )
    return rows


def _workers(arguments: Arguments, loader: Loader) -> int:
    return (arguments.workers or cores()) if loader.workers else 0


def _rates(
    arguments: Arguments, found: dict[str, str], root: Path, kind: str, names: Sequence[str]
) -> np.ndarray:
    """Images a second `[pipelines, rounds]`."""
    running: list[subprocess.Popen[str]] = []
    try:
        for name in names:
            loader = LOADERS[name]
            command = [found[loader.python], "-m", f"experiments.pipelines.{loader.module}"]
            numbers = (arguments.batch, arguments.size, _workers(arguments, loader))
            command += [str(root), kind, *map(str, numbers), str(int(loader.antialias))]
            running.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    cwd=ROOT,
                    env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"},
                )
            )
        seconds = np.array(
            [
                [_ask(process, arguments) for process in running]
                for _ in range(arguments.rounds + 1)  # the first one warms up
            ]
        )
    finally:
        for process in running:
            process.kill()
            process.communicate()
    return arguments.batches * arguments.batch / seconds[1:].T


def _ask(process: subprocess.Popen[str], arguments: Arguments) -> float:
    """Seconds that a pipeline takes for the batches of a round.

    Raises:
      RuntimeError: if it ended, with its last line, or made other batches.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(f"{WARM} {arguments.batches}\n")
        process.stdin.flush()
    except BrokenPipeError:  # it ended; its last line says why
        pass
    for line in process.stdout:
        if line.startswith("answer "):
            answer = json.loads(line.partition(" ")[2])
            expected = [arguments.batch, arguments.size, arguments.size, 3]
            if answer["shape"] != expected or answer["dtype"] != "uint8":
                raise RuntimeError(f"{process.args}: {answer}, not uint8 {expected}")
            return answer["seconds"]
    assert process.stderr is not None
    last = process.stderr.read().strip().splitlines()[-1:]
    raise RuntimeError(f"{process.args} ended: {' '.join(last)}")


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("format", "pipeline", "images/s", "spread", "range", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            row["format"],
            row["pipeline"],
            f"{row['images_per_second']:,.0f}",
            f"{100 * row['spread']:.0f} %",
            f"{row['lowest']:,.0f} to {row['highest']:,.0f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
