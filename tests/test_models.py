"""The shipped networks: shapes, cuts, gradients, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eejax import compact, cond, cost, loop, max_prob
from eejax.models.fast import fast
from eejax.models.isotropic import isotropic
from eejax.models.resnet import resnet
from eejax.routing import collect, route, score

IMAGE = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
SMALL = {
    "fast": lambda dtype: fast(4, width=4, gate=True, dtype=dtype),
    "resnet": lambda dtype: resnet(4, depth=8, width=4, exits=(1, 2), gate=True, dtype=dtype),
    "isotropic": lambda dtype: isotropic(4, depth=4, width=4, gate=True, dtype=dtype),
}


def parameters(network, image=IMAGE) -> int:
    shapes = jax.eval_shape(network.init, jax.random.key(0), image)
    return sum(p.size for p in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize(("depth", "published"), [(20, 0.27), (32, 0.46), (56, 0.85), (110, 1.73)])
def test_a_plain_resnet_has_the_published_number_of_parameters(depth, published):
    # He et al., 2016, table 6, in millions, to two digits.
    plain = parameters(resnet(10, depth=depth, exits=()))
    assert round(plain / 1e6, 2) == pytest.approx(published, abs=0.011)


def test_resnet_56_costs_what_a_count_by_hand_gives():
    network = resnet(10, depth=56, exits=())
    shapes = jax.eval_shape(network.init, jax.random.key(0), IMAGE)

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
    macs = cost.macs(network, shapes, IMAGE).cumulative[-1]
    # XLA counts normalisation, ReLU and additions too, a few operations for each activation.
    assert by_hand < macs < 1.03 * by_hand


@pytest.mark.parametrize("exits", [(), (1,), (2, 3), (1, 2, 3, 4, 5)])
def test_exits_sit_where_they_are_asked_for_and_the_last_is_always_there(exits):
    network = fast(7, width=4, exits=exits)
    assert network.num_exits == len({*exits, 5})
    outputs = jax.eval_shape(
        lambda key, x: network.apply_all(network.init(key, x), x)[0], jax.random.key(0), IMAGE
    )
    assert outputs.logits.shape == (network.num_exits, 2, 7)
    assert outputs.gate.shape == (network.num_exits, 2)


def test_any_set_of_exits_leaves_the_backbone_as_it_is():
    few, many = (resnet(10, depth=8, exits=e) for e in ((), (1, 2)))
    heads = 16 * 10 + 10 + 32 * 10 + 10
    assert parameters(many) - parameters(few) == heads


@pytest.mark.parametrize("exits", [(0,), (6,), (2, 1), (1, 1)])
def test_exits_that_do_not_exist_are_refused(exits):
    with pytest.raises(ValueError, match="from 1 to 5"):
        fast(10, exits=exits)
    with pytest.raises(ValueError, match="from 1 to 3"):
        resnet(10, depth=8, exits=exits)


@pytest.mark.parametrize("depth", [7, 2, 57])
def test_a_depth_that_is_not_6n_plus_2_is_refused(depth):
    with pytest.raises(ValueError, match="6n"):
        resnet(10, depth=depth)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("build", SMALL)
def test_every_parameter_is_reached_by_gradients(build, dtype):
    network = SMALL[build](dtype)
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    variables = jax.jit(network.init)(jax.random.key(0), images)

    def loss(params):
        outputs, stats = network.apply_all({**variables, "params": params}, images, train=True)
        return (outputs.logits**2).sum() + (outputs.gate**2).sum(), (outputs, stats)

    gradients, (outputs, stats) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert outputs.logits.dtype == outputs.gate.dtype == jnp.float32
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert gradient.dtype == jnp.float32, path
        assert np.abs(gradient).max() > 0, jax.tree_util.keystr(path)
    for before, after in zip(
        jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(stats), strict=True
    ):
        assert not np.array_equal(before, after)
        assert after.dtype == jnp.float32


@pytest.mark.parametrize("build", SMALL)
def test_executors_agree_with_the_reference_on_shipped_networks(build):
    """Two programs differ in the last bits, so samples that sit on a threshold are left out."""
    network = SMALL[build](jnp.float32)
    images = np.random.default_rng(3).normal(size=(40, 8, 8, 3)).astype(np.float32)
    variables = jax.jit(network.init)(jax.random.key(2), images[:1])
    scored = score(max_prob, collect(network, variables, images, np.zeros(40, int)))
    thresholds = np.quantile(scored.scores[:, :-1], 0.6, axis=0).astype(np.float32)
    routed = route(scored, thresholds)
    assert len(set(routed.exits.tolist())) == network.num_exits
    clear = (np.abs(scored.scores[:, :-1] - thresholds) > 1e-5).all(1)
    assert clear.sum() >= 36
    executors = [cond, compact, *([loop] if build == "isotropic" else [])]

    def run(variables, thresholds, images):
        return [each(network, max_prob, variables, thresholds, images) for each in executors]

    # Compiling is most of this test's time; LLVM's part of it is not what is tested.
    compiled = jax.jit(run, compiler_options={"xla_backend_optimization_level": "0"})
    for found in compiled(variables, thresholds, images):
        np.testing.assert_array_equal(found.exits[clear], routed.exits[clear])
        np.testing.assert_allclose(found.logits[clear], routed.logits[clear], rtol=1e-4, atol=1e-4)
