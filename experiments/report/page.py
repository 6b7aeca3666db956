"""The building blocks of report.html: strings of HTML from figures, cells and images.

The page stands alone: style, pictures and images are inside, and it fetches nothing. Every text
that comes from a run (names of classes, commands, messages) passes through `html.escape` here, so
callers hand in plain text.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from experiments.report.words import Cells

_THUMBNAIL = 64  # pixels a side, about; images are enlarged by whole numbers so pixels stay square

_CSS = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #5a5a5a; --page: #fbfbfa; --card: #fff;
  --line: #d9d9d6; --link: #0b5394; --warn: #fff3cd; --warn-ink: #5c4400; --warn-line: #e0a800;
  --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e3; --soft: #a8a8a4; --page: #1b1c1e;
  --card: #242629; --line: #404347; --link: #8ab8ee; --warn: #463a12; --warn-ink: #ffe9a8;
  --warn-line: #c99a1a; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 62rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { max-width: 46rem; margin: .4rem 0 .8rem; }
a { color: var(--link); }
nav { margin: 1rem 0; } nav a { margin-right: 1.1rem; white-space: nowrap; }
.lead { font-size: 1.15rem; }
.note { background: var(--warn); color: var(--warn-ink); border: 1px solid var(--warn-line);
  border-left-width: 6px; border-radius: 4px; padding: .6rem .9rem; margin: .8rem 0;
  max-width: none; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: .6rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code { font-family: ui-monospace, Consolas, "Liberation Mono", monospace; font-size: .9em; }
.plot { background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .8rem;
  margin: .8rem 0; overflow-x: auto; }
.plot svg { display: block; margin: 0 auto; max-width: 100%; height: auto; }
.plot svg * { stroke-linejoin: round; stroke-linecap: butt; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top;
  text-align: right; }
th { vertical-align: bottom; } td { white-space: nowrap; }
.text { text-align: left; }
.gallery { display: flex; flex-wrap: wrap; gap: .7rem .6rem; margin: .6rem 0; padding: 0; }
.gallery li { list-style: none; width: 6.2rem; font-size: .78rem; line-height: 1.3;
  overflow-wrap: anywhere; }
.gallery img { display: block; image-rendering: pixelated; border: 3px solid transparent;
  border-radius: 3px; box-sizing: content-box; max-width: 100%; height: auto; }
.gallery .wrong img { border-color: var(--bad); }
.wrong b { color: var(--bad); }
@media (max-width: 40rem) {
  .plot svg { max-width: 40rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --page: #fff; --card: #fff;
    --line: #bbb; --link: #000; --warn: #fff3cd; --warn-ink: #000; --warn-line: #a67c00;
    --bad: #b3261e; }
  @page { margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 10.5pt; print-color-adjust: exact;
    -webkit-print-color-adjust: exact; }
  nav { display: none; }
  .plot, .wide { overflow: visible; border: 0; padding: 0; }
  .plot svg { max-width: 100%; width: auto; }
  table { font-size: 8.5pt; } th, td { padding: .15rem .4rem; }
  .plot, p, tr, .gallery li { break-inside: avoid; }
  h2, h3, p:has(+ .plot), p:has(+ .wide) { break-after: avoid; } }
"""


class Gallery(NamedTuple):
    """Test images that took one exit, most confident first."""

    exit: int
    """0-based."""
    images: np.ndarray
    """uint8 `[k, H, W, C]`, C 1 or 3; k may be 0."""
    labels: np.ndarray
    """int `[k]`."""
    predictions: np.ndarray
    """int `[k]`."""
    confidences: np.ndarray
    """float `[k]`."""


def document(title: str, body: Sequence[str], *, style: str = "", script: str = "") -> str:
    """A whole page around the blocks of its body.

    Args:
        title: its heading too.
        body: blocks of HTML.
        style: rules of CSS behind the common ones.
        script: JavaScript that runs when the body is there; the page must be whole without it.
    """
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}{style}</style>"
    )
    end = f"<script>{script}</script>\n" if script else ""
    main = "\n".join((f"<h1>{escape(title)}</h1>", *body))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n'
        f"<body>\n<main>\n{main}\n</main>\n{end}</body>\n</html>\n"
    )


def navigation(sections: Sequence[tuple[str, str]]) -> str:
    """Links to sections, given as (id, heading)."""
    links = "".join(f'<a href="#{escape(i)}">{escape(heading)}</a> ' for i, heading in sections)
    return f'<nav aria-label="Sections">{links}</nav>'


def section(identity: str, heading: str, blocks: Sequence[str]) -> str:
    """A section with its heading."""
    body = "\n".join(blocks)
    return f'<section id="{escape(identity)}">\n<h2>{escape(heading)}</h2>\n{body}\n</section>'


def paragraph(text: str, style: str = "") -> str:
    """A paragraph of plain text. `style` is one of the page's classes: lead, soft, note."""
    role = ' role="note"' if style == "note" else ""
    words = _tied(escape(text))
    return f'<p class="{style}"{role}>{words}</p>' if style else f"<p>{words}</p>"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """A list of what was set and where; the command is shown as code."""
    rows = ""
    for name, value in pairs:
        words = escape(value)
        words = f"<code>{words}</code>" if name == "Command" else words
        rows += f"<dt>{escape(name)}</dt><dd>{words}</dd>\n"
    return f"<dl>\n{rows}</dl>"


def table(cells: Cells) -> str:
    """A table that scrolls sideways where the page is too narrow for it."""

    def row(tag: str, words: Sequence[str], scope: str = "") -> str:
        inner = ""
        for name, word in zip(cells.columns, words, strict=True):
            style = ' class="text"' if name in cells.text else ""
            inner += f"<{tag}{scope}{style}>{escape(word)}</{tag}>"
        return f"<tr>{inner}</tr>"

    head = row("th", cells.columns, ' scope="col"')
    body = "\n".join(row("td", words) for words in cells.rows)
    return (
        f'<div class="wide" tabindex="0"><table>\n<thead>{head}</thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def plot(figure: Figure, prefix: str, description: str) -> str:
    """A figure on a white card. `prefix` is unique in the page; `description` is its alt text."""
    return f'<div class="plot">{inline_svg(figure, prefix, description)}</div>'


def inline_svg(figure: Figure, prefix: str, description: str) -> str:
    """The figure as an `<svg>` element for a page that holds several of them.

    Matplotlib numbers its ids (`figure_1`, `axes_1`, ...) and names glyphs alike in every file, so
    two figures in one page would clash, and a glyph of the second be drawn from the first. Here
    every id and every reference to one gets the prefix. The file's `<style>` goes, because in a
    page it would reach everything; the page's own style sheet has its rule.
    """
    buffer = io.StringIO()
    # Text as outlines cannot be cut off by a font of another width; the salt makes ids repeatable.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": prefix}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Outlined text holds no text nodes, so what these patterns meet is markup of Matplotlib's own.
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)


def gallery(pictures: Gallery | None, number: int, classes: Sequence[str]) -> str:
    """The images that left at one exit, each with its answer, confidence and, if wrong, label.

    Raises:
        ValueError: the arrays disagree, are not uint8 images, or a label has no class name.
    """
    body = paragraph("No test image in this selection left here.", "soft")
    if pictures is not None and len(pictures.images):
        _check(pictures, len(classes))
        columns = (pictures.images, pictures.labels, pictures.predictions, pictures.confidences)
        items = [_picture(*row, classes) for row in zip(*columns, strict=True)]
        body = f'<ul class="gallery">\n{"".join(items)}</ul>'
    return f'<section id="exit-{number}">\n<h3>Exit {number}</h3>\n{body}\n</section>'


def _picture(
    image: np.ndarray, label: int, prediction: int, confidence: float, classes: Sequence[str]
) -> str:
    truth, answer, sure = classes[label], classes[prediction], f"{100 * confidence:.0f} %"
    wrong = "" if label == prediction else ' class="wrong"'
    alt = f"{truth}, answered {answer} with confidence {sure}"
    words = _tied(f"{escape(answer)} {sure}") + (
        f"<br><b>true: {escape(truth)}</b>" if wrong else ""
    )
    height, width = image.shape[:2]
    scale = max(1, round(_THUMBNAIL / max(height, width)))
    return (
        f"<li{wrong}>"
        f'<img src="{_data_url(image)}" alt="{escape(alt)}" width="{width * scale}" '
        f'height="{height * scale}">{words}</li>\n'
    )


def _tied(text: str) -> str:
    """A number and its unit stay on one line."""
    return re.sub(r"(?<=\d) (?=%|ms\b)", "&nbsp;", text)


def _data_url(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _check(pictures: Gallery, classes: int) -> None:
    images, where = pictures.images, f"gallery of exit {pictures.exit + 1}"
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != np.uint8:
        got = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"{where}: expected uint8 images [k, H, W, 1 or 3], got {got}")
    for name in ("labels", "predictions", "confidences"):
        if len(getattr(pictures, name)) != len(images):
            raise ValueError(
                f"{where}: {len(getattr(pictures, name))} {name}, {len(images)} images"
            )
    numbers = np.concatenate([pictures.labels, pictures.predictions])
    if numbers.min() < 0 or numbers.max() >= classes:
        raise ValueError(
            f"{where}: labels {numbers.min()} to {numbers.max()}, {classes} class names"
        )
