"""The command line: what it fills in, and the one-line reasons it gives."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.cifar import config as cifar_config
from experiments.cifar.config import Config, check
from experiments.command_line import CONFIGS, from_json, load_config, to_json
from experiments.data.config import DataConfig
from experiments.train.config import NetworkConfig, exit_weights

DIGITS = ["--data.name", "digits"]


def refused(*argv: str) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        cifar_config.parse(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_flags_override_the_data_sets_own_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    plain = cifar_config.parse(DIGITS).run
    changed = cifar_config.parse([*DIGITS, "--train.epochs", "3"]).run
    assert plain == load_config(CONFIGS / "digits.py", Config)
    automatic = cifar_config.parse(["--data.no-download", "--data.cache", str(tmp_path)]).run
    assert automatic.data.name == "auto", "loading the images tells of the fall-back"
    assert automatic.network == plain.network
    assert changed.train.epochs == 3
    assert changed.network == plain.network


def test_a_configuration_file_is_taken_and_overridden(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from experiments.cifar.config import Config\n"
        "from experiments.data.config import DataConfig\n"
        "config = Config(seed=7, data=DataConfig(name='digits', calibrate=100, choose=200))\n"
    )
    run = cifar_config.parse(["--config", str(path), "--train.batch", "64"]).run
    assert (run.seed, run.train.batch, run.data.name) == (7, 64, "digits")


@pytest.mark.parametrize(
    "path",
    [*sorted(CONFIGS.glob("*.py")), *sorted(CONFIGS.glob("icassp2020/*.py"))],
    ids=lambda p: p.stem,
)
def test_every_configuration_file_can_be_run(path):
    config = load_config(path, Config)
    if config.data.name == "files":  # of the user, who says where they are
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=Path()))
    check(config)
    text = path.read_text()
    assert "python -m experiments.cifar" in text, "its docstring gives the command"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--nonsense", "3"], ["--nonsense"]),
        (["--train.epoch", "3"], ["--train.epoch", "--train.epochs"]),
        (["--train.epochs", "many"], ["--train.epochs", "many"]),
        (["--train.epochs", "0"], ["train.epochs: 0", "greater than 0"]),
        (["--train.learning-rate", "-1"], ["train.learning_rate: -1"]),
        (["--train.label-smoothing", "1"], ["train.label_smoothing", "[0, 1)"]),
        (["--data.name", "mnist"], ["mnist", "cifar10"]),
        (["--data.dir", "not/there"], ["data.dir", "not/there"]),
        (["--config", "not/there.py"], ["not/there.py", "no such file"]),
        (["--network.exits", "1", "9"], ["exits (1, 9)", "1 to 6"]),
        (["--network.name", "resnet", "--network.depth", "55"], ["depth of 55", "6n + 2"]),
        (
            ["--network.exits", "1", "2", "3", "--policies.thresholds", "1", "2"],
            ["2 thresholds for 4 exits", "give 3"],
        ),
        (["--train.exit-weights", "1", "2"], ["2 weights for 4 exits"]),
        (["--train.exit-weights", "steep"], ["--train.exit-weights", "equal", "linear"]),
        (["--network.options", "link=boosted"], ["link=boosted", "regime decides"]),
        (["--network.no-gate"], ["network.gate", "soft"]),
        (["--train.regime", "joint", "--inference.policy", "gate"], ["inference.policy"]),
        (["--policies.budgets", "1.5"], ["policies.budgets: 1.5"]),
        (["--policies.drop-confidence", "1"], ["policies.drop_confidence: 1", "below 1"]),
        (["--policies.drop-confidence", "0.4"], ["policies.drop_confidence: 0.4", "least 0.5"]),
        (["--resume"], ["--resume needs --workdir"]),
    ],
)
def test_a_mistake_is_one_line_that_says_what_and_what_to_do(argv, words):
    message = refused(*(argv if "--data.name" in argv else [*DIGITS, *argv]))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("flags", "weights"),
    [
        ([], (1, 1, 1, 1)),
        (["equal"], (1, 1, 1, 1)),
        (["linear"], (0.4, 0.8, 1.2, 1.6)),
        (["0.5", "1", "2", "3"], (0.5, 1, 2, 3)),
    ],
)
def test_exit_weights_are_a_word_or_numbers(flags, weights):
    flags = ["--train.exit-weights", *flags] if flags else []
    run = cifar_config.parse([*DIGITS, *flags]).run
    assert exit_weights(run.train.exit_weights, 4) == pytest.approx(weights)
    assert from_json(Config, json.loads(json.dumps(to_json(run)))) == run


def test_a_configuration_file_that_breaks_says_how(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("config = nonsense\n")
    assert "NameError" in refused("--config", str(path))
    path.write_text("configuration = 3\n")
    assert "defines no `config`" in refused("--config", str(path))


def test_a_directory_that_holds_a_run_is_not_written_over(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "--resume" in refused(*DIGITS, "--workdir", str(tmp_path))


def test_resume_takes_the_runs_own_configuration_and_refuses_another(tmp_path):
    stored = Config(seed=3, data=DataConfig(name="digits"), network=NetworkConfig(width=8))
    (tmp_path / "config.json").write_text(json.dumps({"config": to_json(stored)}))
    assert cifar_config.parse(["--workdir", str(tmp_path), "--resume"]).run == stored
    message = refused("--workdir", str(tmp_path), "--resume", "--train.epochs", "99")
    assert "train.epochs is 10, not 99" in message


def test_resume_begins_a_run_where_there_is_none(tmp_path):
    for workdir in (tmp_path, tmp_path / "not there yet"):
        arguments = cifar_config.parse([*DIGITS, "--workdir", str(workdir), "--resume"])
        assert arguments.run == load_config(CONFIGS / "digits.py", Config)
        assert not arguments.resume, "nothing to continue"
        assert arguments.workdir == workdir


def test_the_configuration_survives_json(tmp_path):
    stored = load_config(CONFIGS / "cifar10_resnet.py", Config)
    there = json.loads(json.dumps(to_json(stored)))
    assert from_json(Config, there) == stored
    with pytest.raises(ValueError, match="wrong"):
        from_json(Config, {"wrong": 1})


def test_a_mistake_comes_without_a_traceback():
    command = [sys.executable, "-m", "experiments.cifar", "--nonsense"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert result.stderr.rstrip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr


def test_help_explains_every_field():
    command = [sys.executable, "-m", "experiments.cifar", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0
    for word in ("--train.epochs", "--workdir", "--resume", "Passes over the training split"):
        assert word in result.stdout
