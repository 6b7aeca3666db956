"""Sizes and compile times of all families: the tables of docs/models.md.

python -m experiments.models
python -m experiments.models resnet vit --no-compile
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from eejax import cost
from eejax.compiling import compiler_options
from eejax.models import FAMILIES, Published
from eejax.network import EarlyExitNetwork
from experiments.command_line import execute, parse
from experiments.train.config import FamilyName

SMALL = (32, 32, 3)


@dataclass(frozen=True)
class Arguments:
    """Count the parameters and multiply-accumulates of every family, beside published numbers, and
    time how long a network takes to build and to compile."""

    names: tyro.conf.Positional[tuple[FamilyName, ...]] = ()
    """Families. Default: all of them."""
    compile: bool = True
    """Time building and compiling. Without it the tables take a minute."""
    batch: int = 8
    """Images of the compiled programs."""


def sizes(network: EarlyExitNetwork, image: Sequence[int]) -> tuple[int, cost.Costs]:
    """The number of parameters, and the multiply-accumulates of stages and heads."""
    images = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    return count, cost.macs(network, shapes, images)


def family_row(name: str) -> str:
    """The row of a family's default network for 32x32 images and 10 classes."""
    network = FAMILIES[name].build(10, image=SMALL)
    count, costs = sizes(network, SMALL)
    at = " ".join(f"{100 * f:.0f}" for f in costs.fractions[:-1])
    paper = FAMILIES[name].paper
    return f"| `{name}` | {count / 1e6:.2f} | {costs.cumulative[-1] / 1e6:.1f} | {at} | {paper} |"


def published_row(name: str, published: Published) -> str:
    """The row of a published network: published numbers, and those of this implementation."""
    network = FAMILIES[name].build(**{**published.arguments, "exits": ()})
    count, costs = sizes(network, published.arguments.get("image", SMALL))
    theirs = f"{published.macs / 1e6:,.1f}" if published.macs is not None else ""
    ours = f"{costs.cumulative[-1] / 1e6:,.1f}"
    return (
        f"| {published.name} | {published.parameters:,} | {count:,} | {theirs} | {ours} | "
        f"{published.source} |"
    )


def compile_row(name: str, batch: int) -> str:
    """The row of seconds to build, and to compile `init`, all exits, and their gradient."""
    images = jax.ShapeDtypeStruct((batch, *SMALL), jnp.float32)
    start = time.perf_counter()
    network = FAMILIES[name].build(10, image=SMALL)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)
    built = time.perf_counter()

    def outputs_of(variables: Any, images: Any) -> Any:
        return network.apply_all(variables, images)[0]

    def loss(params: Any, stats: Any, images: Any) -> Any:
        variables = {"params": params, "batch_stats": stats}
        outputs, stats = network.apply_all(variables, images, train=True)
        return (outputs.logits**2).sum(), stats

    seconds = [built - start]
    for function, arguments in (
        (network.init, (jax.random.key(0), images)),
        (outputs_of, (shapes, images)),
        (jax.grad(loss, has_aux=True), (shapes["params"], shapes["batch_stats"], images)),
    ):
        before = time.perf_counter()
        jax.jit(function, compiler_options=compiler_options()).lower(*arguments).compile()
        seconds.append(time.perf_counter() - before)
    return f"| `{name}` | {' | '.join(f'{s:.1f}' for s in seconds)} |"


def tables(arguments: Arguments) -> Iterator[str]:
    """The lines of the tables, each as soon as it is known."""
    names = arguments.names or tuple(FAMILIES)
    yield "| family | M parameters | M multiply-accumulates | early exits at % of them | paper |"
    yield "|---|---|---|---|---|"
    yield from map(family_row, names)
    yield ""
    yield "| network | parameters there | here | M multiply-accumulates there | here | source |"
    yield "|---|---|---|---|---|---|"
    for name in names:
        yield from (published_row(name, network) for network in FAMILIES[name].published)
    if arguments.compile:
        yield ""
        yield "| family | build, s | compile init, s | all exits, s | their gradient, s |"
        yield "|---|---|---|---|---|"
        yield from (compile_row(name, arguments.batch) for name in names)


def main(argv: Sequence[str]) -> int:
    """Runs a command line; returns the exit status: 0, or 2 for a mistake."""

    def begin() -> Arguments:
        return parse(Arguments, "python -m experiments.models", argv, Arguments())

    def work(arguments: Arguments) -> None:
        for line in tables(arguments):
            print(line, flush=True)

    return execute(begin, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
