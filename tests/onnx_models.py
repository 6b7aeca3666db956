"""ONNX models of networks and of single functions, run by ONNX Runtime."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import onnx
import onnxruntime

from eejax import policies
from eejax.network import EarlyExitNetwork, ExitOutput, Module
from eejax.onnx import stages


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
