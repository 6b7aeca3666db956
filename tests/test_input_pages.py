"""The commands of the page on input, in their order, each with less to do."""

import json
import re
import shlex
from pathlib import Path

import pytest

from experiments import throughput
from experiments.cifar.__main__ import main as cifar
from experiments.pipelines import __main__ as pipelines

ROOT = Path(__file__).resolve().parent.parent
FEWER = {
    "--images 400": "--images 60",
    "--data.image-size 64": "--data.image-size 32",
    "--data.calibrate 40": "--data.calibrate 8",
    "--data.choose 80": "--data.choose 16",
    "--repeats 5": "--repeats 1",
    "configs/": f"{ROOT}/configs/",
}
# A network that compiles in seconds, and measurements that take none.
SMALL = "--network.name fast --network.width 4 --network.exits 2 --inference.repeats 1"


def commands():
    """The arguments of the page's shell blocks, by module."""
    page = (ROOT / "docs" / "input.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    for line in lines:
        for old, new in FEWER.items():
            line = line.replace(old, new)
        python, flag, module, *arguments = shlex.split(line)
        assert (python, flag) == ("python", "-m")
        yield module, arguments


def test_the_commands_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    making, own, timing, imagenet = commands()
    for (module, arguments), name in (
        (making, "pipelines"),
        (own, "cifar"),
        (timing, "throughput"),
    ):
        assert module == f"experiments.{name}", arguments
    assert pipelines.main(making[1]) == 0
    assert cifar([*own[1], *SMALL.split(), "--workdir", "run"]) == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["input_wait"] < 1 for row in rows)
    assert Path("run/report.html").exists()
    # The whole network of the other commands takes minutes to compile; its training is tested with
    # a smaller one.
    timed = [*timing[1], *SMALL.rpartition(" --inference")[0].split(), "--json", "rows.json"]
    timed += ["--data.calibrate", "8", "--data.choose", "8"]
    assert throughput.main(timed) == 0
    assert json.loads(Path("rows.json").read_text())[1]["feed"] == "streamed"
    # The last one up to the network: a batch larger than the data is refused once they are read.
    assert imagenet[0] == "experiments.cifar"
    assert cifar([*imagenet[1], "--data.image-size", "32", "--train.batch", "500"]) == 2


def test_pipelines_are_timed_and_those_without_their_framework_left_out(tmp_path, capsys):
    flags = ["--images", "20", "--batch", "4", "--batches", "2", "--rounds", "1", "--size", "32"]
    path = tmp_path / "rows.json"
    assert (
        pipelines.main([*flags, "--formats", "folder", "--workers", "1", "--json", str(path)]) == 0
    )
    rows = json.loads(path.read_text())
    assert [row["pipeline"] for row in rows] == ["eejax, threads", "eejax, processes"]
    assert all(row["images_per_second"] > 0 for row in rows)
    assert capsys.readouterr().out.count("left out") == 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--pythons", "tf=nowhere"], "an interpreter"),
        (["--pythons", "jax=/bin/sh"], "an interpreter"),
        (["--rounds", "0"], "at least 1"),
        (["--files", "nowhere"], "--make made"),
    ],
)
def test_a_mistake_is_one_line(flags, words, capsys):
    assert pipelines.main(flags) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert words in message
