"""What `experiments.latency` times: a network with a policy, images, and thresholds that send the
images where a distribution says."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from eejax import cost
from eejax.evaluation.routing import score
from eejax.network import EarlyExitNetwork, Variables, normalise
from eejax.policies import POLICIES, Policy, fit, with_temperatures
from eejax.selection.thresholds import for_budget
from eejax.trace import Trace, collect
from experiments.cifar.config import Config
from experiments.command_line import from_json, read_run
from experiments.data import splits as data
from experiments.latency.flags import Arguments, is_stream, rates_of
from experiments.train import trained
from experiments.train.config import build_network

# At batch 1 every call serves another image, of so many, so that a distribution can be had.
SINGLES = 64
# A stream repeats so many images.
STREAMED = 1024


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is timed.

    Attributes:
      name: the network, in words.
      network: E exits.
      variables: as `network.init` gives.
      policy: what scores the exits, with its temperatures.
      images: `[N, H, W, C]` uint8 on the host.
      scores: `[N, E]`, the policy's of these images.
      rates: share of the images at each exit in `trained`, of a random network; else None.
      limits: `[E - 1]`, the thresholds of `trained`, of a run; else None.
    """

    name: str
    network: EarlyExitNetwork
    variables: Variables
    policy: Policy
    images: np.ndarray
    scores: np.ndarray
    rates: tuple[float, ...] | None
    limits: np.ndarray | None


def subject(arguments: Arguments) -> Subject:
    """The run's network and its test images, or a random network and random images.

    Raises:
      ValueError, OSError, CheckpointError: what the flags name cannot be had, or does not fit.
    """
    wanted = max(SINGLES, *arguments.batches)
    if arguments.images and any(map(is_stream, arguments.strategies)):
        wanted = max(wanted, min(STREAMED, arguments.images))
    made = _random(arguments, wanted) if arguments.run is None else _of_run(arguments, wanted)
    for name in arguments.distributions:
        rates_of(name, made.network.num_exits, made.rates)
    return made


def thresholds(subject: Subject, distribution: str, count: int) -> np.ndarray:
    """`[E - 1]` float32, which send the first `count` images where the distribution says."""
    if distribution == "trained" and subject.limits is not None:
        return subject.limits
    rates = rates_of(distribution, subject.network.num_exits, subject.rates)
    return imposed(subject.scores[:count], shares(rates, count))


def shares(rates: Sequence[float], count: int) -> np.ndarray:
    """Rates `[E]` as whole numbers `[E]` that add up to `count`: largest remainders round up."""
    exact = np.asarray(rates) * count
    # Rounded first, since 0.3 * 10 must not count as a little under 3.
    whole = np.floor(np.round(exact, 6)).astype(int)
    order = np.argsort(-(exact - whole), kind="stable")
    whole[order[: count - whole.sum()]] += 1
    return whole


def imposed(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Thresholds `[E - 1]` with which so many of these samples leave at each exit.

    A threshold lies half-way between two scores, out of reach of another program's rounding. Where
    equal scores are on both sides of it, all of them leave.

    Args:
      scores: `[N, E]`.
      counts: `[E]`, adding up to N.
    """
    limits = np.full(scores.shape[1] - 1, np.inf, np.float32)
    left = np.asarray(scores, np.float32)
    for e, count in enumerate(counts[:-1]):
        # A score that is NaN never reaches a threshold.
        falling = np.sort(np.nan_to_num(left[:, e], nan=-np.inf))[::-1]
        if count >= len(falling):
            limits[e] = -np.inf
        elif count:
            low, high = falling[count], falling[count - 1]
            middle = np.float32((float(low) + float(high)) / 2)
            limits[e] = middle if middle > low else high
        left = left[~(left[:, e] >= limits[e])]
    return limits


def _random(arguments: Arguments, count: int) -> Subject:
    rng = np.random.default_rng(arguments.seed)
    side = arguments.image_size
    images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    split = data.Split(images, np.zeros(count, np.int32))
    classes = tuple(map(str, range(arguments.classes)))
    moments = ((127.5,) * 3, (73.9,) * 3)
    splits = (split, split, split, split, split)
    dataset = data.Dataset("random", classes, *splits, "", "random", *moments)
    config = arguments.network_config()
    bare = build_network(config, len(dataset.classes), images.shape[1:])
    network = bare.reading(normalise(dataset.mean, dataset.std))
    variables = jax.jit(network.init)(jax.random.key(arguments.seed), jnp.asarray(images[:1]))
    trace = _trace(network, variables, images)
    # Logits of a deep random network are in the thousands, where every answer is certain and all
    # scores are the same.
    spread = trace.logits.std(axis=(0, 2))
    rule = POLICIES[arguments.policy]
    fractions = cost.xla_macs(network, variables, jnp.asarray(images[:1])).fractions
    policy = with_temperatures(Policy(rule, rule.fit(trace, fractions)), np.maximum(spread, 1e-6))
    rates = rates_of("trained", network.num_exits, arguments.rates)
    scores = score(policy, trace).scores
    name = f"random {config.words}, {side}x{side} images"
    return Subject(name, network, variables, policy, images, scores, rates, None)


def _of_run(arguments: Arguments, count: int) -> Subject:
    """As `experiments.job` leaves it, with the thresholds chosen as it chooses them."""
    assert arguments.run is not None
    try:
        config: Config = from_json(Config, read_run(arguments.run)["config"])
    except (ValueError, OSError) as error:
        raise ValueError(f"--run: {error}") from None
    # The splits were drawn with the run's seed.
    training = trained.TrainRun(config.data, config.network, config.train, split_seed=config.seed)
    quiet = Console(quiet=True)
    network, variables, costs, dataset, rows = trained.trained(
        training, config.seed, arguments.run, quiet
    )

    calibrate = collect(network, variables, *dataset.calibrate)
    policy = fit(config.inference.policy, calibrate, costs.fractions)
    choose = score(policy, collect(network, variables, *dataset.choose))
    limits = for_budget(
        choose.scores,
        choose.predictions == dataset.choose.labels[:, None],
        costs.fractions,
        config.inference.budget,
    ).thresholds
    # Small test splits are repeated.
    images = dataset.test.images[np.arange(count) % len(dataset.test.images)]
    scores = score(policy, _trace(network, variables, images)).scores
    name = (
        f"{config.network.words}, {dataset.name}, step {rows[-1]['step']} of {arguments.run.name}"
    )
    return Subject(
        name, network, variables, policy, images, scores, None, np.asarray(limits, np.float32)
    )


def _trace(network: EarlyExitNetwork, variables: Any, images: np.ndarray) -> Trace:
    labels = np.zeros(len(images), np.int32)
    return collect(network, variables, images, labels, batch=min(len(images), 256))
