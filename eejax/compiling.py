"""The one place that knows how this project's programs want to be compiled."""

from __future__ import annotations

import jax

# jaxlib 0.10 and 0.11 hand convolutions on the CPU to a library that uses about one core: 2 to 3
# times slower than XLA's own, forward and backward, and in some programs only, so that timings of
# the same stage in two programs do not compare. Naming one kind of fusion leaves all others to XLA.
# docs/architecture.md has the measurement.
_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}


def compiler_options() -> dict[str, str]:
    """What to give `jax.jit(..., compiler_options=...)` on the default backend."""
    return dict(_CPU) if jax.default_backend() == "cpu" else {}
