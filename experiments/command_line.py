"""What all commands share: flags and configuration files, one-line mistakes, exit statuses."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import cattrs
import tyro
from cattrs.preconf.json import make_converter

from eejax.policies import POLICIES
from experiments.data.splits import resolve
from experiments.files import write_json
from experiments.train.config import NetworkConfig

T = TypeVar("T")

if TYPE_CHECKING:
    PolicyName = str
else:
    PolicyName = Literal[tuple(POLICIES)]

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
STORED = "config.json"

# What decides how fast images come, and not which, may change when a run is continued.
MAY_CHANGE = frozenset(("data.threads", "data.workers", "data.ahead", "data.cache"))

_converter = make_converter(forbid_extra_keys=True)


@dataclass(frozen=True)
class Start:
    """Flags that decide which configuration the others override.

    Attributes:
      config: file.
      workdir: directory of the run.
      resume: whether to continue the run in it.
      family: `--network.name`.
    """

    config: Path | None = None
    workdir: Path | None = None
    resume: bool = False
    family: Annotated[str | None, tyro.conf.arg(name="network.name")] = None


def parse(kind: type[T], prog: str, argv: Sequence[str], default: T) -> T:
    """Fills a dataclass from flags; other fields are as in `default`.

    Raises:
      ValueError: if a flag cannot be read; one line.
      SystemExit: after `--help`.
    """
    with _one_line_errors():
        options = (tyro.conf.ConsolidateSubcommandArgs,)
        return tyro.cli(kind, prog=prog, args=list(argv), default=default, config=options)


def parse_start(argv: Sequence[str]) -> Start:
    """Reads the flags of `Start` and passes over all others.

    Raises:
      ValueError: if one of them cannot be read, or `--resume` stands without `--workdir`.
    """
    start = parse_some(Start, argv)
    if start.resume and start.workdir is None:
        raise ValueError("--resume needs --workdir, the directory of the run to continue.")
    return start


def parse_some(kind: type[T], argv: Sequence[str]) -> T:
    """Reads the flags of a dataclass, and passes over all others.

    Raises:
      ValueError: if one of them cannot be read; one line.
    """
    known = [flag for flag in argv if flag not in ("-h", "--help")]
    with _one_line_errors():
        return tyro.cli(kind, args=known, return_unknown_args=True, add_help=False)[0]


def parse_run(
    kind: type[T], prog: str, argv: Sequence[str], default: Callable[[str], Any]
) -> tuple[T, Any]:
    """Reads the command line of a run; the data set that it names can be had.

    The configuration begins as that of the run to continue, or of `--config`, or as the data set's
    own; flags override it.

    Args:
      kind: dataclass with `config`, `workdir`, `resume`, and the configuration in `run`.
      prog: the command.
      argv: its flags.
      default: the configuration for a data set.

    Returns:
      The arguments, `resume` true only if there is a run to continue, and the configuration of
      that run, else None.

    Raises:
      ValueError, FileNotFoundError: a one-line reason.
      SystemExit: after `--help`.
    """
    start = parse_start(argv)
    bare: Any = kind()
    config = type(bare.run)
    stored = None
    if start.resume and start.workdir is not None and (start.workdir / STORED).exists():
        stored = from_json(config, read_run(start.workdir)["config"])
    file = stored
    if file is None and start.config is not None:
        file = of_family(load_config(start.config, config), start.family)

    def parsed(run: Any) -> Any:
        return parse(kind, prog, argv, dataclasses.replace(bare, run=run))

    arguments = parsed(of_family(config(), start.family) if file is None else file)
    asked, name = arguments.run.data.name, resolve(arguments.run.data)
    if file is None:
        arguments = parsed(of_family(default(name), start.family))
    # "auto" stays if it had to fall back, so that reading the images can say so.
    data = dataclasses.replace(
        arguments.run.data, name="auto" if asked == "auto" and name == "digits" else name
    )
    run = dataclasses.replace(arguments.run, data=data)
    return dataclasses.replace(arguments, run=run, resume=stored is not None), stored


def load_config(path: Path, kind: type[T]) -> T:
    """The `config` that a Python file defines, a `kind`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it raises an exception, or defines no `config`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: there is no such file.")
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:
        raise ValueError(f"--config {path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, kind):
        expected = f"{kind.__module__}.{kind.__name__}"
        raise ValueError(f"--config {path}: it defines no `config`, an {expected}.")
    return config


def of_family(config: T, family: str | None) -> T:
    """The configuration, of main job or comparison, for another family of networks.

    A width in a file is meant for the file's family: 64 channels there would be a factor of 64
    elsewhere. So another family begins with its own depth, width and exits.
    """
    given: Any = config
    if family is None or family == given.network.name:
        return config
    network = NetworkConfig(name=family, gate=given.network.gate, dtype=given.network.dtype)
    train = dataclasses.replace(given.train, exit_weights=())
    return dataclasses.replace(given, network=network, train=train)


def read_run(workdir: Path) -> dict[str, Any]:
    """The content of a run's `config.json`.

    Raises:
      FileNotFoundError: if there is no run in `workdir`.
      ValueError: if the file cannot be read.
    """
    path = workdir / STORED
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no run in {workdir}.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


def write_run(workdir: Path, config: Any, name: str, environment: Mapping[str, Any]) -> None:
    """Writes a run's `config.json`: its environment, and its configuration with the data set
    `name`, so that a resumed run reads the same images, whatever "auto" would mean by then."""
    stored = to_json(config)
    stored["data"]["name"] = name
    write_json(workdir / STORED, {**environment, "config": stored})


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass of configuration as plain JSON values."""
    return _converter.unstructure(config)


def from_json(kind: type[T], values: dict[str, Any]) -> T:
    """A dataclass of configuration from the values of `to_json`.

    Raises:
      ValueError: if a field is unknown, or a value has another type.
    """
    try:
        return _converter.structure(values, kind)
    except cattrs.BaseValidationError as error:
        reasons = "; ".join(cattrs.transform_error(error, path=kind.__name__))
        raise ValueError(f"the configuration cannot be read: {reasons}.") from error


def refuse_changes(stored: Any, asked: Any) -> None:
    """Raises ValueError with the changed fields, if two configurations differ."""
    before, after = _flat(to_json(stored)), _flat(to_json(asked))
    fixed = (k for k in before if before[k] != after[k] and k not in MAY_CHANGE)
    changed = [f"{k} is {before[k]}, not {after[k]}" for k in fixed]
    if changed:
        raise ValueError(
            f"--resume continues a run as it was begun: {'; '.join(changed)}. Leave the flags out, "
            "or begin another run."
        )


def execute(
    begin: Callable[[], T],
    work: Callable[[T], Any],
    failures: tuple[type[Exception], ...] = (),
) -> int:
    """Runs a command; mistakes and failures are one line on stderr, without a traceback.

    Args:
      begin: reads flags and data; ValueError and OSError are the user's mistakes.
      work: takes the result of `begin`; may return an exit status.
      failures: exceptions of `work` that need no traceback.

    Returns:
      The exit status: 0; 1 after a failure; 2 after a mistake; 130 after Ctrl-C, or the `code` of
      the KeyboardInterrupt.
    """
    try:
        try:
            begun = begin()
        except (ValueError, OSError) as error:
            return complain(f"error: {error}", 2)
        status = work(begun)
        return status if isinstance(status, int) else 0
    except failures as error:
        return complain(f"error: {error}", 1)
    except KeyboardInterrupt as stop:
        words = str(stop) or "interrupted; what is done is kept, continue with the same command"
        return complain(words, getattr(stop, "code", 130))


def complain(message: str, status: int) -> int:
    """Prints a message on stderr and returns the status."""
    print(message, file=sys.stderr)
    return status


@contextlib.contextmanager
def _one_line_errors():
    """Turns tyro's boxed message and exit into a ValueError of one line."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(errors.getvalue())) from None


def _one_line(boxed: str) -> str:
    """The message inside the box that tyro draws."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", boxed)
    lines = [line.strip(" │|╭╮╰╯─\n") for line in text.splitlines()]
    body = [line for line in lines if line and not line.startswith("For full helptext")]
    body = [line for line in body if line.lower() not in ("parsing error", "unrecognized options")]
    return re.sub(r"\s+", " ", " ".join(body)) or "the command line cannot be read; see --help."


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        k: v
        for name, value in values.items()
        for k, v in _flat(value, f"{prefix}.{name}".lstrip(".")).items()
    }
