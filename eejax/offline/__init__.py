"""Offline inference: an artifact over a data set that is larger than memory, in restartable parts.

    runtime = eejax.runtime.load("artifact")
    inputs = offline.find("photos", runtime.manifest.image)
    for part, answers in offline.answer(runtime, inputs, offline.parts(inputs, 4096)):
        print(part, answers.labels)

On the command line `eejax predict`; docs/deploying.md is the guide. Needs NumPy, ONNX Runtime and,
for image files, Pillow; Parquet and ArrayRecord need what reads them. `eejax.offline.ray` has the
same for Ray Data.
"""

from eejax.offline.inputs import Inputs, find
from eejax.offline.job import Answers, Part, answer, parts

__all__ = ["Answers", "Inputs", "Part", "answer", "find", "parts"]
