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
    if not codec.endswith("zstd"):
        with pytest.raises(ValueError, match="features"):
            decode(data + b"0", LAYOUT, codec)


def test_a_bomb_is_not_unpacked():
    import tracemalloc

    import zstandard

    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 28))
    assert len(bomb) < 1 << 16
    tracemalloc.start()
    with pytest.raises(ValueError, match="features"):
        decode(bomb, LAYOUT, "int8+zstd")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 24


def test_an_unknown_codec_is_refused():
    with pytest.raises(ValueError, match="codec 'pickle'"):
        decode(b"", LAYOUT, "pickle")


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
        breaker.failed(0.0)
    assert not breaker.allows(0.9)
    assert breaker.allows(1.0)  # one, and no other until it is known
    assert not breaker.allows(1.5)
    breaker.failed(1.5)
    assert not breaker.allows(3.4)
    assert breaker.allows(3.5)
    breaker.succeeded()
    assert breaker.allows(3.5)
    assert breaker.failures == 0


def test_pauses_double_have_an_end_and_are_never_nothing():
    def ends(failures, draw):
        breaker = Breaker(most=1, first=1.0, longest=8.0, draw=lambda: draw)
        for _ in range(failures):
            breaker.failed(0.0)
        return next(t for t in np.arange(0.0, 20.0, 0.05) if breaker.allows(t))

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
