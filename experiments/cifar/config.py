"""Configuration of the main job."""

from __future__ import annotations

from dataclasses import dataclass, field

from eejax.training import REGIMES
from experiments.checks import require
from experiments.data.config import DataConfig
from experiments.data.config import check as check_data
from experiments.evaluate.config import InferenceConfig, PoliciesConfig
from experiments.evaluate.config import check as check_evaluation
from experiments.train.config import NetworkConfig, TrainConfig
from experiments.train.config import check as check_training


@dataclass(frozen=True)
class Config:
    """A run: train an early-exit network, choose thresholds, measure, report."""

    seed: int = 0
    """Of everything that is drawn: splits, parameters, order, augmentation."""
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    policies: PoliciesConfig = field(default_factory=PoliciesConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)


def check(config: Config) -> None:
    """Checks all that can be checked without reading an image.

    Raises:
      ValueError: if a value cannot be used; one line with the field, its value and what to give.
    """
    check_data(config.data)
    check_training(config.network, config.train)
    limit, batch = config.data.limit, config.train.batch
    require(limit is None or limit >= batch, "data.limit", limit, f"at least one batch, {batch}")
    exits = config.network.num_exits
    trains_gate = REGIMES[config.train.regime].trains_gate
    check_evaluation(config.policies, config.inference, exits, trains_gate)
