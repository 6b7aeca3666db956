"""A server by the Open Inference Protocol: what it answers, and what it refuses."""

import asyncio
import contextlib

import grpc
import numpy as np
import pytest
from onnx_models import reference, small_bundle, some_images
from servers import INFER, ask, message, request, rows, server, stub

import eejax
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
    }


def test_what_is_no_request_is_refused_in_a_line_and_nobody_else_notices(place):
    async def use(ports):
        found = {}
        for name, body in wrong_requests().items():
            found[name] = await ask(ports.rest, INFER, body)
        # Binary data behind JSON, with a length that is none.
        headers = {"inference-header-content-length": "-5", "content-type": "application/x"}
        found["a length that is none"] = await ask(ports.rest, INFER, b"12", **headers)
        last = await ask(ports.rest, INFER, request(IMAGES[:1]))
        return found, last

    found, last = served(place, use)
    assert last.status == 200
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
