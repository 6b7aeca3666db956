"""Measured time: what is paired, what stages and heads take, and what efficiency is."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.experimental import io_callback

from eejax import EarlyExitNetwork, ExitOutput, Module, Prediction, benchmark
from eejax.benchmark import BenchmarkEntry, benchmark_rows, ideal_seconds


def spends(clock, amount, head):
    """A module that sets a clock forward when it is run; heads hand on memory."""

    def spend(x):
        clock[0] += amount
        return x

    def apply(variables, x, memory=None, *, train, key=None):
        del variables, train
        x = io_callback(spend, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        if not head:
            return x, {}
        assert memory is not None
        for said in memory:
            x = x + 0 * said
        return ExitOutput(x, x[:, 0], (x,)), {}

    return Module(lambda *_: {}, apply)


@pytest.mark.parametrize("exits", [1, 2, 4])
def test_stages_and_heads_are_told_apart_by_the_clock(exits, monkeypatch):
    """Exactly, on a clock that nothing but the modules sets forward."""
    clock = [0.0]
    stages, heads = [5.0, 3.0, 4.0, 1.0][:exits], [2.0, 0.5, 0.25, 1.5][:exits]
    network = EarlyExitNetwork(
        tuple(spends(clock, s, False) for s in stages), tuple(spends(clock, h, True) for h in heads)
    )
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    variables = jax.eval_shape(network.init, jax.random.key(0), jnp.ones((2, 3)))
    found = benchmark.seconds(network, variables, jnp.ones((2, 3)), repeats=2)
    np.testing.assert_array_equal(found.stages, stages)
    np.testing.assert_array_equal(found.heads, heads)
    together = benchmark.stage_seconds(network, variables, jnp.ones((2, 3)), repeats=2)
    np.testing.assert_array_equal(together, np.add(stages, heads))


@pytest.mark.parametrize(
    ("burst", "rounds"),
    [(0.0, "ab" * 3), (0.1, "aaaab" * 3), (0.5, ("a" * 17 + "b" * 5) * 3)],
)
def test_paired_runs_are_interleaved_and_warmed_up(burst, rounds, monkeypatch):
    clock, order = [0.0], []

    def call(name, duration):
        def run():
            order.append(name)
            clock[0] += duration

        return run

    monkeypatch.setattr(benchmark, "BURST_SECONDS", burst)
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    # In binary fractions, so that the clock is exact.
    calls = [call("a", 1 / 32), call("b", 1 / 8)]
    times = benchmark.paired_seconds(calls, repeats=3, warmup=1)
    # Each runs once to warm up, and once to tell how long it takes. In a round a short call runs
    # several times in a row, after one that is not timed.
    assert "".join(order) == "aabb" + rounds
    np.testing.assert_array_equal(times, [[1 / 32] * 3, [1 / 8] * 3])


def test_the_ideal_weighs_stages_by_their_time():
    """By hand: stages of 1, 2 and 5 ms, of which four samples need 1, 1, 3 and 8."""
    stages = np.array([1.0, 2.0, 5.0])
    assert ideal_seconds(16.0, stages, np.array([0, 0, 1, 2])) == pytest.approx(16 * 13 / 32)
    assert ideal_seconds(16.0, stages, np.array([2, 2])) == 16
    # Exits that are removed take their heads along, the plain network stays the whole one.
    assert ideal_seconds(16.0, np.array([2.9, 5.0]), np.array([1]), 8.0) == pytest.approx(15.8)
    for exits in ([], [3], [-1]):
        with pytest.raises(ValueError, match="from 0 to 2"):
            ideal_seconds(16.0, stages, np.array(exits, int))


def test_rows_agree_with_the_clock(monkeypatch):
    """Exactly, on a clock that nothing but the calls sets forward."""
    clock = [0.0]

    def call(*durations):
        turns = iter([*[durations[0]] * 3, *durations])  # twice to warm up, once for the burst

        def run():
            clock[0] += next(turns)

        return run

    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    plain = BenchmarkEntry("plain", [call(9, 9, 9), call(8, 8, 2)], 40)
    early = BenchmarkEntry(
        "compact", [call(4, 3, 5)], 40, np.array([0, 1] * 20), np.array([3.0, 1.0])
    )
    rows = benchmark_rows([plain, early], 10, 3)
    assert [row["strategy"] for row in rows] == ["plain", "compact"]
    assert rows[0]["ms"] == rows[0]["plain_ms"] == rows[1]["plain_ms"] == 2000  # the faster form
    assert (rows[0]["ideal_ms"], rows[0]["efficiency"], rows[0]["exit_fractions"]) == (None,) * 3
    assert (rows[1]["ms"], rows[1]["speedup"], rows[1]["spread"]) == (1000, 2, 0.25)
    assert rows[1]["ideal_ms"] == pytest.approx(2000 * 3.5 / 4)
    assert rows[1]["efficiency"] == pytest.approx(1.75)
    assert rows[1]["exit_fractions"] == [0.5, 0.5]


def test_entries_serve_every_batch_and_the_plain_network_returns_its_labels():
    network = toys.network(3)
    images = toys.some_images(0, 6)
    variables = toys.variables(network)
    programs = benchmark.plain_programs(network, variables)
    plain = benchmark.plain_entry(programs, [images[:3], images[3:]])
    labels = np.asarray(network.apply_plain(variables, jnp.asarray(images)).argmax(-1))
    assert plain.images == 6
    for call in plain.calls:
        np.testing.assert_array_equal(np.concatenate(call()), labels)

    def predict(thresholds, images):
        return Prediction(*(np.full(len(images), x) for x in (7, len(thresholds), 0)))

    entry = benchmark.predictor_entry("full", predict, [0, 0], [images[:4], images[4:]], None)
    assert entry.exits is not None
    assert (entry.images, entry.exits.tolist()) == (6, [2] * 6)
    assert np.concatenate(entry.calls[0]()).tolist() == [7] * 6
