"""Fashion-MNIST on two CPU cores.

    python -m experiments.cifar --data.name fashion_mnist

Not measured yet; a few minutes.
"""

from experiments.cifar.config import Config
from experiments.data.config import DataConfig
from experiments.train.config import NetworkConfig, TrainConfig

config = Config(
    data=DataConfig(name="fashion_mnist"),
    network=NetworkConfig(name="fast", width=32, exits=(2, 3, 4)),
    train=TrainConfig(
        regime="soft_auxiliary", exit_weights=(0.3, 0.3, 0.3, 1.0), cost_weight=0.3, epochs=5
    ),
)
