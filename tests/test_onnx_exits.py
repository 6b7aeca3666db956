"""Stage models and the single model against JAX: every family, every policy."""

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx_models import answer, chained, module, session, some_variables

from eejax import policies
from eejax.evaluation.routing import route, score
from eejax.models import FAMILIES, heads
from eejax.network import EarlyExitNetwork, normalise
from eejax.onnx import single, stages
from eejax.trace import recorded

SEED = 20261128


def agree(network, policy, variables, images):
    """Both kinds of models take the exits of the reference and give its logits."""
    shape = jax.ShapeDtypeStruct(images.shape[1:], images.dtype)
    outputs, _ = jax.jit(network.apply_all)(variables, images)
    trace = recorded(
        outputs.logits.transpose(1, 0, 2), np.zeros(len(images), np.int32), outputs.gate.T
    )
    scored = score(policy, trace)
    # Halfway between two scores, so that the last bits decide nothing.
    ordered = np.sort(scored.scores[:, :-1], axis=0)
    thresholds = ordered[len(images) // 2 - 1 : len(images) // 2 + 1].mean(0).astype(np.float32)
    models = stages(network, policy, variables, shape, np.full(len(thresholds), np.inf))
    logits, leaves = chained(models, images, thresholds)
    np.testing.assert_allclose(logits.transpose(1, 0, 2), scored.logits, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(leaves.T, scored.scores[:, :-1] >= thresholds)
    expected = route(scored, thresholds)
    run = session(single(models))
    for i in range(len(images)):
        given = {"images": images[i : i + 1], "thresholds": thresholds}
        logits, exits = run.run(["logits", "exits"], given)
        assert exits.dtype == np.int32
        assert exits.tolist() == [expected.exits[i]]
        np.testing.assert_allclose(logits[0], expected.logits[i], rtol=1e-3, atol=1e-4)
    return models


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_takes_the_exits_of_the_reference(name):
    small = dict(FAMILIES[name].small)
    sides = tuple(small.pop("image", (32, 32, 3)))
    network = FAMILIES[name].build(10, image=sides, **small)
    network = network.reading(normalise((120.0,) * sides[2], (60.0,) * sides[2]))
    image = jax.ShapeDtypeStruct(sides, jnp.uint8)
    images = np.random.default_rng(SEED).integers(0, 256, (6, *sides), np.uint8)
    policy = policies.with_temperatures(policies.max_prob, np.linspace(0.5, 2, network.num_exits))
    agree(network, policy, some_variables(network, image, SEED), images)


def small_resnet(**arguments):
    return FAMILIES["resnet"].build(5, image=(8, 8, 3), depth=8, width=4, exits=(1, 2), **arguments)


@pytest.mark.parametrize(
    ("reader", "options"),
    [
        (heads.Pooled("both", norm=True), {"gate": "features"}),
        (heads.Convolutional(4), {"gate": "uncertainty"}),
        (heads.Mixed(2), {"gate": "evidence"}),
        (heads.Reduced(8), {"cascaded": True}),
        (heads.Hidden((8,), heads.Pooled("max")), {"cascaded": True, "gate": "features"}),
    ],
)
def test_a_head_takes_the_exits_of_the_reference(reader, options):
    network = small_resnet(head=lambda e: heads.Head(5, reader, **options))
    images = np.random.default_rng(SEED).normal(size=(6, 8, 8, 3)).astype(np.float32)
    policy = policies.gate if "gate" in options else policies.margin
    agree(network, policy, some_variables(network, images[0], SEED), images)


@pytest.mark.parametrize("kind", ["class", "mean", "attention"])
def test_a_head_on_tokens_takes_the_exits_of_the_reference(kind):
    small = dict(FAMILIES["vit"].small)
    sides = tuple(small.pop("image"))
    head = heads.Head(4, heads.Tokens(kind))
    network = FAMILIES["vit"].build(4, image=sides, **small, head=lambda e: head)
    images = np.random.default_rng(SEED).normal(size=(6, *sides)).astype(np.float32)
    agree(network, policies.max_prob, some_variables(network, images[0], SEED), images)


EXITS, CLASSES = 4, 5
COST = np.linspace(0.25, 1, EXITS)


def logits_alone():
    """A network whose images are the logits of its exits, `[B, E C]`."""

    def head(e):
        return module(lambda x, memory: answer(x[:, e * CLASSES : (e + 1) * CLASSES]))

    stage = module(lambda x: x)
    nothing = {"stages": ({},) * EXITS, "heads": ({},) * EXITS}
    network = EarlyExitNetwork((stage,) * EXITS, tuple(head(e) for e in range(EXITS)))
    return network, {"params": nothing, "batch_stats": nothing}


def some_logits(seed, count):
    random = np.random.default_rng(seed)
    labels = random.integers(CLASSES, size=count)
    logits = 2 * random.normal(size=(count, EXITS, CLASSES))
    logits += 2 * np.eye(CLASSES)[labels][:, None]
    return logits.astype(np.float32), labels


@pytest.mark.parametrize("name", [name for name in policies.POLICIES if name != "random"])
def test_a_policy_takes_the_exits_of_the_reference(name):
    logits, labels = some_logits(SEED, 200)
    policy = policies.fit(name, recorded(logits, labels, logits[..., 0]), COST)
    network, variables = logits_alone()
    images, _ = some_logits(SEED + 1, 20)
    agree(network, policy, variables, images.reshape(20, -1))


def test_scores_of_certain_answers_are_apart_as_in_jax():
    """Probabilities of 1 in float32, and logits that are alike."""
    network, variables = logits_alone()
    gaps = np.array([0.0, 1e-3, 1.0, 15.0, 20.0, 30.0, 80.0, 200.0])
    images = np.zeros((len(gaps), EXITS, CLASSES), np.float32)
    images[..., 2] = gaps[:, None]
    agree(network, policies.max_prob, variables, images.reshape(len(gaps), -1))
    agree(network, policies.margin, variables, images.reshape(len(gaps), -1))


def test_a_policy_that_hashes_bits_is_refused_by_the_name_of_what_it_needs():
    network, variables = logits_alone()
    image = jax.ShapeDtypeStruct((EXITS * CLASSES,), jnp.float32)
    with pytest.raises(NotImplementedError, match="no rule for bitcast_convert_type"):
        stages(network, policies.random(0), variables, image, np.zeros(EXITS - 1))


def test_thresholds_that_do_not_fit_are_refused():
    network, variables = logits_alone()
    image = jax.ShapeDtypeStruct((EXITS * CLASSES,), jnp.float32)
    with pytest.raises(ValueError, match="2 thresholds for 4 exits"):
        stages(network, policies.max_prob, variables, image, [0.0, 1.0])


def test_a_size_that_depends_on_the_batch_is_refused():
    network, variables = logits_alone()
    image = jax.ShapeDtypeStruct((EXITS * CLASSES,), jnp.float32)
    twice = module(lambda x: jax.numpy.concatenate([x, x])[: len(x)])
    network = EarlyExitNetwork((twice, *network.stages[1:]), network.heads)
    with pytest.raises(NotImplementedError, match="must not depend on the size of the batch"):
        stages(network, policies.max_prob, variables, image, np.zeros(EXITS - 1))


def operations(graph):
    """All operations of a graph, those of its branches last."""
    inner = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return [node.op_type for node in graph.node] + [op for g in inner for op in operations(g)]


def fast_models():
    small = {"image": (12, 12, 3), "width": 4, "exits": (2, 4)}
    network = FAMILIES["fast"].build(10, **small)
    image = jax.ShapeDtypeStruct((12, 12, 3), jnp.float32)
    variables = some_variables(network, image, SEED)
    thresholds = np.array([1.0, 2.0])
    models = stages(network, policies.max_prob, variables, image, thresholds)
    return models, single(models)


def test_a_stage_of_convolutions_is_nothing_but_them():
    """Normalisations are folded, pooling and GELU are single operations, images do not turn."""
    models, _ = fast_models()
    found = [operations(model.graph) for model in models]
    assert found[0][:6] == ["Transpose", "Conv", "Gelu", "Conv", "MaxPool", "Gelu"]
    assert found[1][:5] == ["Conv", "MaxPool", "Gelu", "Conv", "Gelu"]
    assert found[2][:4] == ["Conv", "Gelu", "Conv", "Gelu"]  # 2x2 pixels are not pooled
    for ops in found[1:]:
        assert "Transpose" not in ops
    assert {"ReduceLogSumExp", "Softplus", "GreaterOrEqual"} <= set(found[0])
    assert "GreaterOrEqual" not in found[2]


def test_a_stage_of_residual_blocks_is_nothing_but_them():
    """The images that enter are brought into blocks for the first sum, and shortcuts that thin and
    widen them are convolutions; a threshold is one node."""
    network = FAMILIES["resnet"].build(5, image=(8, 8, 3), depth=14, width=4, exits=(1, 4))
    network = network.reading(normalise((120.0,) * 3, (60.0,) * 3))
    image = jax.ShapeDtypeStruct((8, 8, 3), jnp.uint8)
    variables = some_variables(network, image, SEED)
    models = stages(network, policies.max_prob, variables, image, np.zeros(2))
    found = [operations(model.graph) for model in models]
    block = ["Conv", "Relu", "Conv", "Add", "Relu"]
    assert found[0][:6] == ["Cast", "Transpose", "Sub", "Mul", "Conv", "Relu"]
    assert found[0][6:11] == block
    assert found[1][:6] == ["MaxPool", *block]
    assert sorted(found[1][6:12]) == sorted(["Conv", *block])
    # Convolutions alone read what enters the last stage, so it needs no pooling.
    assert sorted(found[2][:6]) == sorted(["Conv", *block])
    for ops in found:
        assert not {"Pad", "Slice", "Or", "Concat"} & set(ops)
    assert [ops.count("Gather") for ops in found] == [1, 1, 0]


def test_the_single_model_holds_each_stage_in_the_branch_before_it():
    models, whole = fast_models()
    graph, found = whole.graph, []
    while True:
        found.append([node.op_type for node in graph.node])
        branches = [node for node in graph.node if node.op_type == "If"]
        if not branches:
            break
        (branch,) = branches
        graphs = {a.name: a.g for a in branch.attribute}
        assert [node.op_type for node in graphs["then_branch"].node] == ["Identity"] * 2
        graph = graphs["else_branch"]
        assert not graph.input
    convolutions = [ops.count("Conv") for ops in found]
    assert convolutions == [operations(m.graph).count("Conv") for m in models]
    weights = {i.name for i in whole.graph.initializer}
    assert len(weights) < len(models[0].graph.initializer) + 5


def test_thresholds_have_defaults_and_can_be_given():
    models, whole = fast_models()
    for model in (models[0], models[1], whole):
        (defaults,) = [i for i in model.graph.initializer if i.name == "thresholds"]
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(defaults), [1.0, 2.0])
    assert [i.name for i in models[2].graph.input] == ["in0"]
    image = np.random.default_rng(SEED).normal(size=(1, 12, 12, 3)).astype(np.float32)
    run = session(whole)
    for e, thresholds in enumerate([(-np.inf, 0), (np.inf, -np.inf), (np.inf, np.inf)]):
        given = {"images": image, "thresholds": np.array(thresholds, np.float32)}
        assert run.run(["exits"], given)[0] == [e]
