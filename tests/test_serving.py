"""The service in real time, on an artifact. Nothing here rests on how quick the machine is."""

import asyncio
import threading

import numpy as np
import pytest
from onnx_models import reference, small_bundle, some_images

import eejax
from eejax import runtime
from eejax.serving import Level, Refusal, Scheduler, Service, StageTimes, measure, noise

TILE, HOUR = 8, 3600.0


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    place = tmp_path_factory.mktemp("serving") / "artifact"
    eejax.export(small_bundle(), place, layers=["onnx"])
    return runtime.load(place)


def served(engine, times, use, **options):
    """What `use(service)` returns, with the thresholds of the bundle."""
    path = [Level(small_bundle().thresholds, np.full(2, 0.5))]

    async def run():
        scheduler = Scheduler(path, times, tile=TILE, **options)
        async with Service(engine, scheduler, times) as service:
            result = await use(service)
        assert scheduler.under_way == 0
        return result

    return asyncio.run(run())


def table(seconds=1e-6):
    """Times by which everything fits, or nothing."""
    return StageTimes(np.tile(seconds * np.arange(TILE + 1.0), (3, 1)))


def test_many_requests_get_the_answers_of_the_reference(loaded):
    times = measure(loaded, (noise((12, 12, 3), TILE),), 3, 2, repeats=2)
    assert (np.diff(times.table) >= 0).all()
    images = some_images(21, 100)
    expected = reference(small_bundle(), images, small_bundle().thresholds)

    async def use(service):
        return await asyncio.gather(*(service.predict((image[None],), HOUR) for image in images))

    answers = served(loaded, times, use)
    assert [a.exit for a in answers] == expected.exits.tolist()
    np.testing.assert_allclose([a.logits for a in answers], expected.logits, rtol=1e-3, atol=1e-4)
    assert not any(a.partial or a.level for a in answers)
    assert (times() > 0)[:, 1:].all()


def test_a_bad_image_fails_alone(loaded):
    images = [image[None] for image in some_images(22, 12)]
    images[5] = images[5][:, :6]

    async def use(service):
        calls = (service.predict((image,), HOUR) for image in images)
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = served(loaded, table(), use)
    assert isinstance(answers[5], Refusal)
    assert answers[5].reason == "failed"
    assert not any(isinstance(a, BaseException) for i, a in enumerate(answers) if i != 5)


class Held:
    """An engine that begins a stage when it is let."""

    def __init__(self, engine):
        self.engine, self.begun, self.let = engine, threading.Event(), threading.Event()

    def run_stage(self, e, arrays, thresholds):
        self.begun.set()
        assert self.let.wait(60)
        return self.engine.run_stage(e, arrays, thresholds)


def test_places_are_few_and_a_caller_that_leaves_frees_its_own(loaded):
    engine = Held(loaded)
    image = some_images(23, 1)

    async def use(service):
        first = asyncio.create_task(service.predict((image,), HOUR))
        second = asyncio.create_task(service.predict((image,), HOUR))
        await asyncio.sleep(0)
        with pytest.raises(Refusal, match="2 samples are under way") as refused:
            await service.predict((image,), HOUR)
        assert refused.value.reason == "full"
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        third = asyncio.create_task(service.predict((image,), HOUR))
        await asyncio.sleep(0)
        engine.let.set()
        return [(await task).exit for task in (first, third)]

    exits = served(engine, table(), use, capacity=2)
    assert exits[0] == exits[1]


def test_whoever_has_an_answer_gets_it_at_the_deadline_while_a_stage_runs(loaded):
    class LastHeld(Held):
        def run_stage(self, e, arrays, thresholds):
            if e == 0:
                return self.engine.run_stage(e, arrays, np.full(2, np.inf, np.float32))
            return super().run_stage(e, arrays, thresholds)

    engine = LastHeld(loaded)

    async def use(service):
        # Two seconds are long for a first stage; the second is held until the answer is there.
        answer = await service.predict((some_images(24, 1),), 2.0)
        engine.let.set()
        return answer

    answer = served(engine, table(), use)
    assert answer.exit == 0
    assert answer.partial


def test_without_time_for_a_first_exit_a_request_is_refused_at_once(loaded):
    async def use(service):
        with pytest.raises(Refusal) as refused:
            await service.predict((some_images(25, 1),), 0.5)
        return refused.value.reason

    assert served(loaded, table(seconds=1.0), use) == "late"


def test_what_is_under_way_at_the_end_is_answered_and_nothing_more_is_taken(loaded):
    async def run():
        scheduler = Scheduler([Level(np.full(2, np.inf), np.ones(2))], table(), tile=TILE)
        async with Service(loaded, scheduler, table()) as service:
            tasks = [
                asyncio.create_task(service.predict((image[None],), HOUR))
                for image in some_images(26, 20)
            ]
            await asyncio.sleep(0)
        with pytest.raises(Refusal, match="ending"):
            await service.predict((some_images(26, 1),), HOUR)
        return [task.result().exit for task in tasks]

    assert asyncio.run(run()) == [2] * 20


def test_an_engine_that_breaks_ends_no_one_elses_request(loaded):
    class Broken:
        calls = 0

        def run_stage(self, e, arrays, thresholds):
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("broken")
            return loaded.run_stage(e, arrays, thresholds)

    async def use(service):
        image = some_images(27, 1)
        with pytest.raises(Refusal, match="broken"):
            await service.predict((image,), HOUR)
        return (await service.predict((image,), HOUR)).partial

    assert served(Broken(), table(), use) is False


def test_results_that_are_none_fail_their_requests_and_nothing_else(loaded):
    class Wrong:
        def __init__(self, wrong):
            self.wrong = wrong

        def run_stage(self, e, arrays, thresholds):
            return self.wrong(loaded.run_stage(e, arrays, thresholds))

    async def use(service):
        reasons = []
        for _ in range(2):
            with pytest.raises(Refusal) as refused:
                await asyncio.wait_for(service.predict((some_images(28, 1),), HOUR), 60)
            reasons.append(refused.value.reason)
        return reasons

    for wrong in (lambda stage: None, lambda stage: stage._replace(leaves=stage.leaves[:0])):
        assert served(Wrong(wrong), table(), use) == ["failed", "failed"]


def test_nobody_waits_for_a_service_that_broke(loaded):
    async def use(service):
        service.scheduler.next = lambda now: 1 / 0
        reasons = []
        for _ in range(2):
            with pytest.raises(Refusal) as refused:
                await asyncio.wait_for(service.predict((some_images(28, 1),), HOUR), 60)
            reasons.append(refused.value.reason)
        assert reasons == ["closed", "closed"]

    with pytest.raises(ZeroDivisionError):
        served(loaded, table(), use)


def test_times_follow_what_stages_take_lately():
    now = 0.0
    table = np.array([[0.0, 2.0, 1.0, 3.0, 4.0], [0.0, 1.0, 2.0, 3.0, 4.0]])
    times = StageTimes(table, lambda: now)
    np.testing.assert_array_equal(times(), [[0, 2, 2, 3, 4], [0, 1, 2, 3, 4]])
    for _ in range(20):
        times.note(1, 2, 6.0)
    # Two and three samples are alike; for more it is not known, but not less.
    np.testing.assert_allclose(times(), [[0, 2, 2, 3, 4], [0, 1, 6, 9, 9]])
    for _ in range(16):
        times.note(1, 3, 3.0)
    np.testing.assert_allclose(times()[1], [0, 1, 2, 3, 4])


def test_what_a_stage_once_took_is_forgotten_unless_it_runs():
    now = 0.0
    times = StageTimes(np.array([[0.0, 1.0], [0.0, 1.0]]), lambda: now)
    for stage in (0, 1):
        for _ in range(16):
            times.note(stage, 1, 9.0)
    now = 0.4
    times.note(0, 1, 9.0)
    now = 0.6
    np.testing.assert_allclose(times(), [[0, 9], [0, 1]])
    now = 1.0
    np.testing.assert_allclose(times(), [[0, 1], [0, 1]])
