"""The configuration of a run: frozen dataclasses, filled by `configs/*.py` and by the command line.

Nothing here imports JAX, so that a mistake is reported before anything slow begins.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

DatasetName = Literal["auto", "cifar10", "cifar100", "fashion_mnist", "digits"]
PolicyName = Literal["max_prob", "entropy", "margin", "gate"]


@dataclass(frozen=True)
class DataConfig:
    """Which images, from where, and how they are split and augmented."""

    name: DatasetName = "auto"
    """Dataset. `auto` is CIFAR-10 where it is there or can be had, else scikit-learn's digits."""
    dir: Path | None = None
    """Directory of prepared tensorflow-datasets. Default: $TFDS_DATA_DIR, else
    ~/tensorflow_datasets."""
    cache: Path | None = None
    """Where decoded images are kept. Default: $XDG_CACHE_HOME/eejax, else ~/.cache/eejax."""
    download: bool = True
    """Fetch what is missing. With --data.no-download nothing touches the network."""
    calibrate: int = 1_000
    """Images held out from training to fit the temperatures."""
    choose: int = 4_000
    """Images held out from training to choose the thresholds."""
    certify: int = 0
    """Images held out from training to certify a risk with (experiments.compare)."""
    limit: int | None = None
    """Use at most this many training images (a quick look, not a result)."""
    flip: bool = True
    """Augmentation: mirror left-right at random."""
    shift: int = 2
    """Augmentation: shift by up to this many pixels, the border reflected."""
    cutout: int = 0
    """Augmentation: side in pixels of a square that is blanked at random; 0 is off."""


@dataclass(frozen=True)
class NetworkConfig:
    """The backbone, and where its exits are."""

    name: str = "fast"
    """Family: `fast` (five blocks, for CPUs), `resnet` (He et al., 2016, depth 6n + 2), `isotropic`
    (equal blocks on patches of 4x4 pixels), or another of docs/models.md: resnet_imagenet, vgg,
    wideresnet, mobilenet, efficientnet, densenet, msdnet, vit, alexnet, lenet."""
    depth: int | None = None
    """resnet: number of layers, 6n + 2; isotropic: number of blocks; and so on. Default: the
    family's own."""
    width: float | None = None
    """Channels of the first block (fast), of the first group (resnet), of all (isotropic), or a
    factor of all of them (mobilenet). Default: the family's own."""
    exits: tuple[float, ...] | None = None
    """Blocks after which an exit sits, from 1, or shares of the multiply-accumulates, below 1; the
    one after the last block is always there. Default: the family's own."""
    options: tuple[str, ...] = ()
    """Further arguments of the family, name=value: size=S patch=8; exits=5 for five spread evenly,
    exits=all."""
    gate: bool = True
    """Heads learn a gate. A soft loss needs it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the backbone; parameters and heads stay float32."""

    def __post_init__(self) -> None:
        # Flags bring floats; whole numbers are meant as such.
        object.__setattr__(self, "width", _whole(self.width))
        if self.exits is not None:
            object.__setattr__(self, "exits", tuple(map(_whole, self.exits)))

    @property
    def words(self) -> str:
        """What it is, on a line, as far as it was given."""
        given = (
            ("depth ", self.depth),
            ("width ", self.width),
            ("exits ", self.exits and " ".join(map(str, self.exits))),
        )
        said = [f"{what}{value}" for what, value in given if value is not None]
        return ", ".join([self.name, *said, *self.options, self.dtype])

    @property
    def blocks(self) -> int:
        """Blocks of the backbone."""
        if self.name == "fast" and self.depth is None and not self.options:
            return 5
        if self.name == "resnet" and not self.options:
            return ((self.depth or 56) - 2) // 2
        return self._counted()[0]

    @property
    def num_exits(self) -> int:
        """E, the last exit included."""
        exits = (2, 3, 4) if self.name == "fast" and self.exits is None else self.exits
        if exits is None or self.options:
            return self._counted()[1]
        return len(exits) + (exits[-1:] != (self.blocks,))

    def _counted(self) -> tuple[int, int]:
        # Only now, because the families import JAX, and a mistake should not wait for that.
        from experiments.train.zoo import counts

        return counts(self)


def _whole(value: float | None) -> float | None:
    return int(value) if value is not None and float(value).is_integer() else value


@dataclass(frozen=True)
class TrainConfig:
    """How the network is trained."""

    loss: Literal["joint", "soft_literal", "soft_auxiliary", "soft_mixture"] = "soft_auxiliary"
    """joint: the sum of the exits' cross-entropies. soft_*: the gates' loss to the letter, with the
    exits' own losses beside it, or as a mixture of losses (Scardapane et al., 2020)."""
    exit_weights: tuple[float, ...] = ()
    """Weight of each exit's cross-entropy. Default: 1 for each."""
    cost_weight: float = 0.0
    """Soft losses: lambda, the price of the expected cost (1 is the whole network's)."""
    label_smoothing: float = 0.1
    """Share of each target that is spread over all classes."""
    epochs: int = 10
    """Passes over the training split."""
    batch: int = 512
    """Samples a step."""
    optimiser: Literal["muon", "sgd", "adam"] = "muon"
    """muon: for convolutions, with Adam for the rest; sgd: with Nesterov momentum."""
    learning_rate: float = 0.02
    """Peak learning rate."""
    adam_learning_rate: float = 0.005
    """muon: peak learning rate of what Adam trains."""
    momentum: float = 0.9
    """sgd: momentum."""
    weight_decay: float = 0.0
    """Decoupled from the gradient for muon and adam."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup: float = 0.15
    """Share of the steps in which the learning rate rises."""
    steps_per_dispatch: int = 10
    """Steps between two looks at the progress; all of them are one call of the compiled program."""
    checkpoint_seconds: float = 60.0
    """A checkpoint is written after this many seconds, after the last step, and on SIGTERM."""


@dataclass(frozen=True)
class PoliciesConfig:
    """When to stop, and to which targets the thresholds are chosen."""

    names: tuple[PolicyName, ...] = ("max_prob", "entropy", "margin", "gate")
    """Policies to compare. The gate takes part only where the loss trains it."""
    budgets: tuple[float, ...] = (0.5, 0.6, 0.75)
    """Mean cost, as fractions of the whole network's multiply-accumulates."""
    drops: tuple[float, ...] = (0.01,)
    """Accuracy that may be lost against the last exit, as fractions: 0.01 is one point."""
    thresholds: tuple[float, ...] = ()
    """Thresholds of your own, reported beside the chosen ones: one for each exit but the last."""
    curve: int = 20
    """Points of the cost curve."""


@dataclass(frozen=True)
class InferenceConfig:
    """What the compiled inference is timed with."""

    policy: PolicyName = "max_prob"
    """Policy that decides."""
    budget: float = 0.6
    """Budget that its thresholds are chosen for."""
    batch: int = 256
    """Batch of the executor `compact`; `cond` is timed at batch 1."""
    repeats: int = 30
    """Timed passes over the batches: 4 of them, or 50 single images."""


@dataclass(frozen=True)
class Config:
    """A run: train an early-exit network, choose thresholds, measure, report."""

    seed: int = 0
    """Of everything that is drawn: splits, parameters, order, augmentation."""
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    policies: PoliciesConfig = field(default_factory=PoliciesConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)


def check(config: Config) -> None:
    """Refuses what cannot be run, before anything slow begins.

    Raises:
      ValueError: the field, what it is, and what it may be.
    """
    network, train, data = config.network, config.train, config.data
    if network.width is not None and not network.width > 0:
        _refuse("network.width", network.width, "something greater than 0")
    depth = network.depth
    if network.name == "resnet" and depth is not None and (depth < 8 or (depth - 2) % 6):
        _refuse("network.depth", depth, "6n + 2: 8, 14, 20, 32, 44, 56, 110 ...")
    exits, blocks = network.exits or (), network.blocks
    shares = bool(exits) and all(0 < e < 1 for e in exits)
    if list(exits) != sorted(set(exits)) or not (
        shares or all(isinstance(e, int) and 1 <= e <= blocks for e in exits)
    ):
        expected = f"increasing block numbers from 1 to {blocks}, or shares between 0 and 1"
        _refuse("network.exits", exits, expected)
    if train.exit_weights and len(train.exit_weights) != network.num_exits:
        raise ValueError(
            f"train.exit_weights: {len(train.exit_weights)} weights for {network.num_exits} exits; "
            f"give {network.num_exits}."
        )
    if config.policies.thresholds and len(config.policies.thresholds) != network.num_exits - 1:
        raise ValueError(
            f"policies.thresholds: {len(config.policies.thresholds)} thresholds for "
            f"{network.num_exits} exits; give {network.num_exits - 1}, one for each exit but "
            "the last."
        )
    if train.loss.startswith("soft") and not network.gate:
        _refuse("network.gate", network.gate, f"True, for the loss {train.loss}")
    if config.inference.policy == "gate" and train.loss == "joint":
        _refuse("inference.policy", "gate", "another, because the joint loss trains no gate")
    positive = {
        "train.epochs": train.epochs,
        "train.batch": train.batch,
        "train.learning_rate": train.learning_rate,
        "train.adam_learning_rate": train.adam_learning_rate,
        "train.steps_per_dispatch": train.steps_per_dispatch,
        "data.calibrate": data.calibrate,
        "data.choose": data.choose,
        "inference.batch": config.inference.batch,
        "inference.repeats": config.inference.repeats,
        "inference.budget": config.inference.budget,
    }
    if data.limit is not None:
        positive["data.limit"] = data.limit
        if data.limit < train.batch:
            _refuse("data.limit", data.limit, f"at least one batch, {train.batch}")
    for name, value in positive.items():
        if not value > 0:
            _refuse(name, value, "something greater than 0")
    for name, value, top in (
        ("train.label_smoothing", train.label_smoothing, 1.0),
        ("train.warmup", train.warmup, 1.0),
        ("train.momentum", train.momentum, 1.0),
    ):
        if not 0 <= value < top:
            _refuse(name, value, f"something in [0, {top:g})")
    for name, value in (
        ("train.weight_decay", train.weight_decay),
        ("train.cost_weight", train.cost_weight),
        ("train.checkpoint_seconds", train.checkpoint_seconds),
        ("data.certify", data.certify),
        ("data.shift", data.shift),
        ("data.cutout", data.cutout),
        *(("policies.drops", d) for d in config.policies.drops),
    ):
        if not value >= 0:
            _refuse(name, value, "something of at least 0")
    for budget in config.policies.budgets:
        if not 0 < budget <= 1:
            _refuse("policies.budgets", budget, "fractions of the whole network, in (0, 1]")
    if config.policies.curve < 2:
        _refuse("policies.curve", config.policies.curve, "at least 2 points")
    if data.dir is not None and not data.dir.is_dir():
        _refuse("data.dir", data.dir, "a directory that is there")


def _refuse(name: str, value: object, expected: str) -> None:
    raise ValueError(f"{name}: {value} cannot be used; give {expected}.")


def to_json(config: Any) -> dict:
    """A dataclass of configuration as plain JSON values."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return {k: plain(v) for k, v in dataclasses.asdict(config).items()}
