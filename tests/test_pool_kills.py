"""Workers and drivers that are killed at random moments: nothing is lost, doubled or changed."""

from __future__ import annotations

import re

import pytest

from experiments.pool.__main__ import main

LOCAL = ["--backend", "local"]
SUBMITIT = ["--backend", "submitit", "--slurm.cluster", "local", "--slurm.tasks", "8"]


@pytest.mark.parametrize(
    ("flags", "cells", "kills"),
    [(LOCAL, 1000, 20), (SUBMITIT, 48, 2)],
    ids=["local", "submitit"],
)
def test_every_result_is_there_once(flags, cells, kills, tmp_path, capfd):
    given = ["--jobs", "2", "--cells", f"{cells}", "--kills", f"{kills}", "--seed", "3"]
    status = main([*flags, *given, "--workdir", str(tmp_path)])
    said = capfd.readouterr().out
    print(said)  # has the seed
    assert status == 0
    found = re.findall(r"\d+", said.split(":", 1)[1])
    there, of, _, workers, drivers, seed, lost, doubled, changed = map(int, found[:9])
    assert (there, of, seed) == (cells, cells, 3)
    assert (lost, doubled, changed) == (0, 0, 0)
    assert drivers == 1
    # How many are still running when the last kill is due is a matter of chance.
    assert 0 < workers <= kills


def test_a_mistake_is_a_line(capsys):
    assert main(["--cells", "0"]) == 2
    assert "cells: 0" in capsys.readouterr().err
    assert main(["--backend", "slurm"]) == 2
    assert "submitit" in capsys.readouterr().err
