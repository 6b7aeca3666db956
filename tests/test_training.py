"""The training step and the loop around it."""

import io
import json
import os
import signal
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from eejax import training
from eejax.backbone import cut
from eejax.links import LINKS
from eejax.models.heads import Head
from eejax.models.layers import Norm
from eejax.network import normalise
from eejax.training import REGIMES, RegimeOptions
from eejax.training.placement import make_mesh
from experiments.data.splits import Split
from experiments.train import loop
from experiments.train.config import TrainConfig
from experiments.train.feeding import Resident

CLASSES, BATCH = 3, 16


class Block(nn.Module):
    """Each pixel by itself: no convolution, so that it compiles in a moment."""

    @nn.compact
    def __call__(self, x, *, train):
        return nn.relu(Norm()(nn.Dense(8, use_bias=False)(x), train=train))


NETWORK = cut([Block(), Block(), Block()], (1, 2), lambda e: Head(CLASSES, gate="features"))
NETWORK = NETWORK.reading(normalise((100.0,), (50.0,)))
OPTIMISER = optax.sgd(0.1, momentum=0.9)
KEY = jax.random.key(5)
MESH = make_mesh(jax.devices()[:1])


def phases(regime="soft_auxiliary", cost_weight=0.1):
    options = RegimeOptions(jnp.ones(3), cost_weight, jnp.array([0.3, 0.6, 1.0]))
    return REGIMES[regime].phases(options)


def make_steps(augment, optimiser=OPTIMISER):
    return training.make_train_steps(
        NETWORK,
        lambda count: optimiser,
        phases(),
        augment,
        steps=12,
        classes=CLASSES,
        label_smoothing=0.1,
    )


def make_step():
    (phase,) = phases()
    step = training.make_train_step(NETWORK, OPTIMISER, phase, classes=CLASSES, label_smoothing=0.1)
    return jax.jit(step)


def made_split(count=64) -> Split:
    """Images whose brightness tells their class."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    noise = rng.integers(0, 60, (count, 8, 8, 1))
    return Split((noise + 80 * labels[:, None, None, None]).astype(np.uint8), labels)


def flip(key, images):
    mirrored = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


START = training.init_state(NETWORK, OPTIMISER, KEY, jnp.asarray(made_split().images[:1]))


def fresh():
    """A copy, because training donates it."""
    return jax.tree.map(jnp.copy, START)


def same(a, b) -> bool:
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="module")
def train_steps():
    return make_steps(flip)


@pytest.fixture(scope="module")
def run(train_steps):
    """Trains as the main job does; `run(workdir)` returns the state and the rows."""

    def go(workdir, *, steps=train_steps, epochs=3, every=1e9):
        return loop.train(
            steps,
            lambda key: fresh(),
            KEY,
            Resident(made_split(), KEY, BATCH, flip=True, mesh=MESH),
            TrainConfig(epochs=epochs, batch=BATCH, steps_per_dispatch=3, checkpoint_seconds=every),
            mesh=MESH,
            workdir=workdir,
            watch=lambda state: [0.0, 0.5, 1.0],
            learning_rate=lambda step: 1e-2,
            console=Console(file=io.StringIO()),
        )

    return go


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_learns_an_easy_task(regime):
    split, steps = made_split(), 60
    link = REGIMES[regime].link
    network = NETWORK if link is None else LINKS[link](NETWORK)
    train_steps = training.make_train_steps(
        network,
        lambda count: OPTIMISER,
        phases(regime, 0.0),
        lambda key, images: images,
        steps=steps,
        classes=CLASSES,
    )
    images, labels = jnp.asarray(split.images), jnp.asarray(split.labels)
    order = jnp.tile(jnp.arange(64, dtype=jnp.int32), (steps, 1))
    start, begin = fresh(), phases(regime, 0.0)[0].begin
    if link is not None:
        start = training.init_state(network, OPTIMISER, KEY, images[:1])
    if begin is not None:
        start = start._replace(regime=begin(start.variables, KEY))
    state, metrics = train_steps(start, KEY, images, labels, order, 0, steps)
    assert int(metrics.first_bad) == -1
    assert int(state.step) == steps
    logits = network.apply_all(state.variables, images)[0].logits
    correct = (logits.argmax(-1) == labels[None]).sum(-1)
    assert correct[-1] >= 56
    # soft_literal and soft_mixture may leave exits untrained.
    assert regime in ("soft_literal", "soft_mixture") or correct.min() >= 56, correct


def test_many_steps_are_the_single_step_repeated(train_steps):
    split = made_split()
    order = jnp.asarray(np.random.default_rng(1).permutation(64).reshape(4, 16), jnp.int32)
    images, labels = jnp.asarray(split.images), jnp.asarray(split.labels)
    many, metrics = train_steps(fresh(), KEY, images, labels, order, 1, 3)
    single = make_step()
    state = fresh()
    for i in range(1, 4):
        batch = flip(jax.random.fold_in(KEY, state.step), images[order[i]])
        state, _ = single(state, batch, labels[order[i]], KEY)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert int(metrics.seen) == 48
    assert int(metrics.first_bad) == -1


def test_the_step_is_compiled_once_and_the_state_donated():
    traces = []

    def counting(key, images):
        traces.append(images.shape)
        return flip(key, images)

    steps = make_steps(counting)
    split = made_split()
    arrays = jnp.asarray(split.images), jnp.asarray(split.labels)
    before = state = fresh()
    for epoch, (start, count) in enumerate([(0, 3), (3, 1), (0, 4), (2, 2)]):
        order = jax.random.permutation(jax.random.key(epoch), 64).reshape(4, 16)
        state, _ = steps(state, KEY, *arrays, order, start, count)
    assert traces == [(16, 8, 8, 1)]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))


def test_accelerators_take_all_steps_in_one_loop(monkeypatch):
    """The program for other backends, run here on the CPU: the same numbers."""
    split = made_split()
    order = jnp.arange(64, dtype=jnp.int32).reshape(4, 16)
    arguments = (KEY, jnp.asarray(split.images), jnp.asarray(split.labels), order, 0, 4)
    stepped = make_steps(flip)
    expected, _ = stepped(fresh(), *arguments)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    looped = make_steps(flip)
    state, metrics = looped(fresh(), *arguments)
    assert int(metrics.seen) == 64
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


class Killed(Exception):
    """Stands for a kill: nothing is saved."""


@pytest.mark.parametrize(
    ("calls", "every"), [(0, 0.0), (1, 0.0), (2, 0.0), (5, 0.0), (4, 1e9)], ids=str
)
def test_a_killed_run_resumed_ends_bit_for_bit_like_one_that_was_not(
    tmp_path, run, uninterrupted, train_steps, calls, every
):
    whole, whole_rows = uninterrupted
    workdir = tmp_path
    left = calls

    def mortal(*arguments):
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return train_steps(*arguments)

    with pytest.raises(Killed):
        run(workdir, steps=mortal, every=every)
    with (workdir / loop.METRICS).open("a") as file:
        file.write('{"step": 999, "los')  # cut short by the kill
    resumed, rows = run(workdir)
    assert same(whole, resumed)
    assert [r["step"] for r in rows] == [r["step"] for r in whole_rows] == [3, 4, 7, 8, 11, 12]
    assert [r["loss"] for r in rows] == [r["loss"] for r in whole_rows]
    written = (workdir / loop.METRICS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in written] == [3, 4, 7, 8, 11, 12]


def test_a_finished_run_resumed_trains_no_more(run, tmp_path):
    whole, _ = run(tmp_path)
    again, _ = run(tmp_path, steps=lambda *_: pytest.fail("trained"))
    assert same(whole, again)


def test_a_diverged_run_stops_with_the_steps_number(run, tmp_path):
    explosive = make_steps(flip, optax.sgd(1e30))
    with pytest.raises(FloatingPointError, match=r"at step [1-9]\d*; .*learning-rate"):
        run(tmp_path, steps=explosive)


def test_epochs_average_their_dispatches(uninterrupted):
    _, rows = uninterrupted
    history = loop.epochs(rows)
    assert [h["epoch"] for h in history] == [1, 2, 3]
    assert history[0]["loss"] == pytest.approx((3 * rows[0]["loss"] + rows[1]["loss"]) / 4)
    assert history[0]["held_out_accuracy"] == [0.0, 0.5, 1.0]


def test_sigterm_saves_and_leaves_and_the_run_goes_on(tmp_path):
    """The real job in a process of its own."""
    command = [sys.executable, "-m", "experiments.cifar", "--workdir", str(tmp_path / "run")]
    command += ["--resume"]  # begins the run, as a job scheduler would restart it
    flags = ["--data.name", "digits", "--network.width", "4", "--train.epochs", "400"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*command, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                process.send_signal(signal.SIGTERM)
                break
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "SIGTERM: saved after step" in errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    saved = int(errors.split("saved after step ")[1].split()[0])
    assert (tmp_path / "run" / loop.CHECKPOINTS / str(saved)).is_dir()
