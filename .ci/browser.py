"""Opens HTML pages in headless Chromium and lists what a reader would see go wrong.

Each page is opened on a desktop and a phone, in light and dark, and printed. A problem is a console
error, a request for anything but the page, an image that does not show, a page wider than its
window, or text that is cut off, off the page, overlapping, too small or too faint. Text in images
is not looked at. Exit status: 0 no problems, 1 problems, 2 if no Chromium is installed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Error, Page, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# No host name resolves, so that a page cannot reach out. A container lacks a GPU and a sandbox.
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
FLAGS += ("--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND")
WINDOWS = {"desktop": (1366, 768), "phone": (390, 844)}
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")

PROBE = Path(__file__).with_suffix(".js").read_text()


def look(page: Page, address: str, width: int) -> list[str]:
    """A line for each problem of one page in its present window and colour scheme."""
    lines: list[str] = []
    page.on("console", lambda m: m.type == "error" and lines.append(f"console: {m.text}"))
    page.on("pageerror", lambda error: lines.append(f"exception: {error}"))
    page.on("request", lambda r: lines.append(f"request: {r.url}"))
    page.goto(address)
    lines += page.evaluate(PROBE, width)
    if b"/Type /Page" not in page.pdf(prefer_css_page_size=True):
        lines.append("print: gives no page")
    own = (f"request: {address}", "request: data:")
    return [line for line in lines if not line.startswith(own)]


def problems(browser: Browser, path: Path) -> Iterator[str]:
    """A line for each problem, in the first window and colour scheme that has it."""
    known: set[str] = set()
    for name, (width, height) in WINDOWS.items():
        for scheme in SCHEMES:
            with browser.new_page(
                viewport={"width": width, "height": height},
                color_scheme=scheme,
                is_mobile=name == "phone",
            ) as page:
                lines = dict.fromkeys(look(page, path.as_uri(), width))
            yield from (f"{path}, {name}, {scheme}: {n}" for n in lines if n not in known)
            known.update(lines)


def main() -> int:
    """Prints the problems of all pages that are named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE.html")
    pages = [page.resolve(strict=True) for page in parser.parse_args().pages]
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        print(f"no {' or '.join(BROWSERS)} here; install chromium", file=sys.stderr)
        return 2
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=binary, args=[*FLAGS])
            lines = [line for page in pages for line in problems(browser, page)]
            browser.close()
    except Error as error:
        print(f"cannot run: {error}", file=sys.stderr)
        return 2
    print(*lines, f"{len(pages)} pages, {len(lines)} problems", sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
