"""The how-to's promises: its code runs from top to bottom, and what was cut answers as before."""

import re
from pathlib import Path

import jax

PAGE = Path(__file__).resolve().parent.parent / "docs" / "adapters.md"
QUICK = "jax_disable_most_optimizations"


def test_every_block_of_the_page_runs_and_says_what_it_should(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 10
    before = jax.config.read(QUICK)
    names = {}
    # A reader's JAX is not strict. Compiling would be most of what the page takes.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        jax.config.update(QUICK, True)
        try:
            for block in blocks:
                assert len([line for line in block.splitlines() if line.strip()]) <= 25
                exec(compile(block, PAGE.name, "exec"), names)
        finally:
            jax.config.update(QUICK, before)
    said = capsys.readouterr().out
    reports = re.findall(r"accuracy ([\d.]+) at ([\d.]+) of the cost", said)
    assert len(reports) == 5
    for accuracy, cost in reports:
        assert float(accuracy) > 0.5
        assert float(cost) < 0.9
    differences = re.findall(r"^[\d.]+(?:e-\d+)?$", said, re.MULTILINE)
    assert len(differences) == 4
    assert all(float(d) < 1e-4 for d in differences)
    assert "(2, 5, 10)" in said
