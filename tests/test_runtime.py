"""The runtime of artifacts against routing, and without JAX."""

import json
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from onnx_models import reference, small_bundle, some_images

from eejax import runtime
from eejax.artifact import export
from eejax.runtime.engine import Stage, session
from eejax.runtime.recent import RECENT


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("artifact") / "small"
    export(small_bundle(), place, layers=["onnx"], images=some_images(3, 12))
    return place


@pytest.fixture(scope="module")
def loaded(place):
    return runtime.load(place, threads=1)


def same(prediction, expected):
    np.testing.assert_array_equal(prediction.exits, expected.exits)
    np.testing.assert_allclose(prediction.logits, expected.logits, rtol=1e-3, atol=1e-4)
    assert (prediction.labels.dtype, prediction.exits.dtype) == (np.int32, np.int32)
    np.testing.assert_array_equal(prediction.labels, prediction.logits.argmax(-1))


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 200])
def test_a_batch_takes_the_exits_of_the_reference(loaded, count):
    bundle, images = small_bundle(), some_images(4, count)
    expected = reference(bundle, images, bundle.thresholds)
    if count > 1:
        assert len(set(expected.exits)) > 1
    same(loaded.predict(images), expected)


def test_given_thresholds_take_the_place_of_the_artifacts(loaded):
    bundle, images = small_bundle(), some_images(5, 9)
    for thresholds in ([np.inf, np.inf], [np.inf, -np.inf], [-np.inf, 0], [2.0, 1.0]):
        expected = reference(bundle, images, thresholds)
        same(loaded.predict(images, thresholds), expected)
        alone = [loaded.predict(images[i : i + 1], thresholds) for i in range(len(images))]
        assert [int(p.exits[0]) for p in alone] == expected.exits.tolist()


@hypothesis.given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    tile=st.integers(1, 48),
    window=st.integers(0, 80),
)
@hypothesis.settings(max_examples=25)
def test_a_stream_predicts_every_batch_in_order(loaded, sizes, tile, window):
    images = some_images(6, sum(sizes))
    batches = np.split(images, np.cumsum(sizes)[:-1])
    expected = loaded.predict(images)
    got = list(loaded.stream(batches, tile=tile, window=tile + window))
    assert [len(p.labels) for p in got] == sizes
    np.testing.assert_array_equal(np.concatenate([p.exits for p in got]), expected.exits)
    logits = np.concatenate([p.logits for p in got])
    np.testing.assert_allclose(logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_a_stream_holds_no_more_than_its_window(loaded):
    """What was read before a prediction comes out is bounded, though no image leaves early."""
    read = 0

    def batches():
        nonlocal read
        for _ in range(12):
            read += 10
            yield some_images(7, 10)

    never = [np.inf, np.inf]
    for number, _ in enumerate(loaded.stream(batches(), never, tile=16, window=32)):
        assert read - 10 * number <= 32 + 10


def test_a_caller_may_fill_its_array_anew(loaded):
    images, array = some_images(12, 40), np.empty((10, 12, 12, 3), np.uint8)

    def batches():
        for start in range(0, 40, 10):
            array[:] = images[start : start + 10]
            yield array

    got = np.concatenate([p.exits for p in loaded.stream(batches(), tile=16, window=64)])
    np.testing.assert_array_equal(got, loaded.predict(images).exits)


def test_one_sample_that_lags_does_not_hold_all_others_up(loaded):
    """The window counts from the oldest answer that is missing."""
    read = 0

    class Lagging(type(loaded)):
        def run_stage(self, e, arrays, thresholds):
            count = len(arrays[0])
            leaves = np.ones(count, bool)
            if e == 0 and read == 16:
                leaves[0] = False
            return Stage(np.zeros((count, 10), np.float32), leaves, (arrays[0],))

    def batches():
        nonlocal read
        for _ in range(50):
            read += 16
            yield some_images(13, 16)

    for number, _ in enumerate(Lagging(loaded.manifest, 1).stream(batches(), tile=16, window=64)):
        assert read - 16 * number <= 64 + 16


def test_survivors_wait_for_a_full_tile(loaded):
    sizes = []

    class Watched(type(loaded)):
        def run_stage(self, e, arrays, thresholds):
            sizes.append((e, len(arrays[0])))
            return super().run_stage(e, arrays, thresholds)

    watched = Watched(loaded.manifest, 1)
    list(watched.stream([some_images(8, 16)] * 4, [np.inf, np.inf], tile=32, window=64))
    assert sizes == [(0, 32), (1, 32), (2, 32)] * 2


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((0, 12, 12, 3), np.uint8),
        np.zeros((12, 12, 3), np.uint8),
        np.zeros((2, 12, 12, 1), np.uint8),
        np.zeros((2, 12, 12, 3), np.float32),
    ],
)
def test_images_that_do_not_fit_are_refused(loaded, images):
    with pytest.raises(ValueError, match=r"give uint8 \[B, 12, 12, 3\] in 0\.\.255, B >= 1"):
        loaded.predict(images)


def test_mistakes_are_refused(loaded, place):
    images = some_images(9, 2)
    for thresholds in ([1.0], [1.0, np.nan], np.zeros((2, 1))):
        with pytest.raises(ValueError, match="give 2 numbers, one for each exit but the last"):
            loaded.predict(images, thresholds)
    with pytest.raises(ValueError, match="tiles of 8 and a window of 7"):
        next(loaded.stream([images], tile=8, window=7))
    with pytest.raises(ValueError, match="0 threads"):
        runtime.load(place, 0)
    with pytest.raises(ValueError, match="batches of 0"):
        runtime.Anytime(loaded, 0)
    with pytest.raises(ValueError, match="cannot load a model"):
        session(b"no model", 1)


def test_without_a_deadline_the_exits_are_those_of_the_reference(loaded):
    bundle, images = small_bundle(), some_images(10, 12)
    anytime = runtime.Anytime(loaded, 12, measure=2)
    assert (anytime.times.seconds[:, :2] > 0).all()
    same(anytime(images, np.inf), reference(bundle, images, bundle.thresholds))
    one = anytime(images[:1], np.inf, [np.inf, np.inf])
    assert one.exits.tolist() == [2]


def test_a_deadline_ends_at_the_last_exit_that_is_reached_in_time(loaded):
    anytime = runtime.Anytime(loaded, 4, measure=1)
    images, never = some_images(11, 4), [np.inf, np.inf]
    anytime.times.seconds[:] = 0
    anytime.times.seconds[1] = 1000.0  # the second stage
    assert anytime(images, 100_000, never).exits.tolist() == [0] * 4
    anytime.times.seconds[:] = 0
    anytime.times.seconds[2] = 1000.0
    prediction = anytime(images, 100_000, never)
    same(prediction, reference(small_bundle(), images, [np.inf, -np.inf]))
    assert anytime.times.needed[2] >= 1000
    for wrong, said in ((0, "a deadline of 0 ms"), (np.nan, "a deadline of nan ms")):
        with pytest.raises(ValueError, match=said):
            anytime(images, wrong)
    with pytest.raises(ValueError, match="5 images; give 4 at most"):
        anytime(some_images(1, 5), 10)


def test_a_slow_moment_does_not_lock_a_stage_out(loaded):
    anytime = runtime.Anytime(loaded, 1, measure=4)
    image, never = some_images(14, 1), [np.inf, np.inf]
    anytime.times.seconds[1, 0] = 1000.0
    taken = [int(anytime(image, 60_000, never).exits[0]) for _ in range(RECENT + 1)]
    assert taken[0] == 0
    assert taken[-1] == 2


def test_neither_jax_nor_flax_is_loaded(place):
    code = f"""
import json, sys
import numpy as np
from eejax import commands, runtime
loaded = runtime.load({str(place)!r}, 1)
prediction = loaded.predict(np.zeros((3, 12, 12, 3), np.uint8))
commands.main(["inspect", {str(place)!r}])
runtime.Anytime(loaded, measure=1)
names = {{name.split('.')[0] for name in sys.modules}}
print(json.dumps([prediction.exits.tolist(), sorted(names)]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    exits, names = json.loads(run.stdout.splitlines()[-1])
    assert len(exits) == 3
    assert not {"jax", "jaxlib", "flax", "scipy", "optax", "onnx", "safetensors"} & set(names)


def test_without_jax_its_names_are_missing_and_nothing_else():
    code = """
import sys
for name in ("jax", "jaxlib"):
    sys.modules[name] = None
import eejax
print(hasattr(eejax, "runtime"), hasattr(eejax, "load"), hasattr(eejax, "models"))
try:
    eejax.compact
except AttributeError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("True False False")
    assert "needs jax" in run.stdout


def test_bundles_and_manifests_need_no_onnx_runtime(place):
    code = f"""
import sys
for name in ("onnx", "onnxruntime"):
    sys.modules[name] = None
import numpy, eejax
print(eejax.runtime.read({str(place)!r}).num_exits, eejax.load.__module__)
try:
    eejax.runtime.load({str(place)!r}).predict(numpy.zeros((1, 12, 12, 3), numpy.uint8))
except ModuleNotFoundError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("3 eejax.artifact.reading")
    assert "pip install onnxruntime" in run.stdout
