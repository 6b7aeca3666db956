"""The how-tos' promises: their code runs from top to bottom and does what it says."""

import inspect
import re
from pathlib import Path

import jax

from eejax.pretrained import names

DOCS = Path(__file__).resolve().parent.parent / "docs"


def run_page(name: str) -> tuple[dict, int]:
    """Executes the Python blocks of a page in order; what they define, and how many there are."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
    defined = {}
    # A reader's JAX is not strict.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            assert len([line for line in block.splitlines() if line.strip()]) <= 25
            exec(compile(block, name, "exec"), defined)
    return defined, len(blocks)


def test_models_already_there_get_exits_as_the_page_says(capsys):
    _, blocks = run_page("adapters.md")
    assert blocks >= 10
    said = capsys.readouterr().out
    reports = re.findall(r"accuracy ([\d.]+) at ([\d.]+) of the cost", said)
    assert len(reports) == 5
    # Over seeds and XLA's flags, accuracies were 0.84 to 0.96 and costs 0.5 to 0.8.
    for accuracy, cost in reports:
        assert float(accuracy) > 0.5
        assert float(cost) < 1
    differences = re.findall(r"^[\d.]+(?:e-\d+)?$", said, re.MULTILINE)
    assert len(differences) == 4
    assert all(float(d) < 1e-6 for d in differences)
    assert "(2, 5, 10)" in said


def test_every_table_of_names_is_on_the_page():
    page = (DOCS / "models.md").read_text()
    tables = [
        name
        for name, of in inspect.getmembers(names, inspect.isfunction)
        if of.__module__ == names.__name__ and not name.startswith("_")
    ]
    assert len(tables) > 10
    assert [name for name in tables if f"| `{name}(" not in page] == []


def test_networks_of_the_zoo_and_their_heads_are_made_as_the_page_says(capsys):
    defined, blocks = run_page("models.md")
    assert blocks == 5
    assert capsys.readouterr().out.startswith("4 [")
    for name in ("branchynet", "shallow_deep", "tapering", "chain"):
        network = defined[name]
        images = jax.ShapeDtypeStruct((2, 32, 32, 3), "float32")
        shapes = jax.eval_shape(network.init, jax.random.key(0), images)
        outputs = jax.eval_shape(lambda v, x, n=network: n.apply_all(v, x)[0], shapes, images)
        assert outputs.logits.shape == (4, 2, 10)
    last = shapes["params"]["heads"][-1]["classifier"]["kernel"]
    assert last.shape == (64 + 10, 10), "the last head sees the one before"
