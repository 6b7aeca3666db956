"""Policies and regimes side by side on CIFAR-10.

    python -m experiments.compare --data.name cifar10

Ten networks a seed. docs/results.md has the results of two seeds (2026-11-21). On two cores of a
busy machine: 80 minutes of training, 2.5 minutes of choosing thresholds, 1.5 minutes of timing.
"""

from experiments.compare.config import Comparison, TargetsConfig
from experiments.data.config import DataConfig
from experiments.train.config import NetworkConfig, TrainConfig

config = Comparison(
    regimes=("joint", "soft_auxiliary", "soft_literal", "soft_mixture"),
    data=DataConfig(name="cifar10", calibrate=1_000, choose=3_000, certify=2_000),
    network=NetworkConfig(name="fast", width=32, exits=(2, 3, 4)),
    targets=TargetsConfig(budgets=(0.5, 0.6, 0.75)),
    train=TrainConfig(exit_weights=(0.3, 0.3, 0.3, 1.0), cost_weight=0.3, epochs=6),
)
