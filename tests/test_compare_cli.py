"""The comparison's command line: what it fills in, and the one-line reasons it gives."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from experiments import command_line
from experiments.cifar.config import Config
from experiments.command_line import load_config, to_json
from experiments.compare import __main__ as compare
from experiments.compare import cells as compare_cells
from experiments.compare import config as compare_config
from experiments.compare.config import Comparison, check
from experiments.data import splits as data

DIGITS = ["--data.name", "digits"]
COMPARISONS = command_line.CONFIGS / "compare"
OWN = load_config(COMPARISONS / "digits.py", Comparison)


def parsed(*argv):
    return compare_config.parse([*DIGITS, *argv])


def refused(*argv: str) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        parsed(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def resolving_to(monkeypatch, name):
    """As if this data set were what can be had."""
    monkeypatch.setattr(command_line, "resolve", lambda config: name)


# --- where the configuration comes from ----------------------------------------------------------


def test_a_data_set_brings_its_configuration_and_flags_override_it():
    plain = parsed()
    assert plain.run == OWN
    assert (plain.workdir, plain.pool.jobs) == (Path("runs/compare-digits"), None)
    flags = ["--train.epochs", "3", "--policies", "max_prob", "vote", "--seeds", "5"]
    changed = parsed(*flags, "--static.no-enabled", "--jobs", "2", "--workdir", "elsewhere")
    assert (changed.workdir, changed.pool.jobs) == (Path("elsewhere"), 2)
    assert changed.run == dataclasses.replace(
        OWN,
        seeds=(5,),
        policies=("max_prob", "vote"),
        train=dataclasses.replace(OWN.train, epochs=3),
        static=dataclasses.replace(OWN.static, enabled=False),
    )


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar100"])
def test_a_data_set_without_its_own_file_takes_its_main_jobs(name, monkeypatch):
    resolving_to(monkeypatch, name)
    arguments = compare_config.parse(["--data.name", name])
    job = load_config(command_line.CONFIGS / f"{name}.py", Config)
    assert arguments.workdir == Path(f"runs/compare-{name}")
    assert arguments.run.network == job.network
    assert arguments.run.train == job.train
    assert arguments.run.data == dataclasses.replace(job.data, certify=1_000)
    assert arguments.run.policies == Comparison().policies


def test_without_flags_it_is_cifar10_or_says_that_it_had_to_fall_back(monkeypatch):
    resolving_to(monkeypatch, "cifar10")
    whole = compare_config.parse([])
    assert whole.run == load_config(COMPARISONS / "cifar10.py", Comparison)
    resolving_to(monkeypatch, "digits")
    instead = compare_config.parse([])
    assert instead.workdir == Path("runs/compare-digits")
    # By this name, loading the images tells of the fall-back.
    automatic = dataclasses.replace(OWN.data, name="auto")
    assert instead.run == dataclasses.replace(OWN, data=automatic)


def test_what_was_trained_after_a_fall_back_is_found_by_the_data_sets_name(monkeypatch):
    """A directory's own configuration has the name of what was read."""
    resolving_to(monkeypatch, "digits")
    automatic = compare_config.parse([]).run
    assert automatic.data.name == "auto"
    fallen_back = dataclasses.replace(data.load(OWN.data, 0), notice="no CIFAR-10 here")
    monkeypatch.setattr(compare_cells, "dataset", lambda config: fallen_back)
    named = [cell.key for cell in compare_cells.cells(OWN)]
    assert [cell.key for cell in compare_cells.cells(automatic)] == named
    assert len(set(named)) == len(named)


def test_a_configuration_file_is_taken_and_overridden(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from experiments.compare.config import *\n"
        "from experiments.data.config import DataConfig\n"
        "config = Comparison(seeds=(7,), policies=('max_prob', 'vote'),\n"
        "    data=DataConfig(name='digits', calibrate=100, choose=200, certify=300))\n"
    )
    run = compare_config.parse(["--config", str(path), "--train.batch", "64"]).run
    assert (run.seeds, run.policies, run.train.batch) == ((7,), ("max_prob", "vote"), 64)
    assert (run.data.calibrate, run.data.certify) == (100, 300)
    assert run.network == Comparison().network, "not the data set's"
    path.write_text("from experiments.cifar.config import Config\nconfig = Config()\n")
    assert "Comparison" in refused("--config", str(path))


def test_resume_takes_the_stored_configuration_and_flags_extend_it(tmp_path):
    stored = dataclasses.replace(
        OWN,
        seeds=(4,),
        data=dataclasses.replace(OWN.data, cache=tmp_path / "cache"),
        static=dataclasses.replace(OWN.static, widths=(0.25,)),
    )
    (tmp_path / "config.json").write_text(json.dumps({"config": to_json(stored)}))
    begun = ["--workdir", str(tmp_path), "--resume"]
    assert compare_config.parse(begun).run == stored
    more = compare_config.parse([*begun, "--seeds", "4", "5"])
    assert more.run == dataclasses.replace(stored, seeds=(4, 5))
    assert more.workdir == tmp_path


def test_resume_begins_a_comparison_where_there_is_none(tmp_path):
    arguments = parsed("--workdir", str(tmp_path / "not there yet"), "--resume")
    assert arguments.run == OWN
    assert not arguments.resume, "nothing to continue"


@pytest.mark.parametrize("path", sorted(COMPARISONS.glob("*.py")), ids=lambda p: p.stem)
def test_every_configuration_file_can_be_run(path):
    config = load_config(path, Comparison)
    check(config)
    assert config.data.name == path.stem
    command = f"python -m experiments.compare --data.name {path.stem}"
    assert command in path.read_text(), "its docstring gives the command"


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--nonsense", "3"], ["--nonsense"]),
        (["--train.epoch", "3"], ["--train.epoch", "--train.epochs"]),
        (["--drift.kinds", "snow"], ["snow", "contrast"]),
        (["--targets.budgets", "1.5"], ["targets.budgets: 1.5", "between 0 and 1"]),
        (["--targets.budgets", "0.5", "0.5"], ["targets.budgets: (0.5, 0.5)", "each once"]),
        (["--targets.budgets-ms", "0"], ["targets.budgets_ms: 0", "greater than 0"]),
        (["--targets.drops", "-0.01"], ["targets.drops: -0.01", "at least 0"]),
        (["--targets.drop-confidence", "1"], ["targets.drop_confidence: 1", "below 1"]),
        (["--targets.drop-confidence", "0.4"], ["targets.drop_confidence: 0.4", "least 0.5"]),
        (["--targets.curve", "1"], ["targets.curve: 1", "2 points"]),
        (["--seeds", "3", "3"], ["seeds: (3, 3)", "each once"]),
        (["--seeds"], ["seeds: ()", "at least one"]),
        (["--seeds", "-1"], ["seeds: -1", "0 to 4294967295"]),
        (["--regimes", "joint", "joint"], ["regimes", "each once"]),
        (["--policies", "gate", "max_prob"], ["policies: gate", "another first"]),
        (["--policies", "margin", "vote"], ["guarantee.policies: max_prob", "margin, vote"]),
        (["--timing.policies", "gate", "--policies", "max_prob"], ["timing.policies: gate"]),
        (["--drift.policies", "vote", "--policies", "max_prob"], ["drift.policies: vote"]),
        (["--drift.severities", "6"], ["drift.severities: 6", "1 to 5"]),
        (["--data.certify", "0"], ["data.certify: 0", "200 or more"]),
        (["--guarantee.risks", "1"], ["guarantee.risks: 1", "between 0 and 1"]),
        (["--static.exits", "4"], ["static.exits: 4", "1 to 3"]),
        (["--static.widths", "0.5", "0.5"], ["static.widths: (0.5, 0.5)", "each once"]),
        (["--network.exits", "6"], ["network.exits: (6,)", "before the last block"]),
        (["--network.no-gate"], ["network.gate", "soft_auxiliary"]),
        (["--train.exit-weights", "1", "2"], ["2 weights for 4 exits"]),
        (["--jobs", "0"], ["jobs: 0", "at least 1"]),
        (["--resume"], ["--resume needs --workdir"]),
        (["--config", "not/there.py"], ["not/there.py", "no such file"]),
        (["--workdir"], ["--workdir", "Missing value"]),
    ],
)
def test_a_mistake_is_one_line_that_says_what_and_what_to_do(argv, words):
    message = refused(*argv)
    for word in words:
        assert word in message


def test_nothing_need_be_certified():
    run = parsed("--guarantee.policies", "--data.certify", "0").run
    assert (run.guarantee.policies, run.data.certify) == ((), 0)


def test_a_mistake_ends_with_status_2_and_one_line(capsys):
    assert compare.main([*DIGITS, "--seeds", "3", "3"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: seeds: (3, 3)")
    assert printed.err.count("\n") == 1
    # So is what only the images tell.
    assert compare.main([*DIGITS, "--data.choose", "5000"]) == 2
    printed = capsys.readouterr()
    assert "leave nothing to train on" in printed.err
    assert printed.err.count("\n") == 1
    assert compare.main([*DIGITS, "--data.feed", "streamed"]) == 2
    assert "give --data.feed resident" in capsys.readouterr().err


def test_a_mistake_is_a_line(capsys):
    assert compare.main(["--jobs", "0", *DIGITS]) == 2
    err = capsys.readouterr().err
    assert err.rstrip().splitlines()[-1].startswith("error: jobs: 0")
    assert "Traceback" not in err


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as ended:
        compare.main(["--help"])
    assert not ended.value.code
    said = capsys.readouterr().out
    for word in (
        *("python -m experiments.compare", "--workdir", "--resume", "--targets.budgets"),
        *("--seeds", "Each trains every network anew", "--guarantee.delta", "--static.widths"),
    ):
        assert word in said
