"""Who gets into a server, and how it ends. Servers are on loopback and end with their test."""

import asyncio
import contextlib
import io
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import time
import urllib.request

import grpc
import numpy as np
import pytest
import trustme
from onnx_models import small_bundle, some_images
from servers import INFER, ask, message, request, rows, server, stub

import eejax
from eejax.server.commands import started
from eejax.server.metrics import Lines, logger
from eejax.server.security import Limits, Tls, Tokens, read_tokens

pb = pytest.importorskip("kserve.protocol.grpc.grpc_predict_v2_pb2")
IMAGES = some_images(41, 4)
TOKEN = "a-token-that-is-long-enough"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("server") / "artifact"
    eejax.export(small_bundle(), place, layers=["onnx"])
    return place


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """An authority, a server's and a client's certificate by it, and a stranger's."""
    place = tmp_path_factory.mktemp("certificates")
    authority, other = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(place / "ca.pem")
    for name, ca in (("server", authority), ("client", authority), ("stranger", other)):
        issued = ca.issue_cert("127.0.0.1", "localhost")
        issued.private_key_pem.write_to_path(place / f"{name}.key")
        with (place / f"{name}.pem").open("wb") as file:
            for blob in issued.cert_chain_pems:
                file.write(blob.bytes())
    return place


async def get(port, context, path="/v2/health/live"):
    def run():
        url = f"https://127.0.0.1:{port}{path}"
        with urllib.request.urlopen(url, timeout=30, context=context) as reply:
            return reply.status

    return await asyncio.to_thread(run)


def client_context(certificates, name=None):
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    if name is not None:
        context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
    return context


def channel(certificates, name=None):
    pair = ()
    if name is not None:
        pair = ((certificates / f"{name}.key").read_bytes(),)
        pair += ((certificates / f"{name}.pem").read_bytes(),)
    return grpc.ssl_channel_credentials((certificates / "ca.pem").read_bytes(), *pair)


def test_tls_and_nothing_in_clear(place, certificates):
    async def run():
        tls = Tls(certificates / "server.pem", certificates / "server.key")
        async with server(place, tls=tls) as (ports, _):
            assert await get(ports.rest, client_context(certificates)) == 200
            async with stub(ports.grpc, channel(certificates)) as client:
                await client.ModelInfer(message(IMAGES), timeout=30)
            with pytest.raises(OSError, match=r"reset|closed|Connection"):
                await ask(ports.rest, "/v2/health/live")
            async with stub(ports.grpc) as client:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await client.ModelInfer(message(IMAGES), timeout=30)
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE

    asyncio.run(run())


@pytest.mark.parametrize("name", [None, "stranger"])
def test_mtls_lets_in_whom_the_authority_knows(place, certificates, name):
    async def run():
        tls = Tls(certificates / "server.pem", certificates / "server.key", certificates / "ca.pem")
        async with server(place, tls=tls) as (ports, _):
            assert await get(ports.rest, client_context(certificates, "client")) == 200
            async with stub(ports.grpc, channel(certificates, "client")) as client:
                await client.ModelInfer(message(IMAGES), timeout=30)
            with pytest.raises(OSError):  # noqa: PT011 - of ssl or of the connection
                await get(ports.rest, client_context(certificates, name))
            async with stub(ports.grpc, channel(certificates, name)) as client:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await client.ModelInfer(message(IMAGES), timeout=30)
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE

    asyncio.run(run())


def test_a_token_is_needed_for_all_but_probes(place):
    wrong = ["", "Bearer", "Bearer " + TOKEN[:-1], f"Basic {TOKEN}", TOKEN]

    async def run():
        async with server(place, tokens=Tokens([TOKEN])) as (ports, _):
            for path in ("/v2/health/live", "/v2/health/ready"):
                assert (await ask(ports.rest, path)).status == 200
            for path in ("/v2", "/metrics", "/v2/models/model", INFER, "/nowhere"):
                for header in wrong:
                    reply = await ask(ports.rest, path, authorization=header)
                    assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
            good = f"Bearer {TOKEN}"
            reply = await ask(ports.rest, INFER, request(IMAGES), authorization=good)
            assert reply.status == 200
            async with stub(ports.grpc) as client:
                assert (await client.ServerReady(pb.ServerReadyRequest())).ready
                for header in wrong:
                    with pytest.raises(grpc.aio.AioRpcError) as error:
                        await client.ModelInfer(
                            message(IMAGES), metadata=[("authorization", header)]
                        )
                    assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
                await client.ModelInfer(message(IMAGES), metadata=[("authorization", good)])

    asyncio.run(run())


def test_a_file_of_tokens_is_secret_and_its_tokens_are_long(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"{TOKEN}\n\n{TOKEN}2\n")
    path.chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        read_tokens(path)
    path.chmod(0o600)
    assert read_tokens(path).allow(f"Bearer {TOKEN}2")
    assert not read_tokens(path).allow("Bearer ")
    for text in ("", "short"):
        path.write_text(text)
        with pytest.raises(ValueError, match="16 characters"):
            read_tokens(path)


HEAD = f"POST {INFER} HTTP/1.1\r\nhost: x\r\n"


def sent(images, head=HEAD):
    """A request as it is sent."""
    body = json.dumps(request(images)).encode()
    return f"{head}content-length: {len(body)}\r\n\r\n".encode(), body


def test_connections_that_say_nothing_are_closed_and_others_served(place):
    """Some in the middle of a request."""
    limits = Limits(connections=1000, reading=1.0, draining=1)

    async def run():
        async with server(place, limits) as (ports, _):
            opened, begin = [], time.monotonic()
            for i in range(100):
                reader, writer = await asyncio.open_connection("127.0.0.1", ports.rest)
                if i % 2:
                    writer.write(HEAD.encode())
                opened.append((reader, writer))
            assert (await ask(ports.rest, INFER, request(IMAGES))).status == 200
            async with asyncio.timeout(60):
                await asyncio.gather(*(_end(reader) for reader, _ in opened))
            assert time.monotonic() - begin > 0.9
            # A body that does not come.
            reader, writer = await asyncio.open_connection("127.0.0.1", ports.rest)
            writer.write(f"{HEAD}content-length: 99\r\n\r\n{{".encode())
            assert b" 408 " in await asyncio.wait_for(reader.readline(), 60)
            for _, other in [*opened, (reader, writer)]:
                other.close()

    asyncio.run(run())


def test_the_oldest_silent_connections_make_room_then_those_that_rest(place):
    limits = Limits(connections=8, reading=600, draining=1)

    async def run():
        async with server(place, limits) as (ports, _):
            opened = []

            async def connect(data=b""):
                reader, writer = await asyncio.open_connection("127.0.0.1", ports.rest)
                opened.append(writer)
                writer.write(data)
                if data:
                    assert b" 200 " in await reader.readline()
                    await reader.readuntil(b"true}")
                return reader

            async def closed(reader):
                async with asyncio.timeout(3):  # uvicorn's own time between requests is 5 s
                    await _end(reader)

            get = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n"
            resting = [await connect(get) for _ in range(2)]
            silent = [await connect() for _ in range(6)]
            for reader in silent[:3]:
                await connect()
                await closed(reader)
            assert not any(reader.at_eof() for reader in (*silent[3:], *resting))
            for writer in opened[2:]:
                writer.close()
            await asyncio.sleep(0.3)
            # Now there is none that never asked.
            others = [await connect(get) for _ in range(6)]
            await connect(get)
            await closed(resting[0])
            assert not any(reader.at_eof() for reader in (resting[1], *others))
            for writer in opened:
                writer.close()

    asyncio.run(run())


def test_a_whole_request_has_one_time(place):
    """And not one for its head and one for its body."""

    async def run():
        async with server(place, Limits(reading=2.0, draining=1)) as (ports, _):
            head, body = sent(IMAGES)
            reader, writer = await asyncio.open_connection("127.0.0.1", ports.rest)
            begin = time.monotonic()
            await asyncio.sleep(1.5)
            writer.write(head)
            assert b" 408 " in await asyncio.wait_for(reader.readline(), 60)
            assert time.monotonic() - begin < 3
            writer.close()
            # A second request of a connection has it from the end of the first.
            reader, writer = await asyncio.open_connection("127.0.0.1", ports.rest)
            for _ in range(2):
                await asyncio.sleep(1.2)
                writer.write(head + body)
                assert b" 200 " in await asyncio.wait_for(reader.readline(), 60)
                await reader.readuntil(b"]}")
                while True:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(0.1):
                            await reader.read(65536)
                            continue
                    break
            writer.close()

    asyncio.run(run())


def test_a_client_that_does_not_read_its_answers_is_cut_off(place):
    limits = Limits(reading=0.5, seconds=0.5, draining=1)

    async def run():
        async with server(place, limits) as (ports, _):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", ports.rest))
            client.setblocking(False)
            async with asyncio.timeout(30):
                await _sent(client, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n" * 1000)

    asyncio.run(run())


async def _sent(client, data):
    with client, contextlib.suppress(ConnectionError):
        while True:
            await asyncio.get_running_loop().sock_sendall(client, data)


def test_a_client_that_has_ended_its_side_is_answered(place):
    async def run():
        async with server(place) as (ports, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", ports.rest)
            writer.write(b"".join(sent(IMAGES)))
            writer.write_eof()
            async with asyncio.timeout(60):
                said = await reader.read()
            assert b"HTTP/1.1 200 " in said
            assert said.endswith(b"}")
            writer.close()
            # Half a request is none.
            reader, writer = await asyncio.open_connection("127.0.0.1", ports.rest)
            writer.write(sent(IMAGES)[0] + b"{")
            writer.write_eof()
            async with asyncio.timeout(5):
                assert await reader.read() == b""
            writer.close()

    asyncio.run(run())


@pytest.mark.parametrize(("size", "token", "status"), [(20 << 20, TOKEN, 413), (4 << 20, "", 401)])
def test_who_sends_much_in_vain_sees_the_answer(place, size, token, status):
    async def run():
        async with server(place, tokens=Tokens([TOKEN])) as (ports, _):
            for _ in range(5):
                headers = {"authorization": f"Bearer {token}"}
                assert (await ask(ports.rest, INFER, bytes(size), **headers)).status == status
            # Who waits for leave to send is told so at once.
            reader, writer = await asyncio.open_connection("127.0.0.1", ports.rest)
            writer.write(f"{HEAD}expect: 100-continue\r\ncontent-length: 99999999\r\n\r\n".encode())
            assert b" 401 " in await asyncio.wait_for(reader.readline(), 5)
            writer.close()

    asyncio.run(run())


def test_what_is_thrown_away_has_an_end(place, caplog):
    """A client without a token that sends on and on."""

    async def run():
        async with server(place, Limits(reading=1, draining=1), tokens=Tokens([TOKEN])) as (
            ports,
            _,
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", ports.rest)
            writer.write(f"{HEAD}transfer-encoding: chunked\r\n\r\n".encode())
            begin = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while time.monotonic() < begin + 30:
                    writer.write(b"1\r\nx\r\n")
                    await writer.drain()
                    await asyncio.sleep(0.01)
            assert time.monotonic() < begin + 10
            writer.close()
            # So has one whose rest is no HTTP.
            reader, writer = await asyncio.open_connection("127.0.0.1", ports.rest)
            writer.write(f"{HEAD}transfer-encoding: chunked\r\n\r\n".encode())
            assert b" 401 " in await reader.readline()
            writer.write(b"zzz\r\n" * 10)
            async with asyncio.timeout(5):
                await _end(reader)
            writer.close()

    asyncio.run(run())
    assert not [record for record in caplog.records if record.exc_info]


@contextlib.contextmanager
def _log():
    """What the server's log gets."""
    handler = next(one for one in logger().handlers if isinstance(one.formatter, Lines))
    assert isinstance(handler, logging.StreamHandler)
    lines = io.StringIO()
    before = handler.setStream(lines)
    try:
        yield lines
    finally:
        handler.setStream(before)


def test_what_uvicorn_logs_is_json_too(place, capfd):
    async def run():
        async with server(place) as (ports, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", ports.rest)
            writer.write(b"rubbish\r\n\r\n")
            await asyncio.wait_for(_end(reader), 60)
            writer.close()

    with _log() as lines:
        asyncio.run(run())
    said = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert "Invalid HTTP request received." in [line["event"] for line in said]
    assert not any("traceback" in line for line in said)
    assert "Invalid HTTP" not in capfd.readouterr().err


def test_handshakes_of_tls_have_a_time(place, certificates):
    async def run():
        tls = Tls(certificates / "server.pem", certificates / "server.key")
        async with server(place, Limits(reading=1, draining=1), tls=tls) as (ports, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", ports.rest)
            async with asyncio.timeout(10):
                await _end(reader)
            writer.close()

    asyncio.run(run())


async def _end(reader):
    with contextlib.suppress(ConnectionError):
        while await reader.read(1024):
            pass


def test_a_client_that_leaves_frees_its_place(place):
    """REST and gRPC; the engine is held until both are gone."""
    import threading

    held, begun = threading.Event(), threading.Event()

    async def run():
        async with server(place) as (ports, tier):
            stages = tier.stages
            whole = stages.run_stage

            def slow(e, arrays, thresholds):
                begun.set()
                assert held.wait(60)
                return whole(e, arrays, thresholds)

            stages.run_stage = slow
            scheduler = tier.service.scheduler
            reader, writer = await asyncio.open_connection("127.0.0.1", ports.rest)
            body = json.dumps(request(IMAGES[:1])).encode()
            writer.write(
                b"POST /v2/models/model/infer HTTP/1.1\r\nhost: x\r\ncontent-length: "
                + str(len(body)).encode()
                + b"\r\n\r\n"
                + body
            )
            async with stub(ports.grpc) as client:
                call = client.ModelInfer(message(IMAGES[:2]))
                task = asyncio.ensure_future(call)
                await _until(lambda: scheduler.under_way == 3)
                writer.transport.abort()
                task.cancel()
                await _until(lambda: scheduler.under_way == 0)
            held.set()
            del reader

    asyncio.run(run())


async def _until(true):
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.01)


def launched(place, *flags):
    command = [sys.executable, "-m", "eejax.commands", "serve", str(place)]
    command += ["--rest-port", "0", "--grpc-port", "0", "--tile", "8", "--threads", "1", *flags]
    return started(command)


CLIENT = """
import json, sys
import numpy as np
import tritonclient.grpc, tritonclient.http
rest, rpc, path = sys.argv[1:]
images = np.load(path)
found = []
for module, port in ((tritonclient.http, rest), (tritonclient.grpc, rpc)):
    client = module.InferenceServerClient(f"127.0.0.1:{port}")
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("model")
    for binary in (True, False) if module is tritonclient.http else (True,):
        tensor = module.InferInput("images", list(images.shape), "UINT8")
        tensor.set_data_from_numpy(images, *([binary] if module is tritonclient.http else []))
        names = ("exits", "logits", "confidences", "partial", "certified")
        outputs = [
            module.InferRequestedOutput(name, *([binary] if module is tritonclient.http else []))
            for name in names
        ]
        result = client.infer("model", [tensor], outputs=outputs, request_id="7")
        found.append({name: result.as_numpy(name).tolist() for name in names})
    try:
        client.infer("other", [tensor])
    except Exception as error:
        assert "does not exist" in str(error), error
    else:
        raise AssertionError
print(json.dumps(found))
"""


def test_a_stock_client_is_served_and_sigterm_drains(place, tmp_path):
    """Two generated stubs of one protocol clash in one process, so the client has its own."""
    np.save(tmp_path / "images.npy", IMAGES)
    process, said = launched(place)
    try:
        client = subprocess.run(
            [
                *(sys.executable, "-c", textwrap.dedent(CLIENT)),
                *(str(said["rest"]), str(said["grpc"]), str(tmp_path / "images.npy")),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "COVERAGE_PROCESS_START": ""},
        )
        assert client.returncode == 0, client.stderr

        async def reference():
            reply = await ask(said["rest"], INFER, request(IMAGES))
            return rows(reply.content)

        expected = asyncio.run(reference())
        for found in json.loads(client.stdout):
            assert found["exits"] == expected["exits"].tolist()
            np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-3, atol=1e-4)
            assert not any(found["certified"])  # it was exported without a certificate
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_mistakes_are_a_line(place, tmp_path):
    for flags, said in (
        (["--cert", "x.pem"], "--cert and --key"),
        (["--token", str(tmp_path / "none")], "none"),
        (["--deadline-ms", "-1"], "--deadline-ms"),
        (["--host", "300.1.1.1"], "eejax: "),
    ):
        with pytest.raises(ValueError, match="a tier ended with status 2") as error:
            launched(place, *flags)
        assert said in str(error.value)
