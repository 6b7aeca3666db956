"""Early-exit neural networks in JAX.

A network is a backbone cut into stages with a head after each (`network`); a policy says when to
stop (`policies`); thresholds come from a held-out trace (`trace`, `selection`); an executor
stops every sample at its own exit (`inference`).

Names are imported when they are first used, as `__init__.pyi` lists them: so `eejax.runtime` runs
where JAX is not installed.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def _modules() -> dict[str, str]:
    """The module that each public name comes from, by the stub beside this file."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


_MODULES = _modules()
__all__ = sorted(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES.get(name, __name__)
    try:
        if module != __name__:
            value = getattr(importlib.import_module(module), name)
        else:
            value = importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name == f"{__name__}.{name}":
            words = f"module {__name__!r} has no attribute {name!r}"
        else:
            words = f"{__name__}.{name} needs {error.name}, which is not installed"
        # So that hasattr, dir and help work where JAX is not installed.
        raise AttributeError(words) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
