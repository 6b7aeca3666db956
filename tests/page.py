"""Reads an HTML page, and checks that it stands alone."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """The elements and words of a page; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.folded = ""
        self.first = ""
        self.feed(text)
        self.close()
        assert not self.open

    @property
    def words(self) -> str:
        return self.first + self.folded

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            return
        if "details" in self.open:
            self.folded += data
        else:
            self.first += data

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.tags if attribute in attrs]


def check_stands_alone(text: str) -> Page:
    """Nothing is fetched, no script runs, ids are unique, every table scrolls in its own box."""
    page = Page(text)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for attribute in ("src", "href", "xlink:href", "srcset", "data", "action"):
        for value in page.values(attribute):
            assert value.startswith(("data:image/png;base64,", "#"))
            assert not value.startswith("#") or value[1:] in ids
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
    assert not re.search(r"https?://(?!www\.w3\.org/)|@import|url\([^#]|fetch\(", text)
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object"} & set(tags)
    assert tags.count("style") == 1  # a figure's style would apply to the whole page
    assert text.count('<div class="wide" tabindex="0"><table>') == tags.count("table")
    assert [attrs["lang"] for tag, attrs in page.tags if tag == "html"] == ["en"]
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    figures = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in figures)
    return page
