"""Small measurements behind the choices that docs/lab describes.

python -m experiments.microbenchmarks                # all, a few minutes
python -m experiments.microbenchmarks depth packing  # some
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from eejax import benchmark, compact, gate, loop, max_prob, stack
from eejax.compiling import bound, compiler_options
from eejax.models import layers
from eejax.models.isotropic import isotropic
from eejax.models.resnet import resnet
from eejax.network import EarlyExitNetwork, ExitOutput, Variables, normalise

Line = tuple[str, float, str]


def dispatch() -> Iterator[Line]:
    """The time of a call that takes the variables of ResNet-56 and does nothing with them."""
    _, variables, image = _resnet()

    def nothing(variables: Variables, image: Array) -> Array:
        return image.sum()

    passed, constant = jax.jit(nothing, keep_unused=True), bound(nothing, variables)
    calls = [lambda: passed(variables, image), lambda: constant(image)]
    leaves = len(jax.tree.leaves(variables))
    yield from _timed([f"{leaves} arrays as arguments", "as constants"], calls, 50)


def heads() -> Iterator[Line]:
    """ResNet-56 with its last head, and with all four, by the form of the mean over the image."""
    network, variables, image = _resnet()

    def mean(x: Array) -> Array:
        return x.mean((1, 2))

    def product(x: Array) -> Array:
        b, h, w, k = x.shape
        return (jnp.full((1, h * w), 1 / (h * w), x.dtype) @ x.reshape(b, h * w, k))[:, 0]

    def window(x: Array) -> Array:
        return nn.avg_pool(x, x.shape[1:3], x.shape[1:3])[:, 0, 0]

    def run(variables: Variables, images: Array, pool: Callable[..., Array], first: int) -> Any:
        features, logits = images, []
        for e in range(network.num_exits):
            features, _ = network.apply_stage(variables, e, features)
            if e >= first:
                layer = variables["params"]["heads"][e]["classifier"]
                logits.append(pool(features) @ layer["kernel"] + layer["bias"][None])
        return logits

    kinds = {"last head alone": (mean, 3), "mean": (mean, 0), "product": (product, 0)}
    kinds["window"] = (window, 0)
    for batch in (1, 32):
        images = jnp.repeat(image, batch, 0)
        calls = []
        for pool, first in kinds.values():
            compiled = bound(functools.partial(run, pool=pool, first=first), variables)
            calls.append(functools.partial(compiled, images))
        yield from _timed([f"batch {batch}, {name}" for name in kinds], calls, 20)


def scores() -> Iterator[Line]:
    """A policy's score of ten logits, as a separate program, beside one that does nothing."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 10)).astype(np.float32))

    def step(logits: Array, policy: Any) -> Any:
        return policy.step(ExitOutput(logits, logits[:, 0], ()), (), 0)[:2]

    calls = [
        functools.partial(jax.jit(functools.partial(step, policy=policy)), logits)
        for policy in (gate, max_prob)
    ]
    for name, ms, _ in _timed(["gate (nothing is computed)", "max_prob"], calls, 100):
        yield name, 1e3 * ms, "us"


def packing() -> Iterator[Line]:
    """Packing the 60 % survivors of 256 rows of 64 KiB, tile by tile, into a new buffer."""
    random, size = np.random.default_rng(0), 32
    rows = jnp.asarray(random.random((256, 32, 32, 16), np.float32))
    keep = jnp.asarray(random.random(256) < 0.6)

    def order(flags: Array) -> Array:
        return jnp.argsort(~flags, stable=True)

    def sort(buffer: Array, tile: Array, flags: Array, at: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(buffer, tile[order(flags)], at, 0)

    def unsorted(buffer: Array, tile: Array, flags: Array, at: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(buffer, tile, at, 0)

    def scatter(buffer: Array, tile: Array, flags: Array, at: Array) -> Array:
        target = jnp.where(flags, at + jnp.cumsum(flags.astype(jnp.int32)) - 1, len(buffer))
        return buffer.at[target].set(tile, mode="drop", unique_indices=True)

    def copies(buffer: Array, tile: Array, flags: Array, at: Array) -> Array:
        which, count = order(flags), flags.sum(dtype=jnp.int32)

        def copy(i: Array, buffer: Array) -> Array:
            row = lax.dynamic_slice_in_dim(tile, which[i], 1)
            return lax.dynamic_update_slice_in_dim(buffer, row, at + i, 0)

        return lax.fori_loop(0, count, copy, buffer)

    def product(buffer: Array, tile: Array, flags: Array, at: Array) -> Array:
        matrix = order(flags)[:, None] == jnp.arange(size)[None]
        packed = (matrix.astype(tile.dtype) @ tile.reshape(size, -1)).reshape(tile.shape)
        return lax.dynamic_update_slice_in_dim(buffer, packed, at, 0)

    def run(rows: Array, keep: Array, write: Callable[..., Array]) -> Array:
        def step(carry: Any) -> Any:
            done, num_survivors, buffer = carry
            tile = lax.dynamic_slice_in_dim(rows, done, size) + 1
            flags = lax.dynamic_slice_in_dim(keep, done, size)
            buffer = write(buffer, tile, flags, num_survivors)
            return done + size, num_survivors + flags.sum(dtype=jnp.int32), buffer

        start = (jnp.int32(0), jnp.int32(0), jnp.zeros_like(rows))
        return lax.while_loop(lambda carry: carry[0] < len(rows), step, start)[2]

    ways = {"unsorted": unsorted, "sort and gather": sort, "scatter": scatter}
    ways |= {"row by row": copies, "permutation matrix": product}
    calls = []
    for write in ways.values():
        compiled = jax.jit(functools.partial(run, write=write), compiler_options=compiler_options())
        calls.append(functools.partial(compiled, rows, keep))
    yield from _timed(list(ways), calls, 30)


def depth() -> Iterator[Line]:
    """Tracing, lowering and compiling an isotropic network, an exit after every block."""
    images = jnp.zeros((64, 32, 32, 3), jnp.uint8)
    seconds: dict[tuple[str, int], list[float]] = {}
    programs = [("loop", n) for n in (12, 24, 48, 96)] + [("compact", n) for n in (12, 24)]
    for _ in range(3):
        for name, blocks in programs:
            network = isotropic(10, depth=blocks).reading(normalise((127.5,) * 3, (73.9,) * 3))
            shapes: Any = jax.eval_shape(network.init, jax.random.key(0), images)
            executor = compact
            if name == "loop":
                executor = loop
                shapes = jax.eval_shape(functools.partial(stack, network), shapes)
            program = jax.jit(
                functools.partial(executor, network, max_prob), compiler_options=compiler_options()
            )
            start = time.perf_counter()
            program.lower(shapes, jnp.zeros(blocks - 1), images).compile()
            seconds.setdefault((name, blocks), []).append(time.perf_counter() - start)
    for (name, blocks), times in seconds.items():
        yield f"{name}, {blocks} blocks", float(np.median(times)), "s"


def depthwise() -> Iterator[Line]:
    """A depthwise convolution by XLA and as a sum of shifted images, and their gradients."""
    for batch, side, width, size in (
        (1, 8, 384, 3),
        (8, 32, 96, 3),
        (32, 4, 960, 3),
        (32, 8, 480, 5),
    ):
        x = jax.random.normal(jax.random.key(0), (batch, side, side, width))
        kernel = jax.random.normal(jax.random.key(1), (size, size, 1, width))
        forms = {"convolution": layers.convolved, "shifts": layers.shifted}
        names, calls = _both_ways(
            {name: functools.partial(form, stride=1) for name, form in forms.items()}, x, kernel
        )
        what = f"{batch}x{side}x{side}x{width}, {size}x{size}"
        yield from _timed([f"{what}, {name}" for name in names], calls, 5)


def small() -> Iterator[Line]:
    """Images smaller than the kernel, by XLA and as products, and their gradients."""
    for batch in (1, 16, 128):
        for side, size, inputs, outputs in ((2, 3, 192, 384), (2, 3, 512, 512), (4, 5, 64, 192)):
            x = jax.random.normal(jax.random.key(0), (batch, side, side, inputs))
            kernel = jax.random.normal(jax.random.key(1), (size, size, inputs, outputs))
            names, calls = _both_ways(
                {"convolution": _convolved, "products": layers.small}, x, kernel
            )
            what = f"{batch}x{side}x{side}, {size}x{size}, {inputs} to {outputs}"
            yield from _timed([f"{what}, {name}" for name in names], calls, 5)


def _both_ways(
    functions: dict[str, Callable[[Array, Array], Array]], x: Array, kernel: Array
) -> tuple[list[str], list[Callable[[], Any]]]:
    """Names and calls of functions of an input and a kernel, each forward and as a gradient."""
    names, calls = [], []
    for name, function in functions.items():

        def loss(x: Array, kernel: Array, function: Callable = function) -> Array:
            return (function(x, kernel) ** 2).sum()

        for kind, run in (("", function), (" gradient", jax.grad(loss, (0, 1)))):
            compiled = jax.jit(run, compiler_options=compiler_options())
            calls.append(functools.partial(compiled, x, kernel))
            names.append(name + kind)
    return names, calls


def convolutions() -> Iterator[Line]:
    """The 3x3 convolutions of the fast network, forward and the gradients by input and kernel."""
    for side, inputs, outputs in ((31, 24, 32), (15, 32, 128), (7, 128, 128)):
        for batch in (64, 128, 512):
            x = jax.random.normal(jax.random.key(0), (batch, side, side, inputs))
            kernel = jax.random.normal(jax.random.key(1), (3, 3, inputs, outputs))
            change = jax.random.normal(jax.random.key(2), (batch, side, side, outputs))

            def by_input(x: Array, kernel: Array, change: Array) -> Array:
                return jax.vjp(_convolved, x, kernel)[1](change)[0]

            def by_kernel(x: Array, kernel: Array, change: Array) -> Array:
                return jax.vjp(_convolved, x, kernel)[1](change)[1]

            options = compiler_options()
            forward = functools.partial(jax.jit(_convolved, compiler_options=options), x, kernel)
            calls = [forward]
            for gradient in (by_input, by_kernel):
                compiled = jax.jit(gradient, compiler_options=options)
                calls.append(functools.partial(compiled, x, kernel, change))
            what = f"{side}x{side}, {inputs} to {outputs}, batch {batch}"
            names = [f"{what}, {kind}" for kind in ("forward", "by input", "by kernel")]
            operations = 2 * batch * side**2 * 9 * inputs * outputs  # padding included
            for name, ms, _ in _timed(names, calls, 9):
                yield name, 1e-6 * operations / ms, "GFLOP/s"


def _convolved(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


BENCHMARKS = {
    f.__name__: f for f in (dispatch, heads, scores, packing, depth, depthwise, small, convolutions)
}


def main(argv: Sequence[str]) -> int:
    """Runs the microbenchmarks that are named, or all; returns the exit status."""
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\n" + "\n".join(f"{n}: {f.__doc__}" for n, f in BENCHMARKS.items()))
        return 0
    unknown = [name for name in argv if name not in BENCHMARKS]
    if unknown:
        print(
            f"error: no microbenchmark {unknown[0]}; give some of {', '.join(BENCHMARKS)}.",
            file=sys.stderr,
        )
        return 2
    for name in argv or BENCHMARKS:
        print(f"{name}: {BENCHMARKS[name].__doc__}", flush=True)
        for what, value, unit in BENCHMARKS[name]():
            print(f"  {what:44s} {value:8.3f} {unit}", flush=True)
    return 0


def _timed(
    names: Sequence[str], calls: Sequence[Callable[[], Any]], repeats: int
) -> Iterator[Line]:
    times = 1e3 * np.median(benchmark.paired_seconds(calls, repeats), axis=1)
    yield from ((name, float(ms), "ms") for name, ms in zip(names, times, strict=True))


def _resnet() -> tuple[EarlyExitNetwork, Variables, Array]:
    network = resnet(10, depth=56).reading(normalise((127.5,) * 3, (73.9,) * 3))
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8))
    return network, jax.jit(network.init)(jax.random.key(0), image), image


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
