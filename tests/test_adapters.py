"""Models of Flax Linen, of NNX and of plain functions get exits without being written for them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from sliced import CLASSES, IMAGE, WIDTH, assert_close, images_of

from eejax import EarlyExitNetwork, ExitOutput, Module, checkpoint
from eejax.adapters.linen import cut_linen
from eejax.adapters.nnx import cut_nnx, nnx_variables, update_nnx
from eejax.adapters.slicing import graft, whole
from eejax.backbone import from_linen


def quick(key, shape, dtype=jnp.float32):
    """Numbers for weights; drawing properly takes longer to compile than all else here."""
    seed = jax.random.key_data(key).sum().astype(jnp.float32) % 1000
    numbers = jnp.sin((jnp.arange(int(np.prod(shape)), dtype=jnp.float32) + 1) * (seed + 1))
    return (numbers / int(np.prod(shape[:-1])) ** 0.5).reshape(shape).astype(dtype)


class Head(nn.Module):
    """Pooled and linear."""

    @nn.compact
    def __call__(self, features, memory, *, train):
        pooled = features.reshape(len(features), -1, features.shape[-1]).mean(1)
        logits = nn.Dense(CLASSES, kernel_init=quick)(pooled)
        return ExitOutput(logits, logits[:, 0], ())


def head(e):
    del e
    return Head()


class Branches(nn.Module):
    """Two branches, and a skip around both."""

    @nn.compact
    def __call__(self, x, train):
        left = nn.Conv(WIDTH, (3, 3), kernel_init=quick, name="left")(x)
        left = nn.BatchNorm(use_running_average=not train, name="norm")(left)
        self.sow("intermediates", "normed", left)
        right = nn.Conv(WIDTH, (1, 1), kernel_init=quick, name="right")(x)
        return nn.relu(left) + jnp.tanh(right) + x


class ResNet(nn.Module):
    """What the first block puts out skips to the end."""

    @nn.compact
    def __call__(self, x, train):
        x = checkpoint_name(nn.Conv(WIDTH, (3, 3), kernel_init=quick, name="stem")(x), "stem value")
        first = x = Branches(name="block0")(x, train)
        x = nn.max_pool(x, (2, 2), (2, 2))
        for i in range(1, 3):
            x = Branches(name=f"block{i}")(x, train)
        both = jnp.concatenate([first.mean((1, 2)), x.mean((1, 2))], axis=-1)
        return nn.Dense(CLASSES, kernel_init=quick, name="classifier")(both)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(WIDTH, WIDTH, (3, 3), kernel_init=quick, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.norm(self.conv(x)))


class NnxResNet(nnx.Module):
    def __init__(self, rngs, drop=0.0):
        self.stem = nnx.Conv(2, WIDTH, (3, 3), kernel_init=quick, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(3)])
        self.drop = nnx.Dropout(drop, rngs=rngs)
        self.out = nnx.Linear(WIDTH, CLASSES, kernel_init=quick, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.out(self.drop(x.mean((1, 2))))


def linen_resnet():
    model = ResNet()
    network = cut_linen(model, ("block0", "block1"), head, IMAGE)

    def apply(variables, images, train):
        if not train:
            return model.apply(variables, images, False), variables["batch_stats"]
        logits, after = model.apply(variables, images, True, mutable=["batch_stats"])
        return logits, after["batch_stats"]

    return network, jax.jit(lambda key: model.init(key, images_of(1), False)), apply


def sequential():
    model = nn.Sequential(
        [
            nn.Conv(WIDTH, (3, 3), kernel_init=quick),
            nn.relu,
            nn.Conv(WIDTH, (3, 3), kernel_init=quick),
            lambda x: x.mean((1, 2)),
            nn.Dense(CLASSES, kernel_init=quick),
        ]
    )
    network = cut_linen(model, ("layers_0", "layers_2"), head, IMAGE, lambda m, x, train: m(x))

    def apply(variables, images, train):
        return model.apply(variables, images), {}

    return network, jax.jit(lambda key: model.init(key, images_of(1))), apply


def nnx_resnet():
    model = NnxResNet(nnx.Rngs(1))
    network = cut_nnx(model, ("blocks/0", "blocks/1"), head, IMAGE)

    def apply(variables, images, train):
        fresh = nnx.clone(model)
        for of, collection in ((nnx.Param, "params"), (nnx.BatchStat, "batch_stats")):
            state = nnx.state(fresh, of)
            nnx.replace_by_pure_dict(state, variables[collection])
            nnx.update(fresh, state)
        fresh.train() if train else fresh.eval()
        return fresh(images), nnx_variables(fresh)["batch_stats"]

    return network, lambda key: nnx_variables(NnxResNet(nnx.Rngs(key))), apply


@pytest.mark.parametrize("build", [linen_resnet, sequential, nnx_resnet])
def test_the_last_exit_is_the_model_and_can_be_trained(build):
    network, init, model = build()
    original = init(jax.random.key(3))
    variables = graft(jax.jit(network.init)(jax.random.key(0), images_of(1)), original)
    images = images_of(5)

    def of_network(params, train):
        outputs, stats = network.apply_all({**variables, "params": params}, images, train=train)
        return (outputs.logits[-1] ** 2).sum(), (outputs.logits, stats)

    def of_model(params, train):
        logits, stats = model({**original, "params": params}, images, train)
        return (logits**2).sum(), (logits, stats)

    @jax.jit
    def both():
        return [
            (of_network(variables["params"], False), of_model(original["params"], False)),
            (
                jax.grad(of_network, has_aux=True)(variables["params"], True),
                jax.grad(of_model, has_aux=True)(original["params"], True),
            ),
        ]

    inference, training = both()
    (_, (logits, stats)), (_, (wanted, _)) = inference
    assert logits.shape == (3, 5, CLASSES)
    assert_close(logits[-1], wanted)
    assert_close(whole({"batch_stats": stats}), whole_stats(original))
    (gradients, (logits, stats)), (wanted_gradients, (wanted, after)) = training
    assert_close(logits[-1], wanted)
    assert_close(whole({"batch_stats": stats}), whole_stats({"batch_stats": after}))
    assert_close(whole({"params": gradients})["params"], wanted_gradients, atol=1e-5)


def whole_stats(variables):
    stats = variables.get("batch_stats")
    return {"batch_stats": stats} if stats else {}


# --- Linen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "stem_alone"),
    [
        (("stem value", "block1/normed"), True),
        (("block0/right", "block0/left"), False),
        (("block0/norm", "block2/left"), False),
    ],
)
def test_parts_of_submodules_sown_values_and_named_ones_can_be_cut_at(at, stem_alone):
    network = cut_linen(ResNet(), at, head, IMAGE)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images_of(2))
    first, _, last = shapes["params"]["stages"]
    assert (list(first) == ["stem"]) == stem_alone
    assert {"classifier", "block2"} <= set(last)
    values = jax.eval_shape(lambda v, x: network.apply_stage(v, 0, x)[0], shapes, images_of(2))
    assert values[0].shape == (2, 8, 8, WIDTH)


class Odd(nn.Module):
    """A module that is called twice, a remat, and one that returns several things."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        twice = nn.Dense(4, kernel_init=quick, name="twice")
        x = twice(jnp.tanh(twice(x[:, :4])))
        x = nn.remat(Inner)(name="saved")(x)
        pair = Pair(name="pair")(x)
        return nn.Dense(CLASSES, kernel_init=quick)(pair[0] * pair[1]["b"])


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(4, kernel_init=quick, name="inside")(x))


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, kernel_init=quick, name="one")(x), {"b": jnp.tanh(x)}


def without_train(module, x, train):
    del train
    return module(x)


def test_what_a_remat_returns_and_parts_of_what_a_module_returns_have_names():
    network = cut_linen(Odd(), ("saved", "pair[0]"), head, IMAGE, without_train)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images_of(2))
    assert [sorted(p) for p in shapes["params"]["stages"]] == [
        ["saved", "twice"],
        ["pair"],
        ["Dense_0"],
    ]


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (["nowhere"], r"no value is named 'nowhere'; .* 'saved', 'pair/one', 'pair\[0\]', \"pair"),
        (["twice"], r"2 values are named 'twice'.* called several times"),
        (["saved/inside"], "'saved/inside' is inside a "),
    ],
)
def test_names_that_cannot_be_cut_at(at, message):
    with pytest.raises(ValueError, match=message):
        cut_linen(Odd(), at, head, IMAGE, without_train)


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, train, deterministic=None):
        x = nn.Dense(4, kernel_init=quick, name="first")(x.reshape(len(x), -1))
        quiet = not train if deterministic is None else deterministic
        x = nn.Dropout(0.5, deterministic=quiet)(x)
        return nn.Dense(CLASSES, kernel_init=quick)(x)


def last_logits(network):
    """A function of variables, images and a key: the last exit's logits in training."""
    return jax.jit(lambda v, x, key: network.apply_all(v, x, train=True, key=key)[0].logits[-1])


def test_dropout_draws_from_the_key_of_its_stage_in_training():
    network = cut_linen(Dropping(), ["first"], head, IMAGE)
    variables = jax.jit(network.init)(jax.random.key(0), images_of(1))
    train, key = last_logits(network), jax.random.key(5)
    stage_key = jax.random.fold_in(key, 2)
    expected = Dropping().apply(
        whole(variables), images_of(8), True, rngs={"dropout": stage_key}, mutable=["batch_stats"]
    )[0]
    assert_close(train(variables, images_of(8), key), expected)
    assert (train(variables, images_of(8), jax.random.key(6)) != expected).any()
    with pytest.raises(ValueError, match="draws random numbers in training; give a key"):
        network.apply_all(variables, images_of(2), train=True)
    quiet = cut_linen(
        Dropping(), ["first"], head, IMAGE, lambda m, x, train: m(x, train, deterministic=True)
    )
    plain = jax.jit(network.apply_plain)(variables, images_of(2))
    assert_close(last_logits(quiet)(variables, images_of(2), None), plain)


class Caching(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        seen = self.variable("cache", "seen", jnp.zeros, ())
        return nn.Dense(CLASSES, kernel_init=quick)(x.reshape(len(x), -1)) + seen.value


def test_other_collections_are_refused():
    with pytest.raises(ValueError, match="'cache' of variables; only params and batch_stats"):
        cut_linen(Caching(), [], head, IMAGE)


def test_a_pair_of_functions_will_do_for_a_head():
    pair = Module(
        lambda key, features, memory: {"params": {}},
        lambda variables, features, memory, train, key=None: (
            ExitOutput(features[:, 0, 0, :CLASSES], features[:, 0, 0, 0], ()),
            {},
        ),
    )
    network = cut_linen(ResNet(), ("block0",), lambda e: pair, IMAGE)
    outputs = jax.eval_shape(
        lambda key, x: network.apply_all(network.init(key, x), x)[0],
        jax.random.key(0),
        images_of(2),
    )
    assert outputs.logits.shape == (2, 2, CLASSES)


# --- NNX ------------------------------------------------------------------------------------------


def test_an_nnx_network_starts_from_the_model_and_gives_back_what_it_learned(tmp_path):
    model = NnxResNet(nnx.Rngs(2))
    network = cut_nnx(model, ("blocks/0", "blocks/1"), head, IMAGE)
    variables = jax.jit(network.init)(jax.random.key(0), images_of(1))
    assert sorted(variables["params"]["stages"][0]["blocks"]) == ["0"]
    before = nnx_variables(model)
    assert_close(whole(variables), before, atol=0)
    plain = jax.jit(network.apply_plain)
    model.eval()
    for leaf in jax.tree.leaves(network.stages[0].init(jax.random.key(0), images_of(1))):
        leaf.delete()  # as a step does to which it is donated
    learned = jax.tree.map(lambda x: x + 0.1, variables)
    jax.tree.map(np.testing.assert_array_equal, nnx_variables(model), before)
    update_nnx(model, learned)
    assert_close(plain(learned, images_of(3)), nnx.jit(lambda m, x: m(x))(model, images_of(3)))
    checkpoint.save(tmp_path, 1, variables)
    _, restored = checkpoint.restore(tmp_path, learned)
    jax.tree.map(np.testing.assert_array_equal, restored, variables)
    exported = jax.export.export(plain, platforms=["cpu"])(variables, images_of(3))
    loaded = jax.export.deserialize(exported.serialize())
    assert_close(loaded.call(variables, images_of(3)), plain(variables, images_of(3)))
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), learned)
    update_nnx(model, narrow)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    jax.tree.map(np.testing.assert_array_equal, nnx_variables(model), whole(wide))
    other = jax.eval_shape(
        cut_linen(ResNet(), (), head, IMAGE).init, jax.random.key(0), images_of(1)
    )
    with pytest.raises(ValueError, match="network takes and the model lacks batch_stats/block0"):
        update_nnx(model, other)


def test_dropout_of_an_nnx_model_draws_from_the_key_in_training():
    model = NnxResNet(nnx.Rngs(2), drop=0.5)
    network = cut_nnx(model, ["blocks/1"], head, IMAGE)
    variables = network.init(jax.random.key(0), images_of(1))
    train, images = last_logits(network), images_of(8)
    first, again, other = (train(variables, images, jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    with pytest.raises(ValueError, match="draws random numbers in training; give a key"):
        train(variables, images, None)
    with pytest.raises(ValueError, match="changes its RngCount drop/rngs/count"):
        cut_nnx(model, ["blocks/1"], head, IMAGE, lambda m, x, train: (m.train(), m(x))[1])

    def quiet(m, x, train):
        del train
        m.set_attributes(nnx.Dropout, deterministic=True)
        return m(x)

    network = cut_nnx(model, ["blocks/1"], head, IMAGE, quiet)
    same = cut_nnx(NnxResNet(nnx.Rngs(2)), ["blocks/1"], head, IMAGE)
    assert_close(*(last_logits(n)(variables, images, None) for n in (network, same)))


def test_an_nnx_layer_that_is_shared_cannot_be_cut_between():
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(2, 2, rngs=rngs)
            self.twin = self.first

        def __call__(self, x):
            x = checkpoint_name(self.first(x.mean((1, 2))), "between")
            return self.twin(jnp.tanh(x))

    with pytest.raises(ValueError, match=r"params/first/\w+ is read by stage 1 .* by stage 2"):
        cut_nnx(Shared(nnx.Rngs(0)), ["between"], head, IMAGE)


# --- Plain functions ------------------------------------------------------------------------------


def test_plain_pairs_of_functions_are_stages_as_they_are():
    def stage(nth):
        def init(key, features):
            return {"params": {"w": quick(key, (features.shape[-1], 4))}}

        def apply(variables, features, *, train, key=None):
            return jnp.tanh(features @ variables["params"]["w"]) + nth, {}

        return Module(init, apply)

    network = EarlyExitNetwork((stage(0), stage(1)), (from_linen(Head()), from_linen(Head())))

    @jax.jit
    def run(key, x):
        variables = network.init(key, x)
        return variables, network.apply_all(variables, x)

    variables, (outputs, stats) = run(jax.random.key(0), images_of(3))
    assert outputs.logits.shape == (2, 3, CLASSES)
    assert stats == variables["batch_stats"]
