"""Training steps compiled for the chips of a pod: memory, collectives, what runs beside them."""

from __future__ import annotations

import collections
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from eejax import models, training
from eejax.training import RegimeOptions, placement
from eejax.training.step import make_train_step
from experiments.aot import program
from experiments.aot.inference import HERTZ, NETWORKS

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One collective operation.

    Attributes:
      kind: one of `KINDS`.
      num_bytes: of its results.
      cycles_beside: estimated cycles of instructions between its start and its end; 0 where it is
        one instruction.
    """

    kind: str
    num_bytes: int
    cycles_beside: int


def measure(name: str, topology_name: str, devices: Sequence[Any], batch: int, fsdp: int) -> Any:
    """A row for one training step, joint training of four exits with Adam.

    Args:
      name: of a network in `NETWORKS`.
      topology_name: for the row.
      devices: of the topology.
      batch: images of all devices together.
      fsdp: devices that divide parameters and optimiser state among them; 1 for none.
    """
    family, image, classes, arguments = NETWORKS[name]
    network = models.build(family, classes, image, **arguments)
    exits = network.num_exits
    options = RegimeOptions(jnp.ones(exits), 0.0, jnp.ones(exits))
    (phase,) = training.REGIMES["joint"].phases(options)
    optimiser = optax.adamw(1e-3)
    mesh = placement.make_mesh(devices, fsdp)
    step = make_train_step(network, optimiser, phase, classes=classes, label_smoothing=0.1)

    def train(state: Any, images: Any, labels: Any, key: Any) -> Any:
        images, labels = (placement.constrain_batch(mesh, x) for x in (images, labels))
        state, metrics = step(state, images, labels, key)
        metrics = placement.constrain_replicated(mesh, metrics)
        return placement.constrain_state(mesh, state), metrics

    key = jax.eval_shape(lambda: jax.random.key(0))
    first = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    state = jax.eval_shape(
        lambda key, x: training.init_state(network, optimiser, key, x), key, first
    )
    whole, split = placement.replicated(mesh), placement.batch_sharding(mesh)
    args = (
        _placed(state, placement.state_shardings(mesh, state)),
        jax.ShapeDtypeStruct((batch, *image), jnp.float32, sharding=split),
        jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=split),
        jax.ShapeDtypeStruct((), key.dtype, sharding=whole),
    )
    start = time.perf_counter()
    traced = jax.jit(train, donate_argnums=0).trace(*args)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    text = program.read(compiled.as_text() or "")
    found = list(collectives(text))
    kinds = {kind: [c for c in found if c.kind == kind] for kind in KINDS}
    cycles = text.cycles([1.0] * text.count("while", "conditional"))
    return {
        "network": name,
        "topology": topology_name,
        "devices": len(devices),
        "batch": batch,
        "fsdp": fsdp,
        "compile_seconds": seconds,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "collectives": {
            kind: {
                "count": len(some),
                "bytes": sum(c.num_bytes for c in some),
                "asynchronous": sum(c.cycles_beside > 0 for c in some),
                "cycles_beside": sum(c.cycles_beside for c in some),
            }
            for kind, some in kinds.items()
            if some
        },
        "cycles": cycles,
        "microseconds": 1e6 * cycles / HERTZ[devices[0].device_kind],
    }


def collectives(compiled: program.Program) -> Iterator[Collective]:
    """The collectives of a program in the order of its schedule.

    XLA:TPU writes an asynchronous one as `all-gather-start` and `-done`, or as a pair of
    `async-start` and `async-done` around it, or as a pair of fusions, `async-collective-start` and
    `-done`.
    """
    for name in _visited(compiled):
        instructions = compiled.computations[name]
        ends = collections.defaultdict(list)
        for n, instruction in enumerate(instructions):
            if _is_end(instruction):
                for operand in re.findall(r"%([\w.\-]+)", instruction.rest.split("),")[0]):
                    ends[operand].append(n)
        for n, instruction in enumerate(instructions):
            kind = _kind(compiled, instruction)
            if kind is None or _is_end(instruction):
                continue
            last = max(ends.get(instruction.name, [n]))
            beside = sum(i.cycles for i in instructions[n + 1 : last])
            done = instructions[last] if last > n else instruction
            yield Collective(kind, sum(b for _, b in done.arrays), beside)


def _visited(compiled: program.Program) -> Iterator[str]:
    todo = [compiled.entry]
    while todo:
        name = todo.pop()
        yield name
        todo += [c for i in compiled.computations[name] for c in i.called]


def _is_end(instruction: program.Instruction) -> bool:
    return instruction.opcode.endswith("-done") or "async-collective-done" in instruction.name


def _kind(compiled: program.Program, instruction: program.Instruction) -> str | None:
    """The kind of collective that an instruction is or begins; None for others."""
    for kind in KINDS:
        if instruction.opcode in (kind, f"{kind}-start"):
            return kind
    called = re.search(r"calls=%?([\w.\-]+)", instruction.rest)
    if instruction.opcode not in ("fusion", "async-start") or called is None:
        return None
    inside = compiled.computations.get(called[1], [])
    return next((k for k in KINDS for i in inside if i.opcode in (k, f"{k}-start")), None)


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
