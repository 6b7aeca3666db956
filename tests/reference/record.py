"""Records what the PyTorch references say, for tests that have no PyTorch.

    pip install torch torchvision timm
    python tests/reference/record.py --checkouts DIR [NAME ...]

writes `tests/reference/recorded/NAME.json`: the names and shapes of the reference's parameters,
its logits for two images when these are filled by `fill.py`, and the multiply-accumulates of each
of its layers. `--checkouts` is a folder with clones of the repositories that REPOSITORIES names.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import fill
import numpy as np
import torch

HERE = Path(__file__).parent
REPOSITORIES = {
    "pytorch_resnet_cifar10": "github.com/akamaster/pytorch_resnet_cifar10, d5489e8",
    "pytorch-cifar": "github.com/kuangliu/pytorch-cifar, 49b7aa9",
    "pytorch-classification": "github.com/bearpaw/pytorch-classification, 24f1c45",
    "MSDNet-PyTorch": "github.com/kalviny/MSDNet-PyTorch, f654595",
    "WideResNet-pytorch": "github.com/xternalz/WideResNet-pytorch, 1171f93",
}


def _load(checkouts: Path, repository: str, file: str) -> ModuleType:
    path = checkouts / repository / file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _torchvision(name: str, **arguments: Any) -> Callable[[Path], torch.nn.Module]:
    def make(checkouts: Path) -> torch.nn.Module:
        del checkouts
        import torchvision

        return getattr(torchvision.models, name)(**arguments)

    return make


def _small_efficientnet(checkouts: Path) -> torch.nn.Module:
    del checkouts
    from torchvision.models import efficientnet

    groups, _ = efficientnet._efficientnet_conf("efficientnet_b0", width_mult=0.5, depth_mult=0.5)
    return efficientnet.EfficientNet(groups, 0.2)


def _small_densenet(checkouts: Path) -> torch.nn.Module:
    del checkouts
    from torchvision.models import DenseNet

    return DenseNet(12, (2, 3, 1, 2), 24)


def _small_vgg(cfg: str, norm: bool) -> Callable[[Path], torch.nn.Module]:
    """torchvision's VGG with an eighth of the channels and two hidden layers of 64."""

    def make(checkouts: Path) -> torch.nn.Module:
        del checkouts
        from torchvision.models import vgg

        layers = [c if isinstance(c, str) else c // 8 for c in vgg.cfgs[cfg]]
        network = vgg.VGG(vgg.make_layers(layers, norm), init_weights=False)
        for place, sizes in ((0, (64 * 7 * 7, 64)), (3, (64, 64)), (6, (64, 1000))):
            network.classifier[place] = torch.nn.Linear(*sizes)
        return network

    return make


def _msdnet(**arguments: Any) -> Callable[[Path], torch.nn.Module]:
    """kalviny's MSDNet, which takes its arguments as a parsed command."""

    def make(checkouts: Path) -> torch.nn.Module:
        module = _load(checkouts, "MSDNet-PyTorch", "models/msdnet.py")
        common = {"stepmode": "even", "bottleneck": True, "reduction": 0.5}
        common["bnFactor"] = arguments["grFactor"]
        common["nScales"] = len(arguments["grFactor"])
        with contextlib.redirect_stdout(io.StringIO()):
            return module.MSDNet(argparse.Namespace(**common, **arguments))

    return make


def _timm(name: str, **arguments: Any) -> Callable[[Path], torch.nn.Module]:
    def make(checkouts: Path) -> torch.nn.Module:
        del checkouts
        import timm

        return timm.create_model(name, **arguments)

    return make


# Name of the record: (who made the reference, the shape of the images [H, W, C], how to make it).
REFERENCES: dict[str, tuple[str, tuple[int, int, int], Callable[[Path], torch.nn.Module]]] = {
    "resnet20": (
        REPOSITORIES["pytorch_resnet_cifar10"],
        (32, 32, 3),
        lambda checkouts: _load(checkouts, "pytorch_resnet_cifar10", "resnet.py").resnet20(),
    ),
    "resnet18": ("torchvision", (64, 64, 3), _torchvision("resnet18")),
    "resnet50": ("torchvision", (64, 64, 3), _torchvision("resnet50")),
    "mobilenet_v2": ("torchvision", (64, 64, 3), _torchvision("mobilenet_v2", width_mult=0.35)),
    "efficientnet_small": ("torchvision", (64, 64, 3), _small_efficientnet),
    "densenet_small": ("torchvision", (64, 64, 3), _small_densenet),
    "densenet_bc22": (
        REPOSITORIES["pytorch-classification"],
        (32, 32, 3),
        lambda checkouts: _load(
            checkouts, "pytorch-classification", "models/cifar/densenet.py"
        ).densenet(depth=22),
    ),
    "lenet": (
        REPOSITORIES["pytorch-cifar"],
        (32, 32, 3),
        lambda checkouts: _load(checkouts, "pytorch-cifar", "models/lenet.py").LeNet(),
    ),
    "alexnet": (
        REPOSITORIES["pytorch-classification"],
        (32, 32, 3),
        lambda checkouts: _load(
            checkouts, "pytorch-classification", "models/cifar/alexnet.py"
        ).alexnet(),
    ),
    "vgg11_cifar": (
        REPOSITORIES["pytorch-cifar"],
        (32, 32, 3),
        lambda checkouts: _load(checkouts, "pytorch-cifar", "models/vgg.py").VGG("VGG11"),
    ),
    "vgg11_small": ("torchvision", (224, 224, 3), _small_vgg("A", norm=False)),
    "vgg16_bn_small": ("torchvision", (224, 224, 3), _small_vgg("D", norm=True)),
    "wrn16_4": (
        REPOSITORIES["WideResNet-pytorch"],
        (32, 32, 3),
        lambda checkouts: _load(checkouts, "WideResNet-pytorch", "wideresnet.py").WideResNet(
            16, 10, 4
        ),
    ),
    "msdnet": (
        REPOSITORIES["MSDNet-PyTorch"],
        (32, 32, 3),
        _msdnet(
            **{"data": "cifar10", "nBlocks": 3, "base": 2, "step": 2, "prune": "max"},
            **{"nChannels": 16, "growthRate": 6, "grFactor": (1, 2, 4)},
        ),
    ),
    "msdnet_imagenet_small": (
        REPOSITORIES["MSDNet-PyTorch"],
        (160, 160, 3),
        _msdnet(
            **{"data": "ImageNet", "nBlocks": 2, "base": 2, "step": 2, "prune": "min"},
            **{"nChannels": 4, "growthRate": 4, "grFactor": (1, 2, 4, 4)},
        ),
    ),
    "vit_tiny_timm": ("timm", (224, 224, 3), _timm("vit_tiny_patch16_224")),
    "vit_small_torchvision": (
        "torchvision",
        (64, 64, 3),
        _torchvision(
            "VisionTransformer",
            **{"image_size": 64, "patch_size": 16, "num_layers": 4, "num_heads": 3},
            **{"hidden_dim": 96, "mlp_dim": 384},
        ),
    ),
}


def record(network: torch.nn.Module, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Names, shapes, logits and multiply-accumulates of one reference."""
    network.eval()
    state = network.state_dict()
    shapes = {k: list(v.shape) for k, v in state.items() if not k.endswith("num_batches_tracked")}
    filled = {k: torch.from_numpy(v) for k, v in fill.weights(shapes).items()}
    network.load_state_dict({**state, **filled})
    macs: dict[str, int] = {}
    hooks = [
        module.register_forward_hook(_counter(macs, name))
        for name, module in network.named_modules()
    ]
    images = torch.from_numpy(fill.images(shape)).permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        logits = network(images)
    for hook in hooks:
        hook.remove()
    logits = logits if isinstance(logits, list | tuple) else [logits]
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "macs": macs,
        "shapes": shapes,
        # Of each exit, the first ten classes.
        "logits": [np.round(z[:, :10].double().numpy(), 7).tolist() for z in logits],
    }


def _counter(macs: dict[str, int], name: str) -> Callable[..., None]:
    """A hook that counts a layer's multiply-accumulates for one image."""

    def hook(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, torch.nn.Conv2d):
            pixels = output.shape[2] * output.shape[3]
            macs[name] = pixels * module.weight.numel()
        elif isinstance(module, torch.nn.Linear):
            rows = output.numel() // output.shape[0] // output.shape[-1]
            macs[name] = rows * module.weight.numel()
        elif isinstance(module, torch.nn.MultiheadAttention):
            # Its products are functions, not modules: three projections, scores, sums, the output.
            tokens, width = inputs[0].shape[1:]
            macs[name] = 4 * tokens * width**2 + 2 * tokens**2 * width
        elif type(module).__name__ == "Attention":  # timm's, with its projections as modules
            tokens, width = inputs[0].shape[1:]
            # Counted with the first of them, for a product has no parameters to find it by.
            macs[f"{name}.qkv"] += 2 * tokens**2 * width

    return hook


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(REFERENCES)}; all without any")
    parser.add_argument("--checkouts", type=Path, default=Path(), help="folder with the clones")
    arguments = parser.parse_args()
    (HERE / "recorded").mkdir(exist_ok=True)
    for name in arguments.names or REFERENCES:
        source, shape, make = REFERENCES[name]
        found = record(make(arguments.checkouts), shape)
        versions = {"torch": torch.__version__.split("+")[0]}
        for library in ("torchvision", "timm"):
            if source.startswith(library):
                versions[library] = sys.modules[library].__version__.split("+")[0]
        text = json.dumps({"source": source, "versions": versions, "image": shape, **found})
        text = text.replace(', "', ',\n"')
        (HERE / "recorded" / f"{name}.json").write_text(text + "\n")
        print(f"{name}: {found['parameters']:,} parameters, {sum(found['macs'].values()):,} MACs")


if __name__ == "__main__":
    main()
