"""Executors in the form that a TPU runs: packed buffers, tiles, and what a compiler makes of them.

The first half runs that form on a CPU. The second compiles for a TPU, if libtpu is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from eejax import compact, full, gate, loop, models, stack
from eejax.inference import lanes
from eejax.inference.tiles import default_tiles
from experiments.aot import __main__ as command
from experiments.aot import inference, program, topology, training

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu-aot)"
)


# The form of a TPU, on a CPU.


@settings(max_examples=15)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    channels=st.sampled_from([1, 3, 16, 128, 130, 384]),
    dtype=st.sampled_from(["float32", "bfloat16", "uint8", "bool"]),
)
def test_packing_keeps_every_value(shape, channels, dtype):
    shape = (3, *shape, channels)
    values = np.random.default_rng(0).integers(0, 2, shape)
    x = jnp.asarray(values, jnp.dtype(dtype))
    rows = {"features": x, "score": jnp.arange(3.0)}
    packed = jax.jit(lanes.packed)(rows)
    assert lanes.is_packed(packed["features"])
    assert not lanes.is_packed(packed["score"])
    again = jax.jit(lanes.unpacked)(packed)
    jax.tree.map(np.testing.assert_array_equal, again, rows)
    assert again["features"].dtype == x.dtype
    # At most a quarter more, or one tile of the hardware, or a row of lanes.
    array = packed["features"].array
    sublanes = 32 // array.dtype.itemsize
    size = np.prod(shape[1:])
    if array.ndim > 2:
        stored = lanes.padded_size(array.shape[1:], sublanes)
        assert stored <= max(1.25 * size, size + sublanes * 128)
    else:
        assert size < sublanes * 128


@pytest.mark.parametrize("executor", [compact, loop], ids=["compact", "loop"])
@pytest.mark.parametrize("tiles", [None, (4, 2)])
def test_packed_buffers_change_no_answer(executor, tiles):
    network = toys.shared_network(4)
    variables = toys.variables(network, 2)
    args = (variables, jnp.array([2.0, 1.0, 0.0]), toys.some_images(2, 21))
    whole = jax.jit(functools.partial(full, network, gate))(*args)
    assert len(set(whole.exits.tolist())) > 2
    run = functools.partial(executor, network, gate, tiles=tiles, platform="tpu")
    given = stack(network, variables) if executor is loop else variables
    found = jax.jit(run)(given, *args[1:])
    jax.tree.map(np.testing.assert_array_equal, found, whole)


def test_packed_buffers_change_no_answer_of_a_residual_network():
    network = models.build("resnet", 10, (16, 16, 3), depth=8, width=4, exits=[1, 2])
    images = jax.random.uniform(jax.random.key(1), (12, 16, 16, 3))
    variables = jax.jit(network.init)(jax.random.key(0), images)
    scores = jnp.array([0.1, 0.12])
    whole = jax.jit(functools.partial(full, network, toys.POLICIES["max_prob"]))
    run = functools.partial(compact, network, toys.POLICIES["max_prob"], tiles=(4,), platform="tpu")
    expected, found = whole(variables, scores, images), jax.jit(run)(variables, scores, images)
    np.testing.assert_array_equal(found.exits, expected.exits)
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("executor", [compact, loop], ids=["compact", "loop"])
def test_the_platform_that_is_lowered_for_decides_the_form(executor):
    network = models.build("isotropic", 10, (8, 8, 3), depth=3, width=16, patch=2, exits=[1, 2])
    images = jax.ShapeDtypeStruct((256, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)

    def lowered(platform):
        run = functools.partial(executor, network, gate, platform=platform)
        args = (variables, jax.ShapeDtypeStruct((2,), jnp.float32), images)
        return jax.jit(run).trace(*args).lower(lowering_platforms=(platform,)).as_text()

    assert "LayoutConstraint" in lowered("tpu")
    assert "AllocateBuffer" in lowered("tpu")
    for other in ("cpu", "cuda"):
        assert "LayoutConstraint" not in lowered(other)
        assert "AllocateBuffer" not in lowered(other)


def test_default_tiles_of_a_tpu_nest_and_fill_the_lanes():
    for batch, row in itertools.product(range(1, 1100), (1, 1 << 15, 1 << 16, 1 << 30)):
        for kind in ("tpu", "TPU v4", "TPU v5 lite"):
            for channels, least in ((16, 128), (384, 16)):
                tiles = default_tiles(batch, row, kind, channels)
                assert all(a % b == 0 and a > b for a, b in itertools.pairwise(tiles))
                assert min(least, 1 << (batch.bit_length() - 1)) <= tiles[-1] <= tiles[0] <= batch
    # By the memory of the device.
    assert default_tiles(1024, 1 << 16, "TPU v5 lite") == (256, 128)
    assert default_tiles(1024, 1 << 16, "TPU v4") == (128,)
    assert default_tiles(1024, 1 << 17, "TPU v5 lite", 384) == (128, 32)


# What a compiled program says.

TEXT = """\
HloModule m, is_scheduled=true

%body (p: (s32[], f32[8,4,128])) -> (s32[], f32[8,4,128]) {
  %p = (s32[]{:T(128)}, f32[8,4,128]{2,1,0:T(8,128)}) parameter(0)
  %f = f32[8,4,128]{2,1,0:T(8,128)} fusion(%p), backend_config={"w":{"estimated_cycles":"100"}}
  ROOT %t = (s32[]{:T(128)}, f32[8,4,128]{2,1,0:T(8,128)}) tuple(%p, %f)
}

%no (q: f32[2]) -> f32[2] {
  ROOT %q = f32[2]{0:T(128)} parameter(0)
}

%yes (r: f32[2]) -> f32[2] {
  %r = f32[2]{0:T(128)} parameter(0)
  ROOT %g = f32[2]{0:T(128)} fusion(%r), backend_config={"estimated_cycles":"10"}
}

ENTRY %main (a: f32[8,4,128]) -> f32[2] {
  %a = f32[8,4,128]{2,1,0:T(8,128)} parameter(0)
  %k = f32[8,4,128]{0,2,1:T(8,128)} copy(%a), backend_config={"estimated_cycles":"7"}
  %s = (f32[8,4,128]{2,1,0:T(8,128)S(1)}, f32[8,4,128]{2,1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %small = f32[8]{0} copy(%a)
  %w = (s32[], f32[8,4,128]{2,1,0:T(8,128)}) while(%k), condition=%cond, body=%body
  ROOT %z = f32[2]{0} conditional(%a, %a, %a), branch_computations={%no, %yes}
}
"""


def test_a_text_is_read():
    found = program.read(TEXT)
    assert found.entry == "main"
    assert found.count("while") == found.count("conditional") == 1
    assert [i.name for i in found.copies(8, 8 * 4 * 128 * 4)] == ["k", "s"]
    assert [i.name for i in found.copies(9, 1)] == []
    assert found.cycles([3, 0.5]) == 7 + 3 * 100 + 0.5 * 10
    for wrong in ([3], [3, 0.5, 1]):
        with pytest.raises(ValueError, match="loops and branches"):
            found.cycles(wrong)


def test_a_trace_runs_the_tiles_that_compact_runs():
    assert inference.reached(1024, 4) == [1024, 614, 358, 205]
    assert inference.trips([1024, 614, 358, 205], (256, 128)) == [[4, 0], [2, 1], [1, 1], [0, 2]]
    rows = toys.Rows(4)
    network = toys.network(4, rows.watch)
    variables = toys.variables(toys.shared_network(4), 1)
    run = jax.jit(functools.partial(compact, network, gate, tiles=(8, 4)))
    exits = np.asarray(run(variables, jnp.array([0.0, 1.0, 0.0]), toys.some_images(1, 30)).exits)
    counted = inference.trips([int((exits >= e).sum()) for e in range(4)], (8, 4))
    assert rows.read() == [8 * a + 4 * b for a, b in counted]


def test_collectives_are_found_with_what_runs_beside_them():
    text = """\
ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %s = (f32[8]{0}, f32[32]{0}) all-gather-start(%a), dimensions={0}
  %f = f32[8]{0} fusion(%a), calls=%c, backend_config={"estimated_cycles":"50"}
  %d = f32[32]{0} all-gather-done(%s)
  ROOT %r = f32[8]{0} all-reduce(%f), to_apply=%add
}
"""
    assert list(training.collectives(program.read(text))) == [
        ("all-gather", 128, 50),
        ("all-reduce", 32, 0),
    ]


def test_mistakes_are_one_line(capsys, monkeypatch):
    monkeypatch.setattr(topology, "installed", lambda: False)
    assert command.main([]) == 2
    assert "pip install 'eejax[tpu-aot]'" in capsys.readouterr().err
    assert command.main(["--tiles", "4", "8"]) == 2
    assert "each a divisor" in capsys.readouterr().err


# Compiled for a TPU.


@needs_libtpu
def test_executors_are_good_programs_on_a_tpu(tmp_path):
    executors = ["cond", "compact", "loop", "host"]
    argv = ["--networks", "resnet8", "--batches", "1024", "--executors", *executors]
    assert command.main([*argv, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["inference"]
    by_name = {(row["executor"], row["batch"]): row for row in rows}
    assert by_name["cond", 1]["conditionals"] == 2
    for name in ("compact", "loop", "host"):
        row = by_name[name, 1024]
        assert row["temporary_ratio"] <= 1.5
        assert row["cycles"] > 0
        assert row["loops"] == (0 if name == "host" else 3 * len(row["tiles"]))
        if name != "host":
            assert row["buffer_copies"] == 0


@needs_libtpu
def test_a_training_step_compiles_for_a_pod(tmp_path):
    argv = ["--networks", "resnet8", "--executors", "--train", "v5e:4x4"]
    argv += ["--fsdp", "16", "--train-batch", "256"]
    assert command.main([*argv, "--json", str(tmp_path / "rows.json")]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())["training"]
    assert row["devices"] == 16
    assert {"all-gather", "all-reduce"} & set(row["collectives"])


@needs_libtpu
def test_an_unknown_topology_is_refused():
    with pytest.raises(ValueError, match="topology"):
        topology.devices("v5e:7x13x2")
