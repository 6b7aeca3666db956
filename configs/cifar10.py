"""CIFAR-10 on two CPU cores."""

from experiments.config import Config, DataConfig, NetworkConfig, TrainConfig

config = Config(
    data=DataConfig(name="cifar10", shift=3, cutout=8),
    network=NetworkConfig(name="fast", width=64, exits=(2, 3, 4)),
    train=TrainConfig(
        loss="soft_auxiliary", exit_weights=(0.3, 0.3, 0.3, 1.0), cost_weight=0.3, epochs=10
    ),
)
