"""Converted weights against what the PyTorch references said (tests/reference/record.py)."""

import json
from pathlib import Path

import fill
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from eejax import cost
from eejax.models.alexnet import alexnet
from eejax.models.densenet import densenet
from eejax.models.efficientnet import efficientnet
from eejax.models.lenet import lenet
from eejax.models.mobilenet import mobilenet
from eejax.models.msdnet import msdnet
from eejax.models.resnet import resnet, resnet_imagenet
from eejax.models.vgg import vgg
from eejax.models.vit import vit
from eejax.models.wideresnet import wideresnet
from eejax.pretrained import convert, names

REFERENCE = Path(__file__).parent / "reference"

# Name of the record: the network for images of a shape, with an exit after every block, and names.
CONVERTED = {
    "resnet20": lambda image: (
        resnet(10, image=image, depth=20, exits="all"),
        names.akamaster_resnet(20),
    ),
    "resnet18": lambda image: (
        resnet_imagenet(1000, image=image, depth=18, exits="all"),
        names.torchvision_resnet(18),
    ),
    "resnet50": lambda image: (
        resnet_imagenet(1000, image=image, depth=50, exits="all"),
        names.torchvision_resnet(50),
    ),
    "mobilenet_v2": lambda image: (
        mobilenet(1000, image=image, width=0.35, exits="all"),
        names.torchvision_mobilenet(),
    ),
    "efficientnet_small": lambda image: (
        efficientnet(1000, image=image, depth=0.5, width=0.5, exits="all"),
        names.torchvision_efficientnet(0.5),
    ),
    "densenet_small": lambda image: (
        densenet(1000, image=image, groups=(2, 3, 1, 2), width=12, exits="all"),
        names.torchvision_densenet((2, 3, 1, 2)),
    ),
    "densenet_bc22": lambda image: (
        densenet(10, image=image, groups=(3, 3, 3), width=12, exits="all"),
        names.bearpaw_densenet(22),
    ),
    "lenet": lambda image: (lenet(10, image=image, exits="all"), names.kuangliu_lenet()),
    "alexnet": lambda image: (alexnet(10, image=image, exits="all"), names.bearpaw_alexnet()),
    "vgg11_cifar": lambda image: (
        vgg(10, image=image, depth=11, exits="all"),
        names.kuangliu_vgg(11),
    ),
    "vgg11_small": lambda image: (
        vgg(1000, image=image, depth=11, width=8, norm=False, hidden=64, exits="all"),
        names.torchvision_vgg(11, norm=False),
    ),
    "vgg16_bn_small": lambda image: (
        vgg(1000, image=image, depth=16, width=8, hidden=64, exits="all"),
        names.torchvision_vgg(16),
    ),
    "wrn16_4": lambda image: (
        wideresnet(10, image=image, depth=16, width=4, exits="all"),
        names.xternalz_wideresnet(16),
    ),
    "msdnet": lambda image: (
        msdnet(10, image=image, depth=6, base=2),
        names.kalviny_msdnet((2, 4, 6)),
    ),
    "msdnet_imagenet_small": lambda image: (
        msdnet(
            1000,
            image=image,
            depth=4,
            width=4,
            growth=4,
            factors=(1, 2, 4, 4),
            prune="min",
            exits=(2,),
        ),
        names.kalviny_msdnet((2, 4), scales=4, prune="min"),
    ),
    "vit_tiny_timm": lambda image: (
        vit(1000, image=image, patch=16, exits="all"),
        names.timm_vit(),
    ),
    "vit_small_torchvision": lambda image: (
        vit(1000, image=image, depth=4, width=96, heads=3, patch=16, exits="all"),
        names.torchvision_vit(4),
    ),
}


def recorded(name):
    return json.loads((REFERENCE / "recorded" / f"{name}.json").read_text())


def empty(network, images):
    """Variables of zeros, which a converter that leaves something out would leave."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)


@pytest.mark.parametrize("name", CONVERTED)
def test_converted_weights_give_the_logits_of_the_reference(name):
    record = recorded(name)
    network, table = CONVERTED[name](record["image"])
    images = fill.images(record["image"])
    variables = convert.load(empty(network, images), fill.weights(record["shapes"]), table)
    if table.exits:
        logits = jax.jit(lambda v, x: network.apply_all(v, x)[0].logits)(variables, images)
    else:
        logits = jax.jit(network.apply_plain)(variables, images)[None]
    expected = np.array(record["logits"], np.float32)
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits[..., : expected.shape[-1]], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONVERTED)
def test_every_block_costs_what_the_layers_of_the_reference_do(name):
    record = recorded(name)
    network, table = CONVERTED[name](record["image"])
    images = jax.ShapeDtypeStruct((1, *record["image"]), np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)
    costs = cost.macs(network, shapes, images)
    of = convert.parameter_names(shapes, table)
    for e in range(network.num_exits):
        for kind, counted in (("stages", costs.stages), ("heads", costs.heads)):
            layers = {
                name.rpartition(".")[0]
                for path, name in of.items()
                if path[1].key == kind and path[2].idx == e
            }
            if kind == "heads" and not layers:
                continue  # an early head that the reference does not have
            theirs = sum(record["macs"].get(layer, 0) for layer in layers)
            assert counted[e] == theirs, (kind, e)
    whole = costs.stages.sum() + (costs.heads.sum() if table.exits else costs.heads[-1])
    assert whole == sum(record["macs"].values())


@pytest.fixture(scope="module")
def little():
    """A ResNet of six blocks, its arrays as a PyTorch network would have them, and their names."""
    network = resnet(5, image=(8, 8, 3), depth=14, width=4, exits=(2, 4))
    table = names.akamaster_resnet(14)
    shapes = {
        name: shape
        for name, shape in recorded("resnet20")["shapes"].items()
        if ".2." not in name  # of three blocks a group the third
    }
    narrow = {
        name: [n if n in (3, 1) else 5 if n == 10 else n // 4 for n in shape]
        for name, shape in shapes.items()
    }
    start = jax.tree.map(
        lambda s: np.full(s.shape, 7, s.dtype), empty(network, np.zeros((1, 8, 8, 3), np.float32))
    )
    return start, fill.weights(narrow), table


def test_early_heads_stay_and_everything_else_is_taken(little):
    start, arrays, table = little
    found = convert.load(start, arrays, table)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
    for e in (0, 1):
        for leaf in jax.tree.leaves(found["params"]["heads"][e]):
            assert (leaf == 7).all()
    rest = [
        *found["params"]["stages"],
        *found["batch_stats"]["stages"],
        found["params"]["heads"][2],
    ]
    assert not any((leaf == 7).any() for leaf in jax.tree.leaves(rest))
    assert jax.tree.structure(found) == jax.tree.structure(start)
    kernel = found["params"]["stages"][1]["blocks_0"]["Conv_0"]["kernel"]
    # Block 3 of 6 is the first of the second group.
    np.testing.assert_array_equal(kernel, arrays["layer2.0.conv1.weight"].transpose(2, 3, 1, 0))


def test_a_classifier_for_other_classes_is_left_as_it_is(little):
    start, arrays, table = little
    other = {**arrays, "linear.weight": np.ones((9, 16)), "linear.bias": np.ones(9)}
    with pytest.raises(ValueError, match=r"linear\.(weight|bias).*classifier=False"):
        convert.load(start, other, table)
    found = convert.load(start, other, table, classifier=False)
    assert all((leaf == 7).all() for leaf in jax.tree.leaves(found["params"]["heads"]))
    assert not (jax.tree.leaves(found["params"]["stages"])[0] == 7).any()
    # And where the source has none at all.
    headless = {k: v for k, v in arrays.items() if not k.startswith("linear")}
    convert.load(start, headless, table, classifier=False)
    with pytest.raises(ValueError, match=r"2 not there \(linear\.bias, linear\.weight\)"):
        convert.load(start, headless, table)


def test_a_file_of_safetensors_gives_what_its_arrays_do(little, tmp_path):
    start, arrays, table = little
    counted = {**arrays, "bn1.num_batches_tracked": np.array(3)}
    safetensors.numpy.save_file(counted, tmp_path / "w.safetensors")
    found = convert.load(start, tmp_path / "w.safetensors", table)
    jax.tree.map(np.testing.assert_array_equal, found, convert.load(start, arrays, table))


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_other_floats_are_read_into_float32(little, tmp_path, dtype):
    start, arrays, table = little
    others = {name: value.astype(dtype) for name, value in arrays.items()}
    safetensors.numpy.save_file(others, tmp_path / "w.safetensors")
    found = convert.load(start, tmp_path / "w.safetensors", table)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}
    exact = {name: value.astype(np.float32) for name, value in others.items()}
    jax.tree.map(np.testing.assert_array_equal, found, convert.load(start, exact, table))


def test_integers_are_no_weights(little):
    start, arrays, table = little
    more = {
        "bn1.num_batches_tracked": np.array(3),
        "layer1.relative_position_index": np.zeros((4, 4), np.int64),
        "mask": np.ones(3, bool),
    }
    found = convert.load(start, {**arrays, **more}, table)
    jax.tree.map(np.testing.assert_array_equal, found, convert.load(start, arrays, table))


def test_module_before_every_name_is_taken_off_and_another_prefix_is_named(little):
    start, arrays, table = little
    parallel = {f"module.{name}": value for name, value in arrays.items()}
    found = convert.load(start, parallel, table)
    jax.tree.map(np.testing.assert_array_equal, found, convert.load(start, arrays, table))
    inside = {f"model.net.{name}": value for name, value in arrays.items()}
    with pytest.raises(ValueError, match=r"'model\.net\.' before every name.*removeprefix"):
        convert.load(start, inside, table)
    # Without it they would still not fit, and it is not what is wrong.
    del inside["model.net.conv1.weight"]
    with pytest.raises(ValueError, match="weights of another network"):
        convert.load(start, inside, table)


def test_positions_of_another_image_size_say_so():
    record = recorded("vit_small_torchvision")
    network, table = CONVERTED["vit_small_torchvision"]((32, 48, 3))
    start = empty(network, np.zeros((1, 32, 48, 3), np.float32))
    with pytest.raises(ValueError, match=r"\(1, 17, 96\) there.*for the image size that it was"):
        convert.load(start, fill.weights(record["shapes"]), table)


@pytest.mark.parametrize("change", ["missing", "left", "shape", "blocks"])
def test_weights_of_another_network_are_refused_by_name(little, change):
    start, arrays, table = little
    arrays = dict(arrays)
    if change == "missing":
        del arrays["layer2.1.bn1.weight"]
        said = r"1 not there \(layer2\.1\.bn1\.weight\)"
    elif change == "left":
        arrays["layer2.2.conv1.weight"] = np.zeros((8, 8, 3, 3))
        said = r"1 with no place here \(layer2\.2\.conv1\.weight\)"
    elif change == "shape":
        arrays["conv1.weight"] = np.zeros((9, 3, 3, 3))
        said = r"conv1\.weight: \(3, 3, 3, 9\) there and \(3, 3, 3, 4\) here"
    else:
        table = names.akamaster_resnet(20)
        said = "7 blocks, and names for 10"
    with pytest.raises(ValueError, match=said):
        convert.load(start, arrays, table)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.npz"])
def test_pickles_are_not_read(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"not a \.safetensors file.*save_file"):
        convert.read(tmp_path / name)


def test_a_broken_file_and_none_at_all_are_refused(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"w\.safetensors"):
        convert.read(tmp_path / "w.safetensors")
    with pytest.raises(FileNotFoundError):
        convert.read(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("table", "said"),
    [(names.torchvision_resnet, "18, 34, 50"), (names.kuangliu_vgg, "11, 13, 16")],
)
def test_a_depth_without_a_table_is_refused(table, said):
    with pytest.raises(ValueError, match=said):
        table(7)
