"""Memory in large pages, for training on a CPU."""

from __future__ import annotations

import os
import sys

_TUNABLE = "glibc.malloc.hugetlb=1"


def use_huge_pages() -> None:
    """Starts this process anew with an allocator that asks Linux for large pages.

    A training step allocates and frees a few hundred megabytes, page by page; with pages of 2 MiB
    it is about 15 % faster (docs/lab/xla.md). glibc reads the setting when a process starts and at
    no other time. Nothing happens on other systems, or if GLIBC_TUNABLES is set already: whoever
    sets it, to an empty value say, decides.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = _TUNABLE
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
