"""Early-exit networks as ONNX models, which run without JAX and still stop early.

`stages` writes a model for each exit, for batches: what executors run, `exit_step`, is traced and
written operation by operation. `single` nests them into one that stops by itself, for one image.
Needs the extra `artifact`.
"""

from eejax.onnx.exits import stages
from eejax.onnx.nesting import single

__all__ = ["single", "stages"]
