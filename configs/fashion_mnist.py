"""Fashion-MNIST on two CPU cores.

    python -m experiments.cifar --data.name fashion_mnist

Not measured yet; a few minutes.
"""

from experiments.cifar.config import Config
from experiments.data.config import DataConfig
from experiments.train.config import NetworkConfig, TrainConfig

config = Config(
    data=DataConfig(name="fashion_mnist"),
    network=NetworkConfig(name="fast", width=16, exits=(2, 3, 4)),
    train=TrainConfig(
        regime="joint",
        exit_weights=(0.3, 0.3, 0.3, 1.0),
        label_smoothing=0.2,
        epochs=4,
        batch=128,
        learning_rate=0.05,
        weight_decay=0.1,
        warmup=0.2,
    ),
)
