"""Models cut at named values: the same answers, and each prefix only what it needs."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name as named
from jax.sharding import Mesh
from sliced import (
    CLASSES,
    VECTOR,
    assert_close,
    convnet,
    cut_convnet,
    dense,
    dense_model,
    images_of,
    linear_head,
)

from eejax import EarlyExitNetwork, compact, cond, cost, max_prob, sharded
from eejax.adapters.slicing import LAST, cut_named, graft, stages, whole
from eejax.evaluation.routing import route, score
from eejax.trace import collect


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("train", [False, True])
def test_the_last_exit_is_the_model(train, dtype):
    network, variables, original = cut_convnet(dtype)
    images = images_of(5)

    def of_network(params):
        outputs, stats = network.apply_all({**variables, "params": params}, images, train=train)
        return (outputs.logits[-1] ** 2).sum(), (outputs, stats)

    def of_model(params):
        logits, stats = convnet(dtype).apply({**original, "params": params}, images, train=train)
        return (logits.astype(jnp.float32) ** 2).sum(), (logits, stats)

    @jax.jit
    def both():
        return (
            jax.grad(of_network, has_aux=True)(variables["params"]),
            jax.grad(of_model, has_aux=True)(original["params"]),
        )

    (gradients, (outputs, stats)), (wanted, (logits, after)) = both()
    tolerance = 2e-2 if dtype == jnp.bfloat16 else 1e-5
    assert outputs.logits.shape == (3, 5, CLASSES)
    assert outputs.logits.dtype == jnp.float32
    assert_close(outputs.logits[-1], logits, tolerance)
    assert_close(whole({"batch_stats": stats})["batch_stats"], after, tolerance)
    if dtype == jnp.float32:
        assert_close(whole({"params": gradients})["params"], wanted, tolerance)
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])


def test_each_variable_goes_with_the_stage_that_reads_it():
    _, variables, original = cut_convnet(jnp.float32)
    params, stats = (variables[c]["stages"] for c in ("params", "batch_stats"))
    assert [sorted(p) for p in params] == [["block0", "stem"], ["block1"], ["block2", "head"]]
    # Nothing reads the number of steps: the last stage keeps it.
    assert [sorted(s) for s in stats] == [["block0"], ["block1"], ["block2", "steps"]]
    jax.tree.map(np.testing.assert_array_equal, whole(variables), original)


def flops_of(program: Any) -> float:
    return program.cost_analysis()["flops"]


def test_a_prefix_holds_what_its_exits_need_and_no_more():
    network, variables, original = cut_convnet(jnp.float32)
    images = images_of(2)

    def until(e, variables, images):
        features = images
        for k in range(e + 1):
            features, _ = network.apply_stage(variables, k, features)
        return features

    lowered = [jax.jit(until, static_argnums=0).lower(e, variables, images) for e in range(3)]
    plain = jax.jit(lambda v, x: convnet().apply(v, x, train=False)[0]).lower(original, images)
    assert [low.as_text().count("stablehlo.convolution") for low in lowered] == [2, 3, 4]
    flops = [flops_of(low.compile()) for low in lowered]
    assert flops[0] < flops[1] < flops[2]
    assert flops[2] == pytest.approx(flops_of(plain.compile()), rel=1e-3)
    # Before XLA has looked at it, the plain model still updates statistics that nobody wants.
    whole_cost = flops_of(plain) / 2 / len(images)
    assert 0.98 * whole_cost < cost.xla_macs(network, variables, images).stages.sum() <= whole_cost


def test_what_comes_first_in_the_program_may_belong_to_a_late_stage():
    def apply(v, x, train):
        late = dense(v, "late", jnp.tanh(x))  # of the images, and only the answer reads it
        early = named(dense(v, "early", x), "early")
        return dense(v, "last", jnp.tanh(early)) + late

    model = dense_model(apply, "early", "late", "last")
    first, second = stages(model, ["early"], VECTOR)
    x = images_of(3, VECTOR)
    variables = [s.init(jax.random.key(0), None) for s in (first, second)]
    assert [sorted(v["params"]) for v in variables] == [["early"], ["last", "late"]]
    value, rest = first.apply(variables[0], x, train=False)[0]
    np.testing.assert_array_equal(rest[0], x)  # the images go on, since the late branch reads them
    assert len(rest) == 1
    program = str(jax.make_jaxpr(lambda v, x: first.apply(v, x, train=False)[0])(variables[0], x))
    assert (program.count("dot_general"), program.count("tanh")) == (1, 0)
    answer, _ = second.apply(variables[1], (value, rest), train=False)
    wanted, _ = model.apply(model.init(jax.random.key(0), None), x, train=False)
    np.testing.assert_array_equal(answer, wanted)


def test_parallel_branches_are_cut_in_the_order_asked_for():
    def apply(v, x, train):
        a, b = named(dense(v, "a", x), "a"), named(dense(v, "b", jnp.tanh(x)), "b")
        return dense(v, "last", a * b)

    for at in (("a", "b"), ("b", "a")):
        network = cut_named(dense_model(apply, "a", "b", "last"), at, linear_head, VECTOR)
        variables = network.init(jax.random.key(0), images_of(1, VECTOR))
        owned = [sorted(p) for p in variables["params"]["stages"]]
        assert owned == [[at[0]], [at[1]], ["last"]]


def test_statistics_that_are_only_kept_go_where_they_are_made():
    def apply(v, x, train):
        early = named(dense(v, "a", x), "early")
        seen = {"seen": 0.9 * v["batch_stats"]["seen"] + 0.1 * jnp.abs(early).mean(0)}
        return dense(v, "b", jnp.tanh(early)), seen if train else v["batch_stats"]

    model = dense_model(apply, "a", "b", stats=["seen"])
    first, second = stages(model, ["early"], VECTOR)
    x = images_of(3, VECTOR)
    original = model.init(jax.random.key(0), None)
    own = first.init(jax.random.key(0), None)
    (_, rest), after = first.apply(own, x, train=True)
    assert rest == ()
    wanted = model.apply(original, x, train=True)[1]
    np.testing.assert_allclose(after["seen"], wanted["seen"], rtol=1e-6)
    assert "batch_stats" not in second.init(jax.random.key(0), None)
    assert first.apply(own, x, train=False)[1] is own["batch_stats"]


def test_the_batch_axis_may_lie_anywhere_in_the_model():
    def apply(v, x, train):
        def one(x):  # under `vmap` the batch comes to lie last
            x = named(v["params"]["a"] @ x, "a")
            return v["params"]["c"] @ named(jnp.tanh(v["params"]["b"] @ x), "b") + x

        return jax.vmap(one)(x)

    model = dense_model(apply, "a", "b", "c")
    network = cut_named(model, ["a", "b"], linear_head, VECTOR)
    x = images_of(5, VECTOR)
    original = model.init(jax.random.key(2), x)
    variables = graft(network.init(jax.random.key(0), x), original)
    (value, rest), _ = network.apply_stage(variables, 0, x)
    assert_close(value, x @ original["params"]["a"].T)
    assert rest == ()
    logits = network.apply_all(variables, x)[0].logits
    assert_close(logits[-1], model.apply(original, x, train=False)[0])


def test_stages_keep_what_a_model_closes_over():
    table, shift = np.arange(16, dtype=np.float32).reshape(4, 4) / 16, jnp.arange(4.0)

    @jax.jit
    def look_up(x):
        return x @ table + shift[None]

    def apply(v, x, train):
        return look_up(dense(v, "b", named(look_up(dense(v, "a", x)), "x")))

    model = dense_model(apply, "a", "b")
    network = cut_named(model, ["x"], linear_head, VECTOR)
    x = images_of(3, VECTOR)
    original = model.init(jax.random.key(2), x)
    variables = graft(network.init(jax.random.key(0), x), original)
    logits = network.apply_all(variables, x)[0].logits
    assert_close(logits[-1], model.apply(original, x, train=False)[0], 1e-5)


def test_names_in_a_jit_are_found_and_so_is_what_a_remat_returns():
    def apply(v, x, train):
        x = jax.jit(lambda x: named(named(dense(v, "a", jnp.tanh(x)), "in jit"), "in jit"))(x)
        x = jax.checkpoint(lambda x: named(dense(v, "b", x), "of remat"))(x)
        return dense(v, "c", x)

    model = dense_model(apply, "a", "b", "c")
    network = cut_named(model, ["in jit", "of remat"], linear_head, VECTOR)
    x = images_of(3, VECTOR)
    original = model.init(jax.random.key(2), x)
    variables = graft(network.init(jax.random.key(0), x), original)
    logits = network.apply_all(variables, x)[0].logits
    assert_close(logits[-1], model.apply(original, x, train=False)[0])


# --- Random programs ------------------------------------------------------------------------------


@st.composite
def programs(draw):
    """Nodes `(kind, inputs)` after the images, of which some are cut at; the last one answers."""
    nodes = draw(st.integers(3, 9))
    kinds = st.sampled_from(["add", "mul", "tanh", "matmul", "matmul"])
    program = [
        (draw(kinds), draw(st.integers(0, i)), draw(st.integers(0, i))) for i in range(nodes)
    ]
    order = ancestors(program, [nodes])
    names = draw(st.lists(st.sampled_from(sorted(order - {0})), unique=True, max_size=3))
    return program, sorted(set(names) - {nodes})


def ancestors(program, nodes):
    """These nodes and all that they need; node 0 is the images."""
    found, waiting = set(), list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            if node:
                kind, a, b = program[node - 1]
                waiting += [a, b] if kind in ("add", "mul") else [a]
    return found


def run_program(program, params, x):
    values = [x]
    for i, (kind, a, b) in enumerate(program):
        a, b = values[a], values[b]
        made = {
            "add": lambda a=a, b=b: a + b,
            "mul": lambda a=a, b=b: a * b,
            "tanh": lambda a=a: jnp.tanh(a),
            "matmul": lambda a=a, i=i: a @ params[f"w{i}"],
        }[kind]()
        values.append(named(made, str(i + 1)))
    return values[-1]


@hypothesis.given(programs(), st.integers(0, 9))
@hypothesis.settings(max_examples=60)
def test_random_programs_cut_anywhere_answer_as_before(program_and_names, seed):
    program, names = program_and_names
    weights = [f"w{i}" for i, node in enumerate(program) if node[0] == "matmul"]
    model = dense_model(lambda v, x, train: run_program(program, v["params"], x), *weights, "none")
    parts = stages(model, [str(n) for n in names], VECTOR)
    original = model.init(jax.random.key(seed), None)
    variables = [s.init(jax.random.key(seed), None) for s in parts]
    for k, name in enumerate(names):
        new = ancestors(program, [name]) - ancestors(program, names[:k])
        needed = {f"w{n - 1}" for n in new if n and program[n - 1][0] == "matmul"}
        assert set(variables[k]["params"]) == needed
    for batch in (1, 3):
        x = jnp.asarray(images_of(batch, VECTOR, seed))
        features = x
        for part, variable in zip(parts, variables, strict=True):
            features, _ = part.apply(variable, features, train=False)
        np.testing.assert_array_equal(features, run_program(program, original["params"], x))


# --- Compiled inference ---------------------------------------------------------------------------


def test_executors_agree_with_the_reference():
    """Two programs differ in the last bits, so samples that sit on a threshold are left out."""

    def apply(v, x, train):
        first = named(jnp.tanh(dense(v, "a", x)), "first")
        second = named(jnp.tanh(dense(v, "b", first)) + x, "second")
        return dense(v, "c", second) * first

    network = cut_named(dense_model(apply, "a", "b", "c"), ("first", "second"), linear_head, VECTOR)
    images = images_of(24, VECTOR)
    variables = network.init(jax.random.key(0), images)
    scored = score(max_prob, collect(network, variables, images, np.zeros(24, int), batch=24))
    thresholds = np.quantile(scored.scores[:, :-1], 0.6, axis=0).astype(np.float32)
    routed = route(scored, thresholds)
    assert len(set(routed.exits.tolist())) == 3
    clear = (np.abs(scored.scores[:, :-1] - thresholds) > 1e-5).all(1)
    assert clear.sum() >= 20
    spread = sharded(cond, Mesh(np.array(jax.devices()[:2]), ("data",)))

    def run(variables, thresholds, images):
        each = (cond, compact, spread)
        return [e(network, max_prob, variables, thresholds, images, None) for e in each]

    for found in jax.jit(run)(variables, thresholds, images):
        np.testing.assert_array_equal(found.exits[clear], routed.exits[clear])
        np.testing.assert_allclose(found.logits[clear], routed.logits[clear], rtol=1e-4, atol=1e-4)


def test_a_model_is_traced_once_for_a_batch_size_and_leaks_nothing():
    calls = []

    def apply(v, x, train):
        calls.append((len(x), train))
        return dense(v, "b", named(dense(v, "a", x), "x"))

    network = cut_named(dense_model(apply, "a", "b"), ["x"], linear_head, VECTOR)
    variables = network.init(jax.random.key(0), images_of(1, VECTOR))
    plain = network.apply_plain
    with jax.checking_leaks():
        for size in (5, 5, 6):
            x = images_of(size, VECTOR)
            jax.jit(lambda v, x: lax.cond(x.sum() > 0, plain, lambda v, x: 2 * plain(v, x), v, x))(
                variables, x
            )
    network.apply_plain(variables, images_of(5, VECTOR))
    assert [calls.count((size, False)) for size in (5, 6)] == [1, 1]
    # Where something else changes what is traced it is traced anew.
    with jax.default_matmul_precision("highest"):
        text = jax.jit(network.apply_plain).lower(variables, images_of(5, VECTOR)).as_text()
    assert "HIGHEST" in text


def test_models_that_cannot_be_trained_can_still_be_cut():
    def apply(v, x, train):
        if train:
            raise RuntimeError("a key is wanted")
        return dense(v, "b", named(dense(v, "a", x), "x"))

    network = cut_named(dense_model(apply, "a", "b"), ["x"], linear_head, VECTOR)
    variables = network.init(jax.random.key(0), images_of(1, VECTOR))
    assert network.apply_plain(variables, images_of(2, VECTOR)).shape == (2, 4)
    with pytest.raises(RuntimeError, match="a key is wanted"):
        network.apply_all(variables, images_of(2, VECTOR), train=True)


def test_outputs_of_the_model_may_be_a_tree_but_not_for_the_last_exit():
    def apply(v, x, train):
        x = named(dense(v, "a", x), "x")
        return {"logits": jnp.tanh(x), "more": [x * 2]}

    model = dense_model(apply, "a")
    first, second = stages(model, ["x"], VECTOR)
    variables = first.init(jax.random.key(0), None)
    features, _ = first.apply(variables, images_of(2, VECTOR), train=False)
    outputs, _ = second.apply({"params": {}}, features, train=False)
    np.testing.assert_array_equal(outputs["more"][0], 2 * features[0])
    network = cut_named(model, ["x"], linear_head, VECTOR)
    with pytest.raises(ValueError, match=r"puts out .*'logits'.*\[B, C\] logits alone"):
        network.init(jax.random.key(0), images_of(1, VECTOR))


def test_grafting_leaves_the_heads_alone():
    network, variables, original = cut_convnet(jnp.float32)
    fresh = jax.jit(network.init)(jax.random.key(9), images_of(1))
    grafted = graft(fresh, original)
    assert grafted["params"]["heads"] is fresh["params"]["heads"]
    jax.tree.map(
        np.testing.assert_array_equal, grafted["params"]["stages"], variables["params"]["stages"]
    )
    assert network.heads[-1] is LAST
    assert isinstance(network, EarlyExitNetwork)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float64])
def test_floats_of_another_dtype_are_grafted_in_the_networks(dtype):
    network, variables, original = cut_convnet(jnp.float32)
    params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), original["params"])
    grafted = graft(variables, {**original, "params": params})
    leaves = jax.tree.leaves(grafted["params"]["stages"])
    assert {(type(x), x.dtype) for x in leaves} == {(type(jnp.ones(())), jnp.dtype(jnp.float32))}
    exact = jax.tree.map(lambda x: x.astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, whole(grafted)["params"], exact)
    jax.eval_shape(network.apply_plain, grafted, images_of(2))
