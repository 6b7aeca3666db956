"""Configuration of a comparison, regimes, policies, targets, seeds, and its command line.

A grid has a comparison for each pair of a data set and a backbone, its blocks. A block is what the
same command would compare with these flags alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

from eejax.policies import POLICIES
from experiments.checks import require, require_all, require_not_negative, require_positive
from experiments.cifar.config import Config
from experiments.cifar.config import check as check_run
from experiments.command_line import (
    CONFIGS,
    PolicyName,
    Start,
    load_config,
    parse_run,
    parse_some,
    parse_start,
)
from experiments.data.config import DataConfig, DatasetName
from experiments.files import write_json
from experiments.pool import config as pool_config
from experiments.pool.config import PoolConfig
from experiments.train.config import PLAIN_REGIME, NetworkConfig, RegimeName, TrainConfig

Loss = Literal["disagreement", "error"]
Method = Literal["crc", "binomial", "betting", "hoeffding_bentkus"]


@dataclass(frozen=True)
class TargetsConfig:
    """Targets that thresholds are chosen for, on held-out data."""

    budgets: tuple[float, ...] = (0.3, 0.5, 0.7)
    """Mean cost, as fractions of the plain network's multiply-accumulates. The first is the one
    that drift, agreement and exits per class are shown at."""
    budgets_ms: tuple[float, ...] = ()
    """Mean cost in milliseconds for a batch of --timing.batch images, as measured on this device:
    each stage at the speed it has there."""
    drops: tuple[float, ...] = (0.01,)
    """Accuracy that may be lost against the last exit, as fractions: 0.01 is one point."""
    drop_confidence: float = 0.9
    """How often a drop is to be kept on new data, from 0.5 to below 1."""
    geometric: bool = True
    """Choose for the budgets in MSDNet's way too, beside the optimal search."""
    curve: int = 16
    """Points of a cost curve."""


@dataclass(frozen=True)
class GuaranteeConfig:
    """Which risks are certified, on a split that serves nothing else (--data.certify)."""

    policies: tuple[PolicyName, ...] = ("max_prob",)
    """Policies that are certified."""
    risks: tuple[float, ...] = (0.05,)
    """Epsilon: an upper bound of the risk on new data."""
    losses: tuple[Loss, ...] = ("disagreement",)
    """disagreement: another label than the last exit's. error: a wrong label."""
    methods: tuple[Method, ...] = (
        "crc",
        "betting",
        "hoeffding_bentkus",
    )
    """Conformal risk control (on average), or a bound that holds with probability 1 - delta."""
    paths: tuple[Literal["shared", "per exit"], ...] = ("shared", "per exit")
    """One threshold for all exits, or one for each."""
    delta: float = 0.1
    """How often a bound may fail, over draws of the certification split."""
    budgets: tuple[float, ...] = (0.8,)
    """Mean cost that is certified together with the risk by betting, each with half of delta."""


@dataclass(frozen=True)
class StaticConfig:
    """Plain networks that are trained alone, with the same training: the static frontier, and the
    members of the cascade."""

    widths: tuple[float, ...] = (0.5, 0.75)
    """Fractions of --network.width, at full depth."""
    exits: tuple[int, ...] = ()
    """Exits at which plain networks of full width end, from 1. Default: each but the last."""
    enabled: bool = True
    """Train them. With --static.no-enabled there is the plain network alone, and no cascade."""


@dataclass(frozen=True)
class TimingConfig:
    """What is measured in wall-clock time, with the networks of the first seed."""

    policies: tuple[PolicyName, ...] = ("max_prob",)
    """Policies whose compiled inference is timed at each budget."""
    batch: int = 256
    """Images a call, of executor `compact`."""
    repeats: int = 15
    """Interleaved passes, of which the median counts."""
    keep_exits: tuple[float, ...] = (0.5,)
    """Choose which exits to keep for these budgets: fractions of the whole network's time."""


@dataclass(frozen=True)
class DriftConfig:
    """Corrupted test images, made on the fly, under thresholds that were chosen without them."""

    policies: tuple[PolicyName, ...] = ("max_prob",)
    """Policies that are tried on them."""
    kinds: tuple[Literal["noise", "blur", "contrast"], ...] = ("noise", "blur", "contrast")
    """Corruptions."""
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    """How strong, from 1 to 5."""
    images: int = 2_000
    """Test images that are corrupted, each in every way; at most as many as there are."""


@dataclass(frozen=True)
class Comparison:
    """A comparison: regimes x policies x targets x seeds."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each trains every network anew, and divides the held-out images anew."""
    regimes: tuple[RegimeName, ...] = (PLAIN_REGIME, TrainConfig.regime)
    """Ways to train early-exit networks. The others are compared with the first one and the first
    policy. Default: one that trains no gate, and that of the main job."""
    policies: tuple[PolicyName, ...] = tuple(POLICIES)
    """Policies. The gate takes part only where the regime trains it."""
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    """As in the main job; the regimes take the place of train.regime."""
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    guarantee: GuaranteeConfig = field(default_factory=GuaranteeConfig)
    static: StaticConfig = field(default_factory=StaticConfig)
    timing: TimingConfig = field(default_factory=TimingConfig)
    drift: DriftConfig = field(default_factory=DriftConfig)


@dataclass(frozen=True)
class Grid:
    """Several data sets, several backbones: one block for each pair."""

    datasets: tuple[DatasetName, ...] = ()
    """Data sets, each with its own configuration as --data.name would take it."""
    backbones: tuple[str, ...] = ()
    """Backbones, a family with its arguments each: "fast width=8" "resnet depth=20 exits=3,6".
    depth, width and exits are as --network.*, anything else as --network.options. For each data
    set; default: the data set's own."""


@dataclass(frozen=True)
class Arguments:
    """Compare ways of stopping early on equal terms: every regime of training, every policy, every
    target and seed, with baselines, statistics and pictures. What is in --workdir already is not
    computed again, so that a comparison can be interrupted, and grow. Without flags: CIFAR-10 where
    it can be had, else scikit-learn's digits."""

    config: Path | None = None
    """File that sets the fields below; flags override it. Default: configs/compare/DATASET.py."""
    workdir: Path | None = None
    """Directory for everything. Machines that work together share it, or a --bucket. Default:
    runs/compare-DATASET."""
    bucket: str | None = None
    """URL of a bucket, such as s3://bucket/comparison, for results; --workdir is then this
    machine's copy of them. It needs the package of fsspec for it (s3fs, gcsfs)."""
    resume: bool = False
    """Take the configuration that --workdir was begun with; flags override it. If there is none
    yet, begin one, so that a job scheduler can restart the same command."""
    budget_hours: float | None = None
    """Hours of training, of all workers together. Networks begin seed by seed, each only if it is
    forecast to fit, from what networks like it took. The same command goes on with what is left."""
    grid: Annotated[Grid, tyro.conf.arg(name="")] = field(default_factory=Grid)
    pool: Annotated[PoolConfig, tyro.conf.arg(name="")] = field(default_factory=PoolConfig)
    run: Annotated[Comparison, tyro.conf.arg(name="")] = field(default_factory=Comparison)


class Block(NamedTuple):
    """A comparison within a grid.

    Attributes:
      name: of its directory within the working directory; "" if it is the only one.
      config: checked.
      resumed: whether it was begun before, and goes on with its configuration.
    """

    name: str
    config: Comparison
    resumed: bool


PROG = "python -m experiments.compare"
GRID = "grid.json"


def parse(argv: Sequence[str]) -> Arguments:
    """The arguments of `parse_grid`."""
    return parse_grid(argv)[0]


def parse_grid(argv: Sequence[str]) -> tuple[Arguments, list[Block]]:
    """Reads a command line, as `command_line.parse_run`, and checks it before anything slow.

    Returns:
      The arguments, with the configuration of the first block, and all blocks.
    """
    start, grid = parse_start(argv), parse_some(Grid, argv)
    if start.resume and start.workdir is not None and (start.workdir / GRID).is_file():
        begun = json.loads((start.workdir / GRID).read_text())
        grid = Grid(
            grid.datasets or tuple(begun["datasets"]), grid.backbones or tuple(begun["backbones"])
        )
    for name, values in (("datasets", grid.datasets), ("backbones", grid.backbones)):
        require(len(set(values)) == len(values), name, values, "each once")
    blocks = [
        _block(argv, start, dataset, backbone)
        for dataset in grid.datasets or ("",)
        for backbone in grid.backbones or ("",)
    ]
    for _, block in blocks:
        try:
            check(block.config)
        except ValueError as error:
            raise ValueError(f"{block.name}: {error}" if block.name else str(error)) from None
    arguments = blocks[0][0]
    pool_config.check(arguments.pool)
    require_positive("", arguments, "budget_hours")
    names = grid.datasets or (arguments.run.data.name,)
    name = "-".join("digits" if name == "auto" else name for name in names)
    workdir = arguments.workdir or Path("runs") / f"compare-{name}"
    return (
        dataclasses.replace(arguments, workdir=workdir, grid=grid),
        [block for _, block in blocks],
    )


def store_grid(workdir: Path, grid: Grid) -> None:
    """Keeps what a grid is of, for --resume."""
    if grid != Grid():
        write_json(workdir / GRID, dataclasses.asdict(grid))


def _block(
    argv: Sequence[str], start: Start, dataset: str, backbone: str
) -> tuple[Arguments, Block]:
    """The comparison of a data set and a backbone; an empty word leaves it to the flags."""
    words = "-".join(filter(None, (dataset, backbone)))
    name = "".join(c if c.isalnum() or c in "._" else "-" for c in words).strip("-")
    flags = [*argv, *(("--data.name", dataset) if dataset else ()), *backbone_flags(backbone)]
    if name and start.workdir is not None:
        flags += ["--workdir", str(start.workdir / name)]
    arguments, _ = parse_run(Arguments, PROG, flags, default)
    block = Block(name, arguments.run, arguments.resume)
    if name and start.workdir is not None:
        arguments = dataclasses.replace(arguments, workdir=start.workdir)
    return arguments, block


def backbone_flags(words: str) -> list[str]:
    """The flags that a backbone stands for: "resnet depth=20 exits=3,6" and so on.

    Raises:
      ValueError: if an argument is no name=value.
    """
    if not words:
        return []
    family, *arguments = words.split()
    flags, options = ["--network.name", family], []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        require(bool(name and equals and value), "backbones", argument, "name=value")
        if name in ("depth", "width") or (name == "exits" and "," in value):
            flags += [f"--network.{name}", *filter(None, value.split(","))]
        else:
            options.append(argument)
    return [*flags, *(("--network.options", *options) if options else ())]


def default(name: str) -> Comparison:
    """The comparison for a data set: its own, else one around its main job's configuration."""
    path = CONFIGS / "compare" / f"{name}.py"
    if path.is_file():
        return load_config(path, Comparison)
    job = load_config(CONFIGS / f"{name}.py", Config)
    data = dataclasses.replace(job.data, certify=1_000)
    return Comparison(data=data, network=job.network, train=job.train)


def check(config: Comparison) -> None:
    """Checks all that can be checked without reading an image.

    Raises:
      ValueError: if a value cannot be used; one line with the field, its value and what to give.
    """
    exits, targets, guarantee = config.network.num_exits, config.targets, config.guarantee
    for regime in config.regimes:
        train = dataclasses.replace(config.train, regime=regime)
        check_run(Config(data=config.data, network=config.network, train=train))
    for name, values in (
        ("seeds", config.seeds),
        ("regimes", config.regimes),
        ("policies", config.policies),
        ("targets.budgets", targets.budgets),
        ("static.widths", config.static.widths),
        ("static.exits", config.static.exits),
    ):
        require(len(set(values)) == len(values), name, values, "each once")
        require(bool(values) or name.startswith("static"), name, values, "at least one")
    expected = "whole numbers from 0 to 4294967295"
    require_all("", config, "seeds", lambda seed: 0 <= seed < 2**32, expected)
    expected = "at least one before the last block"
    require(exits >= 2, "network.exits", config.network.exits, expected)
    first = config.policies[0]
    expected = "another first: the others are compared with it"
    rule = POLICIES[first]
    require(not rule.baseline and not rule.needs_gate, "policies", first, expected)
    for section, part, fields in (
        ("targets", targets, "budgets"),
        ("guarantee", guarantee, "budgets risks delta"),
    ):
        require_all(section, part, fields, lambda v: 0 < v < 1, "fractions between 0 and 1")
    require_positive("targets", targets, "budgets_ms")
    require_positive("timing", config.timing, "keep_exits batch repeats")
    require_positive("drift", config.drift, "images")
    require_positive("static", config.static, "widths")
    require_not_negative("targets", targets, "drops")
    confidence = targets.drop_confidence
    expected = "at least 0.5 and below 1"
    require(0.5 <= confidence < 1, "targets.drop_confidence", confidence, expected)
    require(targets.curve >= 2, "targets.curve", targets.curve, "at least 2 points")
    expected = "numbers from 1 to 5"
    require_all("drift", config.drift, "severities", lambda s: 1 <= s <= 5, expected)
    expected = f"exits from 1 to {exits - 1}"
    require_all("static", config.static, "exits", lambda e: 1 <= e < exits, expected)
    certified = bool(guarantee.policies and guarantee.risks)
    expected = "images to certify a risk with, 200 or more"
    certify = config.data.certify
    require(certify >= 1 or not certified, "data.certify", certify, expected)
    expected = f"some of --policies: {', '.join(config.policies)}"
    for section in ("guarantee", "timing", "drift"):
        part = getattr(config, section)
        require_all(section, part, "policies", lambda p: p in config.policies, expected)
