"""What a compiled program's text says: computations, loops, copies, collectives, cycles.

XLA:TPU writes its own estimate of cycles beside the instructions that it emits
(`estimated_cycles`), by the form and the memory space that it chose. `cost_analysis()` of a whole
program counts the body of a loop once, and knows no memory space. So a program with loops is
estimated here by its loops: the cycles of a body, times how often a trace of exits runs it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: its own.
      shape: of its result, as written, with layouts.
      opcode: such as `fusion`.
      rest: operands and attributes.
      cycles: the compiler's estimate, 0 where it gives none.
    """

    name: str
    shape: str
    opcode: str
    rest: str
    cycles: int

    @property
    def called(self) -> list[str]:
        """The body of a loop, or the branches of a conditional."""
        if self.opcode not in ("while", "conditional"):
            return []
        branches = _BRANCHES.search(self.rest)
        if branches:
            return re.findall(r"[\w.\-]+", branches[1])
        return _CALLED.findall(self.rest)

    @property
    def arrays(self) -> list[tuple[tuple[int, ...], int]]:
        """Shape of each array of the result, and its bytes without padding."""
        return [_array(*found) for found in _ARRAY.findall(self.shape)]


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      entry: name of the outermost computation.
      computations: instructions by computation, in the order in which they run.
    """

    entry: str
    computations: dict[str, list[Instruction]]

    def reached(self, name: str | None = None) -> Iterator[Instruction]:
        """Instructions of a computation, default the entry, and of its loops and branches."""
        for instruction in self.computations[name or self.entry]:
            yield instruction
            for called in instruction.called:
                yield from self.reached(called)

    def count(self, *opcodes: str) -> int:
        """How many instructions have one of these opcodes; each loop's body counts once."""
        return sum(i.opcode in opcodes for i in self.reached())

    def copies(self, rows: int, num_bytes: int) -> list[Instruction]:
        """Copies of arrays of so many rows and bytes, or more, also between memory spaces."""
        copies = (i for i in self.reached() if i.opcode in ("copy", "copy-start"))
        return [
            i
            for i in copies
            if any(shape and shape[0] >= rows and b >= num_bytes for shape, b in i.arrays)
        ]

    def cycles(self, trips: Sequence[float], name: str | None = None) -> float:
        """Estimated cycles, where the n-th innermost loop's body runs `trips[n]` times.

        Loops are counted in the order in which they run. A loop around other loops has its own
        instructions counted once. Of a conditional the longer branch is counted, weighted by the
        next of `trips` too.

        Raises:
          ValueError: if there are fewer or more loops than `trips`.
        """
        left = list(trips)
        total = self._cycles(name or self.entry, left)
        if left:
            raise ValueError(f"{len(trips) - len(left)} loops and branches, {len(trips)} expected.")
        return total

    def _cycles(self, name: str, left: list[float]) -> float:
        total = 0.0
        for instruction in self.computations[name]:
            total += instruction.cycles
            if instruction.opcode == "while":
                (body,) = instruction.called
                inner = any(i.opcode == "while" for i in self.computations[body])
                total += self._cycles(body, left) if inner else _next(left) * self._cycles(body, [])
            elif instruction.opcode == "conditional":
                share, branches = _next(left), instruction.called
                longest = max(branches, key=lambda b: sum(i.cycles for i in self.reached(b)))
                total += share * self._cycles(longest, left)
        return total


def read(text: str) -> Program:
    """Reads `compiled.as_text()`."""
    entry, computations, current = "", {}, None
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            cycles = _CYCLES.search(line)
            name, shape, opcode, rest = found.groups()
            estimate = int(cycles[1]) if cycles else 0
            current.append(Instruction(name, shape, opcode, rest, estimate))
    return Program(entry, computations)


def _next(left: list[float]) -> float:
    if not left:
        raise ValueError("more loops and branches than were expected.")
    return left.pop(0)


def _array(dtype: str, axes: str) -> tuple[tuple[int, ...], int]:
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", " ", dtype).split()[0])
    shape = tuple(int(n) for n in axes.split(",") if n)
    return shape, math.prod(shape) * bits // 8
