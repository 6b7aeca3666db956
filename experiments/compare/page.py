"""The interactive blocks of a comparison's page: charts that answer to a pointer, heat maps.

A chart is a picture without its script. With it, a point tells its numbers under the pointer or
with the keyboard's focus (the arrow keys go from point to point), and a legend entry shows its
line alone. Every text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from matplotlib.ticker import MaxNLocator

from experiments.compare.plot import Look, Panel, bounds, marked
from experiments.compare.terms import number, real

STYLE = """
body { max-width: 74rem; }
.charts { background: #fff; color: #333; border: 1px solid var(--line); border-radius: 6px;
  padding: .8rem; margin: .8rem 0; }
.panels { display: flex; flex-wrap: wrap; gap: .6rem 1rem; }
.panels figure { flex: 1 1 22rem; max-width: 34rem; min-width: 0; margin: 0; }
.panels figcaption { font-weight: 600; font-size: .95rem; overflow-wrap: anywhere; }
.panels svg { display: block; width: 100%; height: auto; }
.panels text { fill: #333; color: #333; font-size: 13px; }
.hit { fill: transparent; outline: none; }
.hit:hover, .hit:focus { stroke: #333; stroke-width: 1.5px; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .6rem 0 0; padding: 0;
  font-size: .85rem; }
.legend li { list-style: none; display: flex; align-items: center; gap: .4rem; border-radius: 3px;
  padding: 0 .2rem; overflow-wrap: anywhere; }
.legend li:hover, .legend li:focus { outline: 2px solid #0b5394; }
.legend svg { flex: none; }
.single .series:not(.on) { opacity: .1; }
.single .series.on .band { opacity: .25; }
.tip { position: fixed; z-index: 9; max-width: min(22rem, calc(100vw - 16px)); background: #222;
  color: #fff; border-radius: 4px; padding: .3rem .5rem; font-size: .85rem; line-height: 1.35;
  pointer-events: none; overflow-wrap: anywhere; white-space: pre-line; }
.tip[hidden] { display: none; }
.heat td, .heat th { text-align: center; padding: .2rem .45rem; }
.heat th[scope=row] { text-align: left; font-weight: 400; white-space: nowrap; }
ul.said { padding-left: 1.2rem; max-width: 46rem; } ul.said li { margin: .25rem 0; }
@media print { .charts { border: 0; padding: 0; } .tip { display: none; }
  .charts, ul.said li { break-inside: avoid; } .panels figure { flex-basis: 40%; }
  .wide table { font-size: 7.5pt; } .wide th, .wide td { padding: .12rem .28rem; }
  .wide td.text { white-space: normal; } ul.said { max-width: none; }
  p:has(+ .charts), p:has(+ ul) { break-after: avoid; } }
"""

SCRIPT = """
(() => {
  const tip = document.createElement('div');
  tip.className = 'tip'; tip.hidden = true; tip.setAttribute('role', 'tooltip');
  document.body.append(tip);
  let shown = null;
  const place = () => {
    const box = shown.getBoundingClientRect(), room = document.documentElement;
    const left = box.left + box.width / 2 - tip.offsetWidth / 2;
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = Math.max(8, Math.min(left, room.clientWidth - tip.offsetWidth - 8)) + 'px';
    const top = above < 8 ? box.bottom + 6 : above;
    tip.style.top = Math.max(8, Math.min(top, room.clientHeight - tip.offsetHeight - 8)) + 'px';
  };
  const at = (event, what) => event.target.closest ? event.target.closest(what) : null;
  const single = (part) => {
    document.querySelectorAll('.single, .on').forEach((e) => e.classList.remove('single', 'on'));
    if (!part) return;
    const charts = part.closest('.charts');
    charts.classList.add('single');
    charts.querySelectorAll('.series').forEach(
      (e) => e.classList.toggle('on', e.dataset.line === part.dataset.line));
  };
  const enter = (event) => {
    const hit = at(event, '.hit');
    shown = hit;
    tip.hidden = !hit;
    if (hit) { tip.textContent = hit.dataset.tip; place(); }
    single(at(event, '.key'));
  };
  const leave = () => { shown = null; tip.hidden = true; single(null); };
  document.addEventListener('pointerover', enter);
  document.addEventListener('focusin', enter);
  document.addEventListener('focusout', leave);
  document.documentElement.addEventListener('pointerleave', leave);
  document.addEventListener('scroll', () => { if (shown) place(); }, true);
  document.addEventListener('keydown', (event) => {
    if (event.key === 'Escape') leave();
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], hit = at(event, '.hit');
    if (!step || !hit) return;
    const line = [...hit.parentNode.querySelectorAll('.hit')];
    const next = line[line.indexOf(hit) + step];
    if (next) { hit.tabIndex = -1; next.tabIndex = 0; next.focus(); }
    event.preventDefault();
  });
})();
"""

_WIDTH, _HEIGHT = 460.0, 340.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 12.0, 26.0, 44.0  # room for the labels of the axes
_HIT = 5.0  # how near a pointer must come to a point


def charts(panels: Sequence[Panel], prefix: str) -> str:
    """The panels on common axes with one legend. `prefix` is unique in the page."""
    names = list({s.name: s.look for panel in panels for s in panel.series}.items())
    numbers = {name: i for i, (name, _) in enumerate(names)}
    xs, ys, _ = bounds(panels)
    figures = [
        f"<figure><figcaption>{escape(panel.title)}</figcaption>\n"
        f"{_chart(panel, xs, ys, numbers, f'{prefix}-{i}')}</figure>\n"
        for i, panel in enumerate(panels)
    ]
    keys = [
        f'<li class="key" tabindex="0" data-line="{i}">{_swatch(look)}{escape(name)}</li>\n'
        for i, (name, look) in enumerate(names)
    ]
    return (
        f'<div class="charts" id="{escape(prefix)}">\n<div class="panels">\n{"".join(figures)}'
        f'</div>\n<ul class="legend">\n{"".join(keys)}</ul>\n</div>'
    )


def heat(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """A table of shares in percent, darker for more; a share that is not known is "-"."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = ""
    for name, line in zip(rows, values, strict=True):
        cells = "".join(_shaded(real(value)) for value in line)
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>\n'
    return (
        f'<div class="wide" tabindex="0"><table class="heat">\n<thead><tr><th></th>{head}</tr>'
        f"</thead>\n<tbody>\n{body}</tbody></table></div>"
    )


def sentences(texts: Sequence[str]) -> str:
    """A list of sentences."""
    return '<ul class="said">\n' + "".join(f"<li>{escape(t)}</li>\n" for t in texts) + "</ul>"


def _shaded(share: float) -> str:
    if not math.isfinite(share):
        return "<td>-</td>"
    weight = min(max(share, 0.0), 1.0)
    white, deep = np.array([255, 255, 255]), np.array([8, 64, 129])
    red, green, blue = np.rint(white + weight * (deep - white)).astype(int)
    # From there on white is further from this ramp's colours than black is: 4.5 to 1 or more.
    ink = "#fff" if weight > 0.7 else "#000"
    colours = f"background: rgb({red}, {green}, {blue}); color: {ink}"
    return f'<td style="{colours}">{number(share, 0, scale=100)}</td>'


# --- a chart


def _chart(
    panel: Panel,
    xs: tuple[float, float],
    ys: tuple[float, float],
    numbers: dict[str, int],
    prefix: str,
) -> str:
    def x_of(x: float) -> float:
        return _LEFT + (x - xs[0]) / (xs[1] - xs[0]) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - ys[0]) / (ys[1] - ys[0]) * (_HEIGHT - _TOP - _BOTTOM)

    def path(points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{x_of(x):.1f} {y_of(y):.1f}" for x, y in points)

    correct, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [
        f'<clipPath id="{prefix}-clip"><rect x="{_LEFT}" y="{_TOP - 6}" width="{correct - _LEFT}" '
        f'height="{bottom - _TOP + 6}"/></clipPath>'
    ]
    for value, words in _ticks(*xs):
        parts.append(_rule(x_of(value), _TOP, x_of(value), bottom, "#e6e6e6"))
        parts.append(_text(x_of(value), bottom + 16, words))
    for value, words in _ticks(*ys):
        parts.append(_rule(_LEFT, y_of(value), correct, y_of(value), "#e6e6e6"))
        parts.append(_text(_LEFT - 6, y_of(value) + 4.5, words, "end"))
    parts += [
        _rule(_LEFT, bottom, correct, bottom, "#777"),
        _rule(_LEFT, _TOP, _LEFT, bottom, "#777"),
    ]
    parts.append(_text((_LEFT + correct) / 2, _HEIGHT - 6, panel.xlabel))
    parts.append(_text(4, 14, "accuracy (%)", "start"))
    # The last line is the topmost: the first policies, which matter most, come last.
    for series in reversed(panel.series):
        colour, dash = series.look.colour, " ".join(f"{1.6 * d:g}" for d in series.look.dash)
        inner = ""
        if series.band:
            edge = [(x, high) for x, _, high in series.band]
            edge += [(x, low) for x, low, _ in reversed(series.band)]
            inner += f'<path class="band" d="{path(edge)}Z" fill="{colour}" opacity=".1"/>'
        if series.line:
            dashes = f' stroke-dasharray="{dash}"' if dash else ""
            inner += f'<path d="{path(series.line)}" fill="none" stroke="{colour}" '
            inner += f'stroke-width="2"{dashes}/>'
        inner += "".join(
            _marker(series.look, x_of(x), y_of(y)) for x, y, _ in marked(series) if y >= ys[0]
        )
        line = f'class="series" data-line="{numbers[series.name]}"'
        parts.append(f'<g {line} clip-path="url(#{prefix}-clip)">{inner}</g>')
    at = [(x_of(x), y_of(y), words) for s in panel.series for x, y, words in s.points if y >= ys[0]]
    parts.append(_hits(at))
    label = escape(f"{panel.title}: accuracy in percent against {panel.xlabel}")
    view = f"0 0 {_WIDTH:g} {_HEIGHT:g}"
    return (
        f'<svg viewBox="{view}" role="group" aria-label="{label}">\n' + "\n".join(parts) + "</svg>"
    )


def _hits(points: Sequence[tuple[float, float, str]]) -> str:
    """Where the pointer finds the points. Those on top of one another share a place, or only the
    topmost could be asked. The tab key stops once a chart; from there the arrow keys go on."""
    places: list[tuple[float, float, list[str]]] = []
    for x, y, words in sorted(points, key=lambda point: point[:2]):
        near = [p for p in places if math.hypot(p[0] - x, p[1] - y) <= _HIT]
        if near:
            near[0][2].append(words)
        else:
            places.append((x, y, [words]))
    circles = []
    for i, (x, y, texts) in enumerate(places):
        words = escape("\n".join(texts))
        circles.append(
            f'<circle class="hit" role="img" tabindex="{0 if i == 0 else -1}" cx="{x:.1f}" '
            f'cy="{y:.1f}" r="{_HIT:g}" aria-label="{words}" data-tip="{words}"/>'
        )
    return f"<g>{''.join(circles)}</g>"


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    found = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    values = [float(value) for value in found if low <= value <= high]
    step = min(np.diff(values), default=1.0)
    digits = max(0, math.ceil(-math.log10(step) - 1e-9)) if step > 0 else 0
    digits += not math.isclose(round(step, digits), step)  # a step of 2.5, 0.25, ...
    return [(value, f"{value:.{digits}f}") for value in values]


def _rule(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _swatch(look: Look) -> str:
    dash = " ".join(f"{1.6 * d:g}" for d in look.dash)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    line = f'<path d="M0 7H36" stroke="{look.colour}" stroke-width="2"{dashes}/>'
    marker = _marker(look, 18, 7)
    return f'<svg width="36" height="14" aria-hidden="true">{line}{marker}</svg>'


# Around the origin, with Matplotlib's letters.
_SHAPES = {
    "o": "M-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0Z",
    "s": "M-3.2 -3.2H3.2V3.2H-3.2Z",
    "^": "M0 -4.2L4 3H-4Z",
    "v": "M0 4.2L4 -3H-4Z",
    "D": "M0 -4.8L4.8 0L0 4.8L-4.8 0Z",
    "P": "M-1.4 -4.2H1.4V-1.4H4.2V1.4H1.4V4.2H-1.4V1.4H-4.2V-1.4H-1.4Z",
    "X": "M0 -1.8L2.4 -4.2L4.2 -2.4L1.8 0L4.2 2.4L2.4 4.2L0 1.8L-2.4 4.2L-4.2 2.4L-1.8 0L-4.2 -2.4"
    "L-2.4 -4.2Z",
}


def _marker(look: Look, x: float, y: float) -> str:
    if look.marker not in _SHAPES:
        return ""
    shape = _SHAPES[look.marker]
    return f'<path transform="translate({x:.1f} {y:.1f})" d="{shape}" fill="{look.colour}"/>'
