"""What clients can do to a server: others are answered, and memory stays bounded."""

import asyncio
import collections
import contextlib
import http.client
import os
import random
import resource
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from onnx_models import small_bundle, some_images
from servers import INFER, ask, message, request, server, stub

import eejax
from eejax.server.commands import started
from eejax.server.security import Limits, Tokens

pb = pytest.importorskip("kserve.protocol.grpc.grpc_predict_v2_pb2")
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import (  # noqa: E402
    GRPCInferenceServiceStub,
)

SEED = 20261128
IMAGES = some_images(61, 4)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("abuse") / "artifact"
    eejax.export(small_bundle(), place, layers=["onnx"])
    return place


def half_call(channel):
    """A call with headers and no message, under way."""

    async def never():
        await asyncio.sleep(3600)
        yield b""

    return channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")(never())


def apart(port):
    """A channel with a connection of its own."""
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)])


TOKEN = "a-token-that-is-long-enough"


@pytest.mark.parametrize("tokens", [None, [TOKEN]])
def test_calls_without_a_message_take_no_places(place, tokens):
    limits = Limits(batch=4, requests=8, reading=2.0, seconds=600, draining=1)
    metadata = [("authorization", f"Bearer {TOKEN}")] if tokens else []

    async def run():
        options = {"tokens": Tokens(tokens)} if tokens else {}
        async with server(place, limits, **options) as (ports, _), contextlib.AsyncExitStack() as s:
            # More than there are places, and than one connection may have.
            channels = [await s.enter_async_context(apart(ports.grpc)) for _ in range(3)]
            halves = [half_call(channel) for channel in channels for _ in range(8)]
            await asyncio.sleep(0.3)
            async with asyncio.timeout(120), stub(ports.grpc) as client:
                await client.ServerLive(pb.ServerLiveRequest())
                await client.ModelInfer(message(IMAGES), metadata=metadata)
                codes = {await call.code() for call in halves}
        refused = "UNAUTHENTICATED" if tokens else "RESOURCE_EXHAUSTED"
        assert codes == {grpc.StatusCode[refused]}

    asyncio.run(run())


def test_there_are_no_more_calls_under_way_than_places(place):
    limits = Limits(batch=4, requests=4, seconds=600, draining=1)

    async def run():
        async with (
            server(place, limits) as (ports, tier),
            stub(ports.grpc) as client,
            apart(ports.grpc) as other,
        ):
            go, predict, waiting = asyncio.Event(), tier.service.predict, []

            async def held(arrays, seconds):
                waiting.append(arrays)
                await go.wait()
                return await predict(arrays, seconds)

            tier.service.predict = held
            calls = [client.ModelInfer(message(IMAGES[:1])) for _ in range(4)]
            async with asyncio.timeout(120):
                while len(waiting) < 4:
                    await asyncio.sleep(0.01)
                further = GRPCInferenceServiceStub(other).ModelInfer(message(IMAGES[:1]))
                assert await further.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                await GRPCInferenceServiceStub(other).ServerLive(pb.ServerLiveRequest())
                go.set()
                await asyncio.gather(*calls)
                await GRPCInferenceServiceStub(other).ModelInfer(message(IMAGES[:1]))

    asyncio.run(run())


def test_silent_connections_make_way(place):
    limits = Limits(batch=4, requests=8, connections=5, reading=1.0, seconds=600, draining=1)
    hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])

    async def run():
        async with server(place, limits) as (ports, _), contextlib.AsyncExitStack() as stack:
            for _ in range(5):
                silent = socket.create_connection(("127.0.0.1", ports.grpc), 60)
                stack.enter_context(contextlib.closing(silent)).sendall(hello)
            await asyncio.sleep(0.2)
            async with asyncio.timeout(30):
                while True:
                    async with stub(ports.grpc) as client:
                        with contextlib.suppress(grpc.aio.AioRpcError):
                            await client.ModelInfer(message(IMAGES), timeout=60)
                            return
                    await asyncio.sleep(0.2)

    asyncio.run(run())


def test_an_unknown_model_is_not_found(place):
    async def run():
        async with server(place) as (ports, _), stub(ports.grpc) as client:
            name = "x" * 5000
            calls = [
                client.ModelReady(pb.ModelReadyRequest(name=name)),
                client.ModelMetadata(pb.ModelMetadataRequest(name=name)),
                client.ModelInfer(pb.ModelInferRequest(model_name=name)),
            ]
            for call in calls:
                assert await call.code() == grpc.StatusCode.NOT_FOUND
                assert 80 < len(await call.details()) < 150
            assert (await client.ModelReady(pb.ModelReadyRequest(name="model"))).ready
            long = message(IMAGES)
            long.inputs[0].name = name
            long.inputs[0].contents.uint_contents.append(1)
            call = client.ModelInfer(long)
            assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert len(await call.details()) <= 400

    asyncio.run(run())


def test_a_full_disk_under_the_log_costs_no_answer(place):
    """Every line that it logs fails."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "eejax.commands", "serve", str(place)]
        command += ["--rest-port", "0", "--grpc-port", "0", "--threads", "1"]
        process = subprocess.Popen(command, stderr=full)
        try:

            async def run():
                rest = await served(process.pid)
                for _ in range(3):
                    await ask(rest, INFER, b"{")
                    assert (await ask(rest, INFER, request(IMAGES))).status == 200

            asyncio.run(run())
            process.terminate()
            assert process.wait(60) == 0
        finally:
            ended(process)


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

    statuses, codes = collections.Counter(), collections.Counter()

    async def run():
        limits = Limits(seconds=600, reading=1.0, draining=1)
        async with server(place, limits) as (ports, tier):

            async def over_http(data):
                """The status; None if there is none."""
                reader, writer = await asyncio.open_connection("127.0.0.1", ports.rest)
                writer.write(data)
                said = b""
                with contextlib.suppress(ConnectionError):
                    said = await asyncio.wait_for(reader.read(65536), 60)
                writer.transport.abort()
                assert b"Traceback" not in said
                assert b".py" not in said
                return int(said.split()[1]) if said else None

            async def over_grpc(call, data):
                made = call(data, timeout=60)
                assert ".py" not in (await made.details() or "")
                return await made.code()

            assert await over_http(whole) == 200
            for _ in range(5):
                sent = [over_http(mutated(whole)) for _ in range(100)]
                statuses.update(await asyncio.gather(*sent))
            async with grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel:
                # Bytes as they are, not messages.
                call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
                assert await over_grpc(call, packed) == grpc.StatusCode.OK
                for _ in range(10):
                    sent = [over_grpc(call, mutated(packed)) for _ in range(50)]
                    codes.update(await asyncio.gather(*sent))
            assert (await ask(ports.rest, INFER, request(IMAGES))).status == 200
            async with stub(ports.grpc) as client:
                await client.ModelInfer(message(IMAGES))
            await asyncio.sleep(0)
            assert tier.service.scheduler.under_way == 0

    asyncio.run(run())
    print(statuses, codes)
    assert statuses.keys() <= {None, 200, 400, 404, 405, 408, 411, 413, 429}
    assert statuses[None] < 250 < statuses[400] + statuses[200]
    # A deadline in a mutated request may be too short.
    allowed = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}
    assert {code.name for code in codes} <= allowed


def test_ten_thousand_connections_that_say_nothing(place):
    """As many as this machine lets a process have; in between, others are served."""
    before_limits = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = 10_500 if hard == resource.RLIM_INFINITY else min(10_500, hard)
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, files), hard))
    command = [sys.executable, "-m", "eejax.commands", "serve", str(place)]
    command += ["--rest-port", "0", "--grpc-port", "0", "--threads", "1"]
    process, said = started(command)
    good = request(IMAGES)
    try:
        before = memory(process.pid)
        with contextlib.ExitStack() as opened:
            for i in range(files - 500):
                place_ = ("127.0.0.1", said["rest"] if i % 2 else said["grpc"])
                opened.enter_context(contextlib.closing(socket.create_connection(place_, 60)))
                if i % 1000 == 999:
                    assert asyncio.run(ask(said["rest"], INFER, good)).status == 200
            grown = memory(process.pid) - before
        assert grown < 256 << 20
    finally:
        ended(process)
        resource.setrlimit(resource.RLIMIT_NOFILE, before_limits)


async def served(pid):
    """The port at which a process answers over REST, as soon as it does."""
    async with asyncio.timeout(120):
        while True:
            for port in listening(pid):
                with contextlib.suppress(OSError, http.client.HTTPException):
                    if (await ask(port, INFER, request(IMAGES))).status == 200:
                        return port
            await asyncio.sleep(0.2)


def listening(pid):
    """The ports at which a process listens, IPv4."""
    sockets = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(os.readlink(file))
    lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return [
        int(line[1].split(":")[1], 16)
        for line in lines
        if line[3] == "0A" and f"socket:[{line[9]}]" in sockets
    ]


def memory(pid):
    """Bytes of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def ended(process):
    process.kill()
    process.wait()
