"""The zoo in numbers: `python -m experiments.models` prints the tables of docs/models.md."""

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
from experiments.command_line import parse

SMALL = (32, 32, 3)


@dataclass(frozen=True)
class Arguments:
    """Count parameters and multiply-accumulates of every family, beside what is published of it,
    and time how long a network takes to build and to compile."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Families. Default: all of them."""
    compile: bool = True
    """Time building and compiling; without it the whole takes a minute."""
    batch: int = 8
    """Images of the program that is compiled."""


def parameters(shapes: Any) -> int:
    """How many numbers a tree of shapes holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def sizes(network: EarlyExitNetwork, image: Sequence[int]) -> tuple[int, cost.Costs]:
    """Parameters, and the multiply-accumulates of each stage and head; nothing is compiled."""
    images = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)
    return parameters(shapes["params"]), cost.macs(network, shapes, images)


def family_row(name: str) -> str:
    """A row: the family's own network for images of 32x32 with 10 classes and its own exits."""
    network = FAMILIES[name].build(10, image=SMALL)
    count, costs = sizes(network, SMALL)
    at = " ".join(f"{100 * f:.0f}" for f in costs.fractions[:-1])
    paper = FAMILIES[name].paper
    return f"| `{name}` | {count / 1e6:.2f} | {costs.cumulative[-1] / 1e6:.1f} | {at} | {paper} |"


def published_row(name: str, published: Published) -> str:
    """A row: a network of the literature, and what ours comes to."""
    network = FAMILIES[name].build(**{**published.arguments, "exits": ()})
    count, costs = sizes(network, published.arguments.get("image", SMALL))
    given = f"{published.macs / 1e6:,.1f}" if published.macs is not None else ""
    ours = f"{costs.cumulative[-1] / 1e6:,.1f}"
    return (
        f"| {published.name} | {published.parameters:,} | {count:,} | {given} | {ours} | "
        f"{published.source} |"
    )


def compile_row(name: str, batch: int) -> str:
    """A row: seconds to build, to compile `init`, all exits, and the gradient of all exits."""
    images = jax.ShapeDtypeStruct((batch, *SMALL), jnp.float32)
    start = time.perf_counter()
    network = FAMILIES[name].build(10, image=SMALL)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)
    built = time.perf_counter()

    def answer(variables: Any, images: Any) -> Any:
        return network.apply_all(variables, images)[0]

    def loss(params: Any, stats: Any, images: Any) -> Any:
        variables = {"params": params, "batch_stats": stats}
        outputs, stats = network.apply_all(variables, images, train=True)
        return (outputs.logits**2).sum(), stats

    seconds = [built - start]
    for function, arguments in (
        (network.init, (jax.random.key(0), images)),
        (answer, (shapes, images)),
        (jax.grad(loss, has_aux=True), (shapes["params"], shapes["batch_stats"], images)),
    ):
        before = time.perf_counter()
        jax.jit(function, compiler_options=compiler_options()).lower(*arguments).compile()
        seconds.append(time.perf_counter() - before)
    return f"| `{name}` | {' | '.join(f'{s:.1f}' for s in seconds)} |"


def tables(arguments: Arguments) -> Iterator[str]:
    """The lines, as they come.

    Raises:
      ValueError: a family that there is not.
    """
    names = arguments.names or tuple(FAMILIES)
    for name in names:
        if name not in FAMILIES:
            raise ValueError(f"{name} is no family; give some of {', '.join(FAMILIES)}.")
    yield "| family | M parameters | M multiply-accumulates | early exits at % of them | paper |"
    yield "|---|---|---|---|---|"
    yield from map(family_row, names)
    yield ""
    yield "| network | parameters there | here | M multiply-accumulates there | here | source |"
    yield "|---|---|---|---|---|---|"
    for name in names:
        yield from (published_row(name, each) for each in FAMILIES[name].published)
    if arguments.compile:
        yield ""
        yield "| family | build, s | compile init, s | all exits, s | their gradient, s |"
        yield "|---|---|---|---|---|"
        yield from (compile_row(name, arguments.batch) for name in names)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    try:
        given = sys.argv[1:] if argv is None else argv
        for line in tables(parse(Arguments, "python -m experiments.models", given, Arguments())):
            print(line, flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
