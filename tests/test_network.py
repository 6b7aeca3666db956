"""The seam: stages and heads by themselves, together, and with what comes before them."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from eejax import EarlyExitNetwork, ExitOutput, Module, cascade, normalise
from eejax.backbone import Chain, from_linen
from eejax.models.heads import Head, Pooled


class Normed(nn.Module):
    """A stage with running statistics."""

    width: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))


class Wide(nn.Module):
    """A head with statistics, whose product is easy to find in a compiled program."""

    hidden: int

    @nn.compact
    def __call__(self, features, memory, train):
        pooled = nn.BatchNorm(use_running_average=not train)(features.mean((1, 2)))
        logits = nn.Dense(3)(nn.tanh(nn.Dense(self.hidden)(pooled)))
        return ExitOutput(logits, jnp.zeros(len(logits)), ())


IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


@functools.cache
def linen_network():
    """Three stages with statistics; the heads' hidden layers are 50, 60 and 70 wide."""
    return EarlyExitNetwork(
        tuple(from_linen(Normed(4)) for _ in range(3)),
        tuple(from_linen(Wide(h)) for h in (50, 60, 70)),
    )


@functools.cache
def linen_variables():
    return jax.jit(linen_network().init)(jax.random.key(0), jnp.zeros(IMAGES.shape))


def test_all_at_once_is_stage_by_stage():
    network = toys.shared_network(4)
    variables = toys.variables(network)
    images = jnp.asarray(toys.some_images(0, 6))
    outputs, _ = jax.jit(network.apply_all)(variables, images)

    @jax.jit
    def stage_by_stage(variables, images):
        features, memory, outputs = images, (), []
        for e in range(4):
            features, _ = network.apply_stage(variables, e, features)
            output, _ = network.apply_head(variables, e, features, memory)
            memory = output.memory
            outputs.append(output)
        return outputs

    for e, output in enumerate(stage_by_stage(variables, images)):
        np.testing.assert_array_equal(outputs.logits[e], output.logits)
        np.testing.assert_array_equal(outputs.gate[e], output.gate)
        jax.tree.map(np.testing.assert_array_equal, outputs.memory[e], output.memory)
    assert outputs.logits.shape == (4, 6, toys.CLASSES)
    assert outputs.gate.shape == (4, 6)
    assert len(outputs.memory) == 4


def test_memory_reaches_the_next_head():
    """Or else the toy network of the other tests would prove nothing about it."""
    network = toys.shared_network(2)

    @jax.jit
    def run(variables, images):
        features, _ = network.apply_stage(variables, 0, images)
        first, _ = network.apply_head(variables, 0, features, ())
        features, _ = network.apply_stage(variables, 1, features)
        nothing = jax.tree.map(jnp.zeros_like, first.memory)
        return [network.apply_head(variables, 1, features, m)[0] for m in (first.memory, nothing)]

    with_memory, without = run(toys.variables(network), toys.some_images(0, 6))
    assert (with_memory.logits != without.logits).any()
    assert (with_memory.gate != without.gate).any()


def test_the_plain_network_is_the_last_exit():
    network = toys.shared_network(3)
    variables = toys.variables(network)
    images = jnp.asarray(toys.some_images(0, 5))
    plain = jax.jit(network.apply_plain)(variables, images)
    every, _ = jax.jit(network.apply_all)(variables, images)
    np.testing.assert_array_equal(plain, every.logits[-1])


def test_the_plain_network_does_not_pay_for_the_other_heads():
    """Of the heads' hidden layers only the last one's is in the program."""
    network, variables = linen_network(), linen_variables()
    plain = jax.jit(network.apply_plain).lower(variables, IMAGES).compile()
    every = jax.jit(lambda v, x: network.apply_all(v, x)[0].logits).lower(variables, IMAGES)
    text, everything = plain.as_text(), every.compile().as_text()
    assert text is not None
    assert everything is not None
    for hidden, is_left in ((50, False), (60, False), (70, True)):
        assert f"f32[2,{hidden}]" in everything
        assert (f"f32[2,{hidden}]" in text) == is_left
    # One head alone, with the bare stages, is counted the same to the last operation.
    bare = EarlyExitNetwork(
        network.stages,
        (*[Module(lambda *_: {}, _nothing) for _ in range(2)], network.heads[-1]),
    )
    alone = jax.jit(bare.apply_plain).lower(variables, IMAGES).compile()
    assert operations(plain) == operations(alone) > 0


def _nothing(variables, features, memory, *, train, key=None):
    del train
    zeros = jnp.zeros(len(features))
    return ExitOutput(zeros[:, None], zeros, ()), variables.get("batch_stats", {})


def operations(compiled):
    return compiled.cost_analysis()["flops"]


def test_initial_variables_have_an_entry_a_module():
    variables = linen_variables()
    assert set(variables) == {"params", "batch_stats"}
    for collection in variables.values():
        assert len(collection["stages"]) == len(collection["heads"]) == 3
    assert variables["batch_stats"]["stages"][0]["BatchNorm_0"]["mean"].shape == (4,)
    kernels = [s["Conv_0"]["kernel"] for s in variables["params"]["stages"]]
    assert kernels[0].shape == (3, 3, 3, 4)
    # Modules of one shape do not start from the same numbers.
    assert kernels[1].shape == kernels[2].shape == (3, 3, 4, 4)
    assert (kernels[1] != kernels[2]).all()


def test_training_returns_new_statistics_and_leaves_the_old_ones_alone():
    network, variables = linen_network(), linen_variables()
    images = jax.random.normal(jax.random.key(1), (6, 8, 8, 3)) * 3 + 1
    before = jax.tree.map(lambda x: np.array(x), variables)
    outputs, stats = jax.jit(lambda v, x: network.apply_all(v, x, train=True))(variables, images)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])
    # By hand for the first stage: momentum one half, and the batch's own mean of the convolution.
    kernel = variables["params"]["stages"][0]["Conv_0"]["kernel"]
    convolved = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    fresh = stats["stages"][0]["BatchNorm_0"]
    np.testing.assert_allclose(fresh["mean"], 0.5 * convolved.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(fresh["var"], 0.5 + 0.5 * convolved.var((0, 1, 2)), rtol=1e-4)
    for e in range(3):  # the heads' too
        moved = stats["heads"][e]["BatchNorm_0"]["mean"]
        assert (moved != variables["batch_stats"]["heads"][e]["BatchNorm_0"]["mean"]).all()
    # Without training they come back as they went in, and the answers do not depend on the batch.
    answer = jax.jit(network.apply_all)
    same, stats = answer(variables, images)
    jax.tree.map(np.testing.assert_array_equal, stats, variables["batch_stats"])
    others = images.at[3:].set(0)
    np.testing.assert_array_equal(answer(variables, others)[0].logits[:, :3], same.logits[:, :3])
    assert np.abs(outputs.logits - same.logits).max() > 1e-3


def test_equal_linen_modules_are_one_pair_of_functions():
    assert from_linen(Head(3)) == from_linen(Head(3))
    assert from_linen(Head(3)) != from_linen(Head(4))
    # A list cannot be hashed: such a module works, and is equal to nothing.
    chain = Chain([nn.Dense(2)])  # pyright: ignore
    assert from_linen(chain) != from_linen(chain)


def test_a_linen_module_without_statistics_trains_too():
    module = from_linen(Head(3, gate="features"))
    features = jnp.ones((2, 4, 4, 5))
    variables = module.init(jax.random.key(0), features, ())
    output, stats = module.apply(variables, features, (), train=True)
    assert stats == {}
    assert output.logits.shape == (2, 3)


@pytest.mark.parametrize("kind", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("pool", ["average", "both"])
def test_a_pooled_head_answers_in_float32(kind, pool):
    head = from_linen(Head(3, Pooled(pool), gate="features"))
    features = jax.random.normal(jax.random.key(0), (4, 5, 6, 7)).astype(kind)
    variables = head.init(jax.random.key(1), features, ())
    output, _ = head.apply(variables, features, (), train=False)
    assert output.logits.dtype == output.gate.dtype == jnp.float32
    pooled = np.float32(features).mean((1, 2))
    if pool == "both":
        pooled = np.concatenate([pooled, np.float32(features).max((1, 2))], -1)
    params = variables["params"]
    np.testing.assert_allclose(
        output.logits, pooled @ params["classifier"]["kernel"], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        output.gate, (pooled @ params["gate"]["kernel"])[:, 0] - 1, rtol=1e-4, atol=1e-5
    )
    assert output.memory == ()
    # Inference pools in another way than training does.
    trained, _ = head.apply(variables, features, (), train=True)
    np.testing.assert_allclose(output.logits, trained.logits, rtol=1e-4, atol=1e-5)
    silent = from_linen(Head(3, Pooled(pool)))
    output, _ = silent.apply(
        silent.init(jax.random.key(1), features, ()), features, (), train=False
    )
    assert output.gate.tolist() == [0] * 4


def test_reading_normalises_raw_images_inside_the_first_stage():
    network = linen_network()
    mean, std = (125.0, 122.5, 114.0), (63.0, 62.0, 66.5)
    raw = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    by_hand = ((raw.astype(np.float64) - mean) / std).astype(np.float32)
    reading = network.reading(normalise(mean, std))
    variables = jax.jit(reading.init)(jax.random.key(0), raw[:2])
    jax.tree.map(np.testing.assert_array_equal, variables, linen_variables())
    got, stats = jax.jit(functools.partial(reading.apply_all, train=True))(variables, raw)
    expected = jax.jit(functools.partial(network.apply_all, train=True))(variables, by_hand)
    np.testing.assert_allclose(got.logits, expected[0].logits, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), stats, expected[1])
    assert reading.num_exits == 3
    preprocessed = normalise(mean, std)(jnp.asarray(raw))
    assert preprocessed.dtype == jnp.float32
    np.testing.assert_allclose(preprocessed, by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mean", "std"), [((1.0, 2.0), (1.0,)), ((1.0,), (0.0,)), ((1.0,), (float("nan"),))]
)
def test_normalising_needs_a_mean_and_a_positive_deviation_a_channel(mean, std):
    with pytest.raises(ValueError, match="give both for each channel, std positive"):
        normalise(mean, std)


@pytest.mark.parametrize(("stages", "heads"), [(0, 0), (2, 1), (1, 2)])
def test_a_network_needs_a_head_for_each_stage(stages, heads):
    network = toys.shared_network(2)
    with pytest.raises(ValueError, match=f"{stages} stages and {heads} heads; give at least one"):
        EarlyExitNetwork(network.stages[:stages], network.heads[:heads])


def _noisy_stage(variables, features, *, train, key=None):
    assert (key is not None) == train
    return features + (0 if key is None else jax.random.normal(key, ())), variables.get(
        "batch_stats", {}
    )


def _noisy_head(variables, features, memory, *, train, key=None):
    del memory
    features, stats = _noisy_stage(variables, features, train=train, key=key)
    return ExitOutput(features, features[:, 0], ()), stats


def test_every_stage_and_head_draws_from_its_own_part_of_the_key():
    stage, head = (
        Module(lambda *_: {"params": {}}, apply) for apply in (_noisy_stage, _noisy_head)
    )
    network = EarlyExitNetwork((stage,) * 3, (head,) * 3)
    images = jnp.zeros((2, 1))

    def logits(network, key=None):
        variables = network.init(jax.random.key(0), images)
        outputs, _ = network.apply_all(variables, images, train=key is not None, key=key)
        return np.asarray(outputs.logits[:, 0, 0])

    def draws(key, *numbers):
        folded = key
        for number in numbers:
            folded = jax.random.fold_in(folded, number)
        return jax.random.normal(folded, ())

    key = jax.random.key(3)
    stages = np.cumsum([draws(key, 2 * e) for e in range(3)])
    expected = stages + [draws(key, 2 * e + 1) for e in range(3)]
    np.testing.assert_allclose(logits(network, key), expected, rtol=1e-6)
    np.testing.assert_array_equal(logits(network), 0)
    np.testing.assert_allclose(
        logits(network.reading(lambda x: x + 1), key), expected + 1, rtol=1e-6
    )
    merged = sum(draws(key, 0, i) for i in range(3)) + draws(key, 1)
    np.testing.assert_allclose(logits(network.keeping([2]), key), [merged], rtol=1e-6)
    member = logits(network, jax.random.fold_in(key, 1))[-1:]
    np.testing.assert_allclose(logits(cascade([network]), key), member, rtol=1e-6)
    assert (logits(network, jax.random.key(4)) != logits(network, key)).all()
