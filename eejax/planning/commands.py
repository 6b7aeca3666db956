"""The commands `eejax times` and `eejax plan`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eejax.planning.options import OBJECTIVES
from eejax.runtime import manifest
from eejax.tiers.codec import CODECS, encode

if TYPE_CHECKING:
    from eejax.planning.machines import Times
    from eejax.planning.reading import Tiers
    from eejax.planning.search import Plans, Row

_HEADER = (
    *("", "cut", "codec", "mean ms", "p50", "p99", "kB by link", "answered %", "device mJ"),
    *("server ms", "price/M", "accuracy %"),
)
_SHOWN = 8


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the commands; `command(action, name, about)` makes a parser."""
    times = command(_times, "times", "Measure stages and codecs on this machine, for `plan`.")
    times.add_argument("directory", metavar="DIR", help="an artifact")
    times.add_argument("--to", required=True, metavar="FILE", help="JSON to write")
    times.add_argument(
        "--images",
        metavar="FILE",
        help="an .npy of uint8 [N, ...], whose bytes and changed labels count; by default the "
        "artifact's recorded images, which may be noise",
    )
    times.add_argument("--repeats", type=int, default=100, help="passes from every stage")
    times.add_argument(
        "--pause",
        type=float,
        default=0.01,
        metavar="SECONDS",
        help="rest before each, as between requests; 0.01 by default",
    )
    times.add_argument("--threads", type=int, help="by default one for each core")
    plan = command(_plan, "plan", "Choose where to cut a network among device, edge and cloud.")
    plan.add_argument("directory", metavar="DIR", help="an artifact with held-out samples")
    plan.add_argument("--links", required=True, metavar="FILE", help="YAML")
    plan.add_argument("--devices", required=True, metavar="FILE", help="YAML, a tier each")
    plan.add_argument("--objective", choices=OBJECTIVES, default="mean", help="mean by default")
    kept = plan.add_mutually_exclusive_group()
    kept.add_argument("--accuracy", type=float, help="at least, on the held-out samples")
    kept.add_argument("--drop", type=float, help="below the last exit's, at most; 0.01 by default")
    kept.add_argument("--risk", type=float, help="certified error on new data, at most")
    plan.add_argument(
        "--confidence", type=float, default=0.9, help="of --drop and --risk; 0.9 by default"
    )
    plan.add_argument("--codecs", nargs="+", metavar="CODEC", help="to choose from")
    plan.add_argument("--json", metavar="FILE", help="where to write all of it")
    plan.add_argument("--picture", metavar="FILE", help="accuracy against the objective; .svg")


def _times(arguments: argparse.Namespace) -> int:
    from eejax import runtime
    from eejax.planning.measuring import measure, save

    artifact = runtime.load(arguments.directory, arguments.threads)
    images = None
    if arguments.images is not None:
        images = np.load(arguments.images, allow_pickle=False)
    passes = {"repeats": arguments.repeats, "pause": arguments.pause}
    times = measure(artifact, _usable(), images, **passes)
    save(times, arguments.to)
    print("\n".join([*_measured(times), "", f"written to {arguments.to}"]))
    return 0


def _usable() -> list[str]:
    """The codecs whose package is installed."""
    try:
        encode([np.zeros((1, 1), np.uint8)], CODECS[-1])
    except ModuleNotFoundError as error:
        print(f"left out: {error}")
        return [name for name in CODECS if "+" not in name]
    return list(CODECS)


def _measured(times: Times) -> list[str]:
    exits = times.stages.shape[2]
    rows: list[Sequence[str]] = [("stage", "first after a pause ms", "p99", "following ms", "p99")]
    for e in range(exits):
        first, rest = times.stages[:, e, e], times.stages[:, :e, e]
        later = _median_p99(rest) if rest.size else ("-", "-")
        rows.append((str(e + 1), *_median_p99(first), *later))
    lines = [*_aligned(rows), ""]
    crossings: list[Sequence[str]] = [
        ("cut", "codec", "bytes", "encode ms", "decode ms", "other labels %")
    ]
    for (cut, codec), c in times.crossings.items():
        seconds = [f"{1e3 * np.median(s):.3f}" for s in (c.encode, c.decode)]
        changed = f"{100 * c.changed.max():.3g}"
        crossings.append((str(cut), codec, f"{c.size:,.0f}", *seconds, changed))
    return lines + _aligned(crossings)


def _median_p99(seconds: np.ndarray) -> tuple[str, str]:
    median, p99 = 1e3 * np.quantile(seconds, [0.5, 0.99])
    return f"{median:.3f}", f"{p99:.3f}"


def _plan(arguments: argparse.Namespace) -> int:
    from eejax.planning import reading
    from eejax.planning.search import search_plans

    found = manifest.read(arguments.directory)
    trace = found.held_out()
    if trace is None:
        raise ValueError(
            f"{arguments.directory} has no held-out samples; export a bundle that has them."
        )
    tiers = reading.read(arguments.links, arguments.devices)
    for name, times in zip(tiers.names, tiers.times, strict=True):
        if times.artifact != found.sha256:
            raise ValueError(
                f"the times of {name} are of another artifact; run `eejax times "
                f"{arguments.directory}` there."
            )
    plans = search_plans(
        trace,
        tiers.times,
        tiers.links,
        tiers.devices,
        objective=arguments.objective,
        accuracy=arguments.accuracy,
        drop=arguments.drop,
        risk=arguments.risk,
        confidence=arguments.confidence,
        codecs=arguments.codecs,
    )
    print("\n".join(_report(plans, tiers, arguments, trace.correct)))
    if arguments.json:
        text = json.dumps(_content(plans, tiers, arguments), indent=1)
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")
    if arguments.picture:
        from eejax.planning.picture import draw

        draw(plans, arguments.objective, arguments.picture)
    return 0


def _report(
    plans: Plans, tiers: Tiers, arguments: argparse.Namespace, correct: np.ndarray
) -> list[str]:
    names = [
        name
        if device.scale == 1
        else f"{name} (modelled: {device.scale:g} times what was measured)"
        for name, device in zip(tiers.names, tiers.devices, strict=True)
    ]
    path = names[0] + "".join(
        f" -[{link}]- {name}" for link, name in zip(tiers.link_names, names[1:], strict=True)
    )
    last = f"{100 * correct[:, -1].mean():.1f} %"
    lines = [path, f"{len(correct):,} held-out samples, the last exit has {last} of them right", ""]
    rows = [
        ("best", plans.best),
        ("all on the device", plans.device),
        ("all in the cloud", plans.cloud),
        *(("", row) for row in _spaced(plans.front)),
    ]
    table = _aligned([_HEADER, *(_cells(name, row, correct.shape[1]) for name, row in rows)])
    lines += [*table[:4], "", f"no plan beats, in {arguments.objective} against accuracy:"]
    shown = len(rows) - 3
    lines += table[4:]
    if shown < len(plans.front):
        lines.append(f"({shown} of {len(plans.front)}; all of them: --json)")
    best = plans.best.plan
    limits = [f"{t:.4g}" for t in best.thresholds.tolist()]
    exits = ", ".join(
        f"{e + 1} from {t}" if t != "inf" else f"{e + 1} off" for e, t in enumerate(limits)
    )
    lines += ["", f"exits of the best: {exits or 'none'}", f"thresholds {','.join(limits)}"]
    if arguments.risk is not None:
        lines.append(
            f"certified: an error of at most {arguments.risk:g}, with confidence "
            f"{arguments.confidence:g}, by the half of the samples that chose nothing"
        )
    return lines


def _cells(name: str, row: Row, exits: int) -> tuple[str, ...]:
    plan, f = row.plan, row.forecast
    named = {0: "image", exits: "-"}
    used = [named.get(cut, c) for c, cut in zip(plan.codecs, plan.cuts, strict=True)]
    milliseconds = [f"{1e3 * s:.3g}" for s in (f.mean_seconds, f.p50_seconds, f.p99_seconds)]
    return (
        name,
        " ".join(map(str, plan.cuts)),
        " ".join(used),
        *milliseconds,
        " ".join(f"{size / 1e3:.3g}" for size in f.link_bytes),
        " ".join(f"{100 * share:.0f}" for share in f.tier_shares),
        f"{1e3 * f.device_joules:.3g}",
        f"{1e3 * f.server_seconds:.3g}",
        f"{f.price_per_million:.3g}",
        f"{100 * f.accuracy:.1f}",
    )


def _spaced(front: Sequence[Row]) -> list[Row]:
    """At most `_SHOWN` of them, with the first and the last."""
    at = np.unique(np.linspace(0, len(front) - 1, _SHOWN).round().astype(int))
    return [front[i] for i in at]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _content(plans: Plans, tiers: Tiers, arguments: argparse.Namespace) -> dict[str, Any]:
    def described(row: Row) -> dict[str, Any]:
        plan = row.plan
        return {
            "cuts": list(plan.cuts),
            "codecs": list(plan.codecs),
            "thresholds": [manifest.number(t) for t in plan.thresholds.tolist()],
            **row.forecast._asdict(),
        }

    asked = ("objective", "accuracy", "drop", "risk", "confidence")
    return {
        **{name: getattr(arguments, name) for name in asked},
        "tiers": tiers.names,
        "links": tiers.link_names,
        "scales": [device.scale for device in tiers.devices],
        "best": described(plans.best),
        "device": described(plans.device),
        "cloud": described(plans.cloud),
        "front": [described(row) for row in plans.front],
    }
