"""The command line: flags and files to a `Config`, and a one-line reason where that cannot be.

Nothing here imports JAX.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import re
import runpy
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from experiments.config import Config, NetworkConfig, check, to_json
from experiments.data.splits import resolve

Made = TypeVar("Made")

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@dataclass(frozen=True)
class Arguments:
    """Train an early-exit network, choose thresholds on held-out data, time compiled inference, and
    write a report. Without flags: CIFAR-10 where it can be had, else scikit-learn's digits."""

    config: Path | None = None
    """File that sets the fields below; flags override it. Default: configs/DATASET.py."""
    workdir: Path | None = None
    """Directory for everything the run makes. Default: a new one under runs/."""
    resume: bool = False
    """Continue the run in --workdir, with the configuration it has."""
    run: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


def parse(argv: Sequence[str]) -> Arguments:
    """Arguments from the command line, checked; the data set that they name can be had.

    Raises:
      ValueError, FileNotFoundError: a one-line reason, before anything is downloaded, compiled or
        written.
      SystemExit: `--help` was asked for.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early.add_argument("--workdir", type=Path)
    early.add_argument("--resume", action="store_true")
    early.add_argument("--data.name", dest="name")
    early.add_argument("--network.name", dest="family")
    early.error = _raise  # type: ignore[method-assign]
    known, _ = early.parse_known_args([a for a in argv if a not in ("-h", "--help")])

    if known.resume:
        if known.workdir is None:
            raise ValueError("--resume needs --workdir, the directory of the run to continue.")
        stored = read_run(known.workdir)["config"]
        defaults = Arguments(workdir=known.workdir, resume=True, run=from_json(Config, stored))
    elif known.config is not None:
        defaults = Arguments(
            config=known.config, run=of_family(load_config(known.config), known.family)
        )
    else:
        defaults = Arguments(run=of_family(Config(), known.family))
    arguments = _tyro(argv, defaults)

    if known.resume:
        _refuse_changes(defaults.run, arguments.run)
        check(arguments.run)
        return arguments
    # Checked before and after the data set is known: a mistake should not wait for a look at the
    # network, and the data set may bring another configuration.
    check(arguments.run)
    asked = arguments.run.data.name
    name = resolve(arguments.run.data)
    if known.config is None:
        own = of_family(load_config(CONFIGS / f"{name}.py"), known.family)
        arguments = _tyro(argv, Arguments(run=own))
        check(arguments.run)
        # "auto" stays, so that loading the images can say that they are a fall-back.
        images = dataclasses.replace(arguments.run.data, name=asked)
        arguments = dataclasses.replace(
            arguments, run=dataclasses.replace(arguments.run, data=images)
        )
    if arguments.workdir is not None and (arguments.workdir / "config.json").exists():
        raise ValueError(
            f"{arguments.workdir} holds a run already; add --resume to continue it, or give "
            "another --workdir."
        )
    return arguments


def load_config(path: Path, kind: type[Made] = Config) -> Made:
    """The `config` that a Python file defines, a `kind`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it does not run, or defines no `config`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: there is no such file.")
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:
        raise ValueError(f"--config {path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, kind):
        wanted = f"{kind.__module__}.{kind.__name__}"
        raise ValueError(f"--config {path}: it defines no `config`, an {wanted}.")
    return config


def of_family(run: Made, family: str | None) -> Made:
    """The configuration, a `Config` or a `Comparison`, for another family of networks.

    What a file says of the network is meant for its own: 64 channels there would be a factor of 64
    elsewhere. So another family begins with its own depth, width and exits.
    """
    given: Any = run
    if family is None or family == given.network.name:
        return run
    network = NetworkConfig(name=family, gate=given.network.gate, dtype=given.network.dtype)
    train = dataclasses.replace(given.train, exit_weights=())
    return dataclasses.replace(given, network=network, train=train)


def read_run(workdir: Path) -> dict[str, Any]:
    """What a run wrote into its `config.json`.

    Raises:
      FileNotFoundError: there is no run in `workdir`.
      ValueError: the file cannot be read.
    """
    path = workdir / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"--resume: there is no run in {workdir}.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"--resume: {path} cannot be read: {error}.") from error


def from_json(kind: type, values: dict[str, Any]) -> Any:
    """A dataclass of `experiments.config` from what `to_json` made of it.

    Raises:
      ValueError: a field that it does not have.
    """
    hints = typing.get_type_hints(kind)
    unknown = set(values) - set(hints)
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}.")

    def typed(hint: Any, value: Any) -> Any:
        if dataclasses.is_dataclass(hint):
            return from_json(typing.cast(type, hint), value)
        if isinstance(value, list):
            return tuple(value)
        if value is not None and Path in typing.get_args(hint):
            return Path(value)
        return value

    return kind(**{name: typed(hints[name], value) for name, value in values.items()})


def command_line(kind: type, prog: str, argv: Sequence[str], default: Any) -> Any:
    """A dataclass filled from flags; what they leave out is as in `default`.

    Raises:
      ValueError: a one-line reason.
      SystemExit: `--help` was asked for.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                kind,
                prog=prog,
                args=list(argv),
                default=default,
                config=(tyro.conf.ConsolidateSubcommandArgs,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(errors.getvalue())) from None


def _tyro(argv: Sequence[str], defaults: Arguments) -> Arguments:
    return command_line(Arguments, "python -m experiments.cifar", argv, defaults)


def _one_line(boxed: str) -> str:
    """The message inside the box that tyro draws."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", boxed)
    lines = [line.strip(" │|╭╮╰╯─\n") for line in text.splitlines()]
    body = [line for line in lines if line and not line.startswith("For full helptext")]
    body = [line for line in body if line.lower() not in ("parsing error", "unrecognized options")]
    return re.sub(r"\s+", " ", " ".join(body)) or "the command line cannot be read; see --help."


def _refuse_changes(stored: Config, asked: Config) -> None:
    def flat(values: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(values, dict):
            return {prefix: values}
        return {
            k: v
            for name, value in values.items()
            for k, v in flat(value, f"{prefix}.{name}".lstrip(".")).items()
        }

    before, after = flat(to_json(stored)), flat(to_json(asked))
    changed = [f"{k} is {before[k]}, not {after[k]}" for k in before if before[k] != after[k]]
    if changed:
        raise ValueError(
            f"--resume continues a run as it was begun: {'; '.join(changed)}. Leave the flags out, "
            "or begin another run."
        )


def _raise(message: str) -> typing.NoReturn:
    raise ValueError(message)
