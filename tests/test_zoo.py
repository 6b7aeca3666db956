"""Families on the command line, and the zoo in numbers."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eejax.models import FAMILIES
from eejax.models.fast import whitening
from experiments import models
from experiments.cifar import __main__ as cifar
from experiments.cifar import config as cifar_config
from experiments.cifar.config import Config, check
from experiments.command_line import CONFIGS
from experiments.compare import config as compare_config
from experiments.data.config import DataConfig
from experiments.train import trained
from experiments.train.config import NetworkConfig, TrainConfig, build_network, narrowed

DOCS = (Path(__file__).parent.parent / "docs" / "models.md").read_text()


def test_a_family_takes_what_is_given_and_has_its_own_defaults():
    network = NetworkConfig(name="vgg", exits=(2, 5))
    assert (network.blocks, network.num_exits) == (13, 3)
    assert build_network(network, 7, (32, 32, 3)).num_exits == 3
    assert NetworkConfig(name="vgg", depth=11).num_exits == 4
    assert NetworkConfig(name="vit", depth=3, options=("exits=all",)).num_exits == 3
    assert NetworkConfig(name="mobilenet", exits=(0.2, 0.5)).num_exits == 3
    assert NetworkConfig(name="resnet", depth=20).num_exits == 4
    assert NetworkConfig(name="isotropic", depth=3).num_exits == 3
    assert NetworkConfig(name="isotropic", depth=3, exits=(1,)).num_exits == 2
    assert NetworkConfig().num_exits == 4
    deep = build_network(NetworkConfig(name="vit", depth=2, options=("size=S",)), 3, (8, 8, 1))
    assert deep.num_exits == 2


def test_numbers_that_are_whole_are_block_numbers(monkeypatch, tmp_path):
    flags = ["--data.name", "digits", "--network.name", "resnet", "--network.depth", "20"]
    run = cifar_config.parse([*flags, "--network.exits", "2", "4", "--network.width", "8"]).run
    assert run.network.exits == (2, 4)
    assert [type(e) for e in run.network.exits or ()] == [int, int]
    assert run.network.width == 8
    run = cifar_config.parse([*flags, "--network.exits", "0.25", "0.5"]).run
    assert run.network.exits == (0.25, 0.5)
    assert run.network.num_exits == 3
    assert run.network.words == "resnet, depth 20, exits 0.25 0.5, float32"


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (NetworkConfig(name="vggg"), r"'vggg' is no family; give .*mobilenet"),
        (
            NetworkConfig(name="vgg", options=("patch=2",)),
            "vgg takes no patch; it takes depth, width",
        ),
        (NetworkConfig(name="lenet", depth=3), r"lenet takes no depth"),
        (NetworkConfig(name="vgg", exits=(2, 14)), "1 to 13"),
        (NetworkConfig(name="vgg", depth=12), "a VGG depth of 12; give 11, 13, 16"),
        (NetworkConfig(name="fast", exits=(0.2, 2)), "shares lie between 0 and 1"),
        (NetworkConfig(width=0), r"network\.width"),
        (NetworkConfig(depth=3), r"fast takes no depth"),
        (NetworkConfig(name="vit", options=("width=32",)), "give it as --network.width"),
        (NetworkConfig(name="vit", exits=(1,), options=("exits=all",)), "as --network.exits"),
        (NetworkConfig(name="vit", options=("patch=x",)), "vit got patch 'x'; give a whole number"),
        (NetworkConfig(name="msdnet", options=("exits=40",)), "0 to 15"),
    ],
)
def test_a_network_that_cannot_be_is_refused_before_anything_slow(network, said):
    with pytest.raises(ValueError, match=said):
        check(Config(network=network))


def test_another_family_begins_with_its_own_depth_width_and_exits():
    own = NetworkConfig()
    for argv in (["--data.name", "digits"], ["--config", str(CONFIGS / "digits.py")]):
        for name in FAMILIES:
            run = cifar_config.parse([*argv, "--network.name", name]).run
            found = (run.network.depth, run.network.width, run.network.exits)
            if name == "fast":  # what the configuration of the digits is about
                assert found == (None, 16, (1, 2, 3))
            else:
                assert found == (own.depth, own.width, own.exits) == (None, None, None)
                assert run.train.exit_weights == ()
    run = compare_config.parse(["--data.name", "digits", "--network.name", "vit"]).run
    assert run.network.width is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--network.name", "vgg"], "images of 8x8"),
        (["--network.name", "vit", "--network.options", "patch=3"], "images of 8x8"),
        (["--network.name", "resnet", "--network.width", "8.5"], "give a whole number"),
        (["--network.exits", "0.31", "0.32"], "different blocks"),
    ],
)
def test_a_network_that_the_images_do_not_suit_is_one_line(flags, said, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert cifar.main(["--data.name", "digits", "--workdir", str(workdir), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not workdir.exists()


def test_a_narrower_network_has_whole_channels_or_a_smaller_factor():
    assert narrowed(NetworkConfig(name="fast", width=10), 0.25) == 2
    assert narrowed(NetworkConfig(name="resnet"), 0.01) == 1
    assert narrowed(NetworkConfig(name="mobilenet"), 0.25) == 0.25
    with pytest.raises(ValueError, match=r"static\.widths.*--network\.width"):
        narrowed(NetworkConfig(name="vit"), 0.5)


def test_the_tables_of_the_docs_are_what_the_command_prints(capsys):
    assert models.main(["resnet", "lenet", "--no-compile"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 13
    assert set(printed) <= set(DOCS.splitlines())


def test_every_family_has_its_rows_in_the_docs():
    for name, family in FAMILIES.items():
        assert len(re.findall(rf"^\| `{name}` \| \d", DOCS, re.MULTILINE)) == 2
        for each in family.published:
            row = f"| {each.name} | {each.parameters:,} | {each.parameters:,} |"
            assert DOCS.count(row) == 1, each.name


def test_compiling_is_timed(capsys):
    assert models.main(["lenet", "--batch", "2"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"\| `lenet` \|( \d+\.\d \|){4}", last)
    assert models.main(["nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_the_experiments_whiten_by_training_images():
    run = trained.TrainRun(
        DataConfig(name="digits", calibrate=100, choose=100),
        NetworkConfig(width=2, exits=(2,)),
        TrainConfig(batch=64, epochs=1),
    )
    init, _, _ = trained.program(run)
    stats = init(jax.random.key(0)).batch_stats["stages"][0]
    kernels = [leaf for leaf in jax.tree.leaves(stats) if leaf.ndim == 4]
    data = trained.dataset(run)
    images = (data.train.images[:1_000] - np.asarray(data.mean, np.float32)) / np.asarray(
        data.std, np.float32
    )
    # The sign of a component is arbitrary.
    expected = np.abs(whitening(jnp.asarray(images)))
    np.testing.assert_allclose(np.abs(kernels[0]), expected, rtol=1e-2, atol=1e-2)
