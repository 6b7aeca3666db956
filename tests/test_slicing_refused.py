"""What cannot be cut says so: which value or variable, between which stages, and what to do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name as named
from sliced import (
    CLASSES,
    IMAGE,
    VECTOR,
    assert_close,
    cut_convnet,
    dense,
    dense_model,
    drawn,
    images_of,
    linear_head,
)

from eejax import Module
from eejax.adapters.linen import cut_linen
from eejax.adapters.slicing import cut_named, graft, stages


def in_scan(v, x):
    return lax.scan(lambda x, _: (named(x @ v["params"]["a"], "deep"), None), x, None, length=2)[0]


REFUSED = {
    "missing": (
        ["z"],
        lambda v, x: dense(v, "b", named(dense(v, "a", x), "x")),
        r"no value is named 'z'; names to cut at: 'x'\. What is inside a scan",
    ),
    "in a scan": (
        ["deep"],
        lambda v, x: named(dense(v, "b", in_scan(v, x)), "out") * 2,
        r"'deep' is inside a scan; names to cut at: 'out'",
    ),
    "in a jit in a loop": (
        ["deep"],
        lambda v, x: named(
            lax.fori_loop(0, 2, lambda i, x: jax.jit(lambda x: named(x * 2, "deep"))(x), x), "out"
        ).sum(),
        "'deep' is inside a scan; names to cut at: 'out'",
    ),
    "twice": (
        ["x"],
        lambda v, x: dense(v, "b", named(named(dense(v, "a", x), "x") * 2, "x")),
        "2 values are named 'x'; give each a name of its own",
    ),
    "out of order": (
        ["y", "x"],
        lambda v, x: dense(v, "b", named(jnp.tanh(named(dense(v, "a", x), "x")), "y")),
        "nothing is left to compute from 'y' to 'x'; give names in the order",
    ),
    "the images": (
        ["x"],
        lambda v, x: dense(v, "b", dense(v, "a", named(x, "x"))),
        "nothing is left to compute from the images to 'x'",
    ),
    "the answer": (
        ["x"],
        lambda v, x: named(dense(v, "b", dense(v, "a", x)), "x"),
        "nothing is left to compute after 'x', and the model's own output is an exit already",
    ),
    "of variables alone": (
        ["w"],
        lambda v, x: dense(v, "b", x @ named(2 * v["params"]["a"], "w")),
        "'w' does not depend on the images",
    ),
    "a shared parameter": (
        ["x"],
        lambda v, x: dense(v, "a", jnp.tanh(named(dense(v, "a", x), "x"))) + dense(v, "b", x),
        r"params/a is read by stage 1 \(from the images to 'x'\) and by stage 2 \(from 'x' to the "
        "end",
    ),
    "a mean of the batch across the cut": (
        ["x"],
        lambda v, x: dense(v, "b", named(dense(v, "a", x - (m := x.mean(0))[None]), "x")) + m[None],
        r"float32\[4\], made by div, would cross the cut at 'x', and with 2 images it does not",
    ),
    "a named mean of the batch": (
        ["x"],
        lambda v, x: dense(v, "b", x) + named(dense(v, "a", x).mean(0), "x")[None],
        r"float32\[4\], made by div, would cross the cut at 'x'",
    ),
    "pairs of images": (
        ["x"],
        lambda v, x: dense(v, "b", jnp.tanh(named((y := dense(v, "a", x)) @ y.T, "x")) @ x),
        r"float32\[2, 2\], made by dot_general, would cross the cut at 'x'",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_cut_says_so(what):
    at, apply, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        stages(dense_model(lambda v, x, train: apply(v, x), "a", "b"), at, VECTOR)


def test_statistics_updated_with_what_a_later_stage_computes_are_refused():
    def apply(v, x, train):
        x = named(dense(v, "a", x - v["batch_stats"]["mean"][None]), "x")
        x = jnp.tanh(x)
        after = {"mean": x.mean(0)} if train else v["batch_stats"]
        return dense(v, "b", x), after

    with pytest.raises(ValueError, match=r"batch_stats/mean belongs to stage 1 .* stage 2 .*'x'"):
        stages(dense_model(apply, "a", "b", stats=["mean"]), ["x"], VECTOR)


def test_statistics_of_another_structure_are_refused():
    def apply(v, x, train):
        return dense(v, "b", named(dense(v, "a", x), "x")), {"median": x.mean(0)} if train else {}

    with pytest.raises(ValueError, match=r"returns batch_stats/median .* batch_stats/mean;"):
        stages(dense_model(apply, "a", "b", stats=["mean"]), ["x"], VECTOR)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"params": [jnp.ones((4, 4))]}, r"\['params'\]\[0\]; give nested dicts"),
        ({"params": {0: jnp.ones((4, 4))}}, r"\['params'\]\[0\]; give nested dicts"),
        ({"params": {}, "cache": {"a": jnp.ones(4)}}, "'cache' .* only params and batch_stats"),
    ],
)
def test_variables_are_nested_dicts_of_two_collections(variables, message):
    def apply(v, x, *, train, key=None):
        return 2 * named(x + jax.tree.leaves(v)[0].sum(), "x"), {}

    with pytest.raises(ValueError, match=message):
        stages(Module(lambda key, x: variables, apply), ["x"], VECTOR)


def test_one_string_is_no_list_of_names():
    model = dense_model(lambda v, x, train: dense(v, "b", named(dense(v, "a", x), "x")), "a", "b")
    with pytest.raises(ValueError, match=r"one string, 'x', .*; give a list: \['x'\]"):
        cut_named(model, "x", linear_head, VECTOR)


def test_images_and_variables_of_another_kind_are_refused():
    network, variables, _ = cut_convnet(jnp.float32)
    with pytest.raises(ValueError, match=r"images float32\[2, 8, 8, 3\]; .*\[2, 8, 8, 2\]"):
        network.apply_plain(variables, jnp.zeros((2, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"features float32\[2, 8, 8, 5\]; .*\[2, 8, 8, 4\]"):
        network.apply_stage(variables, 1, (jnp.zeros((2, 8, 8, 5)), ()))
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"])
    with pytest.raises(ValueError, match=r"params/.* is bfloat16.*; the model was cut with"):
        network.apply_plain({**variables, "params": narrow}, images_of(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("head"), "network takes and the model lacks params/head/w;"),
        (lambda p: p.update(new=np.ones(2)), "model has and the network does not take params/new;"),
        (
            lambda p: p.update(head={"w": np.ones((2, 2), np.float32)}),
            r"params/head/w is float32\[2, 2\] in the model and float32\[8, 4\] in the network",
        ),
        (
            lambda p: p.update(head={"w": np.ones((2, 2), np.float16)}),
            r"params/head/w is float16\[2, 2\] in the model and float32\[8, 4\] in the network",
        ),
        (
            lambda p: p.update(head={"w": np.ones((8, 4), np.int8)}),
            r"params/head/w is int8\[8, 4\] in the model and float32\[8, 4\] in the network",
        ),
    ],
)
def test_only_variables_of_the_same_model_are_grafted(change, message):
    _, variables, original = cut_convnet(jnp.float32)
    params = dict(original["params"])
    change(params)
    with pytest.raises(ValueError, match=message):
        graft(variables, {**original, "params": params})


def test_what_depends_on_the_number_of_images_is_refused():
    def in_pairs(v, x, train):
        if train:
            x = x.reshape(len(x) // 4, 4, 4).reshape(x.shape)
        return dense(v, "b", named(dense(v, "a", x), "x"))

    network = cut_named(dense_model(in_pairs, "a", "b"), ["x"], linear_head, VECTOR)
    variables = network.init(jax.random.key(0), images_of(1, VECTOR))
    with pytest.raises(ValueError, match="trains with 4 images and does not with 2"):
        network.apply_all(variables, images_of(4, VECTOR), train=True)

    def skips_where_many(v, x, train):
        later = jnp.tanh(named(dense(v, "a", x), "x"))
        return dense(v, "b", later + x if len(x) > 3 else later)

    def skips_where_some(v, x, train):
        later = jnp.tanh(named(dense(v, "a", x), "x"))
        return dense(v, "b", later + x if len(x) > 2 else later)

    with pytest.raises(ValueError, match="1 values cross the cut at 'x' with 2 images and 2 with"):
        stages(dense_model(skips_where_some, "a", "b"), ["x"], VECTOR)
    network = cut_named(dense_model(skips_where_many, "a", "b"), ["x"], linear_head, VECTOR)
    assert network.apply_plain(variables, images_of(3, VECTOR)).shape == (3, 4)
    with pytest.raises(ValueError, match="with 4 images other values cross the cuts than with 2"):
        network.apply_plain(variables, images_of(4, VECTOR))


def weights(key, shape, dtype=jnp.float32):
    return drawn(key, 0, *shape).astype(dtype)


class Sowing(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        self.sow("losses", "size", (x**2).sum())
        return nn.Dense(CLASSES, kernel_init=weights)(x.reshape(len(x), -1))


class Partitioned(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        init = nn.with_partitioning(weights, (None, "model"))
        x = nn.Dense(4, kernel_init=init, name="first")(x.reshape(len(x), -1))
        return nn.Dense(CLASSES, kernel_init=weights)(x)


def test_sown_losses_and_partitioned_parameters_say_what_they_are():
    with pytest.raises(ValueError, match=r"'losses' of variables; .* sow into \"intermediates\""):
        cut_linen(Sowing(), [], linear_head, IMAGE)
    with pytest.raises(ValueError, match=r"params/first/kernel is in a box.*nn\.unbox"):
        cut_linen(Partitioned(), ["first"], linear_head, IMAGE)


def test_a_partitioned_model_is_cut_unboxed_as_the_page_says():
    model = Partitioned()
    pair = Module(
        lambda key, x: nn.unbox(model.init(key, x, False)),
        lambda variables, x, train, key=None: (model.apply(variables, x, train), {}),
    )
    network = cut_named(pair, [], linear_head, IMAGE)
    trained = jax.jit(lambda key: model.init(key, images_of(1), False))(jax.random.key(1))
    variables = graft(network.init(jax.random.key(0), images_of(1)), trained)
    found = network.apply_plain(variables, images_of(2))
    assert_close(found, model.apply(trained, images_of(2), False))
