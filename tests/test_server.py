"""A server by the Open Inference Protocol: what it answers, and what it refuses."""

import asyncio
import contextlib
import json
import resource

import grpc
import numpy as np
import pytest
from onnx_models import reference, small_bundle, some_images
from servers import INFER, ask, message, request, rows, server, stub

import eejax
from eejax import runtime
from eejax.server.security import Limits
from eejax.tiers.codec import CODECS

pb = pytest.importorskip("kserve.protocol.grpc.grpc_predict_v2_pb2")
IMAGES = some_images(31, 12)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("server") / "artifact"
    eejax.export(small_bundle(), place, layers=["onnx"], certificate={"risk": 0.1})
    return place


def served(place, use, *limits, **options):
    """What `use(ports)` returns."""

    async def run():
        async with server(place, *limits, **options) as (ports, _):
            return await use(ports)

    return asyncio.run(run())


def test_both_protocols_answer_as_the_reference(place):
    expected = reference(small_bundle(), IMAGES, small_bundle().thresholds)

    async def use(ports):
        rest = await ask(ports.rest, INFER, request(IMAGES))
        async with stub(ports.grpc) as client:
            return rest.content, await client.ModelInfer(message(IMAGES))

    for response in served(place, use):
        found = rows(response)
        assert found["exits"].tolist() == expected.exits.tolist()
        assert found["labels"].tolist() == expected.logits.argmax(-1).tolist()
        np.testing.assert_allclose(found["logits"], expected.logits, rtol=1e-3, atol=1e-4)
        shifted = np.exp(expected.logits - expected.logits.max(-1, keepdims=True))
        np.testing.assert_allclose(
            found["confidences"], shifted.max(-1) / shifted.sum(-1), rtol=1e-3
        )
        assert found["certified"].all()
        assert not any(found[name].any() for name in ("partial", "levels", "tiers"))


def test_a_server_says_what_it_is(place):
    async def use(ports):
        paths = ["", "/health/live", "/health/ready", "/models/model", "/models/model/ready"]
        answers = [await ask(ports.rest, f"/v2{path}") for path in paths]
        async with stub(ports.grpc) as client:
            metadata = await client.ModelMetadata(pb.ModelMetadataRequest(name="model"))
            assert (await client.ServerReady(pb.ServerReadyRequest())).ready
            assert (await client.ServerLive(pb.ServerLiveRequest())).live
        return answers, metadata

    (server_, live, ready, model, model_ready), metadata = served(place, use)
    assert server_.content["name"] == "eejax"
    assert f"eejax codecs {' '.join(CODECS)}" in server_.content["extensions"]
    assert live.content["live"]
    assert ready.content["ready"]
    assert model_ready.content["ready"]
    assert model.content["inputs"] == [
        {"name": "images", "datatype": "UINT8", "shape": [-1, 12, 12, 3]}
    ]
    assert list(metadata.inputs[0].shape) == [-1, 12, 12, 3]
    assert {tensor.name for tensor in metadata.outputs} == {
        tensor["name"] for tensor in model.content["outputs"]
    }


def test_outputs_can_be_chosen(place):
    async def use(ports):
        asked = {**request(IMAGES[:2]), "outputs": [{"name": "labels"}, {"name": "partial"}]}
        good = await ask(ports.rest, INFER, asked)
        bad = await ask(ports.rest, INFER, {**asked, "outputs": [{"name": "secrets"}]})
        return good, bad

    good, bad = served(place, use)
    assert [tensor["name"] for tensor in good.content["outputs"]] == ["labels", "partial"]
    assert bad.status == 400
    assert "no output 'secrets'" in bad.content["error"]


def wrong_requests():
    good = request(IMAGES[:1])
    (tensor,) = good["inputs"]

    def changed(**changes):
        return {"inputs": [{**tensor, **changes}]}

    def rows(count):
        return [tensor["data"][i::count] for i in range(count)]

    return {
        "no JSON": b"{",
        "not UTF-8": b"\xff\xfe",
        "nothing": b"",
        "a list": [],
        "no inputs": {},
        "inputs that are no list": {"inputs": 3},
        "no input": {"inputs": []},
        "two inputs": {"inputs": [tensor, tensor]},
        "another name": changed(name="x"),
        "another type": changed(datatype="FP32"),
        "a type that is none": changed(datatype="PICKLE"),
        "objects": changed(datatype="BYTES", data=["gASVAAAA"]),
        "no shape": {"inputs": [{k: v for k, v in tensor.items() if k != "shape"}]},
        "another shape": changed(shape=[1, 12, 12, 4]),
        "a shape that is too large": changed(shape=[1 << 40, 12, 12, 3]),
        "a negative shape": changed(shape=[-1, 12, 12, 3]),
        "too few numbers": changed(data=tensor["data"][1:]),
        "too large a number": changed(data=[256, *tensor["data"][1:]]),
        "a negative number": changed(data=[-1, *tensor["data"][1:]]),
        "a fraction": changed(data=[1.5, *tensor["data"][1:]]),
        "words": changed(data=["a", *tensor["data"][1:]]),
        "ragged": changed(data=[[1, 2], [3]]),
        "nothing in it": changed(shape=[0, 12, 12, 3], data=[]),
        "no time": {**good, "parameters": {"deadline_ms": 0}},
        "a deadline that is none": {**good, "parameters": {"deadline_ms": "soon"}},
        "NaN for a deadline": {**good, "parameters": {"deadline_ms": "nan"}},
        "a boolean for a deadline": {**good, "parameters": {"deadline_ms": True}},
        "a list for a deadline": {**good, "parameters": {"deadline_ms": [1]}},
        "a deadline without end": {**good, "parameters": {"deadline_ms": 10**400}},
        "a list of parameters": {**good, "parameters": [1]},
        "a number of parameters": {**good, "parameters": 5},
        "an id that is a number": {**good, "id": 5},
        "an id that is an object": {**good, "id": {"a": 1}},
        "outputs that are no list": {**good, "outputs": 5},
        "an output that is a number": {**good, "outputs": [5]},
        "an output whose name is a number": {**good, "outputs": [{"name": 5}]},
        "an output with a number of parameters": {
            **good,
            "outputs": [{"name": "labels", "parameters": 5}],
        },
        "binary or not": {**good, "parameters": {"binary_data_output": [1]}},
        "a boolean among numbers": changed(data=[True, *tensor["data"][1:]]),
        "nothing among numbers": changed(data=[None, *tensor["data"][1:]]),
        "a shape of a boolean": changed(shape=[True, 12, 12, 3]),
        "a shape of a fraction": changed(shape=[1.0, 12, 12, 3]),
        "a shape of words": changed(shape=["1", 12, 12, 3]),
        "a shape of many": changed(shape=[1 << 60] * 9),
        "a name that is long": changed(name="x" * 100_000),
        "a name that is a list": changed(name=["images"]),
        "an output that is long": {**good, "outputs": [{"name": "x" * 100_000}]},
        "rows of other lengths": changed(data=[[1], *rows(4)]),
        "nested deeply": b'{"inputs": ' + b"[" * 100_000,
    }


def packed(images, extra=b"", header=None, **content):
    """A request with binary data: its body and headers."""
    tensor = {"name": "images", "datatype": "UINT8", "shape": list(images.shape)}
    tensor["parameters"] = {"binary_data_size": images.nbytes}
    text = json.dumps({"inputs": [tensor], **content}).encode()
    length = str(len(text)) if header is None else header
    headers = {"inference-header-content-length": length, "content-type": "application/x"}
    return text + images.tobytes() + extra, headers


def wrong_packed():
    one = IMAGES[:1]
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 12, 12, 3]}
    sized = {**tensor, "parameters": {"binary_data_size": -1}}
    return {
        "bytes behind the data": packed(one, b"zz"),
        "no bytes": packed(one[:0], inputs=[tensor]),
        "a size below nothing": packed(one, inputs=[sized]),
        "a length that is negative": packed(one, header="-5"),
        "a length that is too large": packed(one, header="99999"),
        "a length that is no number": packed(one, header="x"),
        "parameters of binary data": packed(one, parameters=[1]),
        "too many bytes for the shape": packed(
            np.zeros(5, np.uint8), inputs=[{**tensor, "parameters": {"binary_data_size": 5}}]
        ),
    }


def test_what_is_no_request_is_refused_in_a_line_and_nobody_else_notices(place):
    async def use(ports):
        found = {}
        for name, body in wrong_requests().items():
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            found[name] = await ask(ports.rest, INFER, data)
        for name, (body, headers) in wrong_packed().items():
            found[name] = await ask(ports.rest, INFER, body, **headers)
        last = await ask(ports.rest, INFER, request(IMAGES[:1]))
        return found, last, (await ask(ports.rest, "/metrics")).text

    found, last, metrics = served(place, use)
    assert last.status == 200
    # Each is counted once.
    assert f'eejax_requests_total{{outcome="invalid"}} {len(found)}.0' in metrics
    assert metrics.count("eejax_requests_total{") == 2
    for name, reply in found.items():
        assert 400 <= reply.status < 500, (name, reply.status, reply.text)
        assert "Traceback" not in reply.text
        assert ".py" not in reply.text
        assert len(reply.text) < 500, name


def test_the_same_over_grpc(place):
    good = message(IMAGES[:1])

    def changed(change):
        other = pb.ModelInferRequest()
        other.CopyFrom(good)
        change(other)
        return other

    def set_(name, value):
        return lambda other: setattr(other.inputs[0], name, value)

    def reshape(other):
        other.inputs[0].shape[:] = [1, 12, 12, -3]

    wrong = {
        "no input": changed(lambda other: other.ClearField("inputs")),
        "another name": changed(set_("name", "x")),
        "another type": changed(set_("datatype", "BYTES")),
        "a type that is none": changed(set_("datatype", "PICKLE")),
        "a shape": changed(reshape),
        "too few bytes": changed(lambda other: other.raw_input_contents.__setitem__(0, b"abc")),
        "no time": message(IMAGES[:1], deadline_ms=-1),
        "too many": message(np.zeros((65, 12, 12, 3), np.uint8)),
    }

    async def use(ports):
        found = {}
        async with stub(ports.grpc) as client:
            for name, one in wrong.items():
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await client.ModelInfer(one)
                found[name] = error.value
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await client.ModelInfer(
                    changed(lambda other: setattr(other, "model_name", "../../etc"))
                )
            assert error.value.code() == grpc.StatusCode.NOT_FOUND
            await client.ModelInfer(good)
        return found

    for name, error in served(place, use).items():
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, (name, error)
        assert "Traceback" not in (error.details() or "")


def test_models_are_not_loaded_or_unloaded_from_outside(place):
    async def use(ports):
        replies = [
            await ask(ports.rest, f"/v2/repository/models/model/{verb}", {})
            for verb in ("load", "unload")
        ]
        async with stub(ports.grpc) as client:
            for call, message_ in (
                (client.RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name="model")),
                (client.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(model_name="model")),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await call(message_)
                assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED
        replies.append(await ask(ports.rest, INFER, request(IMAGES[:1])))
        return [reply.status for reply in replies]

    assert served(place, use) == [404, 404, 200]


def test_a_request_that_is_too_long_is_refused_before_it_is_read(place):
    async def use(ports):
        reply = await ask(ports.rest, INFER, bytes(30_000))
        reader, writer = await asyncio.open_connection("127.0.0.1", ports.rest)
        # In pieces, without a length.
        writer.write(
            b"POST /v2/models/model/infer HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        with contextlib.suppress(ConnectionError):
            for _ in range(30):
                writer.write(b"400\r\n" + bytes(1024) + b"\r\n")
                await writer.drain()
        status = await reader.readline()
        writer.close()
        async with stub(ports.grpc) as client:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await client.ModelInfer(message(np.zeros((60, 12, 12, 3), np.uint8)))
        return reply.status, status, error.value.code()

    status, line, code = served(place, use, Limits(message=20_000, draining=1))
    assert status == 413
    assert b" 413 " in line
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_what_there_is_no_place_or_time_for_is_refused_at_once(place):
    async def use(ports):
        full = await ask(ports.rest, INFER, request(IMAGES[:3]))
        late = await ask(ports.rest, INFER, request(IMAGES[:1], deadline_ms=0.001))
        good = await ask(ports.rest, INFER, request(IMAGES[:2]))
        async with stub(ports.grpc) as client:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await client.ModelInfer(message(IMAGES[:3]))
        metrics = await ask(ports.rest, "/metrics")
        return full, late, good, error.value, metrics.text

    full, late, good, error, metrics = served(place, use, Limits(requests=2, draining=5))
    assert (full.status, late.status, good.status) == (429, 429, 200)
    assert full.headers["retry-after"] == "1"
    assert "2 samples are under way" in full.content["error"]
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert 'eejax_requests_total{outcome="full"} 2.0' in metrics
    assert 'eejax_requests_total{outcome="late"} 1.0' in metrics
    assert 'eejax_requests_total{outcome="answered"} 1.0' in metrics
    assert "eejax_under_way 0.0" in metrics


def test_binary_data_and_nested_lists_are_the_same_images(place):
    nested = request(IMAGES)
    nested["inputs"][0]["data"] = IMAGES.tolist()
    flat = request(IMAGES)

    async def use(ports):
        body, headers = packed(IMAGES, id="7", outputs=[{"name": "exits"}])
        binary = await ask(ports.rest, INFER, body, **headers)
        return [(await ask(ports.rest, INFER, one)).content for one in (flat, nested)], binary

    (one, other), binary = served(place, use)
    assert one["outputs"] == other["outputs"]
    assert binary.content["id"] == "7"
    np.testing.assert_array_equal(rows(binary.content)["exits"], rows(one)["exits"])


def test_an_output_that_is_asked_for_again_comes_once(place):
    async def use(ports):
        asked = {**request(IMAGES[:1]), "outputs": [{"name": "logits"}] * 2000}
        return await ask(ports.rest, INFER, asked)

    reply = served(place, use)
    assert [tensor["name"] for tensor in reply.content["outputs"]] == ["logits"]


def test_an_unknown_output_is_refused_before_anything_runs(place):
    async def run():
        async with server(place) as (ports, tier):
            vars(tier.stages)["run_stage"] = None
            asked = {**request(IMAGES[:1]), "outputs": [{"name": "secrets"}]}
            return await ask(ports.rest, INFER, asked)

    assert asyncio.run(run()).status == 400


def memory():
    """The most bytes that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_large_bodies_are_read_without_a_list_of_errors_or_numbers(place):
    """8 MB each; checked by a general validator, they took minutes and gigabytes."""
    wrong = b'{"inputs": [' + b"1," * 4_000_000 + b"1]}"
    large = packed(np.zeros((8_000_000 // 432, 12, 12, 3), np.uint8))
    many = request(np.zeros((4_000_000 // 432, 12, 12, 3), np.uint8))

    async def use(ports):
        before = memory()
        replies = [await ask(ports.rest, INFER, wrong)]
        replies.append(await ask(ports.rest, INFER, large[0], **large[1]))
        replies.append(
            await ask(ports.rest, INFER, json.dumps(many, separators=(",", ":")).encode())
        )
        return replies, memory() - before

    replies, grown = served(place, use, Limits(message=9 << 20, draining=5))
    assert [reply.status for reply in replies] == [400, 400, 400]
    # They do fit their shapes, and are too many images.
    assert all("1 <= n <= 64" in reply.text for reply in replies[1:])
    assert grown < 1 << 30


def test_what_is_not_there_is_not_found(place):
    async def use(ports):
        found = {}
        for path in (
            "/v2/models/model/versions/1",
            "/v2/models/model/versions/1/ready",
            "/v2/models/x",
            "/v2/models/x/ready",
            f"/v2/models/{'x' * 9000}",
            "/docs",
        ):
            found[path] = await ask(ports.rest, path)
        for path in ("/v2/models/model/versions/1/infer", "/v2/models/x/infer"):
            found[path] = await ask(ports.rest, path, request(IMAGES[:1]))
        wrong_method = await ask(ports.rest, INFER)
        queried = await ask(ports.rest, "/v2/models/model?model_version=1")
        return found, wrong_method, queried

    found, wrong_method, queried = served(place, use)
    for path, reply in found.items():
        assert reply.status == 404, path
        assert len(reply.text) < 400
        assert reply.content["error"]
    assert wrong_method.status == 405
    assert queried.status == 200


def test_probes_are_answered_when_all_places_are_taken(place):
    async def use(ports):
        _, writer = await asyncio.open_connection("127.0.0.1", ports.rest)
        writer.write(
            b"POST " + INFER.encode() + b" HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{"
        )
        async with asyncio.timeout(60):
            while (await ask(ports.rest, "/v2")).status != 429:
                await asyncio.sleep(0.01)
        # A probe takes no place and waits for no body.
        reader, other = await asyncio.open_connection("127.0.0.1", ports.rest)
        other.write(b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n")
        async with asyncio.timeout(5):
            line = await reader.readline()
        replies = [await ask(ports.rest, f"/v2/health/{name}") for name in ("live", "ready")]
        replies.append(await ask(ports.rest, "/v2/health/live", {}))
        for one in (writer, other):
            one.close()
        return line, [reply.status for reply in replies]

    line, statuses = served(place, use, Limits(requests=1, draining=1))
    assert b" 200 " in line
    assert statuses == [200, 200, 405]


def test_the_stage_of_features_is_a_whole_number(place):
    """True is equal to 1 in Python."""
    sha256 = runtime.load(place).manifest.sha256
    tensor = {"name": "features", "datatype": "UINT8", "shape": [1, 3], "data": [1, 2, 3]}

    async def use(ports):
        said = {"artifact": sha256, "codec": "float32"}
        return [
            await ask(
                ports.rest, INFER, {"inputs": [tensor], "parameters": {**said, "stage": stage}}
            )
            for stage in (True, 1.0, 1)
        ]

    *wrong, right = served(place, use, stages=(1, 3))
    assert [reply.content["error"] for reply in wrong] == [
        "stage True; expected 1.",
        "stage 1.0; expected 1.",
    ]
    # Its stage is accepted, and its length is not.
    assert right.status == 400
    assert "stage" not in right.content["error"]
