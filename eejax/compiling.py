"""How the programs of this project are compiled: options, and variables as constants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

# On the CPU, jaxlib 0.10 and 0.11 give the convolutions of some programs to a library that uses
# about one core and is 2 to 3 times slower than XLA, so timings of a stage in two programs are not
# comparable. Naming one kind of fusion leaves all others to XLA. docs/lab/xla.md has the
# measurement.
_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}


def compiler_options() -> dict[str, str]:
    """The `compiler_options` of `jax.jit` for the default backend."""
    return dict(_CPU) if jax.default_backend() == "cpu" else {}


# Above this size the time of a dispatch, which grows with the number of variables, is small beside
# the time of the network, and a copy of the variables in every program would waste memory.
CONSTANT_BYTES = 64 << 20


def bound(function: Callable[..., Any], variables: Any, **options: Any) -> Callable[..., Any]:
    """`function(variables, ...)` compiled with these variables.

    They become constants of the program, up to 64 MiB of them: passing a few hundred arrays takes
    longer than the first stage of a small network. Larger ones stay arguments, on the device.

    Args:
      function: its first argument is `variables`.
      variables: a pytree of arrays.
      options: for `jax.jit`; argument numbers count `variables` as 0.
    """
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(variables))
    if size > CONSTANT_BYTES:
        compiled = jax.jit(function, compiler_options=compiler_options(), **options)
        return functools.partial(compiled, jax.device_put(variables))
    options = {name: tuple(i - 1 for i in numbers) for name, numbers in options.items()}
    return jax.jit(
        functools.partial(function, variables), compiler_options=compiler_options(), **options
    )
