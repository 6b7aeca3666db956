"""Checkpoints: whole or not there; a damaged one is reported and skipped."""

import jax.numpy as jnp
import numpy as np
import pytest

from eejax import checkpoint
from eejax.training.state import TrainState


def state(value: float) -> TrainState:
    params = {"stages": ({"kernel": jnp.full((64, 64), value)},), "heads": ({},)}
    stats = {"stages": ({"mean": jnp.full(3, -value)},), "heads": ({},)}
    return TrainState(jnp.int32(value), params, stats, (jnp.float32(value), ()))


def test_the_newest_comes_back_bit_for_bit_with_its_structure(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, state(step / 3))
    assert checkpoint.steps(tmp_path) == [2, 3], "two are kept"
    step, restored = checkpoint.restore(tmp_path, state(0.0))
    assert step == 3
    assert isinstance(restored, TrainState)
    np.testing.assert_array_equal(
        restored.params["stages"][0]["kernel"], state(1.0).params["stages"][0]["kernel"]
    )


def test_a_damaged_newest_one_is_reported_and_the_one_before_is_used(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step))
    for path in (tmp_path / "2").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    messages = []
    step, restored = checkpoint.restore(tmp_path, state(0.0), messages.append)
    assert (step, float(restored.opt_state[0])) == (1, 1.0)
    assert len(messages) == 1
    assert "checkpoint 2" in messages[0]


def test_none_at_all_says_so(tmp_path):
    assert checkpoint.steps(tmp_path / "not there") == []
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint"):
        checkpoint.restore(tmp_path, state(0.0))
    checkpoint.save(tmp_path, 1, state(1.0))
    for path in (tmp_path / "1").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(checkpoint.CheckpointError, match="none of the checkpoints"):
        checkpoint.restore(tmp_path, state(0.0), lambda message: None)


def test_saving_a_step_again_changes_nothing(tmp_path):
    checkpoint.save(tmp_path, 1, state(1.0))
    checkpoint.save(tmp_path, 1, state(5.0))
    assert float(checkpoint.restore(tmp_path, state(0.0))[1].opt_state[0]) == 1.0
