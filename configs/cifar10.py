"""CIFAR-10 on two CPU cores."""

from experiments.config import Config, DataConfig, NetworkConfig, TrainConfig

config = Config(
    data=DataConfig(name="cifar10"),
    network=NetworkConfig(name="fast", width=64, exits=(1, 2, 3)),
    train=TrainConfig(epochs=10),
)
