"""A traced model as one flat list of equations, and its slices, which `slicing` makes stages of.

How JAX's programs look inside is known here and nowhere else.
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
      variables: one a leaf.
      images: the batch.
      key: of the random numbers.
      constants: what the function closes over.
      equations: in the order of the program.
      outputs: the leaves of what it puts out.
      updates: leaf by leaf the variables that it returns anew.
      names: the values that carry each name.
      inside: names in equations that stay whole, a scan say, and what those are.
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
      graph: the whole.
      at: the names of the K values at which it is cut.
      values: the values.
      level: by position of the equation; what no stage needs is not in it.
      maker: the equation that makes a value; inputs have none.
      data: the values that depend on the images.
    """

    graph: Graph
    at: tuple[str, ...]
    values: tuple[Atom, ...]
    level: dict[int, int]
    maker: dict[Var, int]
    data: set[Var]


class Slice(NamedTuple):
    """One stage as a program.

    Attributes:
      run: values of `reads`, a key if `random`, and features, to features and the values of
        `updates`.
      features: shape and dtype of each leaf that comes in.
      reads: variables by position.
      updates: variables that it owns and returns anew.
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
      closed: as `jax.jit(...).trace(...).jaxpr` gives.
      updated: which variables its last outputs are.
    """
    inputs = [Var(v.aval) for v in closed.jaxpr.invars]
    *variables, images, key = inputs
    found = Graph(tuple(variables), images, key, {}, [], [], {}, {}, {})
    results = _inline(closed, inputs, found)
    split = len(results) - len(updated)
    found.outputs.extend(results[:split])
    found.updates.update(zip(updated, results[split:], strict=True))
    return found


def _inline(closed: jex.ClosedJaxpr, inputs: Sequence[Atom], into: Graph) -> list[Atom]:
    """Adds a program's equations to a graph, with variables of their own, since JAX uses the same
    ones wherever a function is called again; returns its results."""
    values: dict[Var, Atom] = dict(zip(closed.jaxpr.invars, inputs, strict=True))
    for var, constant in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        values[var] = fresh = Var(var.aval)
        into.constants[fresh] = constant

    def read(atoms: Iterable[Atom]) -> list[Atom]:
        return [a if isinstance(a, Literal) else values[a] for a in atoms]

    for equation in closed.jaxpr.eqns:
        given = read(equation.invars)
        if equation.primitive is primitives.name_p:
            # An identity: what carries the name is its input.
            values[equation.outvars[0]] = given[0]
            _add_name(into, equation.params["name"], given[0])
        elif equation.primitive is primitives.jit_p:
            results = _inline(equation.params["jaxpr"], given, into)
            values.update(zip(equation.outvars, results, strict=True))
        else:
            made = [Var(v.aval) for v in equation.outvars]
            values.update(zip(equation.outvars, made, strict=True))
            into.equations.append(equation.replace(invars=given, outvars=made))
            for program in jex.jaxprs_in_params(equation.params):
                _note_names(equation, program, made, into)
    return read(closed.jaxpr.outvars)


def _add_name(into: Graph, name: str, value: Atom) -> None:
    values = into.names.setdefault(name, [])
    if not any(value is other for other in values):
        values.append(value)


def _note_names(equation: jex.JaxprEqn, program: Any, made: Sequence[Var], into: Graph) -> None:
    """Notes the names inside an equation that stays whole.

    What a rematerialised function returns is what the equation makes, so its name is kept.
    """
    is_remat = equation.primitive is primitives.remat_p
    for inner in program.eqns:
        if inner.primitive is primitives.name_p:
            name, value = inner.params["name"], inner.outvars[0]
            here = [i for i, v in enumerate(program.outvars) if v is value] if is_remat else []
            if here:
                _add_name(into, name, made[here[0]])
            else:
                into.inside[name] = equation.primitive.name
        for deeper in jex.jaxprs_in_params(inner.params):
            _note_names(equation, deeper, (), into)


def cuts(found: Graph, at: Sequence[str]) -> Cuts:
    """Says of every equation which stage computes it: the first whose named value needs it.

    Raises:
      ValueError: a name that is not there, is there twice, or does not depend on the images;
        nothing to compute from one cut to the next.
    """
    maker = {v: i for i, equation in enumerate(found.equations) for v in equation.outvars}
    data: set[Var] = {found.images}
    for equation in found.equations:
        if any(v in data for v in equation.invars if isinstance(v, Var)):
            data.update(equation.outvars)
    values = tuple(_named(found, name) for name in at)
    result = Cuts(found, tuple(at), values, {}, maker, data)
    for k, value in enumerate(values):
        if not isinstance(value, Var) or value not in data:
            raise ValueError(f"{at[k]!r} does not depend on the images; cut at a value that does.")
        if value not in maker or maker[value] in result.level:
            raise ValueError(
                f"nothing is left to compute from {_before(at, k)} to {at[k]!r}; give names in the "
                "order in which they are computed, and one for each value."
            )
        for i in _upstream(result, [value], data.__contains__)[0]:
            result.level.setdefault(i, k)
    rest = _upstream(result, found.outputs, data.__contains__)[0] - set(result.level)
    if not rest:
        raise ValueError(
            f"nothing is left to compute after {_before(at, len(at))}, and the model's own output "
            "is an exit already; leave the last name out."
        )
    result.level.update(dict.fromkeys(rest, len(at)))
    return result


def _before(at: Sequence[str], k: int) -> str:
    return repr(at[k - 1]) if k else "the images"


def _named(found: Graph, name: str) -> Atom:
    values = found.names.get(name, [])
    if len(values) > 1:
        raise ValueError(
            f"{len(values)} values are named {name!r}; give each a name of its own. A module that "
            "is called several times names all its results alike."
        )
    if not values:
        there = ", ".join(map(repr, found.names)) or "none"
        what = found.inside.get(name)
        where = f"{name!r} is inside a {what}" if what else f"no value is named {name!r}"
        raise ValueError(
            f"{where}; names to cut at: {there}. What is inside a scan, a loop, a conditional or a "
            "remat cannot be cut at."
        )
    return values[0]


def _upstream(
    of: Cuts, atoms: Iterable[Atom], follow: Callable[[Var], bool]
) -> tuple[set[int], set[Var]]:
    """The equations that lead to some values, and all values met, by way of those to follow."""
    equations: set[int] = set()
    met: set[Var] = set()
    waiting = list(atoms)
    while waiting:
        value = waiting.pop()
        if isinstance(value, Literal) or value in met or not follow(value):
            continue
        met.add(value)
        made_by = of.maker.get(value)
        if made_by is not None and made_by not in equations:
            equations.add(made_by)
            waiting.extend(of.graph.equations[made_by].invars)
    return equations, met


def _direct(of: Cuts, k: int, owned: Sequence[int] | None) -> list[Atom]:
    """What the equations of stage k read and what it puts out; of updates those that it owns, or
    none as long as nobody knows whose they are."""
    read = [v for i, at in of.level.items() if at == k for v in of.graph.equations[i].invars]
    read += [of.values[k]] if k < len(of.at) else of.graph.outputs
    if owned is not None:
        read += [v for i, v in of.graph.updates.items() if owned[i] == k]
    return read


def _constant_part(of: Cuts, atoms: Iterable[Atom]) -> tuple[set[int], set[Var]]:
    """What leads to some values without depending on the images: equations, and inputs met."""
    return _upstream(of, atoms, lambda v: v not in of.data)


def owners(every: Sequence[Cuts], names: Sequence[str]) -> list[int]:
    """The stage that each variable belongs to: the one that reads it, else the last.

    A running statistic that is updated and not read belongs to the last of the stages that make
    what it is updated with.

    Args:
      every: the same cuts in inference and in training.
      names: of the variables.

    Raises:
      ValueError: a variable that two stages read, or that is updated with what a later one makes.
    """
    at = every[0].at
    found: dict[int, int] = {}

    def claim(of: Cuts, owned: Sequence[int] | None) -> None:
        for k in range(len(at) + 1):
            met = _constant_part(of, _direct(of, k, owned))[1]
            for i, var in enumerate(of.graph.variables):
                if var in met and found.setdefault(i, k) != k:
                    raise ValueError(
                        f"{names[i]} is read by {_place(at, found[i])} and by {_place(at, k)}; a "
                        "variable belongs to one stage, so cut where it is not shared."
                    )

    for of in every:
        claim(of, None)
    for of in every:
        for i, update in of.graph.updates.items():
            equations, met = _upstream(of, [update], lambda v: True)
            made = [of.level[j] for j in equations if j in of.level]
            read = [found[j] for j, v in enumerate(of.graph.variables) if v in met and j in found]
            found.setdefault(i, max(made + read, default=len(at)))
    owned = [found.get(i, len(at)) for i in range(len(names))]
    for of in every:
        place_updates(of, owned, names)
        claim(of, owned)
    return [found.get(i, len(at)) for i in range(len(names))]


def place_updates(of: Cuts, owned: Sequence[int], names: Sequence[str]) -> None:
    """Gives equations that only updates need to the stage that owns what is updated.

    Raises:
      ValueError: a variable that is updated with what a later stage computes.
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
    """How a stage is spoken of in messages, 1-based."""
    until = f"to {at[k]!r}" if k < len(at) else "to the end"
    return f"stage {k + 1} (from {_before(at, k)} {until})"


def edges(of: Cuts, owned: Sequence[int]) -> list[list[Var]]:
    """What each stage but the last hands on: the named value, then all that later stages read."""
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
    """For each edge the axis that is the batch's, of each value that crosses it.

    It need not be the first: what is under `jax.vmap` has it where it came to lie.

    Args:
      of: the cuts at one batch size.
      other: the same at another, by which the batch is told from axes of equal length.
      owned: whose the variables are.
      batches: the two sizes.

    Raises:
      ValueError: a value that does not hold one thing for each image.
    """
    found = []
    for name, some, others in zip(of.at, edges(of, owned), edges(other, owned), strict=True):
        if len(some) != len(others):
            raise ValueError(
                f"{len(some)} values cross the cut at {name!r} with {batches[0]} images and "
                f"{len(others)} with {batches[1]}; cut a model that computes alike for any batch."
            )
        axes = []
        for value, larger in zip(some, others, strict=True):
            shapes: Any = value.aval.shape, larger.aval.shape  # pyright: ignore
            pairs = list(itertools.zip_longest(*shapes))
            differ = [i for i, (a, b) in enumerate(pairs) if a != b]
            if len(differ) != 1 or pairs[differ[0]] != batches:
                by = of.graph.equations[of.maker[value]].primitive.name
                raise ValueError(
                    f"{kind(value.aval)}, made by {by}, would cross the cut at {name!r}, and with "
                    f"{batches[0]} images it does not hold a row for each; cut elsewhere."
                )
            axes.append(differ[0])
        found.append(axes)
    return found


def kind(x: Any) -> str:
    """Dtype and shape in one word."""
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
    equations, met = _constant_part(of, _direct(of, k, owned))
    equations |= {i for i, level in of.level.items() if level == k}
    reads = [i for i, v in enumerate(of.graph.variables) if v in met]
    constants = {v: x for v, x in of.graph.constants.items() if v in met}
    random = of.graph.key in met
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
