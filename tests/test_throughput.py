"""The throughput of a training step: its rows and its refusals. No time is asserted."""

import json

import pytest

from experiments import throughput

SMALL = ["--data.name", "digits", "--network.width", "2", "--train.batch", "16", "--repeats", "2"]


def test_rows_compare_one_exit_with_many(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert throughput.main([*SMALL, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [(row["dtype"], row["exits"]) for row in rows] == [
        ("float32", 1),
        ("float32", 4),
        ("bfloat16", 1),
        ("bfloat16", 4),
    ]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(16 / (row["ms"] / 1e3))
        assert {"device", "versions", "command", "date"} <= set(row)
    for one, many in (rows[:2], rows[2:]):
        assert "overhead" not in one
        # Three early heads of 10 classes and a gate read twice 2, 12, 12 channels.
        assert many["macs"] - one["macs"] == 11 * 2 * (2 + 12 + 12)
        assert many["macs_ratio"] == many["macs"] / one["macs"]
        assert many["overhead"] == pytest.approx(many["time_ratio"] / many["macs_ratio"])
        assert many["feed"] == "resident"
        assert many["input_images_per_second"] > 0
        assert many["together_images_per_second"] > 0
        assert 0 <= many["input_wait"] < 1
    assert f"{rows[1]['overhead']:.3f}" in capsys.readouterr().out


def test_streamed_input_is_timed_alone_and_beside_the_steps(tmp_path, capsys):
    path = tmp_path / "rows.json"
    flags = ["--data.feed", "streamed", "--dtypes", "float32", "--json", str(path)]
    assert throughput.main([*SMALL, *flags]) == 0
    _, many = json.loads(path.read_text())
    assert many["feed"] == "streamed"
    assert many["input_images_per_second"] > 0
    assert many["together_images_per_second"] > 0
    assert 0 < many["input_wait"] < 1
    assert "streamed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--repeats", "0"], "repeats: 0"),
        (["--train.batch", "5000"], "train.batch: 5000"),
        (["--dtypes", "float16"], "float16"),
        (["--network.exits", "9"], "1 to 6"),
        (["--json", "nowhere/rows.json"], "no directory nowhere"),
    ],
)
def test_a_mistake_is_one_line(flags, words, capsys):
    assert throughput.main([*SMALL, *flags]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert words in message


def test_help_explains_itself(capsys):
    with pytest.raises(SystemExit) as stop:
        throughput.main(["--help"])
    assert stop.value.code == 0
    assert "last exit alone" in " ".join(capsys.readouterr().out.split())
