"""Early-exit networks as ONNX models, which run without JAX and still stop early.

`stages` writes a model for each exit, for batches; `single` writes one that stops by itself, for
one image. Both are made from what executors run, `eejax.inference.step.exit_step`: traced, and
written operation by operation. Needs the extra `onnx`.
"""

from eejax.onnx.exits import single, stages

__all__ = ["single", "stages"]
