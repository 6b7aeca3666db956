"""The command line of `experiments.latency`, checked. Nothing here imports JAX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from experiments import command_line
from experiments.cifar.config import Config, check
from experiments.evaluate.config import PolicyName
from experiments.train.config import NetworkConfig, TrainConfig

STRATEGIES = ("full", "cond", "compact", "loop", "host", "stream", "auto")
TILED = ("compact", "loop", "host", "stream")
NAMED = ("trained", "first", "last", "uniform")
PICTURES = (".svg", ".png")
# What a finished run brings along, and so cannot be asked for beside it.
OF_RANDOM = (
    *("network", "depth", "width", "exits", "dtype", "image_size", "classes"),
    *("rates", "policy"),
)


@dataclass(frozen=True)
class Arguments:
    """Time strategies of early-exit inference against the plain network: every strategy at every
    batch size and distribution of exits, paired and interleaved, with all that a user pays for
    inside the timer. Without --run the network is random, and so are its images."""

    run: Path | None = None
    """Directory that experiments.cifar made: its network, last checkpoint, test images, policy, and
    the thresholds for its budget. The flags that describe a random network are then left out."""
    network: str = "resnet"
    """Random network: its family, as --network.name of experiments.cifar."""
    depth: int | None = None
    """Random network: number of layers, 6n + 2 (resnet, 56 by default), or of blocks."""
    width: float | None = None
    """Random network: channels of the first block. Default: 16 (resnet), or the family's own."""
    exits: tuple[float, ...] | None = None
    """Random network: blocks after which an exit sits, from 1; the one after the last block is
    always there. Default: three spread evenly before it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Random network: arithmetic of the backbone."""
    image_size: int = 32
    """Random network: side of the images in pixels."""
    classes: int = 10
    """Random network: number of classes."""
    rates: tuple[float, ...] | None = None
    """Random network: share of images that leaves at each exit in the distribution `trained`.
    Default: 0.4 0.25 0.15 0.2; each 0.6 of the one before where there are not four exits."""
    policy: PolicyName = "max_prob"
    """Random network: policy that decides."""
    strategies: tuple[str, ...] = ("full", "cond", "compact", "host", "stream", "auto")
    """What is timed. `loop` is there too; it needs stages that are equal. Tiles of your own are
    added to a name, compact:32,8."""
    batches: tuple[int, ...] = (1, 32, 256)
    """Images a call."""
    distributions: tuple[str, ...] = NAMED
    """Where images leave: trained, first, last, uniform, or the share of each exit as numbers with
    commas between them, 0.5,0.3,0.1,0.1."""
    full_best_batches: tuple[int, ...] = (1, 4, 8, 16, 32, 64, 128, 256)
    """Batches among which the plain network's best is searched; larger ones than are served at once
    do not count."""
    repeats: int = 10
    """Timed runs of each; the median counts."""
    images: int = 10_000
    """Images of a pass of `stream`; 0 leaves it out."""
    long_distributions: tuple[str, ...] = ("trained",)
    """Those of --distributions that `stream` and `auto` are timed with: a pass of the one and the
    choice of the other take long. Where none of them is timed, the first that is."""
    seed: int = 0
    """Of the random network and its images."""
    json: Path | None = None
    """File for the rows, as a list; written after each batch size."""
    picture: Path | None = None
    """File for a picture, .svg or .png."""

    def long(self) -> tuple[str, ...]:
        """The distributions of `stream` and `auto`."""
        found = tuple(d for d in self.distributions if d in self.long_distributions)
        return found or self.distributions[:1]

    def network_config(self) -> NetworkConfig:
        """The random network."""
        bare = NetworkConfig(
            name=self.network,
            depth=self.depth,
            width=self.width,
            exits=self.exits,
            gate=self.policy == "gate",
            dtype=self.dtype,
        )
        if self.exits is not None:
            return bare
        evenly = {max(1, round(bare.blocks * k / 4)) for k in (1, 2, 3)}
        return replace(bare, exits=tuple(sorted(evenly)))


def parse(argv: Sequence[str]) -> Arguments:
    """Arguments from the command line, checked as far as the network need not be known.

    Raises:
      ValueError, FileNotFoundError: a one-line reason.
      SystemExit: `--help` was asked for.
    """
    arguments = command_line.parse(Arguments, "python -m experiments.latency", argv, Arguments())
    _check(arguments)
    return arguments


def rates_of(name: str, exits: int, trained: Sequence[float] | None = None) -> tuple[float, ...]:
    """The share of the images that leaves at each exit, `[E]`.

    Args:
      name: a distribution, as `--distributions` has it.
      exits: E.
      trained: the rates of `trained`; default as `--rates` says.

    Raises:
      ValueError: not a number for each exit, negative ones, or they do not add up to 1.
    """
    if name == "first":
        return (1.0, *[0.0] * (exits - 1))
    if name == "last":
        return (*[0.0] * (exits - 1), 1.0)
    if name == "uniform":
        return (1 / exits,) * exits
    if name == "trained" and trained is None:
        if exits == 4:
            return (0.4, 0.25, 0.15, 0.2)
        falling = [0.6**e for e in range(exits)]
        return tuple(f / sum(falling) for f in falling)
    rates = _numbers(name) if name != "trained" else tuple(trained or ())
    if len(rates) != exits:
        raise ValueError(f"rates {name!r}: {len(rates)} for {exits} exits; give one for each.")
    return rates


def is_stream(strategy: str) -> bool:
    """Whether a strategy, with tiles or without, is `stream`."""
    return strategy.partition(":")[0] == "stream"


def tiles_of(strategy: str) -> tuple[str, tuple[int, ...] | None]:
    """`"compact:32,8"` as `("compact", (32, 8))`; no tiles are None.

    Raises:
      ValueError: no such strategy, tiles that are no numbers, or a strategy without tiles.
    """
    name, _, sizes = strategy.partition(":")
    if name not in STRATEGIES:
        raise ValueError(f"--strategies: {name!r} is none; give some of {', '.join(STRATEGIES)}.")
    if not sizes:
        return name, None
    if name not in TILED or not all(size.isdigit() for size in sizes.split(",")):
        raise ValueError(
            f"--strategies: {strategy!r}; give {', '.join(TILED)} with tiles as in compact:32,8."
        )
    return name, tuple(int(size) for size in sizes.split(","))


def _numbers(name: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(word) for word in name.split(","))
    except ValueError:
        raise ValueError(
            f"--distributions: {name!r} is none; give {', '.join(NAMED)}, or the share of each "
            "exit as numbers with commas between them."
        ) from None
    _check_rates(f"--distributions: {name}", rates)
    return rates


def _check_rates(what: str, rates: Sequence[float]) -> None:
    if not all(r >= 0 for r in rates) or not math.isclose(sum(rates), 1, abs_tol=1e-6):
        raise ValueError(
            f"{what} adds up to {sum(rates):g}; give shares of at least 0 that add up to 1."
        )


def _check(arguments: Arguments) -> None:
    """Raises ValueError or FileNotFoundError for what cannot be run."""
    if arguments.run is not None:
        default = Arguments()
        for field in fields(arguments):
            name = field.name
            if name in OF_RANDOM and getattr(arguments, name) != getattr(default, name):
                flag = name.replace("_", "-")
                raise ValueError(
                    f"--{flag} is for a random network, and --run has its own; leave one out."
                )
        if not (arguments.run / "config.json").is_file():
            raise FileNotFoundError(
                f"--run {arguments.run}: it holds no config.json; give a directory that "
                "experiments.cifar made."
            )
    else:
        network = arguments.network_config()
        try:
            check(Config(network=network, train=TrainConfig(regime="joint")))
        except ValueError as error:
            raise ValueError(str(error).replace("network.", "--")) from None
        if arguments.rates is not None:
            _check_rates("--rates", arguments.rates)
        for name in arguments.distributions:
            rates_of(name, network.num_exits, arguments.rates)
    for name in arguments.strategies:
        tiles_of(name)
    for name in arguments.distributions:
        if name not in NAMED:
            _numbers(name)
    unknown = set(arguments.long_distributions) - {*NAMED, *arguments.distributions}
    if unknown:
        raise ValueError(
            f"--long-distributions: {', '.join(sorted(unknown))} is not timed; give some of "
            f"--distributions, {' '.join(arguments.distributions)}."
        )
    for name in ("strategies", "batches", "distributions"):
        if not getattr(arguments, name):
            raise ValueError(f"--{name}: none given; give at least one.")
    for name in ("image_size", "classes", "repeats", "batches", "full_best_batches"):
        values = getattr(arguments, name)
        for value in values if isinstance(values, tuple) else (values,):
            if value < 1:
                raise ValueError(f"--{name.replace('_', '-')}: {value}; give at least 1.")
    if arguments.images < 0:
        raise ValueError(f"--images: {arguments.images}; give a number of images, or 0.")
    if arguments.picture is not None and arguments.picture.suffix not in PICTURES:
        raise ValueError(f"--picture {arguments.picture}: give a file that ends in .svg or .png.")
    for name in ("json", "picture"):
        path = getattr(arguments, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise FileNotFoundError(
                f"--{name} {path}: there is no directory {path.parent}; make it first."
            )
