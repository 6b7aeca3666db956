"""The table of devices and processes: its rows and its refusals. No time is asserted."""

import json
import os

import pytest

from experiments import scaling

SMALL = ["--data.name", "digits", "--network.width", "2", "--train.batch", "16", "--repeats", "2"]


def test_a_row_for_each_layout(tmp_path, capfd, monkeypatch):
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=4", "")
    monkeypatch.setenv("XLA_FLAGS", flags)
    path = tmp_path / "rows.json"
    assert scaling.main([*SMALL, "--devices", "2", "--modes", "weak", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    layouts = [[row[name] for name in ("mode", "processes", "devices", "batch")] for row in rows]
    assert layouts == [["", 1, 1, 16], ["weak", 1, 2, 32], ["weak", 2, 1, 32]]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(row["batch"] / (row["ms"] / 1e3))
        assert {"device", "versions", "command", "date"} <= set(row)
    assert rows[0]["time_ratio"] == 1
    assert "core(s)" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--repeats", "0"], "repeats: 0"),
        (["--devices", "1"], "devices: 1"),
        (["--devices", "3"], "train.batch: 16 cannot be used; give a multiple of 3"),
        (["--json", "nowhere/rows.json"], "no directory nowhere"),
    ],
)
def test_a_mistake_is_one_line(flags, words, capsys):
    assert scaling.main([*SMALL, *flags]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert words in message
