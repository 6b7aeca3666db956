"""Networks whose heads also read the answer of the head before.

    network = boosted(network)   # head e answers z_e + F_{e-1} / 2, with F_{e-1} the answer before
    network = cascaded(network)  # early head e answers z_e + W LN(z_{e-1})

Both work with any heads, and no gradient passes to the head before. Its logits travel as memory, so
executors hand them on with the samples that go on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from eejax.network import EarlyExitNetwork, ExitOutput, Module, PyTree, Variables

SHARE = 0.5
_EPSILON = 1e-6


class Linked(NamedTuple):
    """The memory of a linked head.

    Attributes:
      logits: `[B, C]`, its answer.
      memory: of the head itself, without the link.
    """

    logits: Array
    memory: PyTree


def boosted(network: EarlyExitNetwork) -> EarlyExitNetwork:
    """The network with added answers: `F_e = z_e + sg(F_{e-1}) / 2`, `F_1 = z_1`.

    Yu, Li, Hua, Huang, Shi, *Boosted dynamic neural networks*, AAAI 2023,
    https://arxiv.org/abs/2211.16726. The variables are those of the network itself.
    """
    heads = tuple(_boosted(head) for head in network.heads)
    return EarlyExitNetwork(network.stages, heads)


def cascaded(network: EarlyExitNetwork) -> EarlyExitNetwork:
    """The network with a cascade of its early heads: `z_e + W_e LN(sg(z'_{e-1}))`, for 1 < e < E.

    `z'` are the answers of the cascade and LN is layer normalisation. Adding a linear layer of the
    answer before is the same as concatenating that answer with what a linear classifier reads. The
    last head stays out, so the plain network needs no early head. Wolczyk et al., *Zero time
    waste*, NeurIPS 2021, https://arxiv.org/abs/2106.05409.

    The parameters of heads 2 to E - 1 become `{"head": ..., "before": {"scale", "bias",
    "kernel"}}`.
    """
    early = network.num_exits - 1
    heads = [
        _cascaded(head, reads=e > 0, hands_on=e + 1 < early)
        for e, head in enumerate(network.heads[:-1])
    ]
    return EarlyExitNetwork(network.stages, (*heads, network.heads[-1]))


LINKS: dict[str, Callable[[EarlyExitNetwork], EarlyExitNetwork]] = {
    "boosted": boosted,
    "cascaded": cascaded,
}


# Both are cached so that equal heads stay equal heads, which can share a program.
@functools.cache
def _boosted(head: Module) -> Module:
    def init(key: Array, features: PyTree, memory: PyTree) -> Variables:
        return head.init(key, features, _own(memory))

    def apply(
        variables: Variables, features: PyTree, memory: PyTree, **mode: Any
    ) -> tuple[ExitOutput, PyTree]:
        output, stats = head.apply(variables, features, _own(memory), **mode)
        logits = output.logits
        if isinstance(memory, Linked):
            logits += SHARE * lax.stop_gradient(memory.logits)
        return ExitOutput(logits, output.gate, Linked(logits, output.memory)), stats

    return Module(init, apply)


@functools.cache
def _cascaded(head: Module, reads: bool, hands_on: bool) -> Module:
    def init(key: Array, features: PyTree, memory: PyTree) -> Variables:
        variables = head.init(key, features, _own(memory))
        if not reads:
            return variables
        classes = memory.logits.shape[-1]
        draw = jax.nn.initializers.lecun_normal()
        before = {
            "scale": jnp.ones(classes),
            "bias": jnp.zeros(classes),
            "kernel": draw(jax.random.fold_in(key, 1), (classes, classes), jnp.float32),
        }
        return {**variables, "params": {"head": variables["params"], "before": before}}

    def apply(
        variables: Variables, features: PyTree, memory: PyTree, **mode: Any
    ) -> tuple[ExitOutput, PyTree]:
        own = {**variables, "params": variables["params"]["head"]} if reads else variables
        output, stats = head.apply(own, features, _own(memory), **mode)
        logits = output.logits
        if reads:
            before = variables["params"]["before"]
            x = _normalised(lax.stop_gradient(memory.logits))
            logits += (x * before["scale"][None] + before["bias"][None]) @ before["kernel"]
        after = Linked(logits, output.memory) if hands_on else output.memory
        return ExitOutput(logits, output.gate, after), stats

    return Module(init, apply)


def _own(memory: PyTree) -> PyTree:
    """What the head itself handed on."""
    return memory.memory if isinstance(memory, Linked) else memory


def _normalised(x: Array) -> Array:
    """Zero mean and unit variance over the classes."""
    x -= x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + _EPSILON)
