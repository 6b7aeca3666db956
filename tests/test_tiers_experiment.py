"""Emulated links, and the experiment on tiers. No measured time is compared with a forecast."""

import asyncio
import json
import time

import pytest

from eejax.planning import Link
from experiments.tiers import __main__ as experiment
from experiments.tiers.proxy import Shaper, emulated


def crossed(link, size, back):
    """Sends bytes over a link, and as many back: what came, what was counted, and seconds."""

    async def run():
        got = bytearray()

        async def serve(reader, writer):
            while len(got) < size:
                got.extend(await reader.read(65536))
            writer.write(bytes(range(256)) * (back // 256))
            await writer.drain()
            writer.close()

        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with listening:
            port = listening.sockets[0].getsockname()[1]
            async with emulated(link, f"127.0.0.1:{port}") as (address, counters):
                reader, writer = await asyncio.open_connection(*address.split(":"))
                begin = time.monotonic()
                writer.write(bytes(i % 251 for i in range(size)))
                answer = await reader.read(-1)
                taken = time.monotonic() - begin
                writer.close()
        return bytes(got), answer, (counters.up.bytes, counters.down.bytes), taken

    return asyncio.run(run())


@pytest.mark.parametrize("jitter", [0.0, 0.02])
def test_a_link_delays_and_paces_and_keeps_the_order(jitter):
    link = Link(4e6, 8e6, 0.1, jitter)
    got, answer, counts, taken = crossed(link, 100_000, 51_200)
    assert got == bytes(i % 251 for i in range(100_000))
    assert answer == bytes(range(256)) * 200
    assert counts == (100_000, 51_200)
    # At least what the rates and the round trip ask for; more on a busy machine.
    assert taken > 0.2 + 0.0512 + 0.1 - 2 * jitter - 0.01


def test_what_shares_a_direction_waits_for_it():
    shaper = Shaper(8e6, 0.0, 0.0, 0)
    first, second = shaper.arrival(1_000_000), shaper.arrival(1_000_000)
    assert second - first == pytest.approx(1.0)


def test_the_experiment_on_digits(digits_run, tmp_path, capsys):
    links = tmp_path / "links.yaml"
    fields = "{up_bits_per_second: 5.0e+7, down_bits_per_second: 5.0e+7, round_trip_seconds: 0.004}"
    links.write_text(f"near: {fields}\nfar: {fields}\n")
    argv = ["--run", str(digits_run), "--links", str(links), "--first", "near", "--second", "far"]
    argv += ["--codecs", "float32", "--requests", "8", "--pause", "0"]
    argv += ["--json", str(tmp_path / "rows.json")]
    assert experiment.main(argv) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    device, tiers, cloud = rows
    assert [row["placement"] for row in rows] == [
        *("all on the device", "tiers, float32", "all in the cloud"),
    ]
    assert device["link_bytes"] == []
    assert device["server_seconds"] == cloud["device_seconds"] == 0
    assert all(size > 64 for size in cloud["link_bytes"])  # the image and more
    for row in rows:
        assert sum(row["tiers"]) == 8
        assert row["accuracy"] == device["accuracy"]
        assert row["fallbacks"] == 0
    shares = [share / 8 for share in tiers["tiers"]]
    assert shares == pytest.approx(tiers["forecast"]["tier_shares"])
    assert "near" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--cut", "1"], "cut: [1]"),
        (["--requests", "0"], "requests: 0"),
        (["--pause", "-1"], "pause: -1"),
        (["--links", "/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_is_a_line(argv, said, capsys):
    assert experiment.main(["--run", "/nowhere", *argv]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
