"""Tiers: features as bytes, the circuit breaker, and who answers."""

import asyncio

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from onnx_models import reference, small_bundle, some_images
from servers import INFER, ask, request, rows, server, tiers

import eejax
from eejax import runtime
from eejax.server.guarded import Guarded
from eejax.tiers import Told, Unanswered
from eejax.tiers.breaker import Breaker
from eejax.tiers.codec import CODECS, Array, decode, encode, layouts

SEED = 20261128
LAYOUT = (
    Array((4, 5, 6), "float32"),
    Array((3, 6), "float32"),
    Array((7,), "float32"),
    Array((), "int32"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("tiers") / "artifact"
    eejax.export(small_bundle(), place, layers=["onnx"])
    return place


def drawn(seed, layout=LAYOUT):
    random = np.random.default_rng(seed)
    scale = 10.0 ** random.integers(-20, 20)
    return tuple(
        (scale * random.normal(size=(1, *array.shape))).astype(array.dtype)
        if array.dtype == "float32"
        else random.integers(-9, 9, (1, *array.shape)).astype(array.dtype)
        for array in layout
    )


@given(st.integers(0, 2**32 - 1), st.sampled_from(CODECS))
@settings(max_examples=200, deadline=None)
def test_what_is_encoded_comes_back_within_the_codecs_precision(seed, codec):
    note(f"seed {seed}")
    arrays = drawn(seed)
    back = decode(encode(arrays, codec), LAYOUT, codec)
    for array, other in zip(arrays, back, strict=True):
        assert (array.dtype, array.shape) == (other.dtype, other.shape)
        if codec.startswith("float32") or array.ndim < 3:
            np.testing.assert_array_equal(array, other)
        elif codec.startswith("bfloat16"):
            np.testing.assert_allclose(array, other, rtol=2.0**-8)
        else:
            # Feature maps have channels first, tokens last.
            axes = (2, 3) if array.ndim == 4 else (1,)
            largest = np.abs(array).max(axes, keepdims=True)
            assert (np.abs(array - other) <= largest / 253).all()


def test_bfloat16_rounds_as_jax_does():
    import jax.numpy as jnp

    print(f"seed {SEED}")
    arrays = drawn(SEED)
    expected = np.asarray(jnp.asarray(arrays[0], jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(
        decode(encode(arrays, "bfloat16"), LAYOUT, "bfloat16")[0], expected
    )


def test_bfloat16_keeps_what_is_not_finite():
    bits = np.array([[0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000, 0xFF800000]], np.uint32)
    array = bits.view(np.float32)[None]
    back = decode(encode((array,), "bfloat16"), (Array((1, 5), "float32"),), "bfloat16")[0]
    np.testing.assert_array_equal(back, array)


def test_int8_gives_what_is_not_finite_a_number():
    array = np.array([[[1, np.inf, -np.inf, np.nan], [np.inf, np.nan, 0, 0]]], np.float32)[None]
    array = array.transpose(0, 2, 1, 3)  # channels first
    back = decode(encode((array,), "int8"), (Array((2, 1, 4), "float32"),), "int8")[0]
    np.testing.assert_allclose(back[0, :, 0], [[1, 1, -1, 0], [0, 0, 0, 0]], rtol=1e-6)


def test_int8_of_subnormal_numbers_keeps_their_signs():
    array = np.arange(-300, 301, dtype=np.int32).reshape(1, 1, 1, -1)
    array = (array * np.float64(2.0**-149)).astype(np.float32)
    back = decode(encode((array,), "int8"), (Array(array.shape[1:], "float32"),), "int8")[0]
    assert (np.diff(back.ravel()) >= 0).all()
    assert back.min() < 0 < back.max()


def test_scales_that_are_not_finite_are_read_without_a_warning():
    data = np.array([np.inf, np.nan], "<f4").tobytes() + bytes([0, 1, 0, 1])
    back = decode(data, (Array((2, 1, 2), "float32"),), "int8")[0]
    np.testing.assert_array_equal(back.ravel(), [np.nan, np.inf, np.nan, np.nan])


def test_a_channel_of_zeros_stays_zero():
    zeros = (np.zeros((1, 2, 2, 3), np.float32),)
    layout = (Array((2, 2, 3), "float32"),)
    np.testing.assert_array_equal(decode(encode(zeros, "int8"), layout, "int8")[0], zeros[0])


def test_sizes_are_what_they_should_be():
    sizes = {codec: len(encode(drawn(1), codec)) for codec in CODECS[:3]}
    rest = 7 * 4 + 4
    assert sizes == {
        "float32": 4 * 138 + rest,
        "bfloat16": 2 * 138 + rest,
        "int8": 138 + 4 * (4 + 6) + rest,
    }


@given(st.integers(0, 2**32 - 1), st.sampled_from(CODECS), st.binary(max_size=40))
@settings(max_examples=300, deadline=None)
def test_other_bytes_are_refused(seed, codec, garbage):
    note(f"seed {seed}")
    with pytest.raises(ValueError, match="features"):
        decode(garbage, LAYOUT, codec)
    data = encode(drawn(seed), codec)
    random = np.random.default_rng(seed)
    with pytest.raises(ValueError, match="features"):
        decode(data[: random.integers(len(data))], LAYOUT, codec)
    with pytest.raises(ValueError, match="features"):
        decode(data + garbage + b"0", LAYOUT, codec)


def test_a_bomb_is_not_unpacked():
    import tracemalloc

    import zstandard

    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 28))
    nothing_said = zstandard.ZstdCompressor(19, write_content_size=False).compress(bytes(1 << 28))
    assert len(bomb) < 1 << 16
    tracemalloc.start()
    for data in (bomb, nothing_said):
        with pytest.raises(ValueError, match="features"):
            decode(data, LAYOUT, "int8+zstd")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 24


def test_an_unknown_codec_is_refused():
    with pytest.raises(ValueError, match="codec 'pickle'"):
        decode(b"", LAYOUT, "pickle")
    with pytest.raises(ValueError, match=r"codec 'x{80}'"):
        decode(b"", LAYOUT, "x" * 10_000)


def test_layouts_are_what_stages_read(place):
    loaded = runtime.load(place, 1)
    found = layouts(loaded)
    assert found[0] == (Array((12, 12, 3), "uint8"),)
    arrays = (some_images(1, 2),)
    for e in range(1, 3):
        arrays = loaded.run_stage(e - 1, arrays, np.full(2, np.inf, np.float32)).arrays
        assert found[e] == tuple(Array(a.shape[1:], str(a.dtype)) for a in arrays)


def test_a_breaker_opens_tries_again_and_closes():
    breaker = Breaker(most=3, first=1.0, longest=8.0, draw=lambda: 1.0)
    for _ in range(3):
        assert breaker.allows(0.0)
        breaker.failed(0.0, 0.0)
    assert not breaker.allows(0.9)
    assert breaker.allows(1.0)  # one, and no other until it is known
    assert not breaker.allows(1.5)
    breaker.failed(1.5, 1.0)
    assert not breaker.allows(3.4)
    assert breaker.allows(3.5)
    breaker.succeeded()
    assert breaker.allows(3.5)
    assert breaker.failures == 0


def test_calls_under_way_when_the_circuit_opens_do_not_count():
    breaker = Breaker(most=3, first=1.0, longest=8.0, draw=lambda: 1.0)
    assert all(breaker.allows(0.0) for _ in range(12))
    for _ in range(6):
        breaker.failed(1.0, 0.0)
    assert breaker.failures == 3
    assert breaker.allows(2.0)
    for _ in range(6):
        breaker.failed(2.1, 0.0)
    breaker.failed(2.2, 2.0)
    assert breaker.failures == 4
    assert not breaker.allows(4.1)
    assert breaker.allows(4.2)


TOLD = Told(np.zeros(2, np.float32), 1, False, 0, True)


class Way:
    """An upstream that does as it is told."""

    error, takes = "", 0.0

    async def forward(self, arrays, seconds):
        del arrays, seconds
        await asyncio.sleep(self.takes)
        if self.error:
            raise Unanswered(self.error)
        return TOLD


async def why(guarded, seconds):
    """Why there is no answer; empty if there is one."""
    try:
        await guarded.forward((), seconds)
    except Unanswered as error:
        return str(error)
    return ""


def test_impatient_samples_do_not_close_the_way_for_others():
    async def run():
        way = Way()
        guarded = Guarded(way, "next")
        way.error = "late"
        assert [await why(guarded, 0.05) for _ in range(9)] == ["late"] * 9
        way.error = ""
        assert await why(guarded, 600.0) == ""
        way.error = "late"
        assert [await why(guarded, 600.0) for _ in range(3)] == ["late"] * 3
        assert await why(guarded, 600.0) == "open"

    asyncio.run(run())


def test_the_last_known_durations_say_who_is_patient(monkeypatch):
    monkeypatch.setattr("eejax.server.guarded._FRESH", 0.0)

    async def run():
        way = Way()
        guarded = Guarded(way, "next")
        way.takes = 0.2
        assert await why(guarded, 600.0) == ""
        way.error, way.takes = "late", 0.0
        assert [await why(guarded, 0.3) for _ in range(9)] == ["late"] * 9

    asyncio.run(run())


def test_impatient_samples_try_an_open_circuit_only_if_nobody_else_does(monkeypatch):
    async def run():
        way = Way()
        guarded = Guarded(way, "next")
        guarded._breaker = Breaker(draw=lambda: 0.0)
        way.error = "down"
        assert [await why(guarded, 600.0) for _ in range(3)] == ["down"] * 3
        await asyncio.sleep(0.1)  # twice the pause
        assert await why(guarded, 0.05) == "open"
        monkeypatch.setattr("eejax.server.guarded._FRESH", 0.0)
        assert await why(guarded, 0.05) == "down"
        await asyncio.sleep(0.2)
        way.error = ""
        assert await why(guarded, 600.0) == ""

    asyncio.run(run())


def test_pauses_double_have_an_end_and_are_never_nothing():
    def ends(failures, draw):
        breaker = Breaker(most=1, first=1.0, longest=8.0, draw=lambda: draw)
        for i in range(failures):
            breaker.failed(i, i)
        return next(t for t in np.arange(0.0, 20.0, 0.05) if breaker.allows(i + t))

    assert [ends(n, 1.0) for n in (1, 2, 3, 4, 100)] == pytest.approx([1, 2, 4, 8, 8])
    assert ends(1, 0.0) == pytest.approx(0.1)


IMAGES = some_images(51, 24)


@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("codec", ["float32", "float32+zstd"])
def test_tiers_answer_as_one_network(place, cuts, codec):
    expected = reference(small_bundle(), IMAGES, small_bundle().thresholds)

    async def run():
        async with tiers(place, cuts, codec) as ports:
            return rows((await ask(ports.rest, INFER, request(IMAGES))).content)

    found = asyncio.run(run())
    assert found["exits"].tolist() == expected.exits.tolist()
    np.testing.assert_allclose(found["logits"], expected.logits, rtol=1e-3, atol=1e-4)
    assert found["tiers"].tolist() == np.searchsorted(cuts, expected.exits, "right").tolist()
    assert not found["partial"].any()


def test_lossy_codecs_change_few_answers(place):
    expected = reference(small_bundle(), IMAGES, small_bundle().thresholds)

    async def run(codec):
        async with tiers(place, (1, 2), codec) as ports:
            return rows((await ask(ports.rest, INFER, request(IMAGES))).content)

    for codec, most in (("bfloat16", 0.02), ("int8+zstd", 0.05)):
        found = asyncio.run(run(codec))
        scale = np.abs(expected.logits).max()
        same = found["exits"] == expected.exits
        assert same.mean() >= 0.8
        difference = np.abs(found["logits"] - expected.logits)[same] / scale
        assert difference.max() < most


def test_other_thresholds_can_be_given(place):
    async def run(thresholds):
        async with tiers(place, (1,), "float32", thresholds=thresholds) as ports:
            found = rows((await ask(ports.rest, INFER, request(IMAGES))).content)
            return set(found["exits"].tolist())

    infinite = float("inf")
    assert asyncio.run(run((infinite, infinite))) == {2}
    assert asyncio.run(run((infinite, -infinite))) == {1}
    with pytest.raises(ValueError, match="2 numbers"):
        asyncio.run(run((1.0,)))


def test_stages_that_do_not_fit_are_refused(place):
    async def run(**options):
        async with server(place, **options):
            pass

    for stages in ((0, 4), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match="give some of 0:3"):
            asyncio.run(run(stages=stages))
    with pytest.raises(ValueError, match="without a next tier"):
        asyncio.run(run(stages=(0, 2)))
