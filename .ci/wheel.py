"""Checks an installed wheel: eejax alone, its own dependencies, and a network that predicts."""

import importlib.util
import time

start = time.perf_counter()
import jax  # noqa: E402

jax_seconds = time.perf_counter() - start
import eejax  # noqa: E402

eejax_seconds = time.perf_counter() - start - jax_seconds
print(f"import jax {jax_seconds:.2f} s, import eejax {eejax_seconds:.2f} s more")

for name in ("experiments", "configs", "tests", "matplotlib", "tyro", "sklearn"):
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
