"""Configuration of the network and its training, and the network that a configuration describes."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from eejax.models import FAMILIES, build
from eejax.network import EarlyExitNetwork
from eejax.training import REGIMES
from experiments.checks import require, require_all, require_not_negative, require_positive

if TYPE_CHECKING:
    FamilyName = RegimeName = str
else:
    FamilyName = Literal[tuple(FAMILIES)]
    RegimeName = Literal[tuple(REGIMES)]

# A plain network has no gate to train: the first regime that trains none is ordinary training.
PLAIN_REGIME = next(name for name, regime in REGIMES.items() if not regime.trains_gate)


@dataclass(frozen=True)
class NetworkConfig:
    """The backbone, and where its exits are."""

    name: FamilyName = "fast"
    """Family: `fast` (six blocks, for CPUs), `resnet` (He et al., 2016, depth 6n + 2), `isotropic`
    (equal blocks on patches of 4x4 pixels), or another of docs/models.md."""
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
    """Heads learn a gate. The regimes soft_* and joint_gates need it."""
    gate_reads: Literal["features", "uncertainty", "evidence"] = "features"
    """What the gate is linear on: the head's features; statistics of its probabilities; or those
    and the answer of the head before, without gradient."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the backbone; parameters and heads stay float32."""

    def __post_init__(self) -> None:
        # Flags bring floats; whole numbers are meant as such.
        object.__setattr__(self, "width", _whole(self.width))
        if self.exits is not None:
            object.__setattr__(self, "exits", tuple(map(_whole, self.exits)))

    @property
    def words(self) -> str:
        """The family and the values that differ from its defaults, on one line."""
        given = (
            ("depth ", self.depth),
            ("width ", self.width),
            ("exits ", self.exits and " ".join(map(str, self.exits))),
        )
        parts = [f"{name}{value}" for name, value in given if value is not None]
        return ", ".join([self.name, *parts, *self.options, self.dtype])

    @property
    def blocks(self) -> int:
        """Number of blocks of the backbone."""
        return _blocks(self)

    @property
    def num_exits(self) -> int:
        """E, the last exit included."""
        return _num_exits(self)


def _whole(value: float | None) -> float | None:
    return int(value) if value is not None and float(value).is_integer() else value


@dataclass(frozen=True)
class TrainConfig:
    """How the network is trained."""

    regime: RegimeName = "soft_auxiliary"
    """How the exits are trained: docs/train.md has the formula and source of each. soft_* and
    joint_gates train gates."""
    exit_weights: tuple[float, ...] | Literal["equal", "linear"] = ()
    """Weight of each exit's cross-entropy: equal, 1 for each, which is the default; linear, in
    proportion to the exit's number; or a number for each."""
    cost_weight: float = 0.0
    """Soft regimes and joint_gates: lambda, the price of the expected cost (1 is the whole
    network's)."""
    budget: float = 0.5
    """soft_budget: the mean cost that the gates are held at while they learn."""
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


def check(network: NetworkConfig, train: TrainConfig) -> None:
    """Checks a network and its training, without an image.

    Raises:
      ValueError: if a value cannot be used, or the family refuses an argument.
    """
    require_positive("network", network, "width")
    exits = network.num_exits  # the family checks its arguments
    exit_weights(train.exit_weights, exits)
    require(train.regime in REGIMES, "train.regime", train.regime, f"one of {', '.join(REGIMES)}")
    trains_gate = REGIMES[train.regime].trains_gate
    expected = f"True, for the regime {train.regime}"
    require(network.gate or not trains_gate, "network.gate", network.gate, expected)
    fields = "epochs batch learning_rate adam_learning_rate steps_per_dispatch"
    require_positive("train", train, fields)
    require_not_negative("train", train, "weight_decay cost_weight checkpoint_seconds")
    fields = "budget"
    require_all("train", train, fields, lambda value: 0 < value <= 1, "something in (0, 1]")
    fields = "label_smoothing warmup momentum"
    require_all("train", train, fields, lambda value: 0 <= value < 1, "something in [0, 1)")


def exit_weights(given: Sequence[float] | str, exits: int) -> tuple[float, ...]:
    """The weight of each of `exits` exits.

    `"linear"` is `w_e = 2 e / (E + 1)`, e from 1: in proportion to the exit's number, with the sum
    of equal weights. Zhou et al., *BERT loses patience*, NeurIPS 2020,
    https://arxiv.org/abs/2006.04152, weigh in that proportion.

    Raises:
      ValueError: if there are numbers, but not one for each exit.
    """
    if isinstance(given, str):
        linear = given == "linear"
        return tuple(2 * e / (exits + 1) if linear else 1.0 for e in range(1, exits + 1))
    if given and len(given) != exits:
        raise ValueError(
            f"train.exit_weights: {len(given)} weights for {exits} exits; give {exits}, or equal "
            "or linear."
        )
    return tuple(given) or (1.0,) * exits


def build_network(
    config: NetworkConfig, classes: int, image: Sequence[int], link: str | None = None
) -> EarlyExitNetwork:
    """Builds the network, on images `(height, width, channels)` in float32.

    Args:
      config: backbone and exits.
      classes: C.
      image: its shape.
      link: of the heads, as the regime needs it.

    Raises:
      ValueError: if there is no such family or argument, or the family refuses it.
    """
    return build(config.name, classes, image, **network_arguments(config, link))


def network_arguments(config: NetworkConfig, link: str | None = None) -> dict[str, Any]:
    """The arguments of `eejax.models.build` that a configuration stands for.

    Raises:
      ValueError: if an option repeats a flag.
    """
    given = {"depth": config.depth, "width": config.width, "exits": config.exits}
    arguments: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    for option in config.options:
        name, _, value = option.partition("=")
        if name == "link":
            raise ValueError(f"network.options: {option}; the regime decides how heads are linked.")
        if name in ("depth", "width", "gate", "dtype") or name in arguments:
            raise ValueError(f"network.options: {option}; give it as --network.{name}.")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
    gate = config.gate_reads if config.gate else None
    linked = {} if link is None else {"link": link}
    return {**arguments, "gate": gate, "dtype": config.dtype, **linked}


# Neither blocks nor exits depend on the images. This side is a multiple of most patches, and no
# array of it is made. The real images are checked once they are known.
_IMAGE = (3360, 3360, 3)


@functools.cache
def _blocks(config: NetworkConfig) -> int:
    options = tuple(o for o in config.options if not o.startswith("exits="))
    everywhere = dataclasses.replace(config, exits=None, options=(*options, "exits=all"))
    return build_network(everywhere, 10, _IMAGE).num_exits


@functools.cache
def _num_exits(config: NetworkConfig) -> int:
    if config.exits and all(0 < e < 1 for e in config.exits):
        return len(config.exits) + 1
    return build_network(config, 10, _IMAGE).num_exits


def narrowed(config: NetworkConfig, share: float) -> float:
    """That share of the network's width: whole channels, at least one, or a factor.

    Raises:
      ValueError: if the family's width follows from something else, and none is given.
    """
    default = inspect.signature(FAMILIES[config.name].build).parameters["width"].default
    width = default if config.width is None else config.width
    if width is None:
        raise ValueError(
            f"static.widths: {config.name} has no width of its own; give --network.width, or "
            "--static.widths without a number."
        )
    return share * width if isinstance(default, float) else max(round(share * width), 1)
