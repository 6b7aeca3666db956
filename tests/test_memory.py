"""Starting anew with large pages."""

import os
import subprocess
import sys

import pytest

from experiments import memory

PROGRAM = """
import os, sys
from experiments.memory import use_huge_pages
use_huge_pages()
print(os.environ["GLIBC_TUNABLES"], sys.argv[1:], sys.prefix)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux alone")
@pytest.mark.parametrize("given", [None, "glibc.malloc.hugetlb=0"])
def test_a_process_starts_anew_with_its_arguments_unless_the_setting_is_there(given):
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment |= {} if given is None else {"GLIBC_TUNABLES": given}
    command = [sys.executable, "-c", PROGRAM, "--flag", "a b"]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    expected = "glibc.malloc.hugetlb=1" if given is None else given
    assert out.stdout.strip() == f"{expected} ['--flag', 'a b'] {sys.prefix}"


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    memory.use_huge_pages()
    assert "GLIBC_TUNABLES" not in os.environ
