"""Fashion-MNIST on two CPU cores: half of CIFAR-10's width, fewer epochs.

    python -m experiments.cifar --data.name fashion_mnist

Not measured yet; a few minutes.
"""

import dataclasses

from configs import cifar10
from experiments.data.config import DataConfig

config = dataclasses.replace(
    cifar10.config,
    data=DataConfig(name="fashion_mnist"),
    network=dataclasses.replace(cifar10.config.network, width=16),
    train=dataclasses.replace(cifar10.config.train, epochs=4),
)
