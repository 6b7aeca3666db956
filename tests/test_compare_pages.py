"""The commands of the pages on comparisons can be read; `.ci/run` runs those for one machine."""

from __future__ import annotations

import re
import shlex

import pytest
from test_docs import DOCS

from experiments import command_line
from experiments.command_line import parse
from experiments.compare.config import parse_grid
from experiments.pool.__main__ import Arguments


def commands(page: str, module: str, *, of_blocks: bool) -> list[list[str]]:
    """The flags of each command of a page, in shell blocks, or in all of it."""
    text = (DOCS / page).read_text()
    if of_blocks:
        text = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    lines = re.findall(rf"^ *python -m experiments\.{module}\b(.*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


PAGES = "comparing.md", "clusters.md"
EVERY = [
    flags for page in PAGES for flags in commands(page, "compare", of_blocks=False)
    if "--help" not in flags
]  # fmt: skip


@pytest.mark.parametrize("flags", EVERY, ids=" ".join)
def test_every_command_can_be_read(flags, monkeypatch):
    monkeypatch.setattr(
        command_line, "resolve", lambda data: "cifar10" if data.name == "auto" else data.name
    )
    arguments, blocks = parse_grid(flags)
    names = len(arguments.grid.datasets) or 1, len(arguments.grid.backbones) or 1
    assert len(blocks) == names[0] * names[1]


@pytest.mark.parametrize("flags", commands("clusters.md", "pool", of_blocks=True), ids=" ".join)
def test_every_check_of_a_pool_can_be_read(flags):
    assert parse(Arguments, "pool", flags, Arguments()).cells == 1000
