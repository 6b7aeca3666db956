"""Every regime side by side on CIFAR-10, with a small network and a short training.

    python -m experiments.compare --data.name cifar10

Thirty-three networks a seed, two hours on two cores; docs/results.md has the figures. The first
exit of a network this narrow costs 0.46, so that the cascade alone meets a budget of 0.4.
"""

import dataclasses

from configs import cifar10
from eejax.training import REGIMES
from experiments.compare.config import Comparison, TargetsConfig
from experiments.data.config import DataConfig
from experiments.train.config import NetworkConfig

config = Comparison(
    seeds=(0, 1),
    regimes=tuple(REGIMES),
    policies=("max_prob", "margin", "gate", "optimal_stopping", "random"),
    data=DataConfig(name="cifar10", calibrate=1_000, choose=3_000, certify=2_000),
    network=NetworkConfig(name="fast", width=8, exits=(2, 3, 4)),
    targets=TargetsConfig(budgets=(0.4, 0.5, 0.6, 0.75)),
    train=dataclasses.replace(
        cifar10.config.train, exit_weights=(0.3, 0.3, 0.3, 1.0), cost_weight=0.3, epochs=3
    ),
)
