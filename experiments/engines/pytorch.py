"""The networks `resnet` and `fast` in PyTorch, with the weights of a bundle.

Early exits are written by hand, or left to earlyon. Needs `pip install torch earlyon`.

earlyon (https://github.com/sohams25/earlyon) is a toolkit for early exits in PyTorch. There a head
is a hook on a layer, and an image leaves by an exception; the images of a batch leave together or
not at all.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import earlyon
import jax
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import eejax
from eejax.bundle import Bundle
from eejax.runtime import Prediction

Arrays = Mapping[str, Any]


class Network(nn.Module):
    """Normalised images `[B, C, H, W]` to logits; stage e ends at exit e, where head e sits."""

    def __init__(self, stages: list[nn.Module], heads: list[nn.Module]) -> None:
        super().__init__()
        self.stages, self.heads = nn.ModuleList(stages), nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.heads[-1](x)


def network(bundle: Bundle) -> Network:
    """The network of a bundle.

    Raises:
      ValueError: if it is of another family, or has another policy, than is written here.
    """
    policy, temperatures = bundle.policy, np.ones(bundle.network.num_exits)
    if policy.name == "temperature":
        temperatures, policy = np.asarray(policy.params.temperatures), policy.params.policy
    if bundle.family not in ("resnet", "fast") or policy.name != "max_prob":
        raise ValueError(
            f"{bundle.family} with the policy {policy.name} is not written in PyTorch here; give "
            "resnet or fast, and max_prob."
        )
    arrays = jax.tree.map(np.asarray, bundle.variables)
    positions = itertools.count()
    stages: list[nn.Module] = [
        nn.Sequential(
            *(_block(bundle.family, next(positions), block) for block in _blocks(_merged(*halves)))
        )
        for halves in zip(arrays["params"]["stages"], arrays["batch_stats"]["stages"], strict=True)
    ]
    heads: list[nn.Module] = [
        Head(head, bundle.family == "fast", float(temperature))
        for head, temperature in zip(arrays["params"]["heads"], temperatures, strict=True)
    ]
    return Network(stages, heads).eval()


def _merged(a: Arrays, b: Arrays) -> Arrays:
    """The two trees as one."""
    both = {key: _merged(a[key], b[key]) for key in a.keys() & b.keys()}
    return {**a, **b, **both}


def _blocks(tree: Arrays) -> list[Arrays]:
    """The trees of the blocks, out of chains of chains."""
    if not all(key.startswith("blocks_") for key in tree):
        return [tree]
    order = sorted(tree, key=lambda key: int(key.removeprefix("blocks_")))
    return [block for key in order for block in _blocks(tree[key])]


def _block(family: str, position: int, arrays: Arrays) -> nn.Module:
    if family == "resnet":
        return BasicBlock(arrays) if "Conv_1" in arrays else Stem(arrays)
    if "kernel" in arrays:
        return Whitening(arrays)
    return Block(arrays, pool=position in (1, 3, 5), residual=position == 6)


def convolution(kernel: np.ndarray, stride: int = 1, padding: int = 1) -> nn.Conv2d:
    """A convolution without offset, from a kernel `[H, W, I, O]`."""
    height, width, inputs, outputs = kernel.shape
    layer = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
    return _filled(layer, weight=kernel.transpose(3, 2, 0, 1))


def norm(arrays: Arrays) -> nn.BatchNorm2d:
    """Batch normalisation, with a scale of one where there is none."""
    arrays = arrays["BatchNorm_0"]
    return _filled(
        nn.BatchNorm2d(len(arrays["bias"])),
        weight=arrays.get("scale", np.ones_like(arrays["bias"])),
        bias=arrays["bias"],
        running_mean=arrays["mean"],
        running_var=arrays["var"],
    )


def _filled(layer: Any, **arrays: np.ndarray) -> Any:
    state = {name: torch.tensor(np.array(array)) for name, array in arrays.items()}
    layer.load_state_dict(state, strict=False)
    return layer


class Stem(nn.Module):
    """Of `resnet`."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__()
        self.conv = convolution(arrays["Conv_0"]["kernel"])
        self.norm = norm(arrays["Norm_0"])

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm(self.conv(x)))


class BasicBlock(nn.Module):
    """Of `resnet`; where it widens, it halves the image."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__()
        inputs, width = arrays["Conv_0"]["kernel"].shape[2:]
        self.stride, self.more = (1, 0) if inputs == width else (2, width - inputs)
        self.conv1 = convolution(arrays["Conv_0"]["kernel"], self.stride)
        self.norm1 = norm(arrays["Norm_0"])
        self.conv2 = convolution(arrays["Conv_1"]["kernel"])
        self.norm2 = norm(arrays["Norm_1"])

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.more:
            before = self.more // 2
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, before, self.more - before))
        return functional.relu(x + y)


class Whitening(nn.Module):
    """Of `fast`."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__()
        self.conv = convolution(arrays["kernel"], padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(self.conv(x), approximate="tanh")


class Block(nn.Module):
    """Of `fast`."""

    def __init__(self, arrays: Arrays, pool: bool, residual: bool) -> None:
        super().__init__()
        self.conv = convolution(arrays["Conv_0"]["kernel"])
        self.norm = norm(arrays["Norm_0"])
        self.pool, self.residual = pool, residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.pool and min(y.shape[2:]) >= 4:
            y = functional.max_pool2d(y, 2)
        y = functional.gelu(self.norm(y), approximate="tanh")
        return x + y if self.residual else y


class Head(nn.Module):
    """Mean and, with `both`, maximum of each channel, then a linear layer; over a temperature."""

    def __init__(self, arrays: Arrays, both: bool, temperature: float) -> None:
        super().__init__()
        kernel = arrays["classifier"]["kernel"]
        self.linear = nn.Linear(*kernel.shape)
        _filled(self.linear, weight=kernel.T, bias=arrays["classifier"]["bias"])
        self.both, self.temperature = both, temperature

    def forward(self, x: Tensor) -> Tensor:
        read = x.mean((2, 3))
        if self.both:
            read = torch.cat([read, x.amax((2, 3))], 1)
        return self.linear(read) / self.temperature


class Engine:
    """Images on the host to answers on the host, in eager mode with a thread a core."""

    def __init__(self, place: Path) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        bundle = eejax.load(place)
        self.network, self.image = network(bundle), bundle.image
        self.classes = len(bundle.classes)
        self.mean, self.std = (
            torch.tensor(values).reshape(1, -1, 1, 1) for values in (bundle.mean, bundle.std)
        )

    def read(self, images: np.ndarray) -> Tensor:
        """uint8 `[B, H, W, C]` as the network reads them."""
        # PyTorch wants memory that it may write to.
        x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
        return ((x.float() - self.mean) / self.std).contiguous()

    @torch.inference_mode()
    def plain(self, images: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
        """Labels of the whole network."""
        del thresholds
        return self.network(self.read(images)).argmax(1).numpy()


def by_hand(place: Path) -> dict[str, Callable[..., Any]]:
    """Every image stops at its own exit: after each exit the others are packed by an index."""
    engine = Engine(place)
    parts = list(zip(engine.network.stages, engine.network.heads, strict=True))

    @torch.inference_mode()
    def early(images: np.ndarray, thresholds: np.ndarray) -> Prediction:
        x = engine.read(images)
        exits = torch.empty(len(x), dtype=torch.int64)
        logits = torch.empty(len(x), engine.classes)
        left = torch.arange(len(x))
        for e, (stage, head) in enumerate(parts):
            x = stage(x)
            found = head(x)
            limit = float(thresholds[e]) if e < len(thresholds) else -torch.inf
            goes_on = score(found) < limit
            logits[left[~goes_on]], exits[left[~goes_on]] = found[~goes_on], e
            left = left[goes_on]
            if not len(left):
                break
            x = x[goes_on] if len(left) < len(x) else x
        return Prediction.of(logits.numpy(), exits.numpy())

    return {"plain": engine.plain, "early": early}


def score(logits: Tensor) -> Tensor:
    """The score of `eejax.max_prob`."""
    top, place = logits.max(1, keepdim=True)
    others = logits.scatter(1, place, -torch.inf).logsumexp(1)
    return functional.softplus(top[:, 0] - others)


def by_earlyon(place: Path) -> dict[str, Callable[..., Any]]:
    """earlyon's wrapper around the same network, with the network's heads instead of its own."""
    engine = Engine(place)
    exits = len(engine.network.heads) - 1
    names = [f"exit{e}" for e in range(exits)]
    points = [earlyon.ExitPoint(name, f"stages.{e}", 1) for e, name in enumerate(names)]
    config = earlyon.EarlyExitConfig("network", engine.classes, points)
    heads = dict(zip(names, list(engine.network.heads), strict=False))
    shape = (1, engine.image[2], *engine.image[:2])
    wrapper = earlyon.EarlyExitWrapper(engine.network, heads, lambda x: x, config, shape).eval()

    def early(images: np.ndarray, thresholds: np.ndarray) -> Prediction:
        # Its scores are probabilities, of which infinitely sure is none.
        config.enabled_exits = [bool(t < np.inf) for t in thresholds]
        config.confidence_thresholds = [float(-np.expm1(-max(t, 0))) for t in thresholds]
        x = engine.read(images)
        if len(x) == 1:
            found = wrapper(x, mode="inference")
            logits = found.prediction
        else:
            found = wrapper.forward_inference_batched(x)
            logits = found.predictions
        taken = exits if found.exit_taken == -1 else found.exit_taken
        return Prediction.of(logits.numpy(), np.full(len(x), taken))

    return {"plain": engine.plain, "early": early}
