"""Reads the links and devices of a plan from YAML; every mistake is refused on one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from eejax.planning import measuring
from eejax.planning.machines import Device, Link, Times


class Tiers(NamedTuple):
    """T tiers, the first of which takes the images.

    Attributes:
      names: of the tiers.
      times: measured for each.
      devices: of each.
      link_names: T - 1.
      links: from each tier to the next.
    """

    names: tuple[str, ...]
    times: tuple[Times, ...]
    devices: tuple[Device, ...]
    link_names: tuple[str, ...]
    links: tuple[Link, ...]


def read(links: str | Path, devices: str | Path) -> Tiers:
    """Reads the tiers, and the times that each of them names.

    Args:
      links: YAML, the fields of `Link` by the name of the link.
      devices: YAML, the fields of `Device` by the name of the tier, from the first tier to the
        last. Also `times`, a file of `eejax times` beside this one, and `link`, the name of the
        link to the next tier.

    Raises:
      ValueError: if a file cannot be read, or a field is wrong, missing or unknown: file, field,
        what came, and what was expected, on one line.
    """
    known = read_links(links)
    tiers = _mapping(devices)
    names, last = tuple(tiers), list(tiers)[-1]
    times, built, link_names = [], [], []
    for name, fields in tiers.items():
        fields = dict(fields)
        measured = fields.pop("times", None)
        if not isinstance(measured, str):
            raise _mistake(devices, f"{name}.times", measured, "a file of `eejax times`")
        link = fields.pop("link", None)
        if name != last:
            if link not in known:
                expected = f"the link to the next tier, one of {', '.join(known)} in {links}"
                raise _mistake(devices, f"{name}.link", link, expected)
            link_names.append(link)
        elif link is not None:
            raise _mistake(devices, f"{name}.link", link, "none, since no tier follows")
        built.append(_built(devices, name, fields, Device, ("times", "link")))
        times.append(measuring.load(Path(devices).parent / measured))
    return Tiers(
        names,
        tuple(times),
        tuple(built),
        tuple(link_names),
        tuple(known[name] for name in link_names),
    )


def read_links(path: str | Path) -> dict[str, Link]:
    """Links by name; ValueError as for `read`."""
    return {name: _link(path, name, fields) for name, fields in _mapping(path).items()}


def _link(path: str | Path, name: str, fields: Mapping[str, Any]) -> Link:
    return _built(path, name, fields, Link)


def _mapping(path: str | Path) -> dict[str, dict[str, Any]]:
    """Fields by name, both as they are in the file."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise ModuleNotFoundError("plans need pyyaml: pip install 'eejax[planning]'") from None
    try:
        content = yaml.safe_load(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict) or not content:
        raise _mistake(path, "the file", content, "names, each with its fields")
    for name, fields in content.items():
        if not isinstance(name, str):
            raise _mistake(path, "a name", name, "a word; quote a number")
        if not isinstance(fields, dict):
            raise _mistake(path, name, fields, "fields and values")
    return content


def _built(
    path: str | Path, name: str, fields: Mapping[str, Any], kind: Any, more: tuple[str, ...] = ()
) -> Any:
    """A dataclass of the fields."""
    known = {field.name: field for field in dataclasses.fields(kind)}
    for field in fields:
        if field not in known:
            expected = f"one of {', '.join([*more, *known])}"
            raise _mistake(path, f"{name}.{field}", fields[field], expected, "unknown field")
    for field in known.values():
        if field.default is dataclasses.MISSING and field.name not in fields:
            raise ValueError(f"{path}: {name}.{field.name}: missing; expected a number.")
    try:
        return kind(**{field: _number(value) for field, value in fields.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {name}.{error}.") from error


def _number(value: Any) -> Any:
    # YAML 1.1 takes 50e6 for a word; it wants 50.0e+6.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _mistake(path: str | Path, field: str, value: Any, expected: str, what: str = "") -> ValueError:
    came = "missing" if value is None else f"{what} {str(value)[:60]!r}".strip()
    return ValueError(f"{path}: {field}: {came}; expected {expected}.")
