"""CINIC-10 on two CPU cores, as `configs/cifar10.py`.

    python -m experiments.cifar --data.name cinic10

Twice as many images as CIFAR-10: about half an hour. Not measured yet.
"""

from experiments.cifar.config import Config
from experiments.data.config import DataConfig
from experiments.train.config import NetworkConfig, TrainConfig

config = Config(
    data=DataConfig(name="cinic10"),
    network=NetworkConfig(name="fast", width=32, exits=(2, 3, 4)),
    train=TrainConfig(
        regime="joint",
        exit_weights=(0.3, 0.3, 0.3, 1.0),
        label_smoothing=0.2,
        epochs=6,
        batch=128,
        learning_rate=0.05,
        weight_decay=0.1,
        warmup=0.2,
    ),
)
