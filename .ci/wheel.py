"""Checks an installed wheel: eejax alone, its own dependencies, and a network that predicts."""

import importlib.util
import time

start = time.perf_counter()
import jax  # noqa: E402

jax_seconds = time.perf_counter() - start
import eejax  # noqa: E402

eejax_seconds = time.perf_counter() - start - jax_seconds
print(f"import jax {jax_seconds:.2f} s, import eejax {eejax_seconds:.2f} s more")

for name in (
    "experiments",
    "configs",
    "tests",
    "matplotlib",
    "tyro",
    "sklearn",
    "onnx",
    "onnxruntime",
):
    assert importlib.util.find_spec(name) is None, f"{name} was installed with the wheel"

import eejax.checkpoint  # noqa: E402
from eejax.models.lenet import lenet  # noqa: E402
from eejax.pretrained import convert, names  # noqa: E402, F401

images = jax.numpy.zeros((4, 32, 32, 1))
network = lenet(10, image=(32, 32, 1))
variables = jax.jit(network.init)(jax.random.key(0), images)
predict = eejax.predictor(network, eejax.max_prob, variables, eejax.compact)
prediction = predict(jax.numpy.zeros(network.num_exits - 1), images)
assert prediction.labels.shape == prediction.exits.shape == (4,)
print(f"eejax {eejax.__version__}, jax {jax.__version__}: {prediction.labels.tolist()}")

# Bundles, and artifacts for JAX, need no extra.
import tempfile  # noqa: E402

import numpy  # noqa: E402

arguments, sides, ones = {"width": 4, "exits": [2]}, (8, 8, 1), (1.0,)
network = eejax.models.build("fast", 10, sides, **arguments).reading(eejax.normalise((0.0,), ones))
images = numpy.random.default_rng(0).integers(0, 256, (4, *sides), numpy.uint8)
variables = jax.jit(network.init)(jax.random.key(0), jax.numpy.asarray(images))
costs = eejax.xla_macs(network, variables, images[:1])
digits = tuple("0123456789")
bundle = eejax.Bundle(
    *("fast", arguments, digits, sides, (0.0,), ones, variables, eejax.max_prob, [0.1], costs, {})
)
with tempfile.TemporaryDirectory() as place:
    eejax.bundle.save(bundle, f"{place}/bundle")
    expected = eejax.load(f"{place}/bundle").predict(images)
    eejax.export(bundle, f"{place}/artifact", layers=["stablehlo"])
    stored = eejax.load(f"{place}/artifact").predict(images)
    assert stored.exits.tolist() == expected.exits.tolist()
