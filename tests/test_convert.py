"""Converted weights against what the PyTorch references said (tests/reference/record.py)."""

import json
from pathlib import Path

import fill
import jax
import numpy as np
import pytest

from eejax import convert, cost, names
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
    # Compiling is most of the time; LLVM's part of it is not what is tested.
    options = {"xla_backend_optimization_level": "0"}
    if table.exits:
        run = jax.jit(lambda v, x: network.apply_all(v, x)[0].logits, compiler_options=options)
        logits = run(variables, images)
    else:
        logits = jax.jit(network.apply_plain, compiler_options=options)(variables, images)[None]
    expected = np.array(record["logits"], np.float32)
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits[..., : expected.shape[-1]], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONVERTED)
def test_every_block_costs_what_the_layers_of_the_reference_do(name):
    record = recorded(name)
    network, table = CONVERTED[name](record["image"])
    images = jax.ShapeDtypeStruct((1, *record["image"]), np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)
    costs = cost.layer_macs(network, shapes, images)
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
