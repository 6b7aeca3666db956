"""The executors: each agrees with `routing.route`, and each leaves out the work that it says."""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eejax import ExitOutput, compact, cond, full, gate, loop, predictor
from eejax.compaction import default_tiles
from eejax.network import EarlyExitNetwork, Module
from eejax.policies import Policy
from eejax.routing import collect, route, score

EXECUTORS = {"full": full, "cond": cond, "compact": compact, "loop": loop}
NAMES = list(toys.POLICIES)

# Exits and batch sizes of the compiled programs. Counts below the batch are drawn, so that every
# number of samples from 1 to 70 can occur.
PROGRAMS = ((1, 5), (2, 1), (3, 2), (4, 7), (2, 16), (5, 33), (3, 70))
SAMPLES = 72
CLOSE = 1e-5


def chosen(kind):
    """All of the toy policies in one, `kind` of which speaks: one program serves them all."""
    each = list(toys.POLICIES.values())

    def init(batch_size):
        return tuple(policy.init(batch_size) for policy in each)

    def step(output, state, e):
        results = [policy.step(output, s, e) for policy, s in zip(each, state, strict=True)]
        logits, scores, state = zip(*results, strict=True)
        return jnp.stack(logits)[kind], jnp.stack(scores)[kind], state

    return Policy(init, step)


@functools.cache
def program(exits, batch):
    """The three executors' predictions for one depth and batch size, compiled once."""
    del batch  # the shape that compiles
    network = toys.shared_network(exits)

    def run(variables, thresholds, images, count, kind):
        return {
            name: executor(network, chosen(kind), variables, thresholds, images, count)
            for name, executor in EXECUTORS.items()
        }

    # Compiling is most of this test's time; LLVM's part of it is not what is tested.
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": "0"})


def expected(exits, name, variables, images, draw_thresholds):
    """By `routing`: `(thresholds, scores, Routed)` of the images."""
    count = len(images)
    trace = collect(
        toys.shared_network(exits), variables, images, np.zeros(count, int), batch=SAMPLES
    )
    # Always the same number of samples, so that nothing here compiles for each example.
    padding = SAMPLES - count
    trace = type(trace)(*(np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) for x in trace))
    scored = score(toys.POLICIES[name], trace)
    scored = type(scored)(scored.logits[:count], scored.scores[:count])
    thresholds = draw_thresholds(scored.scores)
    return thresholds, scored.scores, route(scored, thresholds)


def assert_agrees(prediction, routed, keep, exact):
    count = len(keep)
    prediction = jax.tree.map(lambda x: np.asarray(x)[:count][keep], prediction)
    np.testing.assert_array_equal(prediction.exits, routed.exits[keep])
    if exact:
        np.testing.assert_array_equal(prediction.logits, routed.logits[keep])
    else:
        np.testing.assert_allclose(prediction.logits, routed.logits[keep], rtol=1e-5)
    np.testing.assert_array_equal(prediction.labels, prediction.logits.argmax(-1))
    assert prediction.labels.dtype == prediction.exits.dtype == np.int32


SEEN: Counter[str] = Counter()


@st.composite
def cases(draw):
    exits, batch = draw(st.sampled_from(PROGRAMS))
    name = draw(st.sampled_from(NAMES))
    count = draw(st.integers(1, batch))
    # Of each threshold: off, always, a number in the scores' range, or exactly a sample's score.
    kinds = draw(
        st.lists(
            st.sampled_from(["off", "always", "number", "tie", "tie"]),
            min_size=exits - 1,
            max_size=exits - 1,
        )
    )
    return exits, batch, name, count, kinds, draw(st.integers(0, 2**20))


def thresholds_of(kinds, seed):
    """Draws thresholds once the scores `[N, E]` are known, some of which they are to equal."""

    def draw(scores):
        random = np.random.default_rng(seed)
        values = []
        for e, kind in enumerate(kinds):
            at = scores[:, e]
            middle = np.round(2 * random.uniform(at.min() - 1, at.max() + 1)) / 2
            values.append(
                {"off": np.inf, "always": -np.inf, "number": middle, "tie": random.choice(at)}[kind]
            )
        return np.array(values, np.float32)

    return draw


@settings(max_examples=200)
@given(cases())
@example((5, 33, "running sum", 33, ["tie"] * 4, 0))
@example((5, 33, "patience", 29, ["number", "tie", "number", "tie"], 1))
def test_every_executor_agrees_with_the_reference(case):
    exits, batch, name, count, kinds, seed = case
    variables = toys.variables(toys.shared_network(exits), seed % 16)
    images = toys.some_images(seed, batch)
    thresholds, scores, routed = expected(
        exits, name, variables, images[:count], thresholds_of(kinds, seed)
    )
    exact = name in toys.EXACT
    gap = np.abs(scores[:, :-1] - thresholds)
    near = (gap <= CLOSE * np.maximum(1, np.abs(scores[:, :-1]))).any(1)
    keep = np.ones(count, bool) if exact else ~near
    SEEN["samples"] += count
    SEEN["kept"] += int(keep.sum())
    SEEN["real ties"] += int(near.sum()) if exact else 0
    SEEN["exited early"] += int((routed.exits < exits - 1).sum())
    predictions = program(exits, batch)(
        variables, thresholds, images, np.int32(count), np.int32(NAMES.index(name))
    )
    for prediction in predictions.values():
        assert_agrees(prediction, routed, keep, exact)


def test_the_property_test_was_not_empty():
    """Runs after it: few samples were left out, there were ties, and some stopped and some did not.

    Without the property test's counts, on its own or in another process, it has nothing to say.
    """
    if not SEEN:
        pytest.skip("the property test did not run in this process")
    assert SEEN["kept"] > 0.6 * SEEN["samples"]
    assert SEEN["real ties"] > 100
    assert 0.2 * SEEN["samples"] < SEEN["exited early"] < 0.98 * SEEN["samples"]


@pytest.mark.parametrize("name", NAMES)
def test_executors_agree_for_a_policy_by_itself(name):
    """The same in programs that hold one policy alone, with and without padding."""
    exits, batch = 3, 11
    network = toys.shared_network(exits)
    variables = toys.variables(network, 3)

    @jax.jit
    def run(variables, thresholds, images, count):
        policy = toys.POLICIES[name]
        return [
            executor(network, policy, variables, thresholds, images, count)
            for executor in EXECUTORS.values()
        ]

    images = toys.some_images(11, batch)
    for count, kinds in ((batch, ["number", "number"]), (6, ["tie", "off"]), (1, ["tie", "tie"])):
        thresholds, scores, routed = expected(
            exits, name, variables, images[:count], thresholds_of(kinds, 5)
        )
        exact = name in toys.EXACT
        keep = (np.abs(scores[:, :-1] - thresholds) > CLOSE).all(1) | exact
        for prediction in run(variables, thresholds, images, np.int32(count)):
            assert_agrees(prediction, routed, keep, exact)


@pytest.mark.parametrize("executor", EXECUTORS.values(), ids=EXECUTORS)
def test_a_sample_whose_scores_are_nan_is_answered_by_the_last_exit(executor):
    network = toys.shared_network(3)
    variables = toys.variables(network)
    images = toys.some_images(0, 6)
    images[[1, 4]] = np.nan
    run = jax.jit(lambda *args: executor(network, gate, *args))
    for threshold in (-np.inf, -100.0):
        prediction = run(variables, jnp.full(2, threshold, jnp.float32), images)
        assert prediction.exits.tolist() == [0, 2, 0, 0, 2, 0]


@pytest.mark.parametrize("tiles", [(12,), (1,), (4, 2, 1), (16, 4)])
def test_compact_agrees_whatever_the_tiles(tiles):
    network = toys.shared_network(4)
    variables = toys.variables(network, 2)
    args = (variables, jnp.array([2.0, 1.0, 0.0]), toys.some_images(2, 12))
    whole = jax.jit(lambda *args: full(network, gate, *args))(*args)
    packed = jax.jit(lambda *args: compact(network, gate, *args, tiles=tiles))(*args)
    assert len(set(whole.exits.tolist())) > 2
    jax.tree.map(np.testing.assert_array_equal, packed, whole)


@pytest.mark.parametrize("tiles", [(), (4, 8), (6, 4), (4, 0)])
def test_compact_refuses_tiles_that_do_not_nest(tiles):
    network = toys.shared_network(2)
    with pytest.raises(ValueError, match="each a divisor of the one before"):
        compact(
            network,
            gate,
            toys.variables(network),
            jnp.zeros(1),
            jnp.asarray(toys.some_images(0, 8)),
            tiles=tiles,
        )


def test_default_tiles_nest_and_fit():
    for batch in range(1, 600):
        tiles = default_tiles(batch)
        assert all(a % b == 0 and a > b for a, b in itertools.pairwise(tiles))
        assert 1 <= tiles[-1] <= tiles[0] <= batch


# What is left out.


def rows_computed(executor, exits=4, batch=64):
    """A compiled executor over a toy network, and the count of the rows that its stages compute."""
    rows = toys.Rows(exits)
    network = toys.network(exits, rows.watch)
    variables = toys.variables(toys.shared_network(exits), 1)
    run = jax.jit(lambda *args: executor(network, gate, *args))
    return run, variables, toys.some_images(1, batch), rows


OFF, ALWAYS = np.inf, -np.inf


def test_cond_stops_where_the_last_sample_does():
    run, variables, images, rows = rows_computed(cond, batch=8)
    for e in range(4):
        thresholds = np.array([OFF] * e + [ALWAYS] * (3 - e), np.float32)
        run(variables, thresholds, images, np.int32(8)).labels.block_until_ready()
        assert rows.read() == [8] * (e + 1) + [0] * (3 - e)


def test_padding_decides_nothing_in_cond():
    """A padding row that would go on does not keep the batch running."""
    run, variables, images, rows = rows_computed(cond, batch=8)
    some = np.array([0.0, OFF, OFF], np.float32)
    exits = run(variables, some, images, np.int32(8)).exits
    stays = images[np.asarray(exits) == 0]
    goes_on = images[np.asarray(exits) > 0]
    assert len(stays) > 0
    assert len(goes_on) > 0
    mixed = np.concatenate([stays[:1], np.repeat(goes_on[:1], 7, 0)])
    rows.read()
    run(variables, some, mixed, np.int32(1)).labels.block_until_ready()
    assert rows.read() == [8, 0, 0, 0]


@pytest.mark.parametrize("batch", [1, 6, 64])
def test_compact_computes_the_survivors_and_little_more(batch):
    run, variables, images, rows = rows_computed(compact, batch=batch)
    smallest = default_tiles(batch)[-1]
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
            counted = rows.read()
            assert counted == [-(-n // smallest) * smallest for n in reach]
    assert 0 in seen


@pytest.mark.parametrize("name", ["cond", "compact"])
def test_a_stage_that_nobody_reaches_is_not_moved_out_of_its_branch(name):
    """XLA moves what does not depend on a loop out of it, and would run it though nobody comes.

    A callback would hold the stage in its place, so this reads the compiled program instead, where
    the second stage is the only one to take cosines.
    """
    stage = Module(lambda key, x: {}, lambda variables, x, train: (x * 2, {}))
    second = Module(lambda key, x: {}, lambda variables, x, train: (jnp.cos(x), {}))
    head = Module(
        lambda key, x, memory: {},
        lambda variables, x, memory, train: (ExitOutput(x, x[:, 0], ()), {}),
    )
    network = EarlyExitNetwork((stage, second), (head, head))
    variables = network.init(jax.random.key(0), jnp.zeros((8, 4)))
    # A tile as long as the buffer is the dangerous one.
    options = {"tiles": (8,)} if name == "compact" else {}

    def run(thresholds, images):
        return EXECUTORS[name](network, gate, variables, thresholds, images, **options)

    text = jax.jit(run).lower(jnp.zeros(1), jnp.zeros((8, 4))).compile().as_text()
    assert text is not None
    assert "cosine(" in text
    assert "cosine(" not in unconditional(text)


def unconditional(text):
    """Of a compiled program's text, what runs whatever its loops and branches decide."""
    bodies, entry, name = {}, "", ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head:
            name = head[2]
            bodies[name] = ""
            entry = name if head[1] else entry
        elif name:
            bodies[name] += line + "\n"
    todo, found = [entry], ""
    while todo:
        body = bodies[todo.pop()]
        found += body
        todo += re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", body)
    return found


def test_cond_nests_its_conditionals():
    network = toys.shared_network(4)
    variables = toys.variables(network)
    text = (
        jax.jit(lambda t, x: cond(network, gate, variables, t, x))
        .lower(jnp.zeros(3), toys.some_images(0, 2))
        .as_text()
    )
    assert len(re.findall(r"stablehlo\.case", text)) == 3


# Where executors run.


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("executor", EXECUTORS.values(), ids=EXECUTORS)
def test_executors_lower_for_other_devices(executor, platform):
    network = toys.shared_network(3)
    args = (toys.variables(network), jnp.zeros(2), toys.some_images(0, 8), np.int32(8))
    traced = jax.jit(lambda *args: executor(network, gate, *args)).trace(*args)
    assert traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("executor", EXECUTORS.values(), ids=EXECUTORS)
def test_executors_are_part_of_a_callers_program(executor):
    """Traced inside a function of the caller's, without `count`, over one device of several."""
    network = toys.shared_network(2)
    variables = toys.variables(network)
    images = toys.some_images(4, 9)

    @jax.jit
    def caller(images, level):
        prediction = executor(network, gate, variables, level[None], images - 1)
        return prediction.exits.sum(), prediction

    device = jax.devices()[-1]
    total, prediction = caller(jax.device_put(images + 1, device), jnp.float32(1))
    assert total.devices() == {device}
    alone = full(network, gate, variables, jnp.ones(1), jnp.asarray(images))
    jax.tree.map(np.testing.assert_array_equal, prediction, alone)


# The predictor.


@pytest.fixture(scope="module")
def counted():
    """A predictor over `compact`, variables, and the batch sizes its executor was traced for."""
    network = toys.shared_network(3)
    traced = []

    def executor(network, policy, variables, thresholds, images, count):
        traced.append(images.shape[0])
        return compact(network, policy, variables, thresholds, images, count)

    predict = predictor(network, gate, executor, max_batch=32)
    variables = toys.variables(network, 2)
    for size in (1, 2, 4, 8, 16, 32):  # every program there can be
        predict(variables, [1.0, 1.0], toys.some_images(0, size))
    return predict, variables, traced


def test_a_predictor_compiles_nothing_for_a_new_size_or_new_thresholds(counted):
    predict, variables, traced = counted
    images = toys.some_images(6, 300)
    everything = predict(variables, [1.0, 0.0], images)
    assert len(set(everything.exits.tolist())) == 3
    compiled = []

    def listen(event, seconds, **_):
        del seconds
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)  # pyright: ignore
    try:
        for size in range(1, 301):
            prediction = predict(variables, [1.0, 0.0], images[:size])
            jax.tree.map(
                lambda some, every, size=size: np.testing.assert_array_equal(some, every[:size]),
                prediction,
                everything,
            )
            predict(variables, np.array([size, -size]), images[:3])
        assert not compiled
        jax.jit(lambda x: x + 1)(1)
        assert compiled  # or else the listener hears nothing
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)  # pyright: ignore
    assert traced == [1, 2, 4, 8, 16, 32]


def test_a_predictor_takes_arrays_of_either_kind(counted):
    predict, variables, traced = counted
    images = toys.some_images(6, 41)
    kinds = [
        predict(variables, thresholds, pictures)
        for thresholds in ([1.0, 0.5], np.array([1, 0.5]), jnp.array([1, 0.5]))
        for pictures in (images, jnp.asarray(images))
    ]
    # A constant of JAX has a weak type, which is another program to `jit`.
    same = predict(variables, jnp.full(2, 1.0), images)
    np.testing.assert_array_equal(same.exits, predict(variables, [1.0, 1.0], images).exits)
    for other in kinds[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, kinds[0])
    assert traced == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("name", EXECUTORS)
def test_a_predictor_answers_as_the_reference(name):
    network = toys.shared_network(3)
    variables = toys.variables(network, 1)
    images = toys.some_images(8, 61)
    trace = collect(network, variables, images, np.zeros(61, int))
    predict = predictor(network, toys.POLICIES["running sum"], EXECUTORS[name], max_batch=16)
    routed = route(score(toys.POLICIES["running sum"], trace), [2, 1])
    assert len(set(routed.exits.tolist())) == 3
    assert_agrees(predict(variables, [2, 1], images), routed, np.ones(61, bool), True)


def test_a_network_of_one_exit_needs_no_thresholds():
    network = toys.shared_network(1)
    predict = predictor(network, gate, compact)
    prediction = predict(toys.variables(network), [], toys.some_images(0, 5))
    assert prediction.exits.tolist() == [0] * 5


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ([1, 2, 3], "3 thresholds for 5 exits; give 4, one for each exit but the last"),
        (jnp.zeros(5), "5 thresholds for 5 exits; give 4"),
        (jnp.zeros((4, 1)), r"thresholds \(4, 1\) for 5 exits; give 4"),
        ([0, np.nan, 0, 0], "NaN"),
        (jnp.full(4, np.nan), "NaN"),
    ],
)
def test_a_predictor_refuses_thresholds_that_do_not_fit(thresholds, message):
    network = toys.shared_network(5)
    with pytest.raises(ValueError, match=message):
        predictor(network, gate, full)({}, thresholds, toys.some_images(0, 2))


def test_a_predictor_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="no images; give at least one"):
        predictor(toys.shared_network(2), gate, full)({}, [0], toys.some_images(0, 0))


@pytest.mark.parametrize("size", [0, -4, 3, 96])
def test_a_predictor_refuses_a_size_that_is_no_power_of_two(size):
    with pytest.raises(ValueError, match=f"max_batch is {size}; give a power of two"):
        predictor(toys.shared_network(2), gate, full, max_batch=size)
