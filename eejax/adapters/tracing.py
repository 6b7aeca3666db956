"""A traced model as a flat list of equations, and its slices, for `slicing`.

No other file knows the inside of JAX's programs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex
from jax.extend.core import Literal, Var, primitives

Atom = Var | Literal


class Graph(NamedTuple):
    """A function of variables, images and a key, nested `jit`s inlined and names taken out.

    Attributes:
      variables: one for each leaf.
      images: the batch.
      key: of the random numbers.
      constants: what the function closes over.
      equations: in the order of the program.
      outputs: the leaves of its outputs.
      updates: the new value of each updated variable, by its position.
      names: the values that carry each name.
      inside: names inside equations that stay whole, with its primitive: a scan, for example.
    """

    variables: tuple[Var, ...]
    images: Var
    key: Var
    constants: dict[Var, Any]
    equations: list[jex.JaxprEqn]
    outputs: list[Atom]
    updates: dict[int, Atom]
    names: dict[str, list[Atom]]
    inside: dict[str, str]


class Cuts(NamedTuple):
    """A graph, and the stage, 0-based, of every equation that depends on the images.

    Attributes:
      graph: of the whole model.
      at: the names of the K values at which it is cut.
      values: the values.
      level: the stage, by the position of the equation; equations that no stage needs are missing.
      producer: the equation that computes a value; inputs have none.
      data: the values that depend on the images.
    """

    graph: Graph
    at: tuple[str, ...]
    values: tuple[Atom, ...]
    level: dict[int, int]
    producer: dict[Var, int]
    data: set[Var]


class Slice(NamedTuple):
    """One stage as a program.

    Attributes:
      run: values of `reads`, a key if `random`, and features, to features and the values of
        `updates`.
      features: shape and dtype of each leaf of its input.
      reads: the variables that it reads, by position.
      updates: the variables that it owns and updates, by position.
      random: whether it draws random numbers.
    """

    run: jex.ClosedJaxpr
    features: tuple[Any, ...]
    reads: tuple[int, ...]
    updates: tuple[int, ...]
    random: bool


def graph(closed: jex.ClosedJaxpr, updated: Sequence[int]) -> Graph:
    """The graph of a program of `(*variables, images, key) -> (*outputs, *updates)`.

    Args:
      closed: from `jax.jit(...).trace(...).jaxpr`.
      updated: the variables, by position, whose new values are its last outputs.
    """
    inputs = [Var(v.aval) for v in closed.jaxpr.invars]
    *variables, images, key = inputs
    result = Graph(tuple(variables), images, key, {}, [], [], {}, {}, {})
    values = _inline(closed, inputs, result)
    split = len(values) - len(updated)
    result.outputs.extend(values[:split])
    result.updates.update(zip(updated, values[split:], strict=True))
    return result


def _inline(closed: jex.ClosedJaxpr, inputs: Sequence[Atom], into: Graph) -> list[Atom]:
    """Adds the equations of a program to a graph and returns its results.

    They get fresh variables, since JAX reuses those of a function that is called twice.
    """
    values: dict[Var, Atom] = dict(zip(closed.jaxpr.invars, inputs, strict=True))
    for var, constant in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        values[var] = fresh = Var(var.aval)
        into.constants[fresh] = constant

    def read(atoms: Iterable[Atom]) -> list[Atom]:
        return [a if isinstance(a, Literal) else values[a] for a in atoms]

    for equation in closed.jaxpr.eqns:
        given = read(equation.invars)
        if equation.primitive is primitives.name_p:
            # An identity, so its input carries the name.
            values[equation.outvars[0]] = given[0]
            _add_name(into, equation.params["name"], given[0])
        elif equation.primitive is primitives.jit_p:
            results = _inline(equation.params["jaxpr"], given, into)
            values.update(zip(equation.outvars, results, strict=True))
        else:
            outputs = [Var(v.aval) for v in equation.outvars]
            values.update(zip(equation.outvars, outputs, strict=True))
            into.equations.append(equation.replace(invars=given, outvars=outputs))
            for program in jex.jaxprs_in_params(equation.params):
                _note_names(equation, program, outputs, into)
    return read(closed.jaxpr.outvars)


def _add_name(into: Graph, name: str, value: Atom) -> None:
    values = into.names.setdefault(name, [])
    if not any(value is other for other in values):
        values.append(value)


def _note_names(equation: jex.JaxprEqn, program: Any, outputs: Sequence[Var], into: Graph) -> None:
    """Records the names inside an equation that stays whole.

    The results of a rematerialised function are outputs of the equation, so they keep their names.
    """
    is_remat = equation.primitive is primitives.remat_p
    for inner in program.eqns:
        if inner.primitive is primitives.name_p:
            name, value = inner.params["name"], inner.outvars[0]
            here = [i for i, v in enumerate(program.outvars) if v is value] if is_remat else []
            if here:
                _add_name(into, name, outputs[here[0]])
            else:
                into.inside[name] = equation.primitive.name
        for deeper in jex.jaxprs_in_params(inner.params):
            _note_names(equation, deeper, (), into)


def cuts(whole: Graph, at: Sequence[str]) -> Cuts:
    """Gives every equation to the first stage whose named value needs it.

    Raises:
      ValueError: if a name does not exist, exists twice or does not depend on the images, or if
        nothing is to compute between two cuts.
    """
    producer = {v: i for i, equation in enumerate(whole.equations) for v in equation.outvars}
    data: set[Var] = {whole.images}
    for equation in whole.equations:
        if any(v in data for v in equation.invars if isinstance(v, Var)):
            data.update(equation.outvars)
    values = tuple(_named(whole, name) for name in at)
    result = Cuts(whole, tuple(at), values, {}, producer, data)
    for k, value in enumerate(values):
        if not isinstance(value, Var) or value not in data:
            raise ValueError(f"{at[k]!r} does not depend on the images; cut at a value that does.")
        if value not in producer or producer[value] in result.level:
            raise ValueError(
                f"nothing is left to compute from {_before(at, k)} to {at[k]!r}; give names in the "
                "order in which they are computed, and one for each value."
            )
        for i in _upstream(result, [value], data.__contains__)[0]:
            result.level.setdefault(i, k)
    rest = _upstream(result, whole.outputs, data.__contains__)[0] - set(result.level)
    if not rest:
        raise ValueError(
            f"nothing is left to compute after {_before(at, len(at))}, and the model's own output "
            "is an exit already; leave the last name out."
        )
    result.level.update(dict.fromkeys(rest, len(at)))
    return result


def _before(at: Sequence[str], k: int) -> str:
    return repr(at[k - 1]) if k else "the images"


def _named(whole: Graph, name: str) -> Atom:
    values = whole.names.get(name, [])
    if len(values) > 1:
        raise ValueError(
            f"{len(values)} values are named {name!r}; give each a name of its own. A "
            "module that is called several times names all its results alike."
        )
    if not values:
        there = ", ".join(map(repr, whole.names)) or "none"
        what = whole.inside.get(name)
        where = f"{name!r} is inside a {what}" if what else f"no value is named {name!r}"
        raise ValueError(
            f"{where}; names to cut at: {there}. What is inside a scan, a loop, a conditional or a "
            "remat cannot be cut at."
        )
    return values[0]


def _upstream(
    of: Cuts, atoms: Iterable[Atom], follow: Callable[[Var], bool]
) -> tuple[set[int], set[Var]]:
    """The equations that lead to some values, and all values on the way, through those that
    `follow` accepts."""
    equations: set[int] = set()
    visited: set[Var] = set()
    waiting = list(atoms)
    while waiting:
        value = waiting.pop()
        if isinstance(value, Literal) or value in visited or not follow(value):
            continue
        visited.add(value)
        producer = of.producer.get(value)
        if producer is not None and producer not in equations:
            equations.add(producer)
            waiting.extend(of.graph.equations[producer].invars)
    return equations, visited


def _direct(of: Cuts, k: int, owned: Sequence[int] | None) -> list[Atom]:
    """The inputs of the equations of stage k, its outputs, and its updates if owners are known."""
    read = [v for i, at in of.level.items() if at == k for v in of.graph.equations[i].invars]
    read += [of.values[k]] if k < len(of.at) else of.graph.outputs
    if owned is not None:
        read += [v for i, v in of.graph.updates.items() if owned[i] == k]
    return read


def _constant_part(of: Cuts, atoms: Iterable[Atom]) -> tuple[set[int], set[Var]]:
    """The equations and inputs that lead to some values and do not depend on the images."""
    return _upstream(of, atoms, lambda v: v not in of.data)


def owners(modes: Sequence[Cuts], names: Sequence[str]) -> list[int]:
    """The stage that each variable belongs to: the stage that reads it, otherwise the last.

    A running statistic that is updated and not read belongs to the last stage that computes a value
    of its update.

    Args:
      modes: the same cuts in inference and in training.
      names: of the variables.

    Raises:
      ValueError: if two stages read a variable, or a later stage computes a value of its update.
    """
    at = modes[0].at
    owner: dict[int, int] = {}

    def claim(of: Cuts, owned: Sequence[int] | None) -> None:
        for k in range(len(at) + 1):
            visited = _constant_part(of, _direct(of, k, owned))[1]
            for i, var in enumerate(of.graph.variables):
                if var in visited and owner.setdefault(i, k) != k:
                    raise ValueError(
                        f"{names[i]} is read by {_place(at, owner[i])} and by {_place(at, k)}; a "
                        "variable belongs to one stage, so cut where it is not shared."
                    )

    for of in modes:
        claim(of, None)
    for of in modes:
        for i, update in of.graph.updates.items():
            equations, visited = _upstream(of, [update], lambda v: True)
            computed = [of.level[j] for j in equations if j in of.level]
            read = [k for j, k in owner.items() if of.graph.variables[j] in visited]
            owner.setdefault(i, max(computed + read, default=len(at)))
    owned = [owner.get(i, len(at)) for i in range(len(names))]
    for of in modes:
        place_updates(of, owned, names)
        claim(of, owned)
    return [owner.get(i, len(at)) for i in range(len(names))]


def place_updates(of: Cuts, owned: Sequence[int], names: Sequence[str]) -> None:
    """Gives equations that only an update needs to the stage that owns the variable.

    Raises:
      ValueError: if a later stage computes a value of an update.
    """
    computed = dict(of.level)
    for i in sorted(of.graph.updates, key=lambda i: owned[i]):
        for j in _upstream(of, [of.graph.updates[i]], of.data.__contains__)[0]:
            if computed.get(j, 0) > owned[i]:
                raise ValueError(
                    f"{names[i]} belongs to {_place(of.at, owned[i])}, but is updated with what "
                    f"{_place(of.at, computed[j])} computes; cut elsewhere."
                )
            of.level.setdefault(j, owned[i])


def _place(at: Sequence[str], k: int) -> str:
    """A stage in messages, 1-based."""
    until = f"to {at[k]!r}" if k < len(at) else "to the end"
    return f"stage {k + 1} (from {_before(at, k)} {until})"


def edges(of: Cuts, owned: Sequence[int]) -> list[list[Var]]:
    """The outputs of each stage but the last: the named value, then all that later stages read."""
    stages = range(len(of.at) + 1)
    last = {v: k for k in stages for v in _direct(of, k, owned) if isinstance(v, Var)}
    first = {of.graph.images: -1}
    for i, equation in enumerate(of.graph.equations):
        if i in of.level:
            first.update(dict.fromkeys(equation.outvars, of.level[i]))

    def edge(k: int, named: Any) -> list[Var]:
        rest = (v for v in first if first[v] <= k < last.get(v, -1))
        return [named, *(v for v in rest if v is not named)]

    return [edge(k, named) for k, named in enumerate(of.values)]


def batch_axes(
    of: Cuts, other: Cuts, owned: Sequence[int], batches: tuple[int, int]
) -> list[list[int]]:
    """The batch axis of each value that crosses each edge; under `jax.vmap` it may be any axis.

    Args:
      of: the cuts at one batch size.
      other: the cuts at another batch size, which tells the batch from other axes.
      owned: the stage of each variable.
      batches: the two sizes.

    Raises:
      ValueError: if a value does not have one row for each image.
    """
    result = []
    for name, some, others in zip(of.at, edges(of, owned), edges(other, owned), strict=True):
        if len(some) != len(others):
            raise ValueError(
                f"{len(some)} values cross the cut at {name!r} with {batches[0]} images and "
                f"{len(others)} with {batches[1]}; give a model that computes the same for any "
                "batch size."
            )
        axes = []
        for value, larger in zip(some, others, strict=True):
            shapes: Any = value.aval.shape, larger.aval.shape  # pyright: ignore
            pairs = list(itertools.zip_longest(*shapes))
            differ = [i for i, (a, b) in enumerate(pairs) if a != b]
            if len(differ) != 1 or pairs[differ[0]] != batches:
                by = of.graph.equations[of.producer[value]].primitive.name
                raise ValueError(
                    f"{kind(value.aval)}, made by {by}, would cross the cut at {name!r}, and with "
                    f"{batches[0]} images it does not hold a row for each; cut elsewhere."
                )
            axes.append(differ[0])
        result.append(axes)
    return result


def kind(x: Any) -> str:
    """Dtype and shape, as in `float32[2, 8]`."""
    return f"{x.dtype}{list(x.shape)}".replace("'", "")


def slices(of: Cuts, owned: Sequence[int]) -> tuple[Slice, ...]:
    """Every stage as a program."""
    between = edges(of, owned)
    inputs = [[of.graph.images], *between]
    outputs: list[Any] = [*between, of.graph.outputs]
    return tuple(_slice(of, owned, k, inputs[k], outputs[k]) for k in range(len(of.at) + 1))


def _slice(
    of: Cuts, owned: Sequence[int], k: int, features: Sequence[Var], outputs: Sequence[Atom]
) -> Slice:
    equations, visited = _constant_part(of, _direct(of, k, owned))
    equations |= {i for i, level in of.level.items() if level == k}
    reads = [i for i, v in enumerate(of.graph.variables) if v in visited]
    constants = {v: x for v, x in of.graph.constants.items() if v in visited}
    random = of.graph.key in visited
    updates = [i for i in of.graph.updates if owned[i] == k]
    program = jex.Jaxpr(
        list(constants),
        [*(of.graph.variables[i] for i in reads), *([of.graph.key] if random else []), *features],
        [*outputs, *(of.graph.updates[i] for i in updates)],
        [of.graph.equations[i] for i in sorted(equations)],
        debug_info=jex.DebugInfo("jit", f"stage_{k + 1}", None, None),
    )
    return Slice(
        jex.ClosedJaxpr(program, list(constants.values())),
        tuple(v.aval for v in features),
        tuple(reads),
        tuple(updates),
        random,
    )
