"""How a server begins and ends, what it knows when it breaks, and what is certified."""

import asyncio
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from onnx_models import small_bundle, some_images
from servers import INFER, ask, request, rows, server, tiers

import eejax
from eejax.server.security import Limits
from eejax.server.upstream import Link
from eejax.tiers import Unanswered

IMAGES = some_images(71, 24)
INFINITE = float("inf")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("life") / "artifact"
    eejax.export(small_bundle(), place, layers=["onnx"], certificate={"risk": 0.1})
    return place


def test_a_server_that_broke_is_not_ready(place):
    statuses = []

    async def run():
        async with server(place) as (ports, tier):
            statuses.append((await ask(ports.rest, "/v2/health/ready")).status)
            vars(tier.service.scheduler)["next"] = lambda now: 1 / 0
            statuses.append((await ask(ports.rest, INFER, request(IMAGES))).status)
            statuses.append((await ask(ports.rest, "/v2/health/ready")).status)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(run())
    assert statuses == [200, 503, 503]


def test_only_lossless_codecs_and_the_artifacts_thresholds_are_certified(place):
    async def certified(codec, **options):
        async with tiers(place, (1,), codec, **options) as ports:
            found = rows((await ask(ports.rest, INFER, request(IMAGES))).content)
            return found["certified"], found["tiers"]

    for codec in ("float32", "float32+zstd"):
        found, _ = asyncio.run(certified(codec))
        assert found.all()
    for codec in ("bfloat16", "int8"):
        found, further = asyncio.run(certified(codec))
        assert found.tolist() == (further == 0).tolist()
        assert 0 < further.sum() < len(further)
    found, _ = asyncio.run(certified("float32", thresholds=(INFINITE, -INFINITE)))
    assert not found.any()


def test_a_next_tier_with_other_thresholds_is_another_network(place):
    async def run():
        async with server(place, stages=(1, 3), thresholds=(0.0, 0.0)) as (further, _):
            link = Link(f"127.0.0.1:{further.grpc}", "model", ("float32",))
            async with server(place, stages=(0, 1), link=link) as (ports, _):
                reply = await ask(ports.rest, INFER, request(IMAGES))
                return reply.content["parameters"]["fallback"]

    assert "other" in asyncio.run(run()).split(",")


def test_samples_at_the_next_tier_are_bounded(place):
    async def run():
        link = Link("127.0.0.1:9", "model")
        options = {"stages": (0, 1), "link": link, "thresholds": (INFINITE, INFINITE)}
        async with server(place, Limits(requests=4, seconds=600, draining=1), **options) as (
            _,
            tier,
        ):
            held, begun = asyncio.Event(), 0

            class Slow:
                async def forward(self, arrays, seconds):
                    nonlocal begun
                    begun += 1
                    await held.wait()
                    raise Unanswered("down")

            tier.upstream = Slow()
            under_way = [
                asyncio.create_task(tier.predict((image[None],), 600)) for image in IMAGES[:4]
            ]
            async with asyncio.timeout(60):
                while begun < 4:
                    await asyncio.sleep(0.01)
            more = await tier.predict((IMAGES[:1],), 600)
            held.set()
            return more.fallback, [told.fallback for told in await asyncio.gather(*under_way)]

    assert asyncio.run(run()) == ("full", ["down"] * 4)


def test_sigterm_while_tiers_start_leaves_no_process(place):
    words = [sys.executable, "-m", "eejax.commands", "tiers", str(place), "--cut", "1", "2"]
    process = subprocess.Popen(
        [*words, "--rest-port", "0", "--grpc-port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()  # the first of three
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        assert process.wait(60) in (0, 130)
    # Nobody is left of the session that it began.
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--deadline-ms", "nan"], "--deadline-ms nan"),
        (["--drain-seconds", "inf"], "--drain-seconds inf"),
        (["--requests", "8"], "--batch 64 images and --requests 8"),
    ],
)
def test_arguments_that_cannot_be_are_refused(place, flags, said, capsys):
    from eejax import commands

    assert commands.main(["serve", str(place), *flags]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_drift_sends_all_to_the_last_exit_and_nothing_is_certified(tmp_path):
    """Held-out samples that all leave at the first exit, and a stream that does not."""
    import dataclasses

    from eejax.runtime import HeldOut

    bundle = small_bundle()
    sure = np.full((2000, 3), 1e9, np.float32)
    held_out = HeldOut(sure, np.ones(sure.shape, bool))
    never = dataclasses.replace(bundle, held_out=held_out, thresholds=np.array([1e8, -INFINITE]))
    eejax.export(never, tmp_path / "a", layers=["onnx"], certificate={"risk": 0.1})

    async def run():
        async with server(tmp_path / "a") as (ports, _):
            found = [
                rows((await ask(ports.rest, INFER, request(IMAGES))).content) for _ in range(3)
            ]
            return found, (await ask(ports.rest, "/metrics")).text

    found, metrics = asyncio.run(run())
    # The alarm comes within the first request.
    for later in found[1:]:
        assert set(later["exits"]) == {2}
        assert not later["certified"].any()
    assert "eejax_drift_alarm 1.0" in metrics
