"""Runs artifacts by ONNX Runtime, with NumPy and without JAX; every sample stops at its own exit.

    runtime = eejax.runtime.load("artifact")  # what eejax.export or `eejax export` wrote
    prediction = runtime.predict(images)  # prediction.labels, .exits, .logits

Needs `onnxruntime` and `numpy` alone, so on a device `pip install --no-deps eejax` beside them is
enough.
"""

from eejax.runtime.deadline import Anytime
from eejax.runtime.engine import Prediction, Runtime, load
from eejax.runtime.manifest import HeldOut, Manifest, read
from eejax.runtime.verifying import Verified, recorded, verify

__all__ = [
    "Anytime",
    "HeldOut",
    "Manifest",
    "Prediction",
    "Runtime",
    "Verified",
    "load",
    "read",
    "recorded",
    "verify",
]
