"""Exit heads: what each reader makes of features, gates, cascades, and what they cost."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eejax import backbone, compact, cond, cost, gate, loop, max_prob
from eejax.evaluation.routing import route, score
from eejax.inference.executors import full
from eejax.models import heads
from eejax.models.heads import Convolutional, Flat, Head, Hidden, Mixed, Pooled, Reduced, Tokens
from eejax.trace import collect


def some(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def filled(module, *inputs):
    """Variables of a module, every one a drawn number, so that none of them can be left out."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, train=False))
    leaves, tree = jax.tree.flatten(shapes)
    drawn = (0.5 + np.abs(some(*s.shape, seed=i)) for i, s in enumerate(leaves))
    return jax.tree.unflatten(tree, [x.astype(np.float32) for x in drawn])


def initial(module, *inputs):
    run = jax.jit(lambda *x: module.init(jax.random.key(0), *x, train=False))
    return run(*inputs).get("params", {})


def applied(module, variables, *inputs):
    run = jax.jit(lambda v, *x: module.apply(v, *x, train=False))
    return jax.tree.map(np.asarray, run(variables, *inputs))


def normalised(x, scale=1.0, bias=0.0):
    """Layer normalisation."""
    deviation = x - x.mean(-1, keepdims=True)
    return deviation / np.sqrt((deviation**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


READERS = {
    "average": (Pooled(), (8, 8, 6), 6),
    "both, normalised": (Pooled("both", norm=True), (8, 8, 6), 12),
    "flat": (Flat(), (4, 2, 6), 48),
    "flat, averaged": (Flat(2), (4, 8, 6), 24),
    "hidden": (Hidden((7, 5)), (8, 8, 6), 5),
    "hidden, flat": (Hidden((7,), Flat(2), jnp.bfloat16), (8, 8, 6), 7),
    "convolutional": (Convolutional(3), (8, 8, 6), 48),
    "convolutional, odd": (Convolutional(3), (5, 5, 6), 27),
    "convolutional, one pixel": (Convolutional(3), (1, 1, 6), 3),
    "convolutional, in bfloat16": (Convolutional(3, jnp.bfloat16), (4, 4, 6), 12),
    "mixed": (Mixed(), (8, 8, 6), 96),
    "mixed, no multiple": (Mixed(), (10, 10, 6), 150),
    "mixed, the most that stays": (Mixed(), (7, 15, 6), 210),
    "mixed, oblong": (Mixed(), (8, 4, 6), 96),
    "mixed, narrow": (Mixed(), (8, 2, 6), 48),
    "mixed, small": (Mixed(), (2, 2, 6), 24),
    "reduced": (Reduced(), (8, 8, 6), 128),
    "reduced, as wide as it is": (Reduced(None), (16, 16, 6), 24),
    "reduced, one pixel": (Reduced(5, jnp.bfloat16), (2, 2, 6), 5),
    "class token": (Tokens(), (9, 6), 6),
    "mean token": (Tokens("mean", norm=False), (9, 6), 6),
    "attention": (Tokens("attention"), (9, 6), 6),
}


@pytest.mark.parametrize(("train", "dtype"), [(False, jnp.float32), (True, jnp.bfloat16)])
@pytest.mark.parametrize("name", READERS)
def test_every_reader_makes_a_vector_for_a_head(name, train, dtype):
    reader, shape, width = READERS[name]
    features = jax.ShapeDtypeStruct((2, *shape), dtype)
    head = Head(4, reader, gate="features")

    def run(features):
        variables = head.init(jax.random.key(0), features, (), train=False)
        return variables, head.apply(variables, features, (), train=train, mutable=["batch_stats"])

    variables, (output, _) = jax.eval_shape(run, features)
    assert variables["params"]["classifier"]["kernel"].shape == (width, 4)
    assert variables["params"]["gate"]["kernel"].shape == (width, 1)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert (output.logits.shape, output.gate.shape) == ((2, 4), (2,))
    assert output.logits.dtype == output.gate.dtype == jnp.float32
    assert output.memory == ()


@pytest.mark.parametrize("train", [False, True])
def test_pooling_is_the_mean_and_the_maximum(train):
    x = some(3, 4, 6, 5)
    run = jax.jit(lambda x: Pooled("both").apply({}, x, train=train))
    expected = np.concatenate([x.mean((1, 2)), x.max((1, 2))], axis=-1)
    np.testing.assert_allclose(run(x), expected, atol=1e-6)


def test_pooling_normalises_with_the_running_statistics_and_cuts_at_zero():
    x, reader = some(3, 4, 4, 5), Pooled(norm=True)
    variables = filled(reader, x)
    (params, stats) = variables["params"]["bn"], variables["batch_stats"]["bn"]
    y = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]
    expected = np.maximum(y, 0).mean((1, 2))
    np.testing.assert_allclose(applied(reader, variables, x), expected, rtol=1e-5)


@pytest.mark.parametrize("reader", [Pooled("average"), Pooled("max")])
def test_gradients_pass_the_pooling_of_a_network_that_is_not_in_training(reader):
    x = some(2, 3, 3, 4)

    def total(x):
        return (reader.apply({}, x, train=False) * jnp.arange(4.0)[None]).sum()

    found = jax.jit(jax.grad(total))(x)
    highest = x == x.max((1, 2), keepdims=True)
    where = highest if reader.kind == "max" else np.full(x.shape, 1 / 9)
    np.testing.assert_allclose(found, where * np.arange(4), rtol=1e-6)


def test_flat_features_are_in_the_order_of_pytorch():
    x = some(2, 4, 2, 3)
    in_order = x.transpose(0, 3, 1, 2).reshape(2, -1)
    np.testing.assert_array_equal(applied(Flat(), {}, x), in_order)
    averaged = x.reshape(2, 2, 2, 2, 1, 3).mean((2, 4)).transpose(0, 3, 1, 2).reshape(2, -1)
    np.testing.assert_allclose(applied(Flat(2), {}, x), averaged, atol=1e-6)


def test_hidden_layers_are_an_mlp_on_what_the_reader_gives():
    x, reader = some(3, 2, 2, 4), Hidden((6, 5), Flat())
    variables = filled(reader, x)
    expected = x.transpose(0, 3, 1, 2).reshape(3, -1)
    for i in range(2):
        layer = variables["params"][f"layer{i}"]
        expected = np.maximum(expected @ layer["kernel"] + layer["bias"], 0)
    np.testing.assert_allclose(applied(reader, variables, x), expected, rtol=1e-4, atol=1e-4)


def test_the_convolutional_reader_is_a_convolution_and_pooling():
    x, reader = some(2, 4, 4, 3), Convolutional(5)
    variables = filled(reader, x)
    kernel, bias = (variables["params"]["conv"][k] for k in ("kernel", "bias"))
    kernel -= kernel.mean()  # of both signs
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = np.zeros((2, 4, 4, 5), np.float32)
    for i in range(3):
        for j in range(3):
            y += padded[:, i : i + 4, j : j + 4] @ kernel[i, j]
    y = np.maximum(y + bias, 0)
    y = np.pad(y, ((0, 0), (0, 1), (0, 1), (0, 0)))
    corners = [(0, 0), (0, 2), (2, 0), (2, 2)]
    pooled = np.stack([y[:, i : i + 3, j : j + 3].max((1, 2)) for i, j in corners], axis=-1)
    found = applied(reader, {"params": {"conv": {"kernel": kernel, "bias": bias}}}, x)
    np.testing.assert_allclose(found, pooled.reshape(2, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "window"), [((10, 8), (2, 2)), ((8, 3), (2, 1))])
def test_mixed_pooling_weighs_maximum_and_average(shape, window):
    x, reader = some(2, *shape, 3), Mixed()
    assert initial(reader, x)["mix"] == 0.5
    (h, w), (m, n) = shape, window
    blocks = x.reshape(2, h // m, m, w // n, n, 3)
    expected = 0.2 * blocks.max((2, 4)) + 0.8 * blocks.mean((2, 4))
    found = applied(reader, {"params": {"mix": np.float32(0.2)}}, x)
    np.testing.assert_allclose(found, expected.transpose(0, 3, 1, 2).reshape(2, -1), atol=1e-6)


def test_mixed_pooling_learns_nothing_where_there_is_nothing_to_pool():
    x = some(2, 4, 4, 3)
    assert not jax.tree.leaves(initial(Mixed(), x))
    np.testing.assert_array_equal(applied(Mixed(), {}, x), applied(Flat(), {}, x))


def test_msdnets_reader_is_two_convolutions_and_pooling():
    x, reader = some(2, 8, 8, 3), Reduced(4)
    variables = filled(reader, x)
    y = x
    for i in range(2):
        kernel = variables["params"][f"conv{i}"]["kernel"]
        norm, stats = variables["params"][f"bn{i}"], variables["batch_stats"][f"bn{i}"]
        padded, half = np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0))), y.shape[1] // 2
        y = sum(
            padded[:, a : a + 2 * half : 2, b : b + 2 * half : 2] @ kernel[a, b]
            for a in range(3)
            for b in range(3)
        )
        y = (y - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
        y = np.maximum(y, 0)
    assert y.max() > 0
    np.testing.assert_allclose(applied(reader, variables, x), y.mean((1, 2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["class", "mean", "attention"])
def test_tokens_are_normalised_and_read(kind):
    x, reader = some(3, 5, 8), Tokens(kind)
    variables = filled(reader, x)
    params = variables["params"]
    y = normalised(x, params["norm"]["scale"], params["norm"]["bias"])
    weights = {"class": np.eye(5)[:1].repeat(3, 0), "mean": np.full((3, 5), 0.2)}
    if kind == "attention":
        products = np.exp(y @ params["query"] / np.sqrt(8))
        weights["attention"] = products / products.sum(-1, keepdims=True)
    expected = (weights[kind][..., None] * y).sum(1)
    np.testing.assert_allclose(applied(reader, variables, x), expected, rtol=1e-4, atol=1e-4)


def test_of_several_scales_the_last_is_read():
    scales = (some(2, 4, 4, 3), some(2, 2, 2, 5, seed=1))
    head = Head(4)
    variables = filled(head, scales, ())
    found = applied(head, variables, scales, ())
    np.testing.assert_array_equal(found.logits, applied(head, variables, scales[1], ()).logits)


def test_a_head_without_a_gate_says_zero_and_learns_none():
    head, x = Head(4, bias=False), some(2, 2, 2, 3)
    variables = filled(head, x, ())
    assert list(variables["params"]) == ["classifier"]
    assert list(variables["params"]["classifier"]) == ["kernel"]
    output = applied(head, variables, x, ())
    np.testing.assert_array_equal(output.gate, np.zeros(2))
    expected = x.mean((1, 2)) @ variables["params"]["classifier"]["kernel"]
    np.testing.assert_allclose(output.logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", ["features", "uncertainty"])
def test_a_gate_is_linear_on_what_it_reads(gate):
    head, x = Head(4, gate=gate), some(2, 2, 2, 3)
    variables = filled(head, x, ())
    output = applied(head, variables, x, ())
    read = x.mean((1, 2)) if gate == "features" else np.asarray(heads.uncertainty(output.logits))
    layer = variables["params"]["gate"]
    expected = read @ layer["kernel"][:, 0] + layer["bias"]
    np.testing.assert_allclose(output.gate, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(initial(head, x, ())["gate"]["bias"], [-1])


def test_a_gate_on_evidence_is_linear_on_this_answer_and_the_one_before():
    head, x, before = Head(4, gate="evidence"), some(5, 2, 2, 3), 3 * some(5, 4, seed=1)
    variables = filled(head, x, before)
    layer = variables["params"]["gate"]
    assert layer["kernel"].shape == initial(head, x, ())["gate"]["kernel"].shape == (7, 1)
    for memory in (before, ()):
        output = applied(head, variables, x, memory)
        z = np.asarray(output.logits, np.float64)

        def confidence(z):
            p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
            return np.log1p(-np.log(1 - p.max(-1)))

        agrees = z.argmax(-1) == before.argmax(-1)
        past = [confidence(before.astype(np.float64)), agrees] if len(memory) else [0 * z[:, 0]] * 2
        read = np.concatenate(
            [heads.uncertainty(output.logits), np.stack([confidence(z), *past], -1)], -1
        )
        expected = read @ layer["kernel"][:, 0] + layer["bias"]
        np.testing.assert_allclose(output.gate, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(output.memory, output.logits)
    assert 0 < agrees.sum() < 5


def test_evidence_is_finite_and_tells_confidences_close_to_one_apart():
    sure = np.array([[30.0, 0, 0], [60, 0, 0], [1e4, -1e4, 0]], np.float32)
    values = np.asarray(heads.evidence(jnp.asarray(sure), jnp.asarray(sure)))
    assert np.isfinite(values).all()
    assert values[0, 4] < values[1, 4] < values[2, 4]
    assert np.isfinite(heads.evidence(jnp.zeros((2, 1)))).all()


# Drawn, one class far above the others, two, and all alike.
LOGITS = [*3 * some(3, 7), 100.0 * np.eye(7)[2] - 50, 100.0 * (np.arange(7) < 2) - 50, np.zeros(7)]


@pytest.mark.parametrize("logits", [np.array(LOGITS, np.float32), some(4, 2)], ids=["seven", "two"])
def test_uncertainty_is_four_statistics_with_finite_gradients(logits):
    def entropy(p):
        return -(p * np.log(np.maximum(p, 1e-300))).sum(-1) / np.log(p.shape[-1])

    p = np.exp(np.float64(logits) - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    squares = p**2 / (p**2).sum(-1, keepdims=True)
    top = np.sort(p)[:, ::-1]
    expected = np.stack([top[:, 0], entropy(p), top[:, 0] - top[:, 1], entropy(squares)], axis=-1)

    def both(logits):
        found = heads.uncertainty(logits)
        return found, jax.vmap(jax.jacrev(lambda z: heads.uncertainty(z[None])[0]))(logits)

    found, gradients = jax.jit(both)(logits)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert np.isfinite(gradients).all()
    certain = expected[:, 0] > 0.999
    np.testing.assert_array_equal(np.abs(gradients).max((1, 2)) < 1e-3, certain)


class Mix(nn.Module):
    """A block of the small networks below, equal wherever it stands."""

    @nn.compact
    def __call__(self, x, *, train):
        del train
        return x + nn.gelu(nn.Dense(x.shape[-1])(x))


def cascade(head=None, exits=3):
    """Exits of which each head sees the one before."""
    head = head or Head(3, gate="features", cascaded=True)
    return backbone.cut([Mix()] * exits, "all", lambda e: head)


def drawn(network, images):
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [some(*s.shape, seed=i) for i, s in enumerate(leaves)])


def test_a_cascaded_head_sees_what_the_one_before_said():
    head, x, said = Head(4, cascaded=True), some(2, 2, 2, 3), 10 * some(2, 4, seed=1)
    first = filled(head, x, ())
    assert list(first["params"]) == ["classifier"]
    variables = filled(head, x, said)
    before = variables["params"]["before"]
    read = [x.mean((1, 2)), normalised(said, before["scale"], before["bias"])]
    layer = variables["params"]["classifier"]
    expected = np.concatenate(read, axis=-1) @ layer["kernel"] + layer["bias"]
    output = applied(head, variables, x, said)
    np.testing.assert_allclose(output.logits, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(output.memory, output.logits)


def test_no_gradient_passes_to_the_head_before():
    network, images = cascade(), jnp.asarray(some(2, 2, 2, 6))
    variables = drawn(network, images)

    def last(params):
        return (network.apply_all({"params": params}, images)[0].logits[-1] ** 2).sum()

    gradients = jax.jit(jax.grad(last))(variables["params"])
    size = [jax.tree.map(lambda x: float(np.abs(x).max()), head) for head in gradients["heads"]]
    assert max(jax.tree.leaves(size[:2])) == 0
    assert min(jax.tree.leaves(size[2]["classifier"])) > 0
    assert min(jax.tree.leaves(size[2]["before"])) > 0
    assert min(jax.tree.leaves(jax.tree.map(lambda x: np.abs(x).max(), gradients["stages"]))) > 0


@pytest.mark.parametrize(
    ("head", "policy"), [(None, max_prob), (Head(3, gate="evidence"), gate)], ids=["logits", "gate"]
)
def test_every_executor_hands_the_memory_of_a_cascade_on(head, policy):
    """Two programs differ in the last bits, so samples that sit on a threshold are left out."""
    network, images = cascade(head), some(30, 2, 2, 6)
    variables = drawn(network, images)
    trace = collect(network, variables, images, np.zeros(30, int))
    scored = score(policy, trace)
    thresholds = np.quantile(scored.scores[:, :-1], 0.6, axis=0).astype(np.float32)
    routed = route(scored, thresholds)
    assert set(routed.exits.tolist()) == {0, 1, 2}
    clear = (np.abs(scored.scores[:, :-1] - thresholds) > 1e-4).all(1)
    assert clear.sum() >= 25

    def run(variables, thresholds, images):
        return [
            each(network, policy, variables, thresholds, images)
            for each in (full, cond, compact, loop)
        ]

    for found in jax.jit(run)(variables, thresholds, images):
        np.testing.assert_array_equal(found.exits[clear], routed.exits[clear])
        np.testing.assert_allclose(found.logits[clear], routed.logits[clear], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (Pooled("sum"), (4, 4, 2), '"average", "max" or "both"'),
        (Tokens("last"), (4, 2), '"class", "mean" or "attention"'),
        (Flat(3), (4, 4, 2), "4x4 for a classifier on 3x3"),
        (Flat(), (5, 2), r"of shape \(1, 5, 2\); Flat reads \[B, H, W, K\]; .* give Tokens"),
        (Pooled(), (17, 12), r"\(1, 17, 12\); Pooled reads \[B, H, W, K\]; for tokens give Tokens"),
        (Pooled(), (12,), r"\(1, 12\); Pooled reads \[B, H, W, K\]\.\s"),
        (Mixed(), (5, 2), r"Mixed reads \[B, H, W, K\]; for tokens give Tokens\(\)"),
        (Convolutional(), (5, 2), r"Convolutional reads \[B, H, W, K\]; for tokens give Tokens"),
        (Reduced(), (5, 2), r"Reduced reads \[B, H, W, K\]; for tokens give Tokens\(\)"),
        (Tokens(), (4, 4, 2), r"\(1, 4, 4, 2\); Tokens reads \[B, T, D\]; .* give Pooled\(\)"),
        (Tokens(), (2,), r"\(1, 2\); Tokens reads \[B, T, D\]\.\s"),
        (Flat(7), (4, 4, 2), "a multiple of 7"),
    ],
)
def test_what_a_reader_cannot_read_is_refused(module, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False))


@pytest.mark.parametrize("gate", ["logits", True])
def test_a_gate_on_something_else_is_refused(gate):
    with pytest.raises(ValueError, match='"features", "uncertainty", "evidence" or None'):
        jax.eval_shape(
            lambda: Head(3, gate=gate).init(
                jax.random.key(0), jnp.zeros((1, 2, 2, 2)), (), train=False
            )
        )


def test_larger_heads_cost_more_and_products_are_those_of_their_layers():
    def of(reader, **arguments):
        network = cascade(Head(3, reader, **arguments), exits=2)
        image = jax.ShapeDtypeStruct((2, 8, 8, 6), jnp.float32)
        variables = jax.eval_shape(network.init, jax.random.key(0), image)
        each = [count(network, variables, image) for count in (cost.xla_macs, cost.macs)]
        np.testing.assert_array_equal(each[1].stages, [64 * 36] * 2)
        return [costs.heads for costs in each]

    # The first head of a cascade has nothing to see.
    expected = {
        "plain": (of(Pooled()), [18, 18]),
        "cascaded": (of(Pooled(), cascaded=True), [18, 27]),
        "gate": (of(Pooled(), gate="features"), [24, 24]),
        "hidden": (of(Hidden((32,))), [6 * 32 + 32 * 3] * 2),
        "mixed": (of(Mixed()), [96 * 3] * 2),
        "convolutional": (of(Convolutional(4)), [64 * 9 * 6 * 4 + 64 * 3] * 2),
        "reduced": (of(Reduced(16)), [16 * 9 * 6 * 16 + 4 * 9 * 16 * 16 + 16 * 3] * 2),
    }
    plain = expected["plain"][0][0]
    assert (plain > 0).all()
    for name, ((macs, products), by_hand) in expected.items():
        np.testing.assert_array_equal(products, by_hand, err_msg=name)
        assert name == "plain" or macs[1] > plain[1], name


def test_average_pooling_drops_what_is_left_over():
    x = some(1, 5, 7, 2)
    expected = x[:, :4, :6].reshape(1, 2, 2, 2, 3, 2).mean((2, 4))
    found = jax.jit(heads.average_pool, static_argnums=1)(x, (2, 3))
    np.testing.assert_allclose(found, expected, atol=1e-6)
