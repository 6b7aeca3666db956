"""What the latency benchmarks serve: a network with a policy, images, and their scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import eejax
from eejax import cost
from eejax.evaluation.routing import score
from eejax.network import EarlyExitNetwork, Variables, normalise
from eejax.policies import POLICIES, Policy, with_temperatures
from eejax.trace import Trace, collect
from experiments.cifar.config import Config
from experiments.command_line import from_json, read_run
from experiments.data import splits
from experiments.latency.distributions import exit_counts, exit_rates, imposed_thresholds
from experiments.train.config import NetworkConfig, build_network


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is served.

    Attributes:
      name: the network, in words.
      network: E exits.
      variables: as `network.init` gives.
      policy: scores the exits, with its temperatures.
      images: `[N, H, W, C]` uint8 on the host.
      scores: `[N, E]`, the policy's for these images.
      rates: share of the images at each exit in the distribution `trained`, of a random network.
      thresholds: `[E - 1]` of the distribution `trained`, of a run; None for a random network.
    """

    name: str
    network: EarlyExitNetwork
    variables: Variables
    policy: Policy
    images: np.ndarray
    scores: np.ndarray
    rates: tuple[float, ...] | None = None
    thresholds: np.ndarray | None = None


def thresholds_of(workload: Workload, distribution: str, count: int) -> np.ndarray:
    """`[E - 1]` float32, with which the first `count` images leave as the distribution says."""
    if distribution == "trained" and workload.thresholds is not None:
        return workload.thresholds
    rates = exit_rates(distribution, workload.network.num_exits, workload.rates)
    return imposed_thresholds(workload.scores[:count], exit_counts(rates, count))


def random_workload(
    config: NetworkConfig,
    policy: str,
    seed: int,
    count: int,
    side: int = 32,
    classes: int = 10,
) -> Workload:
    """A network with random variables, and random images.

    Args:
      config: the network.
      policy: its name.
      seed: of images and variables.
      count: how many images.
      side: of the images, in pixels.
      classes: C.

    Raises:
      ValueError: if the family refuses the configuration.
    """
    images = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    network = build_network(config, classes, images.shape[1:])
    network = network.reading(normalise((127.5,) * 3, (73.9,) * 3))
    variables = jax.jit(network.init)(jax.random.key(seed), jnp.asarray(images[:1]))
    trace = _trace(network, variables, images)
    # Logits of a deep random network are in the thousands: without temperatures all scores are 1.
    spread = np.maximum(trace.logits.std(axis=(0, 2)), 1e-6)
    fractions = cost.xla_macs(network, variables, images[:1]).fractions
    rule = POLICIES[policy]
    params = rule.fit(trace._replace(logits=trace.logits / spread[None, :, None]), fractions)
    fitted = with_temperatures(Policy(rule, params), spread)
    name = f"random {config.words}, {side}x{side} images"
    return Workload(name, network, variables, fitted, images, score(fitted, trace).scores)


def run_workload(run: Path, count: int) -> Workload:
    """The bundle and the test images of a run of the main job; a small test split is repeated.

    Args:
      run: its directory.
      count: how many images.

    Raises:
      ValueError, OSError: if they cannot be read; one line.
    """
    try:
        config = from_json(Config, read_run(run)["config"])
        bundle = eejax.load(run)
    except (ValueError, OSError) as error:
        words = f"--run {run}: {error} Give the directory of a finished run of experiments.cifar."
        raise ValueError(words) from None
    # The splits were drawn with the run's seed.
    dataset = splits.load(config.data, config.seed)
    images = np.resize(dataset.test.images, (count, *bundle.image))
    scores = score(bundle.policy, _trace(bundle.network, bundle.variables, images)).scores
    return Workload(
        f"{config.network.words}, {dataset.name}, {run.name}",
        bundle.network,
        bundle.variables,
        bundle.policy,
        images,
        scores,
        thresholds=bundle.thresholds,
    )


def _trace(network: EarlyExitNetwork, variables: Variables, images: np.ndarray) -> Trace:
    labels = np.zeros(len(images), np.int32)
    return collect(network, variables, images, labels, batch=min(len(images), 256))
