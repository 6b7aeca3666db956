"""The executors: each agrees with `routing.route`, and each leaves out the work that it says."""

from __future__ import annotations

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from eejax import ExitOutput, cond, full, gate, predictor, sharded
from eejax.evaluation.routing import route, score
from eejax.inference import EXECUTORS
from eejax.network import EarlyExitNetwork, Module
from eejax.trace import collect

NAMES = list(toys.POLICIES)

# Exits and batch sizes of the compiled programs. Counts below the batch are drawn, so that every
# number of samples from 1 to 70 can occur.
PROGRAMS = ((1, 5), (2, 1), (2, 16), (4, 7), (5, 33), (3, 70), (3, 2))
SAMPLES = 72
CLOSE = 1e-5


def names_in(program_number):
    """Every third policy: each meets a third of the programs, and none has to compile them all."""
    return NAMES[program_number % 3 :: 3]


def chosen(names, kind):
    """Several toy policies in one, `kind` of which speaks: one program serves them all."""
    each = [toys.POLICIES[name] for name in names]

    def init(batch_size):
        return tuple(policy.init(batch_size) for policy in each)

    def step(output, state, e):
        results = [policy.step(output, s, e) for policy, s in zip(each, state, strict=True)]
        logits, scores, state = zip(*results, strict=True)
        return jnp.stack(logits)[kind], jnp.stack(scores)[kind], state

    return toys.policy_of(init, step)


@functools.cache
def program(exits, batch):
    """The three executors' predictions for one depth and batch size, compiled once."""
    network = toys.shared_network(exits)
    names = names_in(PROGRAMS.index((exits, batch)))

    def run(variables, thresholds, images, count, kind):
        return {
            name: executor(network, chosen(names, kind), variables, thresholds, images, count)
            for name, executor in EXECUTORS.items()
        }

    return jax.jit(run)


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


def case(seed):
    """Exits, batch, policy, samples, and of each threshold: off, always, a number in the scores'
    range, or exactly a sample's score. Hypothesis draws the seed alone, so that cases spread."""
    random = np.random.default_rng(seed)
    number = random.integers(len(PROGRAMS))
    exits, batch = PROGRAMS[number]
    kinds = random.choice(["off", "always", "number", "tie", "tie"], exits - 1)
    return (
        exits,
        batch,
        str(random.choice(names_in(number))),
        int(random.integers(1, batch + 1)),
        list(kinds),
    )


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
@given(st.integers(0, 2**32 - 1))
def test_every_executor_agrees_with_the_reference(seed):
    exits, batch, name, count, kinds = case(seed)
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
    kind = names_in(PROGRAMS.index((exits, batch))).index(name)
    predictions = program(exits, batch)(
        variables, thresholds, images, np.int32(count), np.int32(kind)
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


@pytest.mark.parametrize("name", ["cond", "compact", "loop"])
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
    # The second and the third are equal: a run of two, to `loop`.
    network = EarlyExitNetwork((stage, second, second), (head,) * 3)
    variables = network.init(jax.random.key(0), jnp.zeros((8, 4)))
    # A tile as long as the buffer is the dangerous one.
    options = {} if name == "cond" else {"tiles": (8,)}

    def run(thresholds, images):
        return EXECUTORS[name](network, gate, variables, thresholds, images, **options)

    text = jax.jit(run).lower(jnp.zeros(2), jnp.zeros((8, 4))).compile().as_text()
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


@pytest.mark.parametrize(
    ("name", "devices", "batch"),
    [("cond", 4, 32), ("compact", 4, 32), ("loop", 4, 32), ("compact", 3, 10)],
)
def test_each_device_of_a_mesh_serves_its_share(name, devices, batch):
    executor = EXECUTORS[name]
    network = toys.shared_network(3)
    variables = toys.variables(network, 1)
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    images = toys.some_images(7, batch)
    routed = toys.reference("patience", network, 1, [1.0, 2.0], images)
    run = jax.jit(functools.partial(sharded(executor, mesh), network, toys.POLICIES["patience"]))
    toys.assert_answers(run(variables, jnp.array([1.0, 2.0]), images), routed)
    # Counted over the whole batch, of which the last devices may have nothing.
    for count in (batch - 1, batch // 2, 1):
        found = run(variables, jnp.array([1.0, 2.0]), images, np.int32(count))
        np.testing.assert_array_equal(found.exits[:count], routed.exits[:count])
    text = run.lower(variables, jnp.zeros(2), images).compile().as_text() or ""
    assert "while" in text or "conditional" in text
    # A batch that does not divide is padded and cut to size, which is nobody's own share.
    assert batch % devices or not re.search(r"all-(reduce|gather|to-all)|collective", text)
    predict = predictor(network, toys.POLICIES["patience"], variables, sharded(executor, mesh))
    toys.assert_answers(predict([1.0, 2.0], images), routed)


def test_each_device_of_a_mesh_decides_for_itself():
    """One has nobody left after the first exit, and computes nothing more."""
    rows = toys.Rows(3)
    network = toys.network(3, rows.watch)
    variables = toys.variables(toys.shared_network(3), 1)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    images = toys.some_images(7, 64)
    exits = toys.reference("gate", toys.shared_network(3), 1, [0.0, np.inf], images).exits
    stops, goes_on = images[exits == 0][:4], images[exits > 0][:4]
    run = jax.jit(functools.partial(sharded(cond, mesh), network, gate))
    for shares in ((stops, goes_on), (goes_on, stops), (stops, stops)):
        both = np.concatenate(shares)
        run(variables, jnp.array([0.0, np.inf]), both).labels.block_until_ready()
        going = sum(share is goes_on for share in shares)
        assert rows.read() == [8, 4 * going, 4 * going]


def test_a_mesh_without_the_axis_is_refused():
    with pytest.raises(ValueError, match="axis 'data' of a mesh with \\('batch',\\)"):
        sharded(cond, Mesh(np.array(jax.devices()), ("batch",)))


@pytest.mark.parametrize("executor", EXECUTORS.values(), ids=EXECUTORS)
def test_executors_carry_bfloat16(executor):
    """Small integers are exact in bfloat16 too."""
    network = toys.shared_network(4, dtype=jnp.bfloat16)
    variables = toys.variables(network, 1)
    images = toys.some_images(7, 21)
    features, _ = network.apply_stage(variables, 0, images)
    assert features["x"].dtype == jnp.bfloat16
    thresholds = jnp.array([1.0, 1.0, 2.0])
    for name in ("gate", "patience"):
        run = jax.jit(functools.partial(executor, network, toys.POLICIES[name]))
        routed = toys.reference(name, network, 1, thresholds, images)
        assert len(set(routed.exits.tolist())) > 1
        toys.assert_answers(run(variables, thresholds, images), routed)
