"""An artifact: one directory from which a trained network runs without its code, and stops early.

    eejax.export(eejax.load("runs/cifar10"), "artifact")
    eejax.runtime.load("artifact").predict(images)  # by ONNX Runtime, without JAX
    eejax.load("artifact").predict(images)  # by JAX, on CPUs, GPUs and TPUs

`manifest.json` says what is inside, with the size and SHA-256 of every file. Three layers of
programs stand beside it, each of which runs without the others. Thresholds are inputs of all of
them; preprocessing is inside, and images are uint8.

- `onnx/`: a model for one image, and one for each stage.
- `stablehlo/`: the fused programs for 1, 32 and 256 images and the stages for 32, each for CPUs,
  CUDA and TPUs, with the weights beside them. JAX reads them for five years.
- `export/`: the fused programs by `jax.export`, which JAX promises to read for six months.
"""

from eejax.artifact.reading import Artifact, load
from eejax.artifact.writing import LAYERS, export

__all__ = ["LAYERS", "Artifact", "export", "load"]
