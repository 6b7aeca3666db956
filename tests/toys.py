"""Toy networks and policies for the tests, as plain pairs of functions.

Weights, images and thresholds are small integers in float32, so that the arithmetic is exact: two
programs give the same bits, and a score that equals a threshold is a real tie.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eejax import policies
from eejax import trace as eejax_trace
from eejax.evaluation import routing
from eejax.network import EarlyExitNetwork, ExitOutput, Module
from eejax.policies import ensembles, optimal_stopping, scheduler
from eejax.policies.base import Policy, Rule

CLASSES = 3
WIDTH = 4
INPUTS = 3


def integers(key, *shape, high=2):
    """Whole numbers in [-high, high], in float32."""
    return jax.random.randint(key, shape, -high, high + 1).astype(jnp.float32)


def some_images(seed, count):
    return np.random.default_rng(seed).integers(-2, 3, (count, INPUTS)).astype(np.float32)


@functools.cache
def _init(network):
    return jax.jit(network.init)


def variables(network, seed=0):
    return _init(network)(jax.random.key(seed), jnp.zeros((1, INPUTS)))


def _first_stage(watch, dtype) -> Module:
    def init(key, features):
        del features
        return {"params": {"kernel": integers(key, INPUTS, WIDTH)}}

    def apply(variables, images, *, train, key=None):
        del train
        watch(0, images)
        x = images.astype(dtype) @ variables["params"]["kernel"].astype(dtype)
        x = jnp.clip(x, -8, 8)
        grid = jnp.clip(jnp.zeros((x.shape[0], 2, 3), dtype) + x[:, :2, None], -5, 5)
        ticks = jnp.ones_like(jnp.arange(x.shape[0], dtype=jnp.int32))
        return {"x": x, "more": [grid, ticks]}, variables.get("batch_stats", {})

    return Module(init, apply)


@functools.cache
def _later_stage(watch, dtype) -> Module:
    def init(key, features):
        del features
        return {"params": {"kernel": integers(key, WIDTH, WIDTH)}}

    def apply(variables, features, *, train, key=None):
        del train
        grid, ticks = features["more"]
        watch(ticks[0], features["x"])
        x = features["x"] @ variables["params"]["kernel"].astype(dtype)
        x = jnp.clip(x + grid[:, 0, :1], -8, 8)
        grid = jnp.clip(grid + x[:, :2, None], -5, 5)
        return {"x": x, "more": [grid, ticks + 1]}, variables.get("batch_stats", {})

    return Module(init, apply)


@functools.cache
def _head(first: bool) -> Module:
    def init(key, features, memory):
        del features, memory
        for_logits, for_gate = jax.random.split(key)
        return {
            "params": {
                "logits": integers(for_logits, WIDTH, CLASSES),
                "gate": integers(for_gate, WIDTH, high=1),
            }
        }

    def apply(variables, features, memory, *, train, key=None):
        del train
        params = variables["params"]
        grid, ticks = features["more"]
        x = features["x"].astype(jnp.float32)
        logits = x @ params["logits"] + grid[:, 1].astype(jnp.float32)
        gate = x @ params["gate"]
        depth = 0 if first else memory["depth"]
        if not first:
            logits = logits + memory["said"]
            gate = gate + memory["seen"][0]
        gate = jnp.clip(gate, -4, 4)
        # Nothing is said where features and memory are not of the same sample.
        said = jnp.clip(logits, -3, 3) * (ticks == depth + 1)[:, None].astype(jnp.float32)
        memory = {"said": said, "seen": [said.max(-1)], "depth": ticks}
        return ExitOutput(logits, gate, memory), variables.get("batch_stats", {})

    return Module(init, apply)


def _nobody(e: Any, x: Any) -> None:
    del e, x


def network(
    exits: int, watch: Callable[[Any, Any], None] = _nobody, dtype: Any = jnp.float32
) -> EarlyExitNetwork:
    """Features are a dict with a list in it; each head's logits depend on the memory of the last.

    All stages but the first are equal modules, and so are their heads: one run for `loop`.

    Args:
      exits: E.
      watch: called with each stage's number and input, while it is traced.
      dtype: of the features.
    """
    later = _later_stage(watch, dtype)
    return EarlyExitNetwork(
        (_first_stage(watch, dtype), *[later] * (exits - 1)),
        (_head(True), *[_head(False)] * (exits - 1)),
    )


shared_network = functools.cache(network)


class Rows:
    """Counts the rows that each stage is really given to compute, when the program runs."""

    def __init__(self, exits: int):
        self.counts = [0] * exits
        self.watch = self._watch  # one object, by which equal stages are seen to be equal

    def _watch(self, e, x):
        def add(e, rows):
            self.counts[int(e)] += int(rows)

        jax.debug.callback(add, jnp.int32(e), jnp.int32(x.shape[0]))

    def read(self):
        jax.effects_barrier()
        counts, self.counts = self.counts, [0] * len(self.counts)
        return counts


def policy_of(init: Callable[..., Any], step: Callable[..., Any]) -> Policy:
    """A policy from two functions that take no parameters."""
    return Policy(
        Rule("of a test", lambda params, batch_size: init(batch_size), lambda params, *a: step(*a))
    )


def _running_sum() -> Policy:
    """Answers with the sum of the logits so far, as sure as the sum of the gates so far."""

    def init(batch_size):
        return {"logits": jnp.zeros((batch_size, CLASSES)), "gate": jnp.zeros(batch_size)}

    def step(output, state, e):
        del e
        state = {"logits": state["logits"] + output.logits, "gate": state["gate"] + output.gate}
        return state["logits"], state["gate"], state

    return policy_of(init, step)


TEMPERATURES = (0.5, 1.0, 2.0, 4.0, 8.0)

# For up to six exits. What stands in the scheduler are whole numbers, and halves for the past.
LEARNED = scheduler.Parameters(
    weights=np.array([[2, -1, 1, e, -e, 0.5] for e in range(6)]),
    mean=np.ones((6, 5)),
    std=np.full((6, 5), 2.0),
)
PRICED = optimal_stopping.OptimalStoppingParams(
    weights=np.array(
        [[[2 - k, -1, 0.5, 1, -1, e % 2, 1, 0, -1] for k in range(3)] for e in range(6)]
    ),
    mean=np.ones((6, 8)),
    std=np.full((6, 8), 2.0),
    prices=np.arange(3.0),
    steps=np.ones(6),
)
WEIGHTS, BIASES = np.arange(36).reshape(6, 6) % 3 - 1, np.arange(18).reshape(6, CLASSES) % 4

POLICIES = {
    "gate": policies.gate,
    "patience": policies.patience,
    "running sum": _running_sum(),
    "max_prob": policies.max_prob,
    "margin": policies.margin,
    "entropy": policies.entropy,
    "running sum, temperatures": policies.with_temperatures(_running_sum(), TEMPERATURES),
    "fixed": policies.fixed,
    "random": policies.random(7),
    "vote": ensembles.vote(CLASSES),
    # Two of the ensembles are scored by the gate, which is cheap to compile.
    "mean": ensembles.mean_of_experts(CLASSES, policies.gate),
    "product, temperatures": policies.with_temperatures(
        ensembles.product_of_experts(CLASSES), TEMPERATURES
    ),
    "ztw": ensembles.ztw(WEIGHTS, BIASES, policies.gate),
    "scheduler": scheduler.scheduler(LEARNED),
    "optimal stopping": optimal_stopping.optimal_stopping(PRICED),
}

# Scores or answers of the others go through exp and log, and may differ in the last bits between
# programs.
EXACT = ("gate", "patience", "running sum", "running sum, temperatures", "fixed", "random")


def reference(name, network, seed, thresholds, images):
    """By `routing`: where each image leaves, with the variables of that seed, and its answer."""
    labels = np.zeros(len(images), int)
    trace = eejax_trace.collect(network, variables(network, seed), images, labels)
    return routing.route(routing.score(POLICIES[name], trace), thresholds)


def assert_answers(prediction, routed):
    """Exactly the reference's answers, in int32."""
    np.testing.assert_array_equal(prediction.exits, routed.exits)
    np.testing.assert_array_equal(prediction.logits, routed.logits)
    np.testing.assert_array_equal(prediction.labels, routed.logits.argmax(-1))
    assert prediction.labels.dtype == prediction.exits.dtype == np.int32
