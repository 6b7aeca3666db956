"""Packing survivors: what is computed, in which tiles, and equal stages as one loop."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from eejax import ExitOutput, compact, full, gate, loop, stack
from eejax.inference.compaction import Stacked, runs
from eejax.inference.tiles import default_tiles
from eejax.models.resnet import resnet
from eejax.network import EarlyExitNetwork, Module

PACKED = {"compact": compact, "loop": loop}
each_packed = pytest.mark.parametrize("executor", PACKED.values(), ids=PACKED)
OFF, ALWAYS = np.inf, -np.inf


@each_packed
@pytest.mark.parametrize("tiles", [(12,), (1,), (4, 2, 1), (16, 4)])
def test_answers_do_not_depend_on_the_tiles(executor, tiles):
    network = toys.shared_network(4)
    variables = toys.variables(network, 2)
    args = (variables, jnp.array([2.0, 1.0, 0.0]), toys.some_images(2, 12))
    whole = jax.jit(lambda *args: full(network, gate, *args))(*args)
    packed = jax.jit(lambda *args: executor(network, gate, *args, tiles=tiles))(*args)
    assert len(set(whole.exits.tolist())) > 2
    jax.tree.map(np.testing.assert_array_equal, packed, whole)


@each_packed
@pytest.mark.parametrize("tiles", [(), (4, 8), (6, 4), (4, 0)])
def test_tiles_that_do_not_nest_are_refused(executor, tiles):
    network = toys.shared_network(2)
    args = (toys.variables(network), jnp.zeros(1), jnp.asarray(toys.some_images(0, 8)))
    with pytest.raises(ValueError, match="each a divisor of the one before"):
        executor(network, gate, *args, tiles=tiles)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_default_tiles_nest_and_fit(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for batch, row in itertools.product(range(1, 600), (1, 1 << 15, 1 << 16, 1 << 30)):
        tiles = default_tiles(batch, row)
        assert all(a % b == 0 and a > b for a, b in itertools.pairwise(tiles))
        assert 1 <= tiles[-1] <= tiles[0] <= batch
    # Half as many of features that are twice as large, on a CPU alone.
    kinds = [default_tiles(512, row) for row in (1 << 15, 1 << 16, 1 << 17)]
    cpu = [(64, 16, 4), (32, 8), (16, 4)]
    assert kinds == (cpu if backend == "cpu" else [(128, 32)] * 3)


@each_packed
@pytest.mark.parametrize("batch", [1, 6, 64])
def test_the_survivors_are_computed_and_little_more(executor, batch):
    rows = toys.Rows(4)
    network = toys.network(4, rows.watch)
    variables = toys.variables(toys.shared_network(4), 1)
    tiles = (16, 4) if batch > 16 else default_tiles(batch, 1)
    run = jax.jit(functools.partial(executor, network, gate, tiles=tiles))
    images = toys.some_images(1, batch)
    seen = set()
    for thresholds in (
        [0, 0, 0],
        [3, 2, 1],
        [OFF, 1, OFF],
        [OFF] * 3,
        [ALWAYS, 0, 0],
        [1, ALWAYS, 0],
    ):
        for count in {batch, max(batch // 3, 1), 0}:
            values = np.array(thresholds, np.float32)
            prediction = run(variables, values, images, np.int32(count))
            exits = np.asarray(prediction.exits)[:count]
            reach = [int((exits >= e).sum()) for e in range(4)]
            seen.update(reach)
            assert rows.read() == [-(-n // tiles[-1]) * tiles[-1] for n in reach]
    assert 0 in seen


# Equal stages.


def test_equal_modules_make_a_run():
    assert runs(toys.shared_network(1)) == [(0, 1)]
    assert runs(toys.shared_network(5)) == [(0, 1), (1, 5)]
    # Linen modules that are equal, cut at every block: three groups, whose first blocks differ.
    network = resnet(10, depth=20, width=2, exits=tuple(range(1, 9)))
    assert runs(network) == [(0, 1), (1, 3), (3, 4), (4, 6), (6, 7), (7, 9)]
    assert runs(resnet(10, depth=20, width=2, exits=(3, 6))) == [(0, 1), (1, 2), (2, 3)]


def test_loop_takes_variables_stacked_or_not():
    network = toys.shared_network(5)
    variables = toys.variables(network, 4)
    stacked = stack(network, variables)
    assert isinstance(stacked, Stacked)
    assert stacked.runs[1][0]["params"]["kernel"].shape == (4, toys.WIDTH, toys.WIDTH)
    args = (jnp.array([3.0, 1.0, 2.0, 0.0]), toys.some_images(2, 13))
    run = jax.jit(functools.partial(loop, network, gate))
    whole = jax.jit(functools.partial(full, network, gate))(variables, *args)
    assert len(set(whole.exits.tolist())) > 3
    jax.tree.map(np.testing.assert_array_equal, run(variables, *args), whole)
    jax.tree.map(np.testing.assert_array_equal, run(stacked, *args), whole)


def test_a_run_whose_variables_differ_in_shape_is_refused():
    network = toys.shared_network(3)
    variables = toys.variables(network)
    stages = variables["params"]["stages"]
    odd = {"kernel": jnp.zeros((toys.WIDTH, toys.WIDTH + 1))}
    params = {**variables["params"], "stages": (*stages[:2], odd)}
    with pytest.raises(ValueError, match=r"stages 2 to 3 are one module.*`compact`"):
        stack(network, {**variables, "params": params})


def test_a_run_whose_features_change_shape_is_refused():
    """Pooling has no variables, so only the features tell."""
    halve = Module(lambda key, x: {}, lambda variables, x, train: (x[:, ::2] + x[:, 1::2], {}))
    first = Module(lambda key, x: {}, lambda variables, x, train: (x, {}))
    head = Module(
        lambda key, x, memory: {},
        lambda variables, x, memory, train: (ExitOutput(x[:, :2], x[:, 0], ()), {}),
    )
    network = EarlyExitNetwork((first, halve, halve), (head,) * 3)
    variables = network.init(jax.random.key(0), jnp.zeros((4, 8)))
    assert compact(network, gate, variables, jnp.zeros(2), jnp.ones((4, 8))).labels.shape == (4,)
    with pytest.raises(ValueError, match=r"stages 2 to 3 are one module.*change shape"):
        loop(network, gate, variables, jnp.zeros(2), jnp.ones((4, 8)))


def test_a_program_of_equal_stages_does_not_grow_with_their_number():
    """What is compiled is one loop, whatever the depth; so is what it takes to compile it."""

    def program(exits):
        network, images = toys.shared_network(exits), jnp.asarray(toys.some_images(0, 8))
        make = lambda key: stack(network, network.init(key, images))  # noqa: E731
        args = (jax.eval_shape(make, jax.random.key(0)), jnp.zeros(exits - 1), images)
        return jax.jit(functools.partial(loop, network, gate)).lower(*args).as_text()

    def operations(text):
        return len(re.findall(r"stablehlo\.|call @", text))

    short, long = operations(program(12)), operations(program(96))
    assert short > 100
    assert long == short
