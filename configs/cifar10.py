"""CIFAR-10 on two CPU cores.

    python -m experiments.cifar --data.name cifar10

Expect 90 % at the last exit, and 0.1 to 0.3 points less at 60 % of the multiply-accumulates (max
probability). Measured with seed 0 on two cores of an AMD EPYC (Zen 4), jax 0.10.2, 2026-11-27:
exits 65.9, 82.9, 88.4 and 89.9 %; 89.9 % at 0.61 of the cost and 89.0 % at 0.51; 406 images a
second; the whole command took 14 min 21 s.

The regime is the one that wins in docs/results.md; docs/lab/tried.md has what else was tried.
"""

from experiments.cifar.config import Config
from experiments.data.config import DataConfig
from experiments.train.config import NetworkConfig, TrainConfig

config = Config(
    data=DataConfig(name="cifar10"),
    network=NetworkConfig(name="fast", width=32, exits=(2, 3, 4)),
    train=TrainConfig(
        regime="sdn",
        label_smoothing=0.2,
        epochs=6,
        batch=128,
        learning_rate=0.05,
        weight_decay=0.1,
        warmup=0.2,
    ),
)
