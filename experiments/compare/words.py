"""A comparison in words: its headline, what was significant, which guarantees hold.

Nothing here draws or writes. Every sentence is computed from the numbers of the `results` that
`experiments.compare_report` describes; a loss is told like a gain. Words are plain ASCII but for
the "±" of a spread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.compare.terms import (
    Gap,
    Results,
    Scheme,
    distinct,
    gap_to,
    gaps,
    half_width,
    is_promise,
    leading_target,
    number,
    real,
    reference,
    row_of,
    rows_at,
    scheme,
    scheme_words,
    spread_words,
    target_words,
)

EQUAL_COST = 0.005
"""Costs that are no further apart count as equal, as fractions of the plain network."""


def headline(results: Results) -> list[str]:
    """The result in a few sentences: the reference's, for it was not picked by its test accuracy,
    how the others stand to it, the static frontier, the guarantees."""
    target, which = leading_target(results), reference(results)
    row = None if target is None else row_of(results, target, which)
    words = []
    if row is None or not math.isfinite(real(row.get("accuracy"))):
        words.append(f"{scheme_words(which)} has no result at the leading target.")
    else:
        words.append(
            f"At {number(row.get('cost'), 0, scale=100)} % of the plain network's "
            f"multiply-accumulates, {scheme_words(which)} answers "
            f"{spread_words(row['accuracy'])} % of the test images correctly{_plain(results)}."
        )
    found = [gap_to(results, target, other) for other in _schemes(results, target)]
    known = [gap.verdict for gap in found if gap is not None]
    if known:
        counts = [known.count(verdict) for verdict in ("better", "worse", "open")]
        words.append(
            f"Of {len(known)} other schemes tested against it at this target, {counts[0]} "
            f"{_are(counts[0])} significantly better, {counts[1]} significantly worse, and "
            f"{counts[2]} cannot be told apart from it ({_interval(results)})."
        )
    elif not results.get("differences"):
        words.append("No difference was tested for significance.")
    words += frontier(results) + promises(results)[:1]
    shifted = drifts(results)
    if shifted:
        broken = sum(" is broken " in text for text in shifted)
        words.append(
            f"On corrupted images, a guarantee was broken at some severity in {broken} of "
            f"{_count(len(shifted), 'case')}, a guarantee and a corruption each."
        )
    return words


def significant(results: Results) -> list[tuple[str, list[str]]]:
    """Per target, in words: what beat what, and what could not be told apart."""
    found, sections = gaps(results), []
    for target in distinct(gap.target for gap in found):
        here = [gap for gap in found if gap.target == target]
        here.sort(key=lambda gap: -gap.mean)
        sentences = [_sentence(gap) for gap in here if gap.verdict != "open"]
        for other in distinct(gap.b for gap in here):
            same = [_open(gap) for gap in here if gap.b == other and gap.verdict == "open"]
            if same:
                names = "; ".join(same)
                sentences.append(
                    f"Cannot be told apart from {scheme_words(other)} (points): {names}."
                )
        sections.append((f"At {target_words(target)}", sentences))
    return sections


def corrected(results: Results) -> str:
    """How the differences were tested."""
    draws = results.get("draws")
    words = f"Paired bootstrap over test images and seeds{f', {draws:,} draws' if draws else ''}; "
    words += f"{_interval(results)}, and p-values multiplied by their number (Bonferroni). "
    words += "A difference is called significant where every seed's own has that sign too. "
    few = len(results.get("seeds") or ())
    if few == 1:
        return words + "With one seed, the intervals are about these trained networks alone."
    return words + f"{few} seeds say little about how far the next one may lie."


def frontier(results: Results) -> list[str]:
    """Whether early exits beat or lose to the static networks and to the cascade.

    More accuracy for more cost is no win, and less for less no loss. Only the reference is set
    against static networks, and every scheme against the reference.
    """
    words = []
    for kind, name in (("static", "static networks"), ("cascade", "cascade of static networks")):
        pairs = [g for g in gaps(results) if (g.a[0] == kind) != (g.b[0] == kind)]
        pairs = [g if g.b[0] == kind else g.flipped() for g in pairs]
        pairs = [g for g in pairs if g.a[0] not in ("static", "cascade")]
        if pairs:
            # An unknown cost, NaN, is neither above nor below.
            better = sum(g.verdict == "better" and not g.cost > EQUAL_COST for g in pairs)
            worse = sum(g.verdict == "worse" and not g.cost < -EQUAL_COST for g in pairs)
            words.append(
                f"Against the {name}, {scheme_words(reference(results))} wins {better} of "
                f"{len(pairs)} comparisons (significantly more accurate and no dearer) and loses "
                f"{worse}; the rest are open or trade accuracy for cost."
            )
        elif kind == "static" and results.get("static"):
            words.append("No difference to the static networks was tested.")
    return words


def randomness(results: Results) -> list[str]:
    """Whether anything beats exits drawn at random at the same rates, at the leading target."""
    target = leading_target(results)
    rows = [] if target is None else rows_at(results, target, usual=True)
    rows = [r for r in rows if math.isfinite(real(r.get("random")) + real(r.get("accuracy")))]
    rows = [r for r in rows if scheme(r)[1] not in ("random", "fixed")]
    if not rows:
        return []
    # Where there is one seed only, the mean has to do, and the sentence says so.
    single = any(math.isnan(half_width(r["accuracy"])) for r in rows)

    def low(row: Mapping[str, Any]) -> float:
        return real(row["accuracy"] if single else row["accuracy"].get("low"))

    beaten = [row for row in rows if low(row) <= real(row["random"])]
    how = "one seed, so no spread" if single else "the low end of their spread over seeds too"
    words = [
        f"At {target_words(target)}, {len(rows) - len(beaten)} of {len(rows)} schemes answer more "
        f"images correctly than exits drawn at random at the same rates would ({how})."
    ]
    if beaten:
        names = ", ".join(scheme_words(scheme(row)) for row in beaten)
        words.append(f"Not so: {names}.")
    return words


def held(row: Mapping[str, Any]) -> str:
    """How a guarantee fared on the test images: "held", "broken", "held in 2 of 3", or "-"."""
    met = row.get("met")
    if row.get("certified") == 0 or met is None:
        return "-"
    return {"yes": "held", "no": "broken"}.get(str(met), f"held in {met}")


def promises(results: Results) -> list[str]:
    """A summary of the guarantees on the test images, then a sentence for each that failed."""
    rows = [row for row in results.get("rows") or () if is_promise(row["target"])]
    if not rows:
        return []
    fared = [held(row) for row in rows]
    made = [words for words in fared if words != "-"]
    words = [
        f"Of {_count(len(rows), 'guarantee')} asked for, {len(made)} could be certified, and "
        f"{made.count('held')} of those held on the clean test images, for every seed that they "
        "were certified for."
    ]
    seeds = len(results.get("seeds") or ())
    for row, how in zip(rows, fared, strict=True):
        what = f"{scheme_words(scheme(row))}, {target_words(row['target'])}"
        certified = row.get("certified")
        if how == "-":
            words.append(f"{what}: not certified" + _because(row))
            continue
        if certified is not None and certified < seeds:
            words.append(f"{what}: certified for {certified} of {seeds} seeds only{_because(row)}")
        if how != "held":
            words.append(f"{what}: {how} on the clean test images{_risk(row)}.")
    return words


def drifts(results: Results) -> list[str]:
    """Per corruption and guarantee: up to which severity it holds and from where it is broken."""
    rows = [row for row in results.get("drift") or () if row.get("holds")]
    words = []
    for key in distinct((scheme(r), r["target"], r["corruption"]) for r in rows):
        here = [r for r in rows if (scheme(r), r["target"], r["corruption"]) == key]
        here.sort(key=lambda r: r["severity"])
        what = f"{key[2]}: {target_words(key[1])}, {scheme_words(key[0])},"
        fails = [r for r in here if r["holds"] == "no"]
        vague = [str(r["severity"]) for r in here if r["holds"] == "unclear"]
        if fails:
            at = fails[0]
            start = "on the clean images already" if not at["severity"] else (
                f"from severity {at['severity']}"
            )  # fmt: skip
            text = f"{what} is broken {start}{_risk(at)}"
            later = [str(r["severity"]) for r in here[here.index(at) :] if r["holds"] == "yes"]
            text += f"; holds again at {', '.join(later)}" if later else ""
        else:
            verb = "holds" if not vague else "is not refuted"
            text = f"{what} {verb} up to severity {here[-1]['severity']}{_risk(here[-1])}"
        words.append(text + (f"; unclear at {', '.join(vague)}" if vague else "") + ".")
    return words


def _schemes(results: Results, target: Any) -> list[Scheme]:
    rows = [] if target is None else rows_at(results, target, usual=True)
    known = distinct(scheme(row) for row in rows)
    return [s for s in known if s != reference(results) and s[0] not in ("static", "cascade")]


def _plain(results: Results) -> str:
    for row in results.get("static") or ():
        if row["name"] == "plain network":
            return f"; the plain network answers {spread_words(row['accuracy'])} %"
    return ""


def _sentence(gap: Gap) -> str:
    verb = "beats" if gap.verdict == "better" else "loses to"
    low, high = sorted((abs(gap.low), abs(gap.high)))
    crosses = gap.low < 0 < gap.high
    ends = (gap.low, gap.high) if crosses else (low, high)
    interval = " to ".join(number(end, 2, scale=100) for end in ends)
    cost = ""
    if abs(gap.cost) >= 0.01:
        cost = f", at {number(abs(gap.cost), 2)} {'more' if gap.cost > 0 else 'less'} cost"
    points = number(abs(gap.mean), 2, scale=100)
    return (
        f"{scheme_words(gap.a)} {verb} {scheme_words(gap.b)} by {points} points "
        f"({interval}{cost})."
    )  # fmt: skip


def _open(gap: Gap) -> str:
    return f"{scheme_words(gap.a)} {number(gap.mean, 2, scale=100, sign=True)}"


def _interval(results: Results) -> str:
    level, count = results.get("level") or 0.95, results.get("comparisons")
    words = f"{100 * level:g} % intervals"
    return words + (f" that hold together for {count} comparisons" if count else "")


def _risk(row: Mapping[str, Any]) -> str:
    if not math.isfinite(real(row.get("risk"))):
        return ""
    words = f" (risk {number(row['risk'], 1, scale=100)} %"
    interval: Sequence[Any] = row.get("interval") or ()
    if len(interval) == 2:
        words += ", interval " + " to ".join(number(x, 1, scale=100) for x in interval) + " %"
    return words + ")"


def _because(row: Mapping[str, Any]) -> str:
    return f" ({row['error']})." if row.get("error") else "."


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
