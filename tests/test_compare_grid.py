"""Grids of data sets and backbones, budgets of hours, and results in a bucket."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest
from made_comparison import make_comparison, make_table
from page import check_stands_alone

from experiments import command_line
from experiments.command_line import load_config
from experiments.compare import __main__ as compare
from experiments.compare import cells as compare_cells
from experiments.compare import config as compare_config
from experiments.compare import decide as compare_decide
from experiments.compare import grid, planning
from experiments.compare import report as compare_report
from experiments.compare.config import Block, Comparison, backbone_flags
from experiments.files import write_json
from experiments.report import plots
from experiments.store import Store

SMALL, SMALLER = "isotropic depth=3 width=8 exits=1,2", "isotropic depth=2 width=6 exits=1,"
FLAGS = [
    *("--data.name", "digits", "--data.shift", "0", "--jobs", "1", "--seeds", "0"),
    *("--train.optimiser", "sgd", "--train.learning-rate", "0.2", "--train.epochs", "1"),
    *("--train.batch", "128", "--regimes", "joint", "soft_auxiliary"),
    *("--policies", "max_prob", "margin", "--targets.budgets", "0.8", "--targets.curve", "2"),
    *("--guarantee.policies", "--static.no-enabled", "--timing.policies", "--drift.policies"),
    *("--timing.batch", "64", "--timing.repeats", "2", "--timing.keep-exits"),
]
GRID = ["--backbones", SMALL, SMALLER]
NAMES = ("isotropic-depth-3-width-8-exits-1-2", "isotropic-depth-2-width-6-exits-1")


def run(workdir: Path, *flags: str) -> int:
    return compare.main([*FLAGS, *GRID, *flags, "--workdir", str(workdir)])


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", lambda *args: None)
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grid") / "run"
    assert run(path) == 0
    return path


@pytest.fixture
def copy(workdir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(workdir, tmp_path / "run"))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is trained, and what is decided."""
    found: list[str] = []
    train, decided = compare_cells._train, compare_decide._decided

    def training(cell, place):
        train(cell, place)
        found.append(f"{cell.name} of {cell.network.depth}, {cell.seed}")

    def deciding(model, policy, config, workdir):
        found.append(f"{model.name}, {model.seed}, {policy}")
        return decided(model, policy, config, workdir)

    monkeypatch.setattr(compare_cells, "_train", training)
    monkeypatch.setattr(compare_decide, "_decided", deciding)
    return found


@pytest.fixture
def only_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and pages take longer than all the rest of a comparison that is there."""

    def write(place, found, table):
        del table
        write_json(place / "results.json", found)

    monkeypatch.setattr(compare_report, "write", write)


def results(workdir: Path, name: str = "") -> dict[str, Any]:
    return json.loads((workdir / name / "results.json").read_text())


# --- a grid --------------------------------------------------------------------------------------


def test_each_block_has_a_report_of_its_own_and_there_is_one_over_all(workdir):
    over_all = results(workdir)
    assert [block["name"] for block in over_all["blocks"]] == list(NAMES)
    page = check_stands_alone((workdir / "report.html").read_text())
    for name in NAMES:
        block = results(workdir, name)
        assert block["seeds"] == [0]
        assert block["failed"] == block["left_out"] == []
        assert {row["regime"] for row in block["rows"]} == {"joint", "soft_auxiliary"}
        assert f"{name}/report.html" in page.first
        assert (workdir / name / "report.html").stat().st_size > 500
        # A row over all is of the same figures.
        for row in over_all["over_all"]:
            (own,) = (
                r["accuracy"]["mean"]
                for r in block["rows"]
                if (r["regime"], r["policy"]) == (row["regime"], row["policy"])
                and r["target"] == {"kind": "budget", "value": 0.8}
                and r["search"] == "optimal"
            )
            assert row[name] == pytest.approx(own)
    assert len(over_all["over_all"]) == 4


@pytest.mark.usefixtures("only_json")
def test_what_is_there_is_not_computed_again_and_resuming_takes_the_grid(copy, workdir, log):
    assert compare.main(["--workdir", str(copy), "--resume", "--jobs", "1"]) == 0
    assert log == []
    for name in ("", *NAMES):
        before, after = results(workdir, name), results(copy, name)
        for told in ("seconds", "date", "command"):
            before.pop(told, None)
            after.pop(told, None)
        assert before == after


@pytest.mark.usefixtures("only_json")
def test_a_block_is_what_a_comparison_alone_would_be(workdir, copy, log, capsys):
    """Its networks are found where the backbone is given by flags."""
    flags = [*FLAGS, "--network.name", "isotropic", "--network.depth", "3", "--network.width", "8"]
    flags += ["--network.exits", "1", "2", "--workdir", str(copy), "--policies", "max_prob"]
    assert compare.main(flags) == 0
    assert not [words for words in log if " of " in words]
    assert "missing" not in capsys.readouterr().out

    def rows(found):
        return [
            (row["regime"], row["target"], row["search"], row["accuracy"])
            for row in found["rows"]
            if row["policy"] == "max_prob" and "accuracy" in row
        ]

    assert rows(results(copy)) == rows(results(workdir, NAMES[0]))
    assert rows(results(copy))


# --- hours ---------------------------------------------------------------------------------------


def test_a_budget_leaves_out_what_does_not_fit_and_says_so(copy, log, capsys):
    more = ["--seeds", "0", "1"]
    assert run(copy, *more, "--budget-hours", "1e-9") == 0
    assert log == []
    said = capsys.readouterr().out
    first, second = said.split("left out by --budget-hours")[:2]
    for words in (first, second):
        assert "joint" in words
    assert "all" in first
    for name in NAMES:
        block = results(copy, name)
        assert block["seeds"] == [0]
        left = ("plain network", "joint", "soft_auxiliary")
        assert sorted(block["left_out"]) == sorted(f"{name}: {n}, seed 1" for n in left)
        page = (copy / name / "report.html").read_text()
        assert "3 networks were left out by --budget-hours" in page
    # The same command with more hours goes on with the rest.
    assert run(copy, *more, "--budget-hours", "100") == 0
    trained = [words for words in log if " of " in words]
    assert trained == [
        *("plain network of 3, 1", "plain network of 2, 1"),
        *(f"{name} of {depth}, 1" for depth in (3, 2) for name in ("joint", "soft_auxiliary")),
    ]
    assert [results(copy, name)["seeds"] for name in NAMES] == [[0, 1]] * 2


def test_nothing_that_fits_is_one_line(tmp_path, capsys):
    place = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning.Costs, "seconds", lambda self, job: 3600.0)
        assert run(place, "--budget-hours", "0.5") == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert "--budget-hours is over before a network with early exits is there" in errors[0]


def test_networks_are_prepared_seed_by_seed_and_the_plain_one_first(tmp_path):
    config = compare_config.parse(
        [*FLAGS, "--seeds", "0", "1", "--static.enabled", "--static.exits", "1"]
    ).run
    plan = planning.plan([Block("", config, False)], Store(tmp_path))
    assert len(plan.missing) == len(plan.tasks)
    order = [job.name for job in planning.jobs(plan, Store(tmp_path), by_seed=True)]
    assert order[0] == "plain network, seed 0"
    assert {words.rsplit(" ", 1)[1] for words in order[: len(order) // 2]} == {"0"}
    exits = [i for i, words in enumerate(order) if words.startswith(("joint", "soft_auxiliary"))]
    assert exits[:2] == [1, 2]
    together = [job.name for job in planning.jobs(plan, Store(tmp_path), by_seed=False)]
    assert together[:2] == ["joint, seed 0", "joint, seed 1"]


def test_forecasts_rest_on_what_networks_took(workdir):
    blocks = compare_config.parse_grid([*FLAGS, *GRID, "--seeds", "0", "7"])[1]
    store = Store(workdir)
    plan = planning.plan(blocks, store)
    assert {task.cell.seed for task in plan.missing} == {7}
    for job in planning.jobs(plan, store, by_seed=False):
        (task,) = (task for task in plan.missing if task.name == job.name)
        took = [
            record["seconds"]
            for path in (workdir / "networks").glob("*/trained.json")
            for record in [json.loads(path.read_text())]
            if record["cell"]["name"] == task.cell.name
            and record["cell"]["network"]["depth"] == task.cell.network.depth
        ]
        assert len(took) == 1
        assert plan.costs.seconds(job) == pytest.approx(np.mean(took))


# --- a bucket ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("only_json")
def test_two_machines_share_a_bucket(copy, workdir, tmp_path, log):
    bucket = "memory://comparison"
    files = fsspec.filesystem("memory")
    try:
        # What this machine has is shared, and not trained again.
        assert run(copy, "--bucket", bucket) == 0
        trained = len([words for words in log if " of " in words])
        seconds = {
            path.parent.name: json.loads(path.read_text())["seconds"]
            for path in (workdir / "networks").glob("*/trained.json")
        }
        assert trained == len(seconds)  # each was read, and none took time
        log.clear()
        other = tmp_path / "other"
        assert run(other, "--bucket", bucket) == 0
        assert log == []
        for path in (other / "networks").glob("*/trained.json"):
            assert json.loads(path.read_text())["seconds"] == seconds[path.parent.name]
        for name in NAMES:
            assert results(other, name)["rows"] == results(workdir, name)["rows"]
            assert files.exists(f"/comparison/{name}/results.json")
    finally:
        files.store.clear()
        files.pseudo_dirs[:] = [""]


# --- names ---------------------------------------------------------------------------------------


def test_what_was_trained_before_keeps_its_name():
    """Addresses of networks as they were before there were grids."""
    config = load_config(command_line.CONFIGS / "compare" / "digits.py", Comparison)
    keys = [cell.key for cell in compare_cells.cells(config) if cell.seed == 0]
    assert keys[:4] == [
        *("joint-seed0-d34f3183318e", "soft-auxiliary-seed0-dc44662d095e"),
        *("plain-network-seed0-09f0cbd412cc", "depth-to-exit-1-seed0-3b02b8711441"),
    ]


def test_a_training_that_an_older_version_began_goes_on(workdir, tmp_path, log):
    """It lies in the directory of the finished network."""
    begun = next((workdir / "networks").glob("joint-seed0-*"))
    record = json.loads((begun / "trained.json").read_text())
    place = tmp_path / "networks" / begun.name
    shutil.copytree(begun, place)
    for file in ("trained.json", "held_out.npz", "test.npz"):
        (place / file).unlink()
    blocks = compare_config.parse_grid([*FLAGS, *GRID])[1]
    cells = [cell for block in blocks for cell in compare_cells.cells(block.config)]
    (cell,) = (cell for cell in cells if cell.key == begun.name)
    compare_cells.prepare(cell, blocks[0].config.drift, Store(tmp_path))
    again = json.loads((place / "trained.json").read_text())
    assert again["seconds"] == record["seconds"], "its checkpoint was the last"
    assert {path.name for path in place.parent.iterdir()} == {begun.name}


# --- the command line ----------------------------------------------------------------------------


def test_a_backbone_is_a_family_with_arguments():
    assert backbone_flags("") == []
    assert backbone_flags("fast") == ["--network.name", "fast"]
    assert backbone_flags("resnet depth=20 exits=3,6 shortcut=A") == [
        *("--network.name", "resnet", "--network.depth", "20"),
        *("--network.exits", "3", "6", "--network.options", "shortcut=A"),
    ]
    # As among --network.options: five exits.
    assert backbone_flags("fast exits=5")[2:] == ["--network.options", "exits=5"]
    with pytest.raises(ValueError, match="backbones: depth"):
        backbone_flags("resnet depth")


def test_each_data_set_brings_its_own_configuration(monkeypatch, tmp_path):
    monkeypatch.setattr(command_line, "resolve", lambda config: config.name)
    flags = ["--datasets", "digits", "fashion_mnist", "--backbones", "fast width=8", "vit patch=4"]
    arguments, blocks = compare_config.parse_grid([*flags, "--seeds", "5"])
    assert arguments.workdir == Path("runs/compare-digits-fashion_mnist")
    assert [block.name for block in blocks] == [
        *("digits-fast-width-8", "digits-vit-patch-4"),
        *("fashion_mnist-fast-width-8", "fashion_mnist-vit-patch-4"),
    ]
    own = compare_config.default("digits"), compare_config.default("fashion_mnist")
    for block, default in zip(blocks, (own[0], own[0], own[1], own[1]), strict=True):
        assert block.config.seeds == (5,)
        assert block.config.train.epochs == default.train.epochs
        assert block.config.data == default.data
    assert [block.config.network.width for block in blocks[::2]] == [8, 8]
    assert [block.config.network.options for block in blocks[1::2]] == [("patch=4",)] * 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--backbones", "fast", "fast"], ["backbones", "each once"]),
        (["--datasets", "mnist"], ["mnist"]),
        (["--backbones", "fast", "fast exits=99,"], ["fast-exits-99: ", "1 to 6"]),
        (["--budget-hours", "0"], ["budget_hours: 0", "greater than 0"]),
        (["--retries", "-1"], ["retries: -1", "at least 0"]),
        (["--slurm.hours", "0"], ["slurm.hours: 0", "greater than 0"]),
        (["--backend", "slurm"], ["slurm", "submitit"]),
        (["--bucket", "nothing://there"], ["--bucket nothing://there cannot be read"]),
    ],
)
def test_a_mistake_is_one_line(argv, words, tmp_path, capsys):
    assert compare.main([*FLAGS, *argv, "--workdir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for word in words:
        assert word in line


# --- the table over all --------------------------------------------------------------------------


def made(name: str, change: float) -> grid.Part:
    """A block in which one scheme's accuracy is changed by so much."""
    comparison = make_comparison(policies=("max_prob", "entropy", "margin"))
    table = make_table(comparison)
    better = (table["regime"] == "joint") & (table["policy"] == "margin")
    table.loc[better, "accuracy"] += change
    return grid.Part(name, comparison, table)


def test_ranks_and_changes_are_means_over_blocks():
    parts = [made("one", 0.05), made("two", -0.05)]
    records = grid.over_all(parts).to_dict("records")
    rows: dict[Any, Any] = {(row["regime"], row["policy"]): row for row in records}
    reference, margin = rows["joint", "max_prob"], rows["joint", "margin"]
    assert reference["change"] == 0
    differences = [margin[name] - reference[name] for name in ("one", "two")]
    assert margin["change"] == pytest.approx(sum(differences) / 2)
    # The best in one block, the last in the other.
    assert margin["rank"] == (1 + len(rows)) / 2
    words = grid.words(grid.over_all(parts), parts)
    assert list(words)[2:4] == ["one: % at cost <= 0.50", "two: % at cost <= 0.50"]


def test_a_scheme_without_a_result_somewhere_is_not_ranked():
    one, two = made("one", 0.0), made("two", 0.0)
    kept = two.table[two.table["policy"] != "entropy"]
    rows = grid.over_all([one, two._replace(table=pd.DataFrame(kept))])
    assert "entropy" not in set(rows["policy"])
    assert not rows.isna().to_numpy().any()
