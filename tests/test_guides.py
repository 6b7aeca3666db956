"""The guides' code runs, and the documentation's tables of contents are complete."""

import pkgutil
import re
from pathlib import Path

import pytest
from test_docs import run_page

import eejax
from eejax.inference import EXECUTORS
from eejax.policies import POLICIES
from eejax.training import REGIMES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


@pytest.mark.parametrize(
    "page", ["train.md", "thresholds.md", "inference.md", "deploying.md", "drift.md", "planning.md"]
)
def test_the_code_of_a_guide_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, blocks = run_page(page)
    assert blocks >= 2


def test_the_reference_has_every_module():
    pages = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    listed = set(re.findall(r"^::: eejax\.(\w+)$", pages, re.MULTILINE))
    assert listed == {module.name for module in pkgutil.iter_modules(eejax.__path__)}


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}


def test_every_regime_policy_and_executor_is_in_a_guide():
    def rows(page):
        cells = re.findall(r"^\|([^|]*)\|([^|]*)", (DOCS / page).read_text(), re.MULTILINE)
        return set(re.findall(r"`(\w+)`", " ".join(f"{a} {b}" for a, b in cells)))

    assert set(REGIMES) <= rows("train.md")
    assert set(POLICIES) <= rows("comparing.md")
    assert set(EXECUTORS) <= rows("inference.md")
