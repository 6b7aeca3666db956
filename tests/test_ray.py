"""A network as a Ray Serve application: who answers, who refuses, and what ends."""

import asyncio
import json
import pickle
import re
import secrets
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_models import reference, small_bundle, some_images
from PIL import Image
from servers import INFER, ask, request, rows

import eejax
from eejax.server.guarded import Guarded
from eejax.server.security import Limits
from eejax.serving import Refusal
from eejax.tiers import Told, Unanswered

pytest.importorskip("ray")
pytestmark = [
    # Ray's own models, at import.
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on.*:DeprecationWarning"),
    # Ray starts its processes by fork and exec, with JAX's threads in this one.
    pytest.mark.filterwarnings("ignore:os.fork\\(\\) was called:RuntimeWarning"),
]
IMAGES = some_images(51, 24)
LIMITS = Limits(seconds=600, draining=5)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("ray") / "artifact"
    eejax.export(small_bundle(), place, layers=["onnx"])
    return place


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, without a dashboard: the port of Ray Serve's HTTP proxy."""
    import ray
    from ray import serve

    # Short, because sockets lie in it.
    folder = tempfile.mkdtemp(prefix="ray")
    with pytest.MonkeyPatch.context() as patch, socket.socket() as listener:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_prestart_worker_first_driver", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # of replicas
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        listener.close()
        ray.init(
            num_cpus=5,
            object_store_memory=100 << 20,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield port
        finally:
            serve.shutdown()
            ray.shutdown()
    until(lambda: not processes(folder))
    shutil.rmtree(folder)


def processes(word):
    """The processes with a word in their command line."""
    lines = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines[path.parent.name] = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
    return [pid for pid, line in lines.items() if word in line]


def until(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# Ray's own settings, which it reads when a data set is made.
@pytest.mark.filterwarnings("ignore:.* is deprecated:DeprecationWarning")
def test_a_data_set_is_answered_as_the_page_says(cluster, place, tmp_path):
    from pyarrow import parquet

    (tmp_path / "photos").mkdir()
    for i, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / "photos" / f"{i:02}.png")
    page = (Path(__file__).parent.parent / "docs" / "ray.md").read_text()
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Predictor" in c)
    for name, given in [
        ('"artifact"', repr(str(place))),
        ('"photos"', repr(str(tmp_path / "photos"))),
        ('"answers"', repr(str(tmp_path / "answers"))),
        ("(32, 32)", "(12, 12)"),
        ("=1024", "=5"),
    ]:
        assert code.count(name) == 1
        code = code.replace(name, given)
    exec(code, {})
    rows = parquet.read_table(tmp_path / "answers").sort_by("path").to_pydict()
    expected = reference(small_bundle(), IMAGES, small_bundle().thresholds)
    assert [Path(path).name for path in rows["path"]] == [f"{i:02}.png" for i in range(24)]
    assert rows["exit"] == (expected.exits + 1).tolist()
    assert rows["predicted"] == expected.logits.argmax(-1).tolist()


@pytest.fixture(scope="module")
def handle(cluster, place):
    """Of two groups of stages with two replicas each."""
    from ray import serve
    from ray_replicas import Marked

    import eejax.server.ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eejax.server.ray, "Group", Marked)
        scale = {"min_replicas": 2, "max_replicas": 2}
        application = eejax.server.ray.application(
            place, (1,), replicas=(2, scale), tile=8, limits=LIMITS
        )
    return serve.run(application, name="tiers")


def marks(place, method):
    return set(place.parent.glob(f"{method}_*"))


def test_groups_answer_as_one_network(handle):
    expected = reference(small_bundle(), IMAGES, small_bundle().thresholds)
    told = handle.predict.remote(IMAGES).result()
    assert [answer.exit for answer in told] == expected.exits.tolist()
    logits = np.stack([answer.logits for answer in told])
    np.testing.assert_allclose(logits, expected.logits, rtol=1e-3, atol=1e-4)
    assert [answer.tier for answer in told] == (expected.exits >= 1).astype(int).tolist()
    assert not any(answer.partial or answer.fallback for answer in told)


def test_http_answers_as_the_network(handle, cluster):
    expected = reference(small_bundle(), IMAGES, small_bundle().thresholds)
    reply = asyncio.run(ask(cluster, INFER, request(IMAGES)))
    assert reply.status == 200, reply.text
    found = rows(reply.content)
    assert found["exits"].tolist() == expected.exits.tolist()
    np.testing.assert_allclose(found["logits"], expected.logits, rtol=1e-3, atol=1e-4)
    assert asyncio.run(ask(cluster, "/v2")).status == 404


def test_both_replicas_of_both_groups_serve(handle, place):
    def served():
        calls = [handle.predict.remote(IMAGES[i % 24][None]) for i in range(48)]
        assert all(len(call.result()) == 1 for call in calls)
        return len(marks(place, "predict")) == len(marks(place, "forward")) == 2

    until(served)


def test_a_refusal_comes_over_the_handle(handle):
    with pytest.raises(Refusal) as refused:
        handle.predict.remote(IMAGES, 1e-6).result()
    assert refused.value.reason == "late"
    with pytest.raises(ValueError, match="65 images; give 64 at most"):
        handle.predict.remote(some_images(1, 65)).result()
    with pytest.raises(ValueError, match="nan seconds; give a positive number"):
        handle.predict.remote(IMAGES, float("nan")).result()


def test_samples_of_a_replica_that_dies_are_answered_by_the_group_before(handle, place):
    (place.parent / "end_forward").touch()
    before = marks(place, "forward")
    calls = [handle.predict.remote(IMAGES[i % 24][None]) for i in range(96)]
    told = [answer for call in calls for answer in call.result()]
    assert len(told) == 96
    assert not (place.parent / "end_forward").exists()
    for answer in told:
        assert answer.fallback in ("", "down", "open")
        assert answer.tier == (0 if answer.fallback else min(answer.exit, 1))

    def replaced():
        calls = [handle.predict.remote(IMAGES[i % 24][None]) for i in range(48)]
        fallbacks = {answer.fallback for call in calls for answer in call.result()}
        return fallbacks == {""} and len(marks(place, "forward")) > len(before)

    until(replaced)


def test_requests_of_a_first_replica_that_dies_fail_and_later_ones_are_answered(handle, place):
    from ray.exceptions import RayActorError

    (place.parent / "end_predict").touch()
    calls = [handle.predict.remote(IMAGES[i % 24][None]) for i in range(48)]
    answered = 0
    for call in calls:
        try:
            answered += len(call.result())
        except RayActorError:
            continue
    assert not (place.parent / "end_predict").exists()
    assert answered

    # By the replica that is left.
    calls = [handle.predict.remote(IMAGES[i % 24][None]) for i in range(48)]
    assert all(len(call.result()) == 1 for call in calls)


def test_what_does_not_fit_in_the_queues_is_refused(cluster, place):
    from ray import serve
    from ray.serve.exceptions import BackPressureError
    from ray_replicas import Held

    import eejax.server.ray

    limits = Limits(requests=1, seconds=600, draining=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eejax.server.ray, "Group", Held)
        application = eejax.server.ray.application(place, tile=8, limits=limits)
    handle = serve.run(application, name="held", route_prefix="/held")
    running = handle.predict.remote(IMAGES[:1])
    until(lambda: marks(place, "held"))
    # One waits.
    others = [handle.predict.remote(IMAGES[:1]) for _ in range(5)]

    def refused(call):
        try:
            call.result()
        except BackPressureError:
            return True
        return False

    assert sum(refused(call) for call in others[1:]) == 4
    (place.parent / "go").touch()
    assert len(running.result()) == len(others[0].result()) == 1
    with pytest.raises(Refusal) as full:
        handle.predict.remote(IMAGES[:2]).result()
    assert full.value.reason == "full"
    serve.delete("held")


def test_a_refusal_is_pickled_with_its_reason():
    refusal = pickle.loads(pickle.dumps(Refusal("full", "no place.")))
    assert (refusal.reason, str(refusal)) == ("full", "no place.")


def test_cuts_and_replicas_that_do_not_fit_are_refused(place):
    from eejax.server.ray import application

    for cuts in ((0,), (3,), (2, 1), (1, 1)):
        with pytest.raises(ValueError, match="of 3 stages; give ascending ones inside"):
            application(place, cuts)
    with pytest.raises(ValueError, match="for 2 groups; give one for each"):
        application(place, (1,), replicas=[2])


async def replica(place, span=(0, 3), following=None, limits=LIMITS):
    """A replica in this process, without Ray."""
    from eejax.server.ray import Group

    group = Group.__new__(Group)
    await group.__init__(str(place), span, following, 8, 1, limits)
    return group


async def sent(group, body, path=INFER, headers=()):
    """The reply of a replica in this process to a request over HTTP."""
    from fastapi import Request

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers)}
    scope |= {"query_string": b"", "server": ("127.0.0.1", 80), "scheme": "http"}
    return await group(Request(scope, receive))


def test_http_takes_and_gives_binary_data(place):
    body = request(IMAGES)
    del body["inputs"][0]["data"]
    body["inputs"][0]["parameters"] = {"binary_data_size": IMAGES.nbytes}
    body["outputs"] = [{"name": "exits", "parameters": {"binary_data": True}}]
    head = json.dumps(body).encode()
    name = "inference-header-content-length"

    async def run():
        headers = [(name.encode(), str(len(head)).encode())]
        return await sent(await replica(place), head + IMAGES.tobytes(), headers=headers)

    reply = asyncio.run(run())
    expected = reference(small_bundle(), IMAGES, small_bundle().thresholds)
    exits = np.frombuffer(reply.body[int(reply.headers[name]) :], np.int32)
    assert exits.tolist() == expected.exits.tolist()


def test_http_requests_that_do_not_fit_are_refused(place):
    async def post(group, body, path=INFER):
        reply = await sent(group, body, path)
        return reply.status_code, json.loads(reply.body)

    async def run():
        group = await replica(place, limits=Limits(requests=4, message=1 << 14, seconds=600))
        body = json.dumps(request(IMAGES[:1])).encode()
        assert (await post(group, body))[0] == 200
        assert (await post(group, body, "/other"))[0] == 404
        assert await post(group, b"{") == (400, {"error": "this is no inference request: no JSON."})
        assert "16,384 bytes at most" in (await post(group, bytes(1 << 15)))[1]["error"]
        wrong = json.dumps(request(IMAGES[:1, :5])).encode()
        assert "of shape [1, 5, 12, 3]" in (await post(group, wrong))[1]["error"]
        late = json.dumps(request(IMAGES[:1], deadline_ms=1e-6)).encode()
        assert (await post(group, late))[0] == 429
        group.check_health()
        # As after a failure of the scheduler.
        await group._tier.service.__aexit__(None, None, None)
        assert (await post(group, body))[0] == 503
        with pytest.raises(RuntimeError, match="ended"):
            group.check_health()

    asyncio.run(run())


class Handle:
    """Of a deployment whose answer is given, an exception, or never comes."""

    def __init__(self, answer=None):
        self.answer, self.forward, self.calls = answer, self, []

    async def remote(self, samples):
        self.calls.append([seconds for _, seconds in samples])
        if self.answer is None:
            await asyncio.get_running_loop().create_future()
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


TOLD = Told(np.zeros(2, np.float32), 1, False, 0, True)


def test_samples_that_go_on_together_share_a_call():
    from eejax.server.ray import NextGroup

    async def run():
        handle: Any = Handle([TOLD, "full"])
        group = NextGroup(handle)
        calls = [group.forward((), seconds) for seconds in (600.0, 500.0)]
        told, refused = await asyncio.gather(*calls, return_exceptions=True)
        assert told is TOLD
        assert isinstance(refused, Unanswered)
        assert str(refused) == "full"
        assert await group.forward((), 400.0) is TOLD
        assert handle.calls == [[600.0, 500.0], [400.0]]

    asyncio.run(run())


def test_errors_of_ray_are_reasons():
    from ray.exceptions import ActorDiedError, RayTaskError
    from ray.serve.exceptions import BackPressureError

    from eejax.server.ray import NextGroup

    cases = [
        (BackPressureError(1, 1), "full"),
        (ActorDiedError(), "down"),
        (asyncio.CancelledError(), "down"),
        (RayTaskError("forward", "", ValueError()), "garbage"),
    ]

    async def run():
        handle: Any = Handle()
        with pytest.raises(Unanswered, match="late"):
            await NextGroup(handle).forward((), 0.0)
        for handle.answer, reason in cases:
            with pytest.raises(Unanswered, match=reason):
                await NextGroup(handle).forward((), 600.0)

    asyncio.run(run())


def test_refusals_of_a_later_group_are_reasons(place):
    async def run():
        group = await replica(place, limits=Limits(requests=2, seconds=600))
        sample = (IMAGES[:1],)
        # Two places, and no time for the first.
        answers = await group.forward([(sample, 1e-6), *[(sample, 600.0)] * 3])
        assert [a if isinstance(a, str) else "" for a in answers] == ["full", "", "", "full"]
        await group._tier.service.__aexit__(None, None, None)
        assert await group.forward([(sample, 600.0)]) == ["down"]

    asyncio.run(run())


def test_a_guarded_way_is_left_alone_after_failures():
    class Way:
        error, calls = "down", 0

        async def forward(self, arrays, seconds):
            self.calls += 1
            if self.error:
                raise Unanswered(self.error)
            return TOLD

    async def reasons(guarded, count):
        found = []
        for _ in range(count):
            with pytest.raises(Unanswered) as error:
                await guarded.forward((), 600.0)
            found.append(str(error.value))
        return found

    async def run():
        way = Way()
        guarded = Guarded(way, "next")
        assert await reasons(guarded, 3) == ["down"] * 3
        # The pause is random, and not less than 0.05 s.
        assert (await reasons(guarded, 1))[0] in ("open", "down")
        way.error = ""
        async with asyncio.timeout(60):
            while True:
                try:
                    assert await guarded.forward((), 600.0) is TOLD
                    break
                except Unanswered:
                    await asyncio.sleep(0.01)
        # Too short for any answer: not sent, and no failure.
        sent = way.calls
        for _ in range(9):
            with pytest.raises(Unanswered, match="late"):
                await guarded.forward((), 0.0)
        assert way.calls == sent
        assert await guarded.forward((), 600.0) is TOLD

    asyncio.run(run())
