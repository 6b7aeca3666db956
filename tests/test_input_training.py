"""Training on streamed images: what the steps get, on one device and on four, and the ImageNet
configurations on images made on the spot."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from eejax.training import placement
from experiments.cifar.config import Config, check
from experiments.command_line import load_config
from experiments.data.config import DataConfig
from experiments.data.records import Arrays, RecordError
from experiments.data.streaming import Streamed
from experiments.pipelines.making import make
from experiments.train import trained
from experiments.train.host_feed import HostFeed, mirrored_steps

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
N, BATCH, STEPS = 45, 8, 3
KEY = jax.random.key(4)


def images(n=N):
    """A third pixel with the number of the image, the first two different in left and right."""
    pixels = np.zeros((n, 2, 2, 1), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 1, :, 0] = 1, np.arange(n)[:, None]
    return Streamed(Arrays(pixels, np.arange(n), ("a",)), np.arange(n), None)


def feed(devices=1, **change):
    mesh = placement.make_mesh(jax.devices()[:devices])
    config = DataConfig(**{"name": "digits", "feed": "streamed", "flip": False, **change})
    key = placement.replicate(mesh, KEY)
    sizes = {"batch": BATCH, "epochs": 2, "steps_per_dispatch": STEPS}
    return HostFeed(images(), key, config, mesh, **sizes)


def dispatches(made, start=0):
    """What the training loop asks for, from a step to the end; images and labels by step."""
    steps, step = {}, start
    while step < 2 * made.per_epoch:
        count = min(STEPS, made.per_epoch - step % made.per_epoch)
        fed = made(step, count)
        assert fed.order is None
        assert fed.images.shape == (STEPS, BATCH, 2, 2, 1)
        for i in range(count):
            row = fed.start + i
            steps[step + i] = np.asarray(fed.images[row]), np.asarray(fed.labels[row])
        step += count
    made.close()
    return steps


def assert_equal(a, b):
    assert a.keys() == b.keys()
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_steps_get_batches_of_every_image_once_an_epoch():
    made = feed()
    assert made.per_epoch == 5
    steps = dispatches(made)
    labels = np.stack([labels for _, labels in steps.values()])
    for epoch in (labels[:5], labels[5:]):
        assert len(np.unique(epoch)) == 5 * BATCH
    for pixels, numbers in steps.values():
        np.testing.assert_array_equal(pixels[:, 1, 0, 0], numbers)


@pytest.mark.parametrize("start", [0, 2, 7, 9])
@pytest.mark.parametrize("flip", [False, True])
def test_a_run_that_is_resumed_at_any_step_gets_the_same(start, flip):
    whole = dispatches(feed(flip=flip))
    resumed = dispatches(feed(flip=flip), start)
    assert_equal(resumed, {step: whole[step] for step in range(start, 10)})


def test_four_devices_get_the_same_batches_divided():
    assert_equal(dispatches(feed(4, flip=True)), dispatches(feed(1, flip=True)))
    made = feed(4)
    fed = made(0, STEPS)
    made.close()
    mesh = placement.make_mesh(jax.devices()[:4])
    for array in (fed.images, fed.labels):
        assert array.sharding.is_equivalent_to(placement.batch_sharding(mesh, 1), array.ndim)


def test_a_call_out_of_turn_begins_anew():
    whole = dispatches(feed())
    made = feed()
    for step, count in ((0, 3), (6, 3), (2, 2)):
        fed = made(step, count)
        for i in range(count):
            np.testing.assert_array_equal(fed.labels[i], whole[step + i][1])
    made.close()


def test_half_of_the_images_are_mirrored_by_the_number_of_the_step():
    pixels = np.tile(np.arange(2, dtype=np.uint8)[:, None], (4, 512, 1, 1, 1))
    found = np.asarray(mirrored_steps(KEY, pixels, np.int32(3)))
    mirrored = found[..., 0, 0, 0] == 1
    assert 0.4 < mirrored.mean() < 0.6
    assert (mirrored[0] != mirrored[1]).any()
    later = np.asarray(mirrored_steps(KEY, pixels[:2], np.int32(5)))
    np.testing.assert_array_equal(later, found[2:])


def test_a_damaged_record_ends_the_training_with_its_name():
    made = feed()

    def fail(rows):
        raise RecordError(f"image {rows[0]}")

    made._chunks.images.source.read = fail
    with pytest.raises(RecordError, match="image"):
        made(0, STEPS)
    made.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("imagenet")
    make(place, 40, seed=0, width=40, height=36)
    return place


@pytest.mark.parametrize(
    ("name", "kind", "network"),
    [
        ("imagenet_resnet50", "array_record", {"depth": 18, "width": 4}),
        ("imagenet_msdnet", "folder", {"depth": 4, "options": ("growth=4", "factors=(1,2)")}),
        ("imagenet_vit", "parquet", {"depth": 2, "width": 24, "exits": (1,)}),
    ],
)
def test_the_imagenet_configurations_train_on_images_made_here(
    name, kind, network, files, tmp_path
):
    config = load_config(CONFIGS / f"{name}.py", Config)
    whole = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=files / kind))
    check(whole)
    assert config.network.num_exits in (4, 5)
    small = {"dir": files / kind, "cache": tmp_path, "calibrate": 4, "choose": 4, "image_size": 32}
    run = trained.TrainRun(
        dataclasses.replace(config.data, **small),
        dataclasses.replace(config.network, **network),
        dataclasses.replace(config.train, batch=16, epochs=1, checkpoint_seconds=0.0),
    )
    place = tmp_path / "run"
    _, rows = trained.trained(run, 0, place, Console(quiet=True))
    assert rows[-1]["step"] == 2
    assert np.isfinite(rows[-1]["loss"])
    assert 0 <= rows[-1]["input_wait"] < 1
