"""Results as strict JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.cache import replacing


def write_json(
    path: str | os.PathLike[str], values: Mapping[str, Any] | Sequence[Mapping[str, Any]]
) -> None:
    """Writes strict JSON, in which a number that is not finite is null; replaces the file at once.

    Raises:
      TypeError: if a value is neither plain data nor a NumPy array, and so has no JSON form.
    """
    text = json.dumps(_plain(values), indent=1, allow_nan=False, ensure_ascii=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
