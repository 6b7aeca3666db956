"""Pages from Jinja2 templates: one HTML file each, which fetches nothing and runs no script.

The templates escape every value. Only `svg` and `table` return markup, made from a figure or from
a table of words.
"""

from __future__ import annotations

import base64
import io
import re
from html import escape
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from experiments.files import write_text

TEMPLATES = Path(__file__).parent / "templates"
_THUMBNAIL = 64  # pixels a side, about; images grow by whole numbers so that pixels stay square


def write(path: Path, template: str, **values: Any) -> None:
    """Renders a template and replaces the file in one step."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"thumbnail": thumbnail, "tied": _tied}
    environment.globals |= {"svg": svg, "text_columns": text_columns}
    write_text(path, environment.get_template(template).render(**values))


def svg(figure: Figure, prefix: str, description: str) -> Markup:
    """A figure as an `<svg>` element for a page that holds several.

    Matplotlib numbers its ids (`figure_1`, `axes_1`, ...) alike in every file, so two figures in
    one page would clash. Here every id and every reference to one gets `prefix`. The `<style>` of
    the file is removed, because in a page it would apply to everything.

    Args:
      figure: what to draw.
      prefix: unique in the page.
      description: the alternative text.
    """
    buffer = io.StringIO()
    # Text as outlines does not depend on fonts; the salt makes ids repeatable.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": prefix}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    figure.set_layout_engine("none")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Outlined text leaves no text nodes, so these patterns meet Matplotlib's own markup alone.
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1))


def _tied(text: str) -> str:
    """A number and its unit stay on one line."""
    return re.sub(r"(?<=\d) (?=%|ms\b)", "\u00a0", text)


def text_columns(words: pd.DataFrame) -> set[str]:
    """The columns that hold words, which align left; numbers and their units align right."""
    return {str(n) for n in words if any(re.search("[A-Za-z]{2}", w) for w in words[n])}


def thumbnail(image: np.ndarray) -> dict[str, Any]:
    """An image uint8 `[H, W, 1 or 3]` as a data URL, and the size in pixels to show it at."""
    height, width = image.shape[:2]
    scale = max(1, round(_THUMBNAIL / max(height, width)))
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"url": url, "width": width * scale, "height": height * scale}
