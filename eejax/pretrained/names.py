"""The names of parameters in PyTorch networks: a table for each source, for `convert.load`.

A function is named after the source and the family of `eejax.models` that it is for.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from eejax.models import efficientnet, msdnet, resnet, vgg


class Names(NamedTuple):
    """The names of a PyTorch network's parameters and statistics.

    A leaf of ours first gets a name in PyTorch's style: kernel and scale become `weight`, the
    statistics `running_mean` and `running_var`, after the names of the modules around them. In a
    block with the prefix `layer1.0` that is `layer1.0.conv1.weight`, in the last head
    `head.classifier.weight`, in the first early head `exit.0.classifier.weight`. Then `rename` is
    applied.

    Attributes:
      blocks: the prefix of each block of the backbone, in order; `""` for none.
      rename: `(pattern, replacement)`, applied in order to the whole name by `re.sub`.
      exits: whether the source has early heads too; otherwise ours keep their values.
    """

    blocks: Sequence[str]
    rename: Sequence[tuple[str, str]] = ()
    exits: bool = False


def torchvision_resnet(depth: int) -> Names:
    """torchvision's `resnet18`, `34`, `50` for `resnet_imagenet` of that depth."""
    groups = _groups(resnet.GROUPS, depth)
    blocks = [f"layer{g}.{i}" for g, n in enumerate(groups, 1) for i in range(n)]
    return Names(
        ("", *blocks),
        ((r"downsample_(\d)", r"downsample.\1"), (r"^head\.classifier", "fc")),
    )


def akamaster_resnet(depth: int) -> Names:
    """`resnet20` to `resnet110` of akamaster/pytorch_resnet_cifar10, for `resnet` of that depth."""
    blocks = [f"layer{g}.{i}" for g in (1, 2, 3) for i in range((depth - 2) // 6)]
    return Names(
        ("", *blocks),
        (
            (r"Conv_0", "conv1"),
            (r"Conv_1", "conv2"),
            (r"Norm_0", "bn1"),
            (r"Norm_1", "bn2"),
            (r"^head\.classifier", "linear"),
        ),
    )


def torchvision_mobilenet() -> Names:
    """torchvision's `mobilenet_v2`, of any `width_mult`, for `mobilenet`."""
    return Names(
        [f"features.{i}" for i in range(19)],
        (
            *_CONV_NORM,
            # The first block does not expand.
            (r"^features\.1\.depthwise", "features.1.conv.0"),
            (r"^features\.1\.project\.0", "features.1.conv.1"),
            (r"^features\.1\.project\.1", "features.1.conv.2"),
            (r"\.expand\.", ".conv.0."),
            (r"\.depthwise\.", ".conv.1."),
            (r"\.project\.0", ".conv.2"),
            (r"\.project\.1", ".conv.3"),
            (r"^head\.classifier", "classifier.1"),
        ),
    )


def torchvision_efficientnet(depth: float = 1.0) -> Names:
    """torchvision's `efficientnet_b0` to `b4`, for `efficientnet` of that factor on the depth."""
    counts = enumerate(efficientnet.block_counts(depth), 1)
    blocks = [f"features.{g}.{i}" for g, n in counts for i in range(n)]
    return Names(
        ("features.0", *blocks, "features.8"),
        (
            *_CONV_NORM,
            # The first group does not expand.
            (r"^(features\.1\.\d+)\.depthwise", r"\1.block.0"),
            (r"^(features\.1\.\d+)\.attention", r"\1.block.1"),
            (r"^(features\.1\.\d+)\.project", r"\1.block.2"),
            (r"\.expand", ".block.0"),
            (r"\.depthwise", ".block.1"),
            (r"\.attention", ".block.2"),
            (r"\.project", ".block.3"),
            (r"^head\.classifier", "classifier.1"),
        ),
    )


# torchvision keeps a convolution and its norm in a `Sequential`.
_CONV_NORM = ((r"\.conv\.", ".0."), (r"\.bn\.", ".1."))


def torchvision_densenet(groups: Sequence[int] = (6, 12, 24, 16)) -> Names:
    """`densenet121`, `169` ... of torchvision for `densenet` of these groups, on large images."""
    blocks = ["features"]
    for g, layers in enumerate(groups, 1):
        blocks += [f"features.denseblock{g}.denselayer{i + 1}" for i in range(layers)]
        blocks += [f"features.transition{g}"] if g < len(groups) else []
    last = ((r"^head\.reader\.bn", "features.norm5"), (r"^head\.classifier", "classifier"))
    return Names(blocks, last)


def bearpaw_densenet(depth: int) -> Names:
    """`densenet` of bearpaw/pytorch-classification, for `densenet` of 3 groups, on small images.

    Args:
      depth: 6n + 4, where a group has n layers.
    """
    blocks = [""]
    for g in (1, 2, 3):
        blocks += [f"dense{g}.{i}" for i in range((depth - 4) // 6)]
        blocks += [f"trans{g}"] if g < 3 else []
    return Names(
        blocks,
        (
            (r"^conv0", "conv1"),
            (r"\.norm([12])", r".bn\1"),
            (r"^(trans\d)\.norm", r"\1.bn1"),
            (r"^(trans\d)\.conv", r"\1.conv1"),
            (r"^head\.reader\.bn", "bn"),
            (r"^head\.classifier", "fc"),
        ),
    )


def kuangliu_lenet() -> Names:
    """`LeNet` of kuangliu/pytorch-cifar for `lenet`."""
    return Names(
        ("conv1", "conv2"),
        (
            (r"^(conv\d)\.conv", r"\1"),
            (r"^head\.reader\.layer0", "fc1"),
            (r"^head\.reader\.layer1", "fc2"),
            (r"^head\.classifier", "fc3"),
        ),
    )


def bearpaw_alexnet() -> Names:
    """`alexnet` of bearpaw/pytorch-classification, the one for CIFAR, for `alexnet`."""
    blocks = [f"features.{i}" for i in (0, 3, 6, 8, 10)]
    return Names(blocks, ((r"^(features\.\d+)\.conv", r"\1"), (r"^head\.classifier", "classifier")))


def kuangliu_vgg(depth: int) -> Names:
    """`VGG` of kuangliu/pytorch-cifar for `vgg` of that depth."""
    blocks, rename = _vgg(depth, norm=True)
    return Names(blocks, (*rename, (r"^head\.classifier", "classifier")))


def torchvision_vgg(depth: int, norm: bool = True) -> Names:
    """torchvision's `vgg11`, `13`, `16`, and with `norm` their `_bn`, for `vgg` of that depth,
    `norm` and `hidden=4096`."""
    blocks, rename = _vgg(depth, norm)
    return Names(
        blocks,
        (
            *rename,
            (r"^head\.reader\.layer0", "classifier.0"),
            (r"^head\.reader\.layer1", "classifier.3"),
            (r"^head\.classifier", "classifier.6"),
        ),
    )


def _vgg(depth: int, norm: bool) -> tuple[list[str], list[tuple[str, str]]]:
    """Both sources keep one list, `features`, of convolutions, norms, ReLUs and pooling."""
    blocks, place = [], 0
    for count in _groups(vgg.GROUPS, depth):
        for _ in range(count):
            blocks.append(f"features.{place}/{place + 1}")
            place += 3 if norm else 2
        place += 1
    of_block = r"^features\.(\d+)/(\d+)"
    return blocks, [(of_block + r"\.conv", r"features.\1"), (of_block + r"\.bn", r"features.\2")]


def _groups(table: Mapping[int, tuple[int, ...]], depth: int) -> tuple[int, ...]:
    if depth not in table:
        raise ValueError(f"a depth of {depth}; give {', '.join(map(str, table))}.")
    return table[depth]


def xternalz_wideresnet(depth: int) -> Names:
    """`WideResNet` of xternalz/WideResNet-pytorch for `wideresnet` of that depth."""
    blocks = [f"block{g}.layer.{i}" for g in (1, 2, 3) for i in range((depth - 4) // 6)]
    return Names(
        ("", *blocks),
        (
            (r"shortcut", "convShortcut"),
            (r"^head\.reader\.bn", "bn1"),
            (r"^head\.classifier", "fc"),
        ),
    )


def kalviny_msdnet(exits: Sequence[int], *, scales: int = 3, prune: str = "max") -> Names:
    """`MSDNet` of kalviny/MSDNet-PyTorch with all its exits, for `msdnet` of these exits.

    Args:
      exits: as for `msdnet`, block numbers with the last: `(4, 6, 8, 10, 12, 14, 16)`.
      scales: their number.
      prune: as for `msdnet`.
    """
    layers, blocks = msdnet.steps(exits[-1], scales, prune), []
    for e, (start, stop) in enumerate(itertools.pairwise((0, *exits))):
        # The first layer and each transition count as blocks there.
        count = sum(1 + layer.reduced for layer in layers[start:stop]) + (start == 0)
        blocks += [f"blocks.{e}.{i}" for i in range(count)]
    return Names(
        blocks,
        (
            (r"_(\d)", r".\1"),
            (r"(\d)_", r"\1."),
            (r"_net", ".net"),
            (r"^head", f"exit.{len(exits) - 1}"),
            (r"reader\.conv(\d)", r"m.\1.net.0"),
            (r"reader\.bn(\d)", r"m.\1.net.1"),
            (r"classifier", "linear"),
            (r"^exit", "classifier"),
        ),
        exits=True,
    )


def timm_vit(depth: int = 12) -> Names:
    """timm's `vit_tiny_patch16_224`, `small`, `base` for `vit` of that depth with a class token."""
    return Names(
        ("", *(f"blocks.{i}" for i in range(depth))),
        (
            (r"(attn|mlp)_", r"\1."),
            (r"^patch_embed", "patch_embed.proj"),
            (r"^head\.reader\.norm", "norm"),
            (r"^head\.classifier", "head"),
        ),
    )


def torchvision_vit(depth: int = 12) -> Names:
    """torchvision's `vit_b_16` and its other sizes for `vit` of that depth with a class token."""
    return Names(
        ("", *(f"encoder.layers.encoder_layer_{i}" for i in range(depth))),
        (
            (r"^patch_embed", "conv_proj"),
            (r"^cls_token", "class_token"),
            (r"^pos_embed", "encoder.pos_embedding"),
            (r"\.norm(\d)", r".ln_\1"),
            (r"attn_qkv\.", "self_attention.in_proj_"),
            (r"attn_proj", "self_attention.out_proj"),
            (r"mlp_fc1", "mlp.0"),
            (r"mlp_fc2", "mlp.3"),
            (r"^head\.reader\.norm", "encoder.ln"),
            (r"^head\.classifier", "heads.head"),
        ),
    )
