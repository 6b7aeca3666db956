"""Checks of configuration values, which fail with one line: the field, its value, what to give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Raises ValueError with the field, its value and what is expected, unless `holds`."""
    if not holds:
        raise ValueError(f"{name}: {value} cannot be used; give {expected}.")


def require_all(
    section: str, config: Any, fields: str, holds: Callable[[Any], bool], expected: str
) -> None:
    """Requires `holds` of fields of a dataclass, and of each value of a tuple; None is left out.

    Args:
      section: name of the dataclass on the command line, "" for the outermost.
      config: the dataclass.
      fields: names with spaces between them.
      holds: of one value.
      expected: words for the error.
    """
    for field in fields.split():
        values = getattr(config, field)
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None:
                require(holds(value), f"{section}.{field}".lstrip("."), value, expected)


def require_positive(section: str, config: Any, fields: str) -> None:
    """Requires that fields are greater than 0, as `require_all`."""
    require_all(section, config, fields, lambda value: value > 0, "something greater than 0")


def require_not_negative(section: str, config: Any, fields: str) -> None:
    """Requires that fields are at least 0, as `require_all`."""
    require_all(section, config, fields, lambda value: value >= 0, "something of at least 0")
