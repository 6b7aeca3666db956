"""The flags of `experiments.latency`, and their checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eejax.policies import POLICIES
from experiments import command_line
from experiments.checks import require, require_all
from experiments.command_line import PolicyName
from experiments.latency.distributions import NAMED
from experiments.latency.strategies import split_strategy
from experiments.train.config import FamilyName, NetworkConfig, TrainConfig, check

# Fields that describe a random network.
OF_RANDOM = ("network", "depth", "width", "exits", "dtype", "image_size", "classes")
OF_RANDOM += ("rates", "policy")


@dataclass(frozen=True)
class Arguments:
    """Time strategies of early-exit inference against the plain network: every strategy at every
    batch size and distribution of exits, paired and interleaved, with everything that a user pays
    for inside the timer. Without --run the network and its images are random."""

    run: Path | None = None
    """Directory that experiments.cifar made: its network, policy, thresholds and test images. The
    flags that describe a random network are then left out."""
    network: FamilyName = "resnet"
    """Random network: its family, as --network.name of experiments.cifar."""
    depth: int | None = None
    """Random network: number of layers, 6n + 2 (resnet, 56 by default), or of blocks."""
    width: float | None = None
    """Random network: channels of the first block. Default: 16 (resnet), or the family's own."""
    exits: tuple[float, ...] | None = None
    """Random network: blocks after which an exit sits, from 1; the one after the last block is
    always there. Default: three, evenly spaced before it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Random network: arithmetic of the backbone."""
    image_size: int = 32
    """Random network: side of the images in pixels."""
    classes: int = 10
    """Random network: number of classes."""
    rates: tuple[float, ...] | None = None
    """Random network: share of images that leaves at each exit in the distribution `trained`.
    Default: 0.4 0.25 0.15 0.2; with other than four exits, each 0.6 of the one before."""
    policy: PolicyName = "max_prob"
    """Random network: policy that decides."""
    strategies: tuple[str, ...] = ("full", "cond", "compact", "host", "stream", "auto")
    """Strategies; also `loop`, for networks with equal stages. Tiles may follow a name:
    compact:32,8."""
    batches: tuple[int, ...] = (1, 32, 256)
    """Images a call."""
    distributions: tuple[str, ...] = NAMED
    """Where images leave: trained, first, last, uniform, or the share of each exit as numbers with
    commas between them, 0.5,0.3,0.1,0.1."""
    plain_batches: tuple[int, ...] = (1, 4, 8, 16, 32, 64, 128, 256)
    """Batches among which the plain network's best is searched, up to the batch that is served."""
    repeats: int = 10
    """Timed runs of each strategy; the median counts."""
    images: int = 10_000
    """Images of a pass of `stream`; 0 leaves it out."""
    long_distributions: tuple[str, ...] = ("trained",)
    """Those of --distributions that `stream` and `auto` are timed with, which take long. Default
    where none of them is timed: the first that is."""
    seed: int = 0
    """Seed of the random network and its images."""
    json: Path | None = None
    """File for the rows, as a list; written after each batch size."""
    picture: Path | None = None
    """File for a picture, .svg or .png."""

    def long(self) -> tuple[str, ...]:
        """The distributions of `stream` and `auto`."""
        timed = tuple(d for d in self.distributions if d in self.long_distributions)
        return timed or self.distributions[:1]

    def network_config(self) -> NetworkConfig:
        """The random network."""
        given = {name: getattr(self, name) for name in ("depth", "width", "exits", "dtype")}
        return spaced(
            NetworkConfig(name=self.network, gate=POLICIES[self.policy].needs_gate, **given)
        )


def parse(argv: Sequence[str]) -> Arguments:
    """Arguments from the command line, checked as far as no network is needed.

    Raises:
      ValueError, FileNotFoundError: a one-line reason.
      SystemExit: after `--help`.
    """
    arguments = command_line.parse(Arguments, "python -m experiments.latency", argv, Arguments())
    if arguments.run is None:
        arguments.network_config()
    for name in OF_RANDOM if arguments.run is not None else ():
        if getattr(arguments, name) != getattr(Arguments(), name):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is for a random network, not for --run; leave one out.")
    for name in arguments.strategies:
        split_strategy(name)
    for name in ("strategies", "batches", "distributions"):
        require(bool(getattr(arguments, name)), name, "none", "at least one")
    counted = "image_size classes repeats batches plain_batches"
    require_all("", arguments, counted, lambda n: n >= 1, "at least 1")
    require_all("", arguments, "images", lambda n: n >= 0, "a number of images, or 0")
    known = {*NAMED, *arguments.distributions}
    words = f"some of --distributions, {' '.join(arguments.distributions)}"
    require_all("", arguments, "long_distributions", lambda name: name in known, words)
    svg_or_png = "a file that ends in .svg or .png"
    require_all("", arguments, "picture", lambda path: path.suffix in (".svg", ".png"), svg_or_png)
    check_parents(arguments, "json", "picture")
    return arguments


def spaced(config: NetworkConfig) -> NetworkConfig:
    """A network with three exits evenly spaced before the last, if it has no exits given; checked.

    Raises:
      ValueError: if a value cannot be used, or the family refuses an argument.
    """
    try:
        if config.exits is None:
            exits = sorted({max(1, round(config.blocks * k / 4)) for k in (1, 2, 3)})
            config = dataclasses.replace(config, exits=tuple(exits))
        # Without training no gate is needed.
        check(dataclasses.replace(config, gate=True), TrainConfig())
    except ValueError as error:
        raise ValueError(str(error).replace("network.", "--")) from None
    return config


def check_parents(arguments: object, *names: str) -> None:
    """Raises FileNotFoundError if a file's directory does not exist.

    Args:
      arguments: a dataclass of flags.
      names: its fields that are paths, or None.
    """
    for name in names:
        path: Path | None = getattr(arguments, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"--{name} {path}: there is no directory {path.parent}.")
