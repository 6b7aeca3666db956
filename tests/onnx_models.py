"""ONNX models of networks and of single functions, and the bundle that artifacts are made of."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime

from eejax import policies
from eejax.bundle import Bundle
from eejax.cost import Costs
from eejax.evaluation.routing import route, score
from eejax.models import FAMILIES
from eejax.network import EarlyExitNetwork, ExitOutput, Module, normalise
from eejax.onnx import stages
from eejax.trace import recorded


def session(model) -> Any:
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # a default for an input is a warning
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def module(function):
    """A pair of functions without variables."""
    return Module(
        lambda key, *inputs: {}, lambda variables, *inputs, **mode: (function(*inputs), {})
    )


def answer(logits, memory=()):
    return ExitOutput(logits, logits[:, 0], memory)


def model_of(function, image):
    """The model of a function of images to `[B, C]`: a network of one exit."""
    network = EarlyExitNetwork((module(function),), (module(answer),))
    variables = {"params": {"stages": ({},), "heads": ({},)}}
    shape = jax.ShapeDtypeStruct(image.shape[1:], image.dtype)
    return stages(network, policies.gate, variables, shape, [])[0]


def results(function, images):
    """What JAX and ONNX Runtime make of a function: of all images, and of the first alone."""
    run = session(model_of(function, images))
    expected = np.asarray(jax.jit(function)(images))
    got = np.asarray(run.run(None, {"images": np.asarray(images)})[0])
    (first,) = run.run(None, {"images": np.asarray(images[:1])})
    np.testing.assert_array_equal(first.shape, (1, *got.shape[1:]))
    return got, expected


def some_variables(network, image, seed):
    """Variables as after training: no statistic and no scale is that of a fresh network."""
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(
        network.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image.shape), image.dtype)
    )

    def drawn(path, leaf):
        kind = path[-1].key
        if kind in ("var", "scale"):
            return random.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        fan = max(1, np.prod(leaf.shape[:-1]))
        return (random.normal(size=leaf.shape) / np.sqrt(fan)).astype(leaf.dtype)

    return jax.tree.map_with_path(drawn, shapes)


def chained(models, images, thresholds):
    """Runs the stages on all samples; returns logits `[E, B, C]` and leaves `[E - 1, B]`."""
    logits, leaves, carried = [], [], [images]
    for e, model in enumerate(models):
        run = session(model)
        names = [i.name for i in run.get_inputs() if i.name != "thresholds"]
        given = dict(zip(names, carried, strict=True))
        if e + 1 < len(models):
            given["thresholds"] = thresholds
        made = dict(zip([o.name for o in run.get_outputs()], run.run(None, given), strict=True))
        logits.append(made["logits"])
        leaves += [made["leaves"]] if "leaves" in made else []
        carried = [array for name, array in made.items() if name.startswith("out")]
    return np.stack(logits), np.stack(leaves)


@functools.cache
def small_bundle():
    """A trained network's bundle, but for the training: exits are taken by a third each."""
    sides, mean, std = (12, 12, 3), (120.0,) * 3, (60.0,) * 3
    arguments = {"width": 4, "exits": [2, 4]}
    network = FAMILIES["fast"].build(10, image=sides, **arguments).reading(normalise(mean, std))
    image = jax.ShapeDtypeStruct(sides, jnp.uint8)
    variables = some_variables(network, image, 1)
    policy = policies.with_temperatures(policies.max_prob, [0.5, 1.0, 2.0])
    images = some_images(2, 60)
    outputs, _ = jax.jit(network.apply_all)(variables, images)
    trace = recorded(outputs.logits.transpose(1, 0, 2), np.zeros(60, np.int32))
    scores = np.sort(score(policy, trace).scores, axis=0)
    thresholds = np.array([scores[39:41, 0].mean(), scores[29:31, 1].mean()], np.float32)
    costs = Costs(np.array([2.0, 3.0, 4.0]), np.array([0.5, 0.5, 1.0]))
    names = tuple(f"class {i}" for i in range(10))
    return Bundle(
        "fast",
        arguments,
        names,
        sides,
        mean,
        std,
        variables,
        policy,
        thresholds,
        costs,
        {"seed": 1},
    )


def some_images(seed, count):
    """Noise of different strength, uint8 `[count, 12, 12, 3]`."""
    random = np.random.default_rng(seed)
    strength = random.uniform(5, 120, (count, 1, 1, 1))
    return (128 + strength * random.normal(size=(count, 12, 12, 3))).clip(0, 255).astype(np.uint8)


def reference(bundle, images, thresholds):
    """Exits and logits by the specification of routing."""
    outputs, _ = jax.jit(bundle.network.apply_all)(bundle.variables, images)
    trace = recorded(outputs.logits.transpose(1, 0, 2), np.zeros(len(images), np.int32))
    return route(score(bundle.policy, trace), thresholds)
