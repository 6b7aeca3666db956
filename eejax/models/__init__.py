"""The zoo. A new family takes one file, which ends in its `Family`, and a line in this list."""

from eejax.models import (
    alexnet,
    densenet,
    efficientnet,
    fast,
    isotropic,
    lenet,
    mobilenet,
    msdnet,
    resnet,
    vgg,
    vit,
    wideresnet,
)
from eejax.models.family import Family, Published

FAMILIES: dict[str, Family] = {
    "alexnet": alexnet.FAMILY,
    "densenet": densenet.FAMILY,
    "efficientnet": efficientnet.FAMILY,
    "fast": fast.FAMILY,
    "isotropic": isotropic.FAMILY,
    "lenet": lenet.FAMILY,
    "mobilenet": mobilenet.FAMILY,
    "msdnet": msdnet.FAMILY,
    "resnet": resnet.SMALL_IMAGES,
    "resnet_imagenet": resnet.IMAGENET,
    "vgg": vgg.FAMILY,
    "vit": vit.FAMILY,
    "wideresnet": wideresnet.FAMILY,
}

__all__ = ["FAMILIES", "Family", "Published"]
