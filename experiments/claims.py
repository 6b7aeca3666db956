"""What early exits do to the training of a deep plain network: gradients, gap and convergence.

python -m experiments.claims
python -m experiments.claims --norm --json claims.json
python -m experiments.claims --data.name cifar10 --data.limit 5000 --depth 12

The claims are those of Scardapane, Scarpiniti, Baccarelli, Uncini, *Why should we add early exits
to neural networks?*, Cognitive Computation 12, 2020, https://arxiv.org/abs/2004.12814: early exits
counter vanishing gradients, regularise, and let the network converge sooner.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich import box
from rich.console import Console
from rich.table import Table

from eejax.backbone import cut
from eejax.models.heads import Head
from eejax.models.layers import Norm
from eejax.network import EarlyExitNetwork, Variables, normalise
from eejax.training import Batch, LossAux, Phase, cross_entropies, init_state, make_train_steps
from experiments.checks import require, require_positive
from experiments.command_line import execute, parse
from experiments.data import splits
from experiments.data.config import DataConfig
from experiments.data.config import check as check_data
from experiments.files import write_json
from experiments.latency.arguments import check_parents
from experiments.memory import use_huge_pages
from experiments.report.environment import describe
from experiments.train.augment import epoch_order
from experiments.train.config import TrainConfig
from experiments.train.trained import optimiser

GRADIENT_IMAGES = 256
EVALUATED = 2_000


@dataclass(frozen=True)
class Arguments:
    """Train a deep network without shortcuts twice from the same initial parameters: with the last
    exit alone, and with early exits of equal weight (joint training). Print gradient norms by depth
    before, during and after training, the gap between training and test accuracy, and accuracy by
    epoch, all of the last exit."""

    depth: int = 10
    """3x3 convolutions with ReLU. The first shrinks the image to about 8x8."""
    width: int = 16
    """Channels."""
    exits: int = 3
    """Early exits, spread evenly."""
    norm: bool = False
    """Batch normalisation, which keeps gradients from vanishing: the control."""
    epochs: int = 50
    """Passes over the training split."""
    batch: int = 64
    """Samples a step."""
    optimiser: Literal["sgd", "adam"] = "sgd"
    """sgd: with Nesterov momentum of 0.9. Adam rescales gradients, and so hides how small they
    are."""
    learning_rate: float = 0.02
    """Peak learning rate."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of parameters and order; the splits are those of the first."""
    json: Path | None = None
    """File for the rows, as a list."""
    data: DataConfig = field(
        default_factory=lambda: DataConfig(name="digits", calibrate=1, choose=1)
    )


class Block(nn.Module):
    """A 3x3 convolution as Flax initialises it, and ReLU, which halves the variance each time."""

    width: int
    stride: int = 1
    norm: bool = False

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = nn.Conv(self.width, (3, 3), self.stride, name="conv")(x)
        return nn.relu(Norm(name="bn")(x, train=train) if self.norm else x)


class Trained(NamedTuple):
    """A training run.

    Attributes:
      gradients: `[T + 1, D]`, norm of the gradient of each convolution before training and after
        each of T epochs, on the same images.
      train_accuracy: `[T + 1]` of the last exit.
      test_accuracy: `[T + 1]`.
      train_loss: `[T + 1]`, cross-entropy of the last exit.
    """

    gradients: np.ndarray
    train_accuracy: np.ndarray
    test_accuracy: np.ndarray
    train_loss: np.ndarray


def build(arguments: Arguments, dataset: splits.Dataset) -> EarlyExitNetwork:
    """The network, with a head after every block; a run trains some of them."""
    image = dataset.train.images.shape[1:]
    blocks = [Block(arguments.width, norm=arguments.norm) for _ in range(arguments.depth)]
    blocks[0] = Block(arguments.width, max(min(image[:2]) // 8, 1), arguments.norm)
    head = Head(len(dataset.classes))
    network = cut(blocks, "all", lambda e: head, image=image)
    return network.reading(normalise(dataset.mean, dataset.std))


def early_exits(depth: int, exits: int) -> list[int]:
    """The blocks, from 0, after which an early exit sits, evenly spread."""
    return [round(depth * (i + 1) / (exits + 1)) - 1 for i in range(exits)]


def joint(exits: Sequence[int]) -> Callable[..., tuple[Array, LossAux]]:
    """The loss of a phase: the sum of the cross-entropies of some exits, averaged over samples."""

    def loss(
        network: EarlyExitNetwork, variables: Variables, batch: Batch, key: Array, progress: Array
    ) -> tuple[Array, LossAux]:
        del progress
        outputs, stats = network.apply_all(variables, batch.images, train=True, key=key)
        logits = outputs.logits[np.asarray(exits)]
        return cross_entropies(logits, batch.targets).sum(0).mean(), LossAux(stats, outputs)

    return loss


def train(
    arguments: Arguments, network: EarlyExitNetwork, dataset: splits.Dataset, exits: Sequence[int]
) -> Callable[[int], Trained]:
    """A function from a seed to a training run with these exits; it compiles once."""
    images, labels = map(jnp.asarray, dataset.train)
    per_epoch, classes = len(images) // arguments.batch, len(dataset.classes)
    config = TrainConfig(
        optimiser=arguments.optimiser, learning_rate=arguments.learning_rate, weight_decay=0.0
    )
    rule = functools.partial(optimiser, config)
    steps = per_epoch * arguments.epochs
    loss = joint(exits)
    train_steps = make_train_steps(
        network, rule, [Phase(1.0, loss)], lambda _, x: x, steps=steps, classes=classes
    )
    targets = jax.nn.one_hot(labels[:GRADIENT_IMAGES], classes, dtype=jnp.float32)
    probe = Batch(images[:GRADIENT_IMAGES], labels[:GRADIENT_IMAGES], targets)

    @jax.jit
    def gradient_norms(variables: Variables) -> Array:
        def value(params: Any) -> Array:
            changed = {**variables, "params": params}
            return loss(network, changed, probe, jax.random.key(0), jnp.float32(0))[0]

        stages = jax.grad(value)(variables["params"])["stages"]
        kernels = [stage["blocks_0"]["conv"]["kernel"] for stage in stages]
        return jnp.stack([jnp.sqrt((kernel**2).sum()) for kernel in kernels])

    @jax.jit
    def evaluate(variables: Variables, images: Array, labels: Array) -> tuple[Array, Array]:
        logits = network.apply_plain(variables, images)
        losses = cross_entropies(logits[None], jax.nn.one_hot(labels, classes, dtype=jnp.float32))
        return (logits.argmax(-1) == labels).mean(), losses.mean()

    seen = images[:EVALUATED], labels[:EVALUATED]
    unseen = tuple(jnp.asarray(part[:EVALUATED]) for part in dataset.test)

    def run(seed: int) -> Trained:
        key = jax.random.key(seed)
        state = init_state(network, rule(steps), key, images[:1])
        rows = []
        for epoch in range(arguments.epochs + 1):
            accuracy, value = evaluate(state.variables, *seen)
            test = evaluate(state.variables, *unseen)[0]
            rows.append(jax.device_get((gradient_norms(state.variables), accuracy, test, value)))
            if epoch < arguments.epochs:
                order = epoch_order(jax.random.fold_in(key, epoch), len(images), arguments.batch)
                state, _ = train_steps(state, key, images, labels, order, 0, per_epoch)
        return Trained(*map(np.stack, zip(*rows, strict=True)))

    return run


def measure(arguments: Arguments) -> list[dict[str, Any]]:
    """A row for each seed, without and with early exits: `seed`, `exits` (blocks, from 1), and the
    arrays of `Trained` as lists."""
    dataset = splits.load(arguments.data, arguments.seeds[0])
    network, last = build(arguments, dataset), arguments.depth - 1
    arms = ([last], [*early_exits(arguments.depth, arguments.exits), last])
    runs = [(exits, train(arguments, network, dataset, exits)) for exits in arms]
    rows = []
    for seed in arguments.seeds:
        for exits, run in runs:
            columns = {name: array.tolist() for name, array in run(seed)._asdict().items()}
            blocks = [e + 1 for e in exits]
            rows.append({"data": dataset.name, "seed": seed, "exits": blocks, **columns})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Both networks side by side: the mean over the seeds, and the range in brackets."""
    arms = [[row for row in rows if (len(row["exits"]) > 1) == many] for many in (False, True)]
    result = Table("last exit", "last exit alone", "with early exits", box=box.SIMPLE)

    def line(name: str, value: Callable[[dict[str, Any]], float], form: str) -> None:
        cells = []
        for arm in arms:
            values = [value(row) for row in arm]
            low, high = (format(v, form) for v in (min(values), max(values)))
            cells.append(f"{float(np.mean(values)):{form}} ({low} to {high})")
        result.add_row(name, *cells)

    epochs = len(rows[0]["train_loss"]) - 1
    depth = len(rows[0]["gradients"][0])
    for t in sorted({0, 1, epochs // 2, epochs}):
        for d in dict.fromkeys([0, depth // 2, depth - 1]):
            name = f"gradient norm, block {d + 1}, epoch {t}"
            line(name, lambda row, t=t, d=d: row["gradients"][t][d], ".2e")
    for t in sorted({1, max(epochs // 4, 1), max(epochs // 2, 1), epochs}):
        line(f"train loss, epoch {t}", lambda row, t=t: row["train_loss"][t], ".3f")
        line(f"test accuracy %, epoch {t}", lambda row, t=t: 100 * row["test_accuracy"][t], ".1f")
    line("train accuracy %, end", lambda row: 100 * row["train_accuracy"][-1], ".1f")

    def gap(row: dict[str, Any]) -> float:
        return 100 * (row["train_accuracy"][-1] - row["test_accuracy"][-1])

    line("train - test, points, end", gap, ".1f")
    return result


def main(argv: Sequence[str]) -> int:
    """Runs a command line; returns the exit status: 0, 2 for a mistake, or 130 after Ctrl-C."""
    console = Console(soft_wrap=True)

    def begin() -> Arguments:
        arguments = parse(Arguments, "python -m experiments.claims", argv, Arguments())
        require_positive("", arguments, "depth width exits epochs batch learning_rate")
        exits, seeds = arguments.exits, len(arguments.seeds)
        require(exits < arguments.depth, "exits", exits, f"fewer than {arguments.depth}, the depth")
        require(seeds > 0, "seeds", "nothing", "at least one")
        check_data(arguments.data)
        check_parents(arguments, "json")
        images = len(splits.load(arguments.data, arguments.seeds[0]).train.images)
        require(
            arguments.batch <= images, "batch", arguments.batch, f"at most {images}, the images"
        )
        return arguments

    def work(arguments: Arguments) -> None:
        environment = describe("experiments.claims", argv)
        with console.status("training"):
            rows = measure(arguments)
        console.print(f"{rows[0]['data']}, {len(arguments.seeds)} seeds\n{environment['device']}")
        console.print(table(rows))
        if arguments.json is not None:
            write_json(arguments.json, [{**row, **environment} for row in rows])

    return execute(begin, work, (OSError,))


if __name__ == "__main__":
    use_huge_pages()
    sys.exit(main(sys.argv[1:]))
