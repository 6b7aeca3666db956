"""Temperatures: the likelihood's optimum, and what happens where it has none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from eejax import Trace, fit_temperatures


def trace_of(logits, labels):
    logits = np.asarray(logits, np.float32)
    labels = np.asarray(labels, np.int32)
    ids = np.arange(len(labels), dtype=np.uint64)
    return Trace(logits, np.zeros(logits.shape[:2], np.float32), labels, ids)


def sampled(seed, count, temperatures, classes=5):
    """Labels drawn from `softmax(z)`, and logits `z * T`: so `T` is what undoes it."""
    random = np.random.default_rng(seed)
    z = 2 * random.normal(size=(count, classes))
    noise = random.gumbel(size=z.shape)
    labels = (z + noise).argmax(-1)
    return trace_of(z[:, None] * np.array(temperatures)[None, :, None], labels)


def loss(trace, e, temperature):
    z = np.float64(trace.logits[:, e]) / temperature
    z = z - z.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return -log_p[np.arange(len(z)), trace.labels].mean()


def test_a_known_temperature_is_recovered():
    known = (0.25, 1.0, 3.0, 20.0)
    fitted = fit_temperatures(sampled(0, 20_000, known))
    np.testing.assert_allclose(fitted, known, rtol=0.03)
    assert fitted.dtype == np.float64


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_optimum_of_the_likelihood(seed):
    """Of a network that is often wrong, by another optimiser."""
    random = np.random.default_rng(seed)
    logits = 4 * random.normal(size=(300, 3, 6))
    labels = random.integers(0, 6, 300)
    logits[np.arange(300), :, labels] += 3
    trace = trace_of(logits, labels)
    fitted = fit_temperatures(trace)
    for e in range(3):
        best: Any = minimize_scalar(
            lambda b, e=e: loss(trace, e, 1 / b),
            bounds=(0.01, 100),
            method="bounded",
            options={"xatol": 1e-10},
        )
        assert fitted[e] == pytest.approx(1 / best.x, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e30])
def test_perfect_accuracy_gives_the_limit_and_does_not_overflow(scale):
    labels = np.arange(40) % 4
    logits = scale * np.eye(4)[labels][:, None]
    assert fit_temperatures(trace_of(logits, labels)) == pytest.approx([0.01])


def test_all_wrong_gives_the_other_limit():
    labels = np.arange(40) % 4
    logits = 10 * np.eye(4)[(labels + 1) % 4][:, None]
    assert fit_temperatures(trace_of(logits, labels)) == pytest.approx([100])


def test_exits_are_fitted_by_themselves_and_shifts_of_the_logits_do_not_matter():
    trace = sampled(3, 500, (0.5, 2.0))
    both = fit_temperatures(trace)
    shift = np.random.default_rng(0).normal(size=(500, 2, 1)).astype(np.float32)
    np.testing.assert_allclose(
        fit_temperatures(trace._replace(logits=trace.logits + shift)), both, rtol=1e-5
    )
    alone = fit_temperatures(trace._replace(logits=trace.logits[:, 1:]))
    assert alone[0] == both[1]


def test_traces_without_an_answer_are_refused():
    empty = trace_of(np.zeros((0, 2, 3)), [])
    bad = trace_of(np.full((4, 2, 3), np.nan), [0] * 4)
    for trace in (empty, bad):
        with pytest.raises(ValueError, match="give finite logits"):
            fit_temperatures(trace)
