"""The report in words: its headline and the cells of its tables, for the terminal and for the page.

Nothing here draws or writes. A number that is None or not finite becomes "-". Words are plain
ASCII, so that a pipe with an old encoding can take them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.report import reading as reports


class Cells(NamedTuple):
    """A table as words."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: frozenset[str]
    """Names of the columns that hold words, and so align left and may wrap."""


def headline(report: Mapping[str, Any]) -> str:
    """The result in two or three sentences of plain words, computed from the numbers.

    It speaks of the policy that did best on the images its thresholds were chosen on, among those
    at the report's leading target; without such numbers, of the first policy. So it is not picked
    by its accuracy on the test images. A loss is told like a gain.
    """
    whole = report["exits"][-1]["accuracy"]
    policy = _leading(report)
    if policy is None:
        return (
            f"The whole network answers {_percent(whole)} of the test images correctly. "
            "No policy reached its target, so nothing is saved."
        )
    cost = reports.mean_fraction(policy, reports.whole_macs(report))
    points = round(100 * (policy["accuracy"] - _nan(whole)), 1)
    change = (
        f"{abs(points):.1f} points {'more' if points < 0 else 'less'}" if points else "the same"
    )
    words = [
        f"At {_percent(cost, 0)} of the whole network's multiply-accumulates, the {policy['name']} "
        f"policy answers {_percent(policy['accuracy'])} of the test images correctly; the whole "
        f"network answers {_percent(whole)}" + (f" ({change})." if math.isfinite(points) else ".")
    ]
    if cost >= 1:
        words.append("It saves no computation.")
    return " ".join([*words, *_timing(report, policy["name"], cost)])


def exit_cells(report: Mapping[str, Any]) -> Cells:
    """A row an exit: its cost, and how good it is on all test images."""
    warm = any(row.get("temperature") is not None for row in report["exits"])
    columns = ("exit", "MACs", "cost", "accuracy %", "ECE", *(("temperature",) if warm else ()))
    rows = []
    for row, (cost, accuracy) in zip(report["exits"], reports.exit_points(report), strict=True):
        words = [str(row["index"] + 1), macs_words(row["macs"]), _number(cost, 2)]
        words += [_number(100 * accuracy, 1), _number(row["ece"], 3)]
        rows.append((*words, *((_number(row.get("temperature"), 2),) if warm else ())))
    return Cells(columns, tuple(rows), frozenset())


def policy_cells(report: Mapping[str, Any]) -> Cells:
    """A row a policy and target, under one for the whole network: the result on the test images."""
    whole, macs = _nan(report["exits"][-1]["accuracy"]), reports.whole_macs(report)
    leaving = "% leaving at exit 1, 2, .."
    columns = ("policy", "target", "accuracy %", "change", "cost", "met", leaving)
    rows = [("whole network", "", _number(100 * whole, 1), "", "1.00", "", "")]
    for policy in report["policies"]:
        accuracy, cost = _nan(policy.get("accuracy")), reports.mean_fraction(policy, macs)
        target, fractions = policy.get("target"), policy.get("exit_fractions")
        shares = [] if fractions is None else [_number(100 * _nan(f), 0) for f in fractions]
        rows.append(
            (
                policy["name"],
                reports.target_label(policy),
                _number(100 * accuracy, 1),
                _number(100 * (accuracy - whole), 1, sign=True),
                _number(cost, 2),
                _met(target, cost, whole - accuracy),
                " ".join(shares) or "-",
            )
        )
    return Cells(columns, tuple(rows), frozenset({"policy", "target", leaving}))


def threshold_cells(report: Mapping[str, Any]) -> Cells:
    """A row a policy and target: the thresholds, and what they gave where they were chosen."""
    columns = ("policy", "target", "search", "accuracy %", "cost", "threshold of exit 1, 2, ..")
    rows = []
    for policy in report["policies"]:
        chosen = policy.get("chosen") or {}
        words = [policy["name"], reports.target_words(policy.get("target"))]
        words += [policy.get("search") or "-", _number(100 * _nan(chosen.get("accuracy")), 1)]
        words += [_number(chosen.get("mean_fraction"), 2), _thresholds(policy.get("thresholds"))]
        rows.append(tuple(words))
    return Cells(columns, tuple(rows), frozenset({"policy", "target", "search", columns[-1]}))


def inference_cells(report: Mapping[str, Any], *, full: bool = False) -> Cells:
    """A row a strategy and batch size: measured times beside the plain network's and the ideal."""
    columns = ["strategy", "batch", "policy", "cost", "ms", "spread", "plain ms", "speedup"]
    columns += ["efficiency", *(["ideal ms"] if full else [])]
    rows = []
    for row in report["inference"]:
        words = [str(row["strategy"]), str(row["batch"]), str(row.get("policy") or "")]
        words += [_number(row.get("mean_fraction"), 2), _ms(row["ms"])]
        spread = row.get("spread")
        words += ["-" if spread is None else _percent(spread, 0), _ms(row["plain_ms"])]
        words += [_number(row["speedup"], 2), _number(row["efficiency"], 2)]
        rows.append((*words, *((_ms(row["ideal_ms"]),) if full else ())))
    return Cells(tuple(columns), tuple(rows), frozenset({"strategy", "policy"}))


def failures(report: Mapping[str, Any]) -> list[str]:
    """A sentence for each policy whose target cannot be hit."""
    bad = [policy for policy in report["policies"] if policy.get("error")]
    return [f"{reports.policy_label(policy)}: {policy['error']}" for policy in bad]


def facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the run was made, as (name, value); what the report does not hold is left out."""
    versions = report["versions"]
    if isinstance(versions, Mapping):
        versions = ", ".join(f"{name} {version}" for name, version in versions.items())
    pairs = [
        ("Command", report.get("command")),
        ("Data", ", ".join(filter(None, (report["dataset"], report.get("data_source"))))),
        ("Network", report.get("network")),
        ("Whole network", f"{macs_words(reports.whole_macs(report))} MACs an image"),
        ("Device", report["device"]),
        ("Seed", report["seed"]),
        ("Date", report.get("date")),
        ("Versions", versions),
    ]
    return [(name, str(value)) for name, value in pairs if value is not None]


def training(report: Mapping[str, Any]) -> str:
    """How long training took."""
    train = report["train"]
    if not train or not train.get("epochs"):
        return "Nothing was trained in this run."
    seconds, rate = _nan(train["seconds"]), _nan(train["images_per_second"])
    words = [f"{train['epochs']} epochs of training"]
    words += [f"{seconds:,.0f} s"] if math.isfinite(seconds) else []
    words += [f"{rate:,.0f} images per second"] if math.isfinite(rate) else []
    return ", ".join(words) + "."


def overthinking(report: Mapping[str, Any]) -> list[str]:
    """What computing on costs in answers, where the report says: shares of the test images."""
    found = report.get("overthinking")
    known = {
        "destructive": "are answered correctly by some earlier exit and wrongly by the last",
        "wasteful": "are answered correctly by the last exit, and were by an earlier one already",
    }
    shares = found if isinstance(found, Mapping) else {}
    return [
        f"{_percent(shares[key])} of the test images {words} ({key} overthinking)."
        for key, words in known.items()
        if isinstance(shares.get(key), float | int)
    ]


def listed(texts: str | Sequence[str] | None) -> list[str]:
    """One text, several or none, as a list."""
    if not texts:
        return []
    return [texts] if isinstance(texts, str) else [str(text) for text in texts]


def macs_words(macs: float) -> str:
    """MACs with a unit: "40.8 M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if macs >= size:
            value = macs / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{macs:.0f}"


def _leading(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    same = reports.leading_policies(report)
    scores = [_nan((p.get("chosen") or {}).get("accuracy")) for p in same]
    if not same or not all(map(math.isfinite, scores)):
        return same[0] if same else None
    return same[scores.index(max(scores))]


def _timing(report: Mapping[str, Any], policy: str, cost: float) -> list[str]:
    """A sentence each for the smallest and the largest batch: the fastest strategy, gain or loss.

    A run may have timed other thresholds too, say such that all images leave at once. Those would
    flatter the policy, so only rows whose mean cost is nearest to the policy's own count.
    """
    timed = [r for r in report["inference"] if r["strategy"] != "full"]
    timed = [r for r in timed if math.isfinite(_nan(r["ms"]) + _nan(r["plain_ms"]))]
    timed = [r for r in timed if r.get("policy") in (None, policy)] or timed
    batches = sorted({row["batch"] for row in timed})
    sentences = []
    for batch in dict.fromkeys([*batches[:1], *batches[-1:]]):
        rows = [row for row in timed if row["batch"] == batch]
        gaps = [abs((row.get("mean_fraction") or cost) - cost) for row in rows]
        near = [row for row, gap in zip(rows, gaps, strict=True) if gap <= min(gaps) + 0.02]
        row = min(near, key=lambda row: row["ms"] / row["plain_ms"])
        what = "A single image" if batch == 1 else f"A batch of {batch}"
        versus = "instead of" if row["ms"] < row["plain_ms"] else "and so saves no time against"
        how = f"strategy {row['strategy']}"
        how += f", policy {row['policy']}" if row.get("policy") not in (None, policy) else ""
        how += f", cost {row['mean_fraction']:.2f}" if min(gaps) > 0.02 else ""
        times = f"{_ms(row['ms'])} ms {versus} {_ms(row['plain_ms'])} ms"
        sentences.append(f"{what} takes {times} ({how}).")
    return sentences


def _met(target: Any, cost: float, drop: float) -> str:
    """Whether the target holds on the test images, to the digits that are shown."""
    kind = target.get("kind") if isinstance(target, Mapping) else None
    value, digits = {"budget": (cost, 2), "drop": (drop, 3)}.get(str(kind), (math.nan, 0))
    if math.isnan(value) or target.get("value") is None:
        return "" if kind not in ("budget", "drop") else "-"
    return "yes" if round(value, digits) <= round(target["value"], digits) else "no"


def _thresholds(values: Sequence[float | None] | None) -> str:
    """None and +inf switch an exit off; -inf makes it fire always."""
    if values is None:
        return "-"
    plain = [math.inf if value is None else float(value) for value in values]
    words = {math.inf: "off", -math.inf: "always"}
    return " ".join(words.get(value, f"{value:.3f}") for value in plain) or "none"


def _nan(value: Any) -> float:
    return math.nan if value is None else float(value)


def _number(value: Any, digits: int, *, sign: bool = False) -> str:
    number = _nan(value)
    if not math.isfinite(number):
        return "-"
    number = round(number, digits) + 0.0  # no "-0.0"
    return f"{number:+.{digits}f}" if sign else f"{number:.{digits}f}"


def _percent(value: Any, digits: int = 1) -> str:
    number = _nan(value)
    return f"{100 * number:.{digits}f} %" if math.isfinite(number) else "an unknown share"


def _ms(value: Any) -> str:
    number = _nan(value)
    if not math.isfinite(number):
        return "-"
    return f"{number:.3f}" if number < 1 else f"{number:.2f}" if number < 100 else f"{number:,.0f}"
