"""The terms that a comparison is told in: numbers as words, names, and looking things up.

`results` is the plain data that `experiments.compare_report` describes. A number that is None,
missing or not finite becomes NaN, and "-" in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Results = Mapping[str, Any]
Scheme = tuple[str, str]
"""Regime and policy. The regime may be "static", then the policy is the network's name."""

_PROMISES = ("risk", "certificate")


class Gap(NamedTuple):
    """A tested difference in accuracy, `a` minus `b`, as fractions: 0.01 is one point."""

    target: Mapping[str, Any]
    a: Scheme
    b: Scheme
    mean: float
    low: float
    high: float
    p: float
    adjusted_p: float
    significant: bool
    cost: float

    def flipped(self) -> Gap:
        """The same seen from `b`."""
        ends = {"mean": -self.mean, "low": -self.high, "high": -self.low, "cost": -self.cost}
        return self._replace(a=self.b, b=self.a, **ends)

    @property
    def verdict(self) -> str:
        """What it says of `a`: "better", "worse", or "open"."""
        if not self.significant or not self.mean:  # NaN is no number to rest a verdict on
            return "open"
        return "better" if self.mean > 0 else "worse" if self.mean < 0 else "open"


# --- numbers


def real(value: Any) -> float:
    """A number, or the mean of a spread; NaN where there is none."""
    if isinstance(value, Mapping):
        value = value.get("mean")
    return math.nan if value is None else float(value)


def number(value: Any, digits: int, *, scale: float = 1.0, sign: bool = False) -> str:
    """A number or the mean of a spread to so many digits, or "-"."""
    found = scale * real(value)
    if not math.isfinite(found):
        return "-"
    found = round(found, digits) + 0.0  # no "-0.0"
    return f"{found:+.{digits}f}" if sign else f"{found:.{digits}f}"


def half_width(spread: Any) -> float:
    """Half of the spread over seeds, high - low; NaN for a bare number or a single seed."""
    if not isinstance(spread, Mapping):
        return math.nan
    return (real(spread.get("high")) - real(spread.get("low"))) / 2


def spread_words(spread: Any, digits: int = 1) -> str:
    """A spread in percent: "91.2 ± 0.4", or the mean alone where there is no spread."""
    width = number(half_width(spread), digits, scale=100)
    return number(spread, digits, scale=100) + (f" ± {width}" if width != "-" else "")


def ms_words(value: Any) -> str:
    """Milliseconds to three or four figures."""
    found = real(value)
    return number(found, 3 if found < 1 else 2 if found < 100 else 0)


# --- names


def scheme(entry: Mapping[str, Any]) -> Scheme:
    """Regime and policy of a row, a curve, a timing or one side of a difference."""
    policy = str(entry.get("policy") or "")
    if entry.get("regime"):
        return str(entry["regime"]), policy
    for kind in ("static", "cascade"):
        name = entry.get(kind)
        if name:
            return kind, name if isinstance(name, str) and kind == "static" else policy
    return "", policy


def scheme_words(which: Scheme) -> str:
    """ "max_prob (joint)", "the plain network", "the cascade by max_prob"."""
    regime, policy = which
    if regime == "static":
        return f"the {policy}" if policy.startswith("plain") else f"the static network {policy}"
    if regime == "cascade":
        return f"the cascade by {policy}"
    return f"{policy} ({regime})" if policy else regime


def target_words(target: Any) -> str:
    """A target: "cost <= 0.50", "drop <= 1.0 points", "disagreement <= 5.0 % (crc, ...)"."""
    if not isinstance(target, Mapping):
        return "-" if target is None else str(target)
    kind, value = str(target.get("kind")), target.get("value")
    if value is None:
        return kind
    if kind == "budget":
        return f"cost <= {number(value, 2)}"
    if kind == "ms":
        batch = target.get("batch")
        return f"time <= {ms_words(value)} ms" + (f" at batch {batch}" if batch else "")
    if kind == "drop":
        return f"drop <= {number(value, 1, scale=100)} points"
    if kind not in _PROMISES:
        return f"{kind} {value}"
    words = f"{target.get('loss') or 'risk'} <= {number(value, 1, scale=100)} %"
    if target.get("budget") is not None:
        words += f" and cost <= {number(target['budget'], 2)}"
    method, path = target.get("method"), target.get("path")
    notes = [str(method).replace("_", "-")] if method else []
    notes += [f"thresholds {path}"] if path else []
    # Conformal risk control promises an expectation, so delta is no part of what it says.
    known = target.get("delta") is not None and method != "crc"
    notes += [f"delta {target['delta']:g}"] if known else []
    return words + (f" ({', '.join(notes)})" if notes else "")


# --- looking things up


def reference(results: Results) -> Scheme:
    """The scheme that the others are compared with."""
    return scheme(results.get("reference") or {})


def is_promise(target: Any) -> bool:
    """Whether a target is a guarantee: a risk, or a risk and a cost."""
    return isinstance(target, Mapping) and target.get("kind") in _PROMISES


def targets(results: Results) -> list[Mapping[str, Any]]:
    """The distinct targets of the rows, in order."""
    return distinct(row["target"] for row in results.get("rows") or ())


def distinct(items: Iterable[Any]) -> list[Any]:
    """Each item once, in order of appearance; items need not be hashable."""
    found: list[Any] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found


def leading_target(results: Results) -> Mapping[str, Any] | None:
    """The first budget that some scheme reached, else the first other target that is no promise."""
    rows = [r for r in results.get("rows") or () if math.isfinite(real(r.get("accuracy")))]
    known = [row["target"] for row in rows if not is_promise(row["target"])]
    return next((t for t in known if t["kind"] == "budget"), known[0] if known else None)


def rows_at(results: Results, target: Any, *, usual: bool = False) -> list[Mapping[str, Any]]:
    """The rows of a target; with `usual` the geometric search is left out where there is another,
    because differences are those of the other."""
    rows = [row for row in results.get("rows") or () if row["target"] == target]
    if not usual:
        return rows
    better = {scheme(row) for row in rows if row.get("search") != "geometric"}
    return [r for r in rows if r.get("search") != "geometric" or scheme(r) not in better]


def row_of(results: Results, target: Any, which: Scheme) -> Mapping[str, Any] | None:
    """The row of a scheme at a target."""
    return next((r for r in rows_at(results, target, usual=True) if scheme(r) == which), None)


def gaps(results: Results) -> list[Gap]:
    """The differences that were tested."""
    return [
        Gap(
            d["target"],
            scheme(d["a"]),
            scheme(d["b"]),
            mean=real(d.get("difference")),
            low=real(d.get("low")),
            high=real(d.get("high")),
            p=real(d.get("p")),
            adjusted_p=real(d.get("adjusted_p")),
            significant=bool(d.get("significant")),
            cost=real(d.get("cost_difference")),
        )
        for d in results.get("differences") or ()
    ]


def gap_to(results: Results, target: Any, which: Scheme) -> Gap | None:
    """A scheme minus the reference at a target, if that was tested."""
    other = reference(results)
    for gap in gaps(results):
        if gap.target == target and {gap.a, gap.b} == {which, other}:
            return gap if gap.a == which else gap.flipped()
    return None
