"""Every family of the zoo: what is published of it, and that its members train and stop early."""

import functools
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from flax.errors import InvalidRngError
from jax import lax

from eejax import compact, cond, cost, loop, max_prob
from eejax.evaluation.routing import route, score
from eejax.inference import compaction
from eejax.models import FAMILIES, build
from eejax.models.fast import Whitening, fast, identity
from eejax.models.layers import drop_branch
from eejax.models.resnet import resnet
from eejax.trace import recorded
from eejax.training import cross_entropies

IMAGE = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
PUBLISHED = [
    pytest.param(family, each, id=each.name)
    for family in FAMILIES.values()
    for each in family.published
]


def shapes(network, image=IMAGE):
    return jax.eval_shape(network.init, jax.random.key(0), image)


def parameters(tree) -> int:
    return sum(math.prod(p.shape) for p in jax.tree.leaves(tree))


@pytest.mark.parametrize(("family", "published"), PUBLISHED)
def test_full_networks_are_those_of_the_literature(family, published):
    """By shapes alone: nothing is compiled or computed."""
    network = family.build(**{**published.arguments, "exits": ()})
    image = jax.ShapeDtypeStruct((1, *published.arguments.get("image", (32, 32, 3))), jnp.float32)
    variables = shapes(network, image)
    assert parameters(variables["params"]) == published.parameters
    if published.macs is not None:
        found = cost.macs(network, variables, image).cumulative[-1]
        assert found == pytest.approx(published.macs, rel=5e-3)


@functools.cache
def small(name, exits=None, dtype=jnp.float32, random=False):
    """A network that trains in seconds, and its image size: two early exits if there can be, and
    with `random` the published dropout and stochastic depth."""
    build, arguments = FAMILIES[name].build, dict(FAMILIES[name].small)
    if random:
        arguments.update(FAMILIES[name].regularisation)
    if exits is None:
        exits = min(2, build(4, **{**arguments, "exits": "all"}).num_exits - 1)
    network = build(4, **{**arguments, "exits": exits, "gate": "features", "dtype": dtype})
    return network, arguments["image"]


@functools.cache
def initial(name, exits=None, random=False):
    network, image = small(name, exits, random=random)
    return jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, *image)))


@pytest.mark.parametrize("name", FAMILIES)
def test_exits_leave_the_backbone_as_it_is_and_costs_add_up(name):
    arguments = FAMILIES[name].small
    image = jax.ShapeDtypeStruct((2, *arguments["image"]), jnp.float32)
    few, many = (FAMILIES[name].build(4, **{**arguments, "exits": e}) for e in ((), "all"))
    assert few.num_exits == 1
    alone, every = shapes(few, image), shapes(many, image)
    early = parameters(every["params"]["heads"][:-1])
    assert parameters(every["params"]) == parameters(alone["params"]) + early
    for count in (cost.xla_macs, cost.macs):
        whole, parts = count(few, alone, image), count(many, every, image)
        np.testing.assert_allclose(parts.stages.sum(), whole.stages[0], rtol=1e-6)
        assert parts.heads[-1] == whole.heads[0]
        assert (parts.heads > 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_trains_every_parameter_with_the_published_regularisation(name):
    network, image = small(name, random=True)
    images = jax.random.normal(jax.random.key(1), (8, *image))
    targets = jax.nn.one_hot(jnp.arange(8) % 4, 4)
    # Dropout has no variables, so those of the small network serve, unless there are more layers.
    variables = initial(name, random="hidden" in FAMILIES[name].regularisation)
    # A first-order step, even where layer normalisation divides by little: a new class token is 0.
    optimiser = optax.sgd(1e-5)

    def loss(params, key):
        trained = {**variables, "params": params}
        outputs, stats = network.apply_all(trained, images, train=True, key=key)
        losses = cross_entropies(outputs.logits, targets).sum(0)
        return losses.mean() + (outputs.gate**2).mean(), (outputs, stats)

    @jax.jit
    def step(params, key):
        (before, (outputs, stats)), gradients = jax.value_and_grad(loss, has_aux=True)(params, key)
        updates, _ = optimiser.update(gradients, optimiser.init(params))
        return before, outputs, stats, gradients, optax.apply_updates(params, updates)

    keys = [jax.random.key(k) for k in (1, 1, 2)]
    first, again, other = (step(variables["params"], key) for key in keys)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    drawn = (first[1].logits[-1] != other[1].logits[-1]).any()
    assert drawn == bool(FAMILIES[name].regularisation)
    before, outputs, stats, gradients, params = first
    assert outputs.logits.dtype == outputs.gate.dtype == jnp.float32
    assert outputs.logits.shape == (network.num_exits, 8, 4)
    assert np.isfinite(before)
    assert step(params, keys[0])[0] < before
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert gradient.dtype == jnp.float32, path
        assert np.isfinite(gradient).all(), jax.tree_util.keystr(path)
        assert np.abs(gradient).max() > 0, jax.tree_util.keystr(path)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, variables["params"])
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(variables["batch_stats"]),
        jax.tree.leaves(stats),
        strict=True,
    ):
        fixed = "kernel" in jax.tree_util.keystr(path)  # of a whitening
        assert np.array_equal(old, new) == fixed
        assert new.dtype == jnp.float32


@pytest.mark.parametrize("name", FAMILIES)
def test_in_bfloat16_logits_gradients_and_statistics_stay_float32(name):
    """By types alone."""
    network, image = small(name, dtype=jnp.bfloat16, random=True)
    images, key = jax.ShapeDtypeStruct((8, *image), jnp.float32), jax.random.key(1)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)

    def loss(params, stats, images):
        given = {"params": params, "batch_stats": stats}
        outputs, stats = network.apply_all(given, images, train=True, key=key)
        return outputs.logits.sum() + outputs.gate.sum(), (outputs, stats)

    gradients, (outputs, stats) = jax.eval_shape(
        jax.grad(loss, has_aux=True), variables["params"], variables["batch_stats"], images
    )
    for made in jax.tree.leaves((gradients, outputs.logits, outputs.gate, stats)):
        assert made.dtype == jnp.float32
    text = str(jax.make_jaxpr(lambda v, x: network.apply_all(v, x)[0].logits)(variables, images))
    assert "bf16" in text


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_computes_in_bfloat16_nearly_what_it_does_in_float32(name):
    network, image = small(name)
    half, _ = small(name, dtype=jnp.bfloat16)
    variables = initial(name)
    images = jax.random.normal(jax.random.key(1), (8, *image))
    exact, rounded = (jax.jit(n.apply_all)(variables, images)[0].logits for n in (network, half))
    np.testing.assert_allclose(rounded, exact, rtol=0.1, atol=0.1 * float(exact.std()))
    assert np.abs(rounded - exact).max() > 0


def program(function, *arguments):
    """The text of a traced function, without the addresses in it."""
    return re.sub(r" at 0x\w+", "", str(jax.make_jaxpr(function)(*arguments)))


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.regularisation])
def test_dropout_and_stochastic_depth_change_neither_inference_nor_initial_values(name):
    network, image = small(name, random=True)
    off = dict.fromkeys({"dropout", "stochastic_depth"} & FAMILIES[name].regularisation.keys(), 0)
    arguments = {**FAMILIES[name].small, **FAMILIES[name].regularisation, **off}
    plain = FAMILIES[name].build(4, **{**arguments, "exits": 2, "gate": "features"})
    key, images = jax.random.key(0), jnp.zeros((2, *image))
    variables = jax.eval_shape(network.init, key, images)
    assert program(network.init, key, images) == program(plain.init, key, images)
    answers = [lambda v, x, n=n: n.apply_all(v, x)[0] for n in (network, plain)]
    assert program(answers[0], variables, images) == program(answers[1], variables, images)
    with pytest.raises(InvalidRngError, match="dropout"):
        jax.eval_shape(lambda v: network.apply_all(v, images, train=True), variables)


def test_a_dropped_branch_keeps_its_expected_value_and_drops_whole_samples():
    class Branch(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            return drop_branch(x, 0.25, train)

    x, key = jnp.ones((4000, 2, 3)), jax.random.key(0)
    dropped = Branch().apply({}, x, train=True, rngs={"dropout": key})
    assert isinstance(dropped, jax.Array)
    rows = np.asarray(dropped).reshape(4000, 6)
    assert set(np.unique(rows)) == {0, np.float32(1 / 0.75)}
    assert (rows == rows[:, :1]).all()
    # Ten standard errors.
    assert abs(rows[:, 0].mean() - 1) < 10 * (1 / 0.75 - 1) ** 0.5 / 4000**0.5
    np.testing.assert_array_equal(Branch().apply({}, x, train=False), x)  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit", {"dropout": 1.0}, "dropout of 1.0; give a rate from 0 to less than 1"),
        ("efficientnet", {"stochastic_depth": -0.1}, "stochastic_depth of -0.1; give a rate"),
        ("wideresnet", {"dropout": float("nan")}, "dropout of nan; give a rate"),
        ("vgg", {"dropout": 0.5}, "dropout of 0.5 without hidden layers"),
    ],
)
def test_rates_that_make_no_sense_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES[name].build(10, **arguments)


# One size of tiles, so that each stage is compiled once.
tiled = functools.partial(compact, tiles=(8,))


@pytest.mark.parametrize("name", FAMILIES)
def test_executors_agree_with_the_reference(name):
    """Two programs differ in the last bits, so samples that sit on a threshold are left out."""
    uniform = compaction.runs(small(name, "all")[0])[-1]
    executors = [cond, tiled, *([loop] if uniform[1] - uniform[0] > 1 else [])]
    exits = "all" if loop in executors else None
    network, image = small(name, exits)
    variables = initial(name, exits)
    images = np.random.default_rng(3).normal(size=(40, *image)).astype(np.float32)

    @jax.jit
    def run(sharpness, thresholds):
        def step(output, state, e):
            return max_prob.step(output._replace(logits=output.logits * sharpness[e]), state, e)

        policy = toys.policy_of(max_prob.init, step)
        found = [each(network, policy, variables, thresholds, images) for each in executors]
        return network.apply_all(variables, jnp.asarray(images))[0].logits, found

    ones = np.ones(network.num_exits, np.float32)
    logits, _ = run(ones, ones[1:])
    # Some new networks say nearly the same of every image.
    sharpness = 1 / logits.std((1, 2))
    trace = recorded(np.swapaxes(logits * sharpness[:, None, None], 0, 1), np.zeros(40, int))
    scored = score(max_prob, trace)
    thresholds = np.quantile(scored.scores[:, :-1], 0.6, axis=0).astype(np.float32)
    routed = route(scored, thresholds)
    assert len(set(routed.exits.tolist())) == network.num_exits
    clear = (np.abs(scored.scores[:, :-1] - thresholds) > 1e-4).all(1)
    assert clear.sum() >= 36
    for found in run(sharpness, thresholds)[1]:
        np.testing.assert_array_equal(found.exits[clear], routed.exits[clear])
        np.testing.assert_allclose(found.logits[clear], routed.logits[clear], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["isotropic", "vit"])
def test_equal_blocks_are_equal_stages(name):
    family = FAMILIES[name]
    for arguments in (family.small, {**family.small, **family.regularisation}):
        network = family.build(4, **{**arguments, "exits": "all"})
        assert compaction.runs(network) == [(0, 1), (1, network.num_exits)]


@pytest.mark.parametrize("name", FAMILIES)
def test_positions_that_do_not_exist_are_refused(name):
    build, arguments = FAMILIES[name].build, dict(FAMILIES[name].small)
    blocks = small(name, "all")[0].num_exits
    for exits, said in (
        ((0,), f"from 1 to {blocks}"),
        ((blocks + 1,), f"from 1 to {blocks}"),
        ((1, 1), f"from 1 to {blocks}"),
        (blocks, f"0 to {blocks - 1}"),
        ((0.5, 1.5), "between 0 and 1"),
        ("some", "give"),
    ):
        with pytest.raises(ValueError, match=said):
            build(4, **{**arguments, "exits": exits})


@pytest.mark.parametrize("name", FAMILIES)
def test_images_and_widths_that_are_none_are_refused(name):
    build, arguments = FAMILIES[name].build, FAMILIES[name].small
    for changed, said in (
        ({"image": (32, 32)}, r"image \(32, 32\); give \(height, width, channels\)"),
        ({"image": 32}, "image 32; give"),
        ({"image": (32, 0, 3)}, "positive whole numbers"),
        ({"image": (32, 32, -3)}, "positive whole numbers"),
        ({"image": (32.0, 32.0, 3.0)}, "positive whole numbers"),
        ({"width": 0}, "width 0; give a positive number"),
        ({"width": -8}, "width -8; give a positive number"),
        ({"width": float("nan")}, "width nan; give a positive number"),
    ):
        with pytest.raises(ValueError, match=said):
            build(4, **{**arguments, **changed})


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("isotropic", {"depth": 0}, "depth 0; give a positive number"),
        ("isotropic", {"patch": 0}, "patch 0; give a positive number"),
        ("isotropic", {"image": (32, 30, 3)}, "images of 32x30 for patches of 4x4"),
        ("vit", {"depth": 0}, "depth 0; give a positive number"),
        ("vit", {"heads": 0}, "heads 0; give a positive number"),
        ("vit", {"patch": 0}, "patch 0; give a positive number"),
        ("vit", {"image": (32, 30, 3)}, "images of 32x30 for patches of 4x4"),
        ("msdnet", {"factors": ()}, r"factors \(\); give one or more positive numbers"),
        ("msdnet", {"factors": (1, 0)}, r"factors \(1, 0\); give one or more positive numbers"),
        ("msdnet", {"growth": 0}, "growth 0; give a positive number"),
        ("msdnet", {"depth": 0}, "depth 0; give a positive number"),
        ("msdnet", {"step": 0}, "step 0; give a positive number"),
        ("densenet", {"groups": ()}, r"groups \(\); give one or more positive numbers"),
        ("densenet", {"groups": (6, 0, 6)}, "groups .*; give one or more positive numbers"),
        ("mobilenet", {"depth": 0.0}, "depth 0.0; give a positive number"),
        ("efficientnet", {"depth": -1.0}, "depth -1.0; give a positive number"),
        ("vgg", {"image": (28, 28, 1)}, "images of 28x28; .* at least 32x32"),
    ],
)
def test_sizes_that_make_no_network_are_refused(name, arguments, said):
    with pytest.raises(ValueError, match=said):
        FAMILIES[name].build(4, **arguments)


def test_whitening_makes_patches_independent_and_is_not_trained():
    images = np.random.default_rng(0).normal(3, 2, (50, 9, 8, 3))
    images[..., 1] += images[..., 0]  # correlated channels
    images = jnp.asarray(images, jnp.float32)
    layer = Whitening()
    variables: Any = layer.init(jax.random.key(0), images, train=False)
    assert "params" not in variables
    kernel = variables["batch_stats"]["kernel"]
    assert kernel.shape == (2, 2, 3, 24)
    projected = lax.conv_general_dilated(
        images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    covariance = np.cov(np.asarray(projected[..., :12], np.float64).reshape(-1, 12).T)
    np.testing.assert_allclose(covariance, np.eye(12), atol=5e-3)
    np.testing.assert_array_equal(projected[..., 12:], -projected[..., :12])
    out, after = layer.apply(variables, 2 * images, train=True, mutable=["batch_stats"])
    assert out.shape == (50, 8, 7, 24)
    np.testing.assert_array_equal(after["batch_stats"]["kernel"], kernel)


def test_whitening_of_images_without_variance_is_finite():
    images = jnp.full((2, 4, 4, 1), 7.0)
    variables: Any = Whitening().init(jax.random.key(0), images, train=False)
    assert np.isfinite(variables["batch_stats"]["kernel"]).all()


def test_a_block_begins_as_the_identity():
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 3))
    kernel = identity(jax.random.key(0), (3, 3, 3, 5))
    out = lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_array_equal(out[..., :3], x)
    assert np.abs(out[..., 3:]).min() > 0


def test_resnet_56_costs_what_a_count_by_hand_gives():
    network = resnet(10, depth=56, exits=())

    def valid(side: int, stride: int = 1) -> int:
        """Products of a 3x3 kernel with something else than padding, along one axis."""
        return sum(
            0 <= out * stride + k - 1 < side for out in range(side // stride) for k in range(3)
        )

    by_hand = valid(32) ** 2 * 3 * 16 + 64 * 10
    for side, width, before in ((32, 16, 16), (16, 32, 16), (8, 64, 32)):
        stride = 1 if width == 16 else 2
        by_hand += valid(side * stride, stride) ** 2 * before * width
        by_hand += 17 * valid(side) ** 2 * width * width
    macs = cost.xla_macs(network, shapes(network), IMAGE).cumulative[-1]
    # XLA counts normalisation, ReLU and additions too, a few operations for each activation.
    assert by_hand < macs < 1.03 * by_hand


@pytest.mark.parametrize("exits", [(), (1,), (2, 3), (1, 2, 3, 4, 5, 6)])
def test_exits_sit_where_they_are_asked_for_and_the_last_is_always_there(exits):
    network = fast(7, width=4, exits=exits)
    assert network.num_exits == len({*exits, 6})
    outputs = jax.eval_shape(
        lambda key, x: network.apply_all(network.init(key, x), x)[0], jax.random.key(0), IMAGE
    )
    assert outputs.logits.shape == (network.num_exits, 2, 7)
    assert outputs.gate.shape == (network.num_exits, 2)


@pytest.mark.parametrize("depth", [7, 2, 57])
def test_a_depth_that_is_not_6n_plus_2_is_refused(depth):
    with pytest.raises(ValueError, match="6n"):
        resnet(10, depth=depth)


def test_a_network_is_built_by_name_from_plain_values():
    network = build("fast", 4, [8, 8, 3], width=4, exits=[1, 2], dtype="bfloat16")
    assert network.num_exits == 3
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((2, 8, 8, 3)))
    assert shapes["params"]["heads"][0]


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("fastest", {}, "'fastest' is no family; give one of alexnet"),
        ("fast", {"depth": 3}, "fast takes no depth; it takes width, exits"),
        ("fast", {"width": 4.5}, "fast got width 4.5; give a whole number"),
        ("fast", {"width": True}, "fast got width True; give a whole number"),
        ("mobilenet", {"width": "wide"}, "mobilenet got width 'wide'; give a number"),
        ("fast", {"head": "linear"}, "head 'linear'; give a function"),
        ("fast", {"dtype": "float99"}, "dtype 'float99'; give float32 or bfloat16"),
        ("fast", {"width": 0}, "width"),
        ("vgg", {"depth": 12}, "a VGG depth of 12"),
    ],
)
def test_a_network_that_no_family_builds_is_refused_with_a_reason(family, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(family, 4, (32, 32, 3), **arguments)
