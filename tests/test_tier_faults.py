"""What can go wrong beyond a tier, or with its clients: always an answer or a refusal."""

import asyncio
import contextlib
import dataclasses
import os
import random
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest
from onnx_models import small_bundle, some_images
from servers import INFER, ask, message, request, rows, server, stub

import eejax
from eejax.server.commands import started
from eejax.server.security import Limits
from eejax.server.upstream import Link

pb = pytest.importorskip("kserve.protocol.grpc.grpc_predict_v2_pb2")
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import (  # noqa: E402
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)

SEED = 20261128
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

    def __init__(self, extensions, answer):
        self.extensions, self.answer = extensions, answer

    async def ServerMetadata(self, request, context):
        return pb.ServerMetadataResponse(name="x", version="1", extensions=self.extensions)

    async def ModelInfer(self, request, context):
        return await self.answer(context)


@contextlib.asynccontextmanager
async def fake(place, answer, **changes):
    from eejax.runtime import read
    from eejax.server.upstream import Said

    said = Said(read(place).sha256, 1, ("float32",))._replace(**changes)
    listening = grpc.aio.server()
    add_GRPCInferenceServiceServicer_to_server(Fake(said.extensions(), answer), listening)
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


def test_a_full_disk_under_the_log_costs_no_answer(place):
    """Every line that it logs fails."""
    with open("/dev/full", "w") as full, socket_port() as (rest, rpc):
        command = [sys.executable, "-m", "eejax.commands", "serve", str(place)]
        command += ["--rest-port", str(rest), "--grpc-port", str(rpc), "--threads", "1"]
        process = subprocess.Popen(command, stderr=full)
        try:

            async def run():
                await until_served(rest)
                for _ in range(3):
                    await ask(rest, INFER, b"{")
                    assert (await ask(rest, INFER, request(IMAGES))).status == 200

            asyncio.run(run())
            process.terminate()
            assert process.wait(60) == 0
        finally:
            ended(process)


@contextlib.contextmanager
def socket_port():
    """Two ports that were free a moment ago."""
    with socket.socket() as a, socket.socket() as b:
        for one in (a, b):
            one.bind(("127.0.0.1", 0))
        ports = a.getsockname()[1], b.getsockname()[1]
    yield ports


def test_a_thousand_malformed_requests(place):
    """Valid ones with bytes flipped, cut, doubled, on both ports."""
    print(f"seed {SEED}")
    draw = random.Random(SEED)
    body = str(request(IMAGES[:1])).replace("'", '"').encode()
    head = b"POST /v2/models/model/infer HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    whole = head + b"content-length: %d\r\n\r\n" % len(body) + body
    packed = message(IMAGES[:1]).SerializeToString()

    def mutated(data):
        data = bytearray(data)
        for _ in range(draw.randint(1, 8)):
            at = draw.randrange(min(len(data), 400))
            kind = draw.random()
            if kind < 0.5:
                data[at] = draw.randrange(256)
            elif kind < 0.75:
                del data[at : at + draw.randint(1, 40)]
            else:
                data[at:at] = data[at : at + draw.randint(1, 40)]
        return bytes(data)

    async def run():
        limits = Limits(seconds=600, reading=2.0, draining=1)
        async with server(place, limits) as (ports, tier):

            async def over_http(data):
                reader, writer = await asyncio.open_connection("127.0.0.1", ports.rest)
                writer.write(data)
                with contextlib.suppress(ConnectionError):
                    writer.write_eof()
                    said = await asyncio.wait_for(reader.read(65536), 60)
                    assert b"Traceback" not in said
                    assert b".py" not in said
                writer.transport.abort()

            async def over_grpc(call, data):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await call(data, timeout=60)

            for start in range(0, 500, 50):
                await asyncio.gather(*(over_http(mutated(whole)) for _ in range(start, start + 50)))
            async with grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel:
                # Bytes as they are, not messages.
                call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
                for _ in range(10):
                    await asyncio.gather(*(over_grpc(call, mutated(packed)) for _ in range(50)))
            assert (await ask(ports.rest, INFER, request(IMAGES))).status == 200
            async with stub(ports.grpc) as client:
                await client.ModelInfer(message(IMAGES))
            await asyncio.sleep(0)
            assert tier.service.scheduler.under_way == 0

    asyncio.run(run())


def test_ten_thousand_connections_that_say_nothing(place):
    """As many as this machine lets a process have; in between, others are served."""
    most = min(10_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 500)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    command = [sys.executable, "-m", "eejax.commands", "serve", str(place)]
    command += ["--rest-port", "0", "--grpc-port", "0", "--threads", "1"]
    process, said = started(command)
    good = request(IMAGES)
    try:
        before = memory(process.pid)
        with contextlib.ExitStack() as opened:
            for i in range(most):
                place_ = ("127.0.0.1", said["rest"] if i % 2 else said["grpc"])
                opened.enter_context(contextlib.closing(socket.create_connection(place_, 60)))
                if i % 1000 == 999:
                    assert asyncio.run(ask(said["rest"], INFER, good)).status == 200
            grown = memory(process.pid) - before
        assert grown < 256 << 20
    finally:
        ended(process)


async def until_served(port):
    async with asyncio.timeout(120):
        while True:
            with contextlib.suppress(ConnectionError):
                if (await ask(port, INFER, request(IMAGES))).status == 200:
                    return
            await asyncio.sleep(0.2)


def memory(pid):
    """Bytes of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
