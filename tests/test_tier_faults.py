"""What can go wrong beyond a tier: always an answer or a refusal."""

import asyncio
import contextlib
import dataclasses
import signal
import sys

import grpc
import numpy as np
import pytest
from onnx_models import small_bundle, some_images
from servers import INFER, ask, request, rows, server

import eejax
from eejax.runtime import read
from eejax.server.commands import started
from eejax.server.metrics import logger
from eejax.server.upstream import Link, NextTier, Said
from eejax.tiers import Unanswered

pb = pytest.importorskip("kserve.protocol.grpc.grpc_predict_v2_pb2")
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import (  # noqa: E402
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)

IMAGES = some_images(61, 4)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Of a network that is never sure at its first exit."""
    place = tmp_path_factory.mktemp("faults") / "artifact"
    bundle = dataclasses.replace(small_bundle(), thresholds=np.array([np.inf, -np.inf]))
    eejax.export(bundle, place, layers=["onnx"])
    return place


def next_tier(place, port=0):
    """The tier of the other stages, in a process of its own."""
    command = [sys.executable, "-m", "eejax.commands", "tier", str(place), "--stages", "1:3"]
    command += ["--rest-port", "0", "--grpc-port", str(port), "--tile", "8", "--threads", "1"]
    return started(command)


@contextlib.asynccontextmanager
async def first_tier(place, port):
    """The ports of a tier that forwards everything to this port."""
    link = Link(f"127.0.0.1:{port}", "model", ("float32",))
    async with server(place, stages=(0, 1), link=link) as (ports, _):
        yield ports


async def asked(ports, deadline_ms=60_000):
    """Asks for all images: why the next tier did not answer all of them; None if it did."""
    async with asyncio.timeout(120):
        reply = await ask(ports.rest, INFER, request(IMAGES, deadline_ms=deadline_ms))
        while reply.status == 429 and deadline_ms < 60_000:  # a busy machine
            reply = await ask(ports.rest, INFER, request(IMAGES, deadline_ms=deadline_ms))
    assert reply.status == 200, reply.text
    found = rows(reply.content)
    fallback = reply.content["parameters"].get("fallback")
    # Each has the next tier's answer, or this one's.
    assert found["exits"].tolist() == np.where(found["partial"], 0, 1).tolist()
    assert found["partial"].any() == (fallback is not None)
    return fallback


async def until_answered(ports):
    """Asks until the next tier answers again, as the breaker lets it."""
    async with asyncio.timeout(120):
        while await asked(ports) is not None:
            await asyncio.sleep(0.1)


def ended(process):
    process.kill()
    process.wait()


def test_the_next_tier_is_killed_and_restarted(place):
    process, said = next_tier(place)
    try:

        async def run():
            nonlocal process
            async with first_tier(place, said["grpc"]) as ports:
                assert await asked(ports) is None
                ended(process)
                reasons = {await asked(ports) for _ in range(5)}
                assert reasons <= {"down", "open", "down,open"}
                process, _ = await asyncio.to_thread(next_tier, place, said["grpc"])
                await until_answered(ports)

        asyncio.run(run())
    finally:
        ended(process)


def test_the_next_tier_is_stopped_and_goes_on(place):
    process, said = next_tier(place)
    try:

        async def run():
            async with first_tier(place, said["grpc"]) as ports:
                assert await asked(ports) is None
                process.send_signal(signal.SIGSTOP)
                reasons = {await asked(ports, deadline_ms=300) for _ in range(4)}
                assert reasons <= {"late", "open", "late,open"}
                process.send_signal(signal.SIGCONT)
                await until_answered(ports)

        asyncio.run(run())
    finally:
        process.send_signal(signal.SIGCONT)
        ended(process)


class Fake(GRPCInferenceServiceServicer):
    """A next tier that says it is the right one, and then answers as it is told."""

    def __init__(self, extensions, answer, pause):
        self.extensions, self.answer, self.pause = extensions, answer, pause

    async def ServerMetadata(self, request, context):
        await asyncio.sleep(self.pause)
        return pb.ServerMetadataResponse(name="x", version="1", extensions=self.extensions)

    async def ModelInfer(self, request, context):
        return await self.answer(context)


@contextlib.asynccontextmanager
async def fake(place, answer, pause=0.0, **changes):
    said = Said(read(place).sha256, 1, ("float32",))._replace(**changes)
    listening = grpc.aio.server()
    add_GRPCInferenceServiceServicer_to_server(Fake(said.extensions(), answer, pause), listening)
    port = listening.add_insecure_port("127.0.0.1:0")
    await listening.start()
    try:
        yield port
    finally:
        await listening.stop(0)


def outputs(**changes):
    """A response to one sample, right but for the changes: `name=(datatype, array)`."""
    arrays = {
        "logits": ("FP32", np.zeros((1, 10), np.float32)),
        "exits": ("INT32", np.ones(1, np.int32)),
        "levels": ("INT32", np.zeros(1, np.int32)),
        "tiers": ("INT32", np.zeros(1, np.int32)),
        "partial": ("BOOL", np.zeros(1, bool)),
        "certified": ("BOOL", np.zeros(1, bool)),
        **changes,
    }
    made = pb.ModelInferResponse(model_name="model")
    for name, (kind, array) in arrays.items():
        made.outputs.append(
            pb.ModelInferResponse.InferOutputTensor(name=name, datatype=kind, shape=array.shape)
        )
        made.raw_output_contents.append(array.tobytes())
    return made


def classes():
    return len(small_bundle().classes)


def garbage():
    good = outputs(logits=("FP32", np.zeros((1, classes()), np.float32)))
    cut = pb.ModelInferResponse()
    cut.CopyFrom(good)
    cut.raw_output_contents[0] = b"abc"
    nan = np.full((1, classes()), np.nan, np.float32)
    logits = ("FP32", np.zeros((1, classes()), np.float32))
    return {
        "nothing": pb.ModelInferResponse(),
        "cut": cut,
        "NaN": outputs(logits=("FP32", nan)),
        "other classes": outputs(logits=("FP32", np.zeros((1, classes() + 1), np.float32))),
        "two samples": outputs(logits=("FP32", np.zeros((2, classes()), np.float32))),
        "another exit": outputs(logits=logits, exits=("INT32", np.full(1, 3, np.int32))),
        "an exit before": outputs(logits=logits, exits=("INT32", np.zeros(1, np.int32))),
        "another type": outputs(logits=logits, exits=("STRING", np.zeros(1, np.int32))),
    }


@pytest.mark.parametrize("name", garbage())
def test_the_next_tier_answers_garbage(place, name):
    async def answer(context):
        return garbage()[name]

    async def run():
        async with fake(place, answer) as port, first_tier(place, port) as ports:
            return {await asked(ports) for _ in range(2)}

    assert asyncio.run(run()) <= {"garbage", "garbage,open", "open"}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "full"),
        (grpc.StatusCode.UNAVAILABLE, "down"),
        (grpc.StatusCode.UNAUTHENTICATED, "refused"),
        (grpc.StatusCode.INTERNAL, "garbage"),
    ],
)
def test_the_next_tier_refuses(place, code, reason):
    async def answer(context):
        await context.abort(code, "no")

    async def run():
        async with fake(place, answer) as port, first_tier(place, port) as ports:
            return await asked(ports)

    assert reason in asyncio.run(run())


def test_the_next_tier_is_slow(place):
    async def answer(context):
        await asyncio.sleep(600)

    async def run():
        async with fake(place, answer) as port, first_tier(place, port) as ports:
            return await asked(ports, deadline_ms=300)

    assert asyncio.run(run()) == "late"


@pytest.mark.parametrize("changes", [{"artifact": "0"}, {"stage": 2}, {"codecs": ("int8",)}])
def test_the_next_tier_is_another(place, changes):
    async def answer(context):
        raise AssertionError

    async def run():
        async with fake(place, answer, **changes) as port, first_tier(place, port) as ports:
            return await asked(ports)

    assert "other" in asyncio.run(run())


def test_another_artifact_in_the_place_of_the_next_tiers(place, tmp_path):
    eejax.export(small_bundle(), tmp_path / "other", layers=["onnx"])

    async def run():
        async with contextlib.AsyncExitStack() as stack:
            following = contextlib.AsyncExitStack()
            (_, port), _ = await following.enter_async_context(server(place, stages=(1, 3)))
            ports = await stack.enter_async_context(first_tier(place, port))
            assert await asked(ports) is None
            await following.aclose()
            replaced = server(tmp_path / "other", stages=(1, 3), grpc=port)
            await stack.enter_async_context(replaced)
            async with asyncio.timeout(120):
                while "other" not in (await asked(ports) or ""):
                    await asyncio.sleep(0.1)

    asyncio.run(run())


@contextlib.asynccontextmanager
async def way(place, port, codec="float32", token=None):
    """The way to a next tier, alone."""
    link = Link(f"127.0.0.1:{port}", "model", (codec,), token=token)
    made = NextTier(link, read(place), 1)
    try:
        yield made
    finally:
        await made.close()


FEATURES = (np.zeros((1, 4), np.float32),)


def test_a_sample_with_little_time_waits_for_no_other(place):
    async def run():
        async with fake(place, None, pause=600) as port, way(place, port) as upstream:
            patient = asyncio.create_task(upstream.forward(FEATURES, 600))
            await asyncio.sleep(0.1)
            async with asyncio.timeout(60):
                with pytest.raises(Unanswered, match="late"):
                    await upstream.forward(FEATURES, 0.2)
            assert not patient.done()
            patient.cancel()

    asyncio.run(run())


def test_whatever_goes_wrong_here_is_no_answer(place, monkeypatch):
    def missing(arrays, codec):
        raise ModuleNotFoundError("codecs with zstd need zstandard")

    lines = []
    monkeypatch.setattr("eejax.server.upstream.encode", missing)
    monkeypatch.setattr(logger(), "error", lambda *a, **k: lines.append((a, k)))

    async def run():
        async with fake(place, None) as port, way(place, port) as upstream:
            with pytest.raises(Unanswered, match="garbage"):
                await upstream.forward(FEATURES, 600)

    asyncio.run(run())
    assert len(lines) == 1
    assert "zstandard" in str(lines)


@pytest.mark.parametrize("token", ["two\nlines", "two words", "t\u00f6ken", "bell\a"])
def test_a_token_that_no_header_can_hold_is_refused(place, token):
    async def run():
        async with way(place, 1, token=token):
            pass

    with pytest.raises(ValueError, match="printable ASCII"):
        asyncio.run(run())


@contextlib.asynccontextmanager
async def proxy(port, most):
    """A link that breaks after so many bytes upwards, each time."""

    async def connected(reader, writer):
        other_reader, other_writer = await asyncio.open_connection("127.0.0.1", port)

        async def copy(source, sink, left):
            with contextlib.suppress(ConnectionError):
                while left > 0 and (data := await source.read(min(left, 4096))):
                    left -= len(data)
                    sink.write(data)
                    await sink.drain()
            sink.transport.abort()

        try:
            await asyncio.gather(copy(reader, other_writer, most), copy(other_reader, writer, 1e18))
        finally:
            writer.transport.abort()
            other_writer.transport.abort()

    listening = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


def test_the_link_is_cut_in_the_middle_of_a_message(place):
    async def run():
        async with server(place, stages=(1, 3)) as (further, _):
            size = 1500  # after the greetings, within the first features
            async with proxy(further.grpc, size) as port, first_tier(place, port) as ports:
                return {await asked(ports) for _ in range(3)}

    reasons = asyncio.run(run())
    assert reasons
    assert all(set(reason.split(",")) <= {"down", "open", "late"} for reason in reasons)


def test_nobody_is_there_or_somebody_who_speaks_otherwise(place):
    async def run():
        async def talk(reader, writer):
            writer.write(b"220 smtp.example.org ready\r\n")
            await asyncio.sleep(0.05)
            writer.close()

        listening = await asyncio.start_server(talk, "127.0.0.1", 0)
        async with listening:
            port = listening.sockets[0].getsockname()[1]
            async with first_tier(place, port) as ports:
                first = await asked(ports, deadline_ms=2000)
        async with first_tier(place, port) as ports:  # now nobody
            return first, await asked(ports, deadline_ms=2000)

    for reason in asyncio.run(run()):
        assert set(reason.split(",")) <= {"down", "late", "open"}
