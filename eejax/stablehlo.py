"""Programs as StableHLO portable artifacts, and their use inside of JAX programs.

A portable artifact holds a program and not the code that it was traced from. Readers of StableHLO
accept it for five years after the writer's version, and readers older than that for two
(https://openxla.org/stablehlo/compatibility). `TARGET` is the version that is written; every reader
since October 2024 knows it.

The parser behind `call` does not withstand damage: check hashes first, as `eejax.artifact` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend import mlir as portable_mlir
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.interpreters.mlir import ir
from jaxlib.mlir import passmanager
from jaxlib.mlir.dialects import func

TARGET = "1.0.0"


class Program(NamedTuple):
    """A program that can be stored.

    Attributes:
      artifact: the portable artifact.
      reads: positions of those leaves of the arguments that the program takes; what a program does
        not use is not among its inputs.
      outputs: shape and dtype of each leaf of its result.
    """

    artifact: bytes
    reads: tuple[int, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]


def portable(function: Callable[..., Any], *args: Any, platform: str) -> Program:
    """Lowers a function for a platform; the device itself is not needed.

    Args:
      function: of pytrees of arrays.
      args: shapes and dtypes of its arguments.
      platform: `"cpu"`, `"cuda"` or `"tpu"`.
    """
    # Buffers of `compact` have a fixed layout on a TPU, by a call that JAX promises nothing for.
    layout = jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")
    export = jax.export.export(jax.jit(function), platforms=[platform], disabled_checks=[layout])
    exported = export(*args)
    with mlir.make_ir_context():
        module = portable_mlir.deserialize_portable_artifact(exported.mlir_module_serialized)
        # Locations are paths of this machine, and a third of the bytes.
        passmanager.PassManager.parse("builtin.module(strip-debuginfo)").run(module.operation)
        artifact = portable_mlir.serialize_portable_artifact(module, TARGET)
    outputs = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in exported.out_avals)
    return Program(bytes(artifact), tuple(exported.module_kept_var_idx), outputs)


def call(program: Program) -> Callable[..., tuple[jax.Array, ...]]:
    """A function that runs a program, to be used under `jax.jit`, on the program's platform.

    Args:
      program: its artifact must be what `portable` wrote, byte for byte.

    Returns:
      A function of the leaves that `program.reads` names, to the leaves of the result.
    """

    def run(*leaves: Any) -> tuple[jax.Array, ...]:
        results = _STORED.bind(*leaves, artifact=program.artifact, outputs=program.outputs)
        return tuple(results)

    return run


def _outputs(
    *leaves: Any, artifact: bytes, outputs: Sequence[jax.ShapeDtypeStruct]
) -> list[ShapedArray]:
    del leaves, artifact
    return [ShapedArray(x.shape, np.dtype(x.dtype)) for x in outputs]


def _lowering(
    context: Any, *leaves: Any, artifact: bytes, outputs: Sequence[jax.ShapeDtypeStruct]
) -> Sequence[Any]:
    """Merges the program into the one that is lowered, and calls it there."""
    del outputs
    module = context.module_context.module
    with module.context:
        stored = portable_mlir.deserialize_portable_artifact(artifact)
    name = mlir.merge_mlir_modules(
        module, "stored", stored, dst_symtab=context.module_context.symbol_table
    )
    function: Any = ir.SymbolTable(module.operation)[name]
    called = func.CallOp(function.type.results, ir.FlatSymbolRefAttr.get(name), list(leaves))
    return list(called.results)


_STORED = Primitive("stored_program")
_STORED.multiple_results = True
_STORED.def_abstract_eval(_outputs)
mlir.register_lowering(_STORED, _lowering)
