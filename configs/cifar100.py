"""CIFAR-100 on two CPU cores, as `configs/cifar10.py`.

    python -m experiments.cifar --data.name cifar100

About as long as CIFAR-10, a quarter of an hour. Not measured yet.
"""

import dataclasses

from configs import cifar10
from experiments.data.config import DataConfig

config = dataclasses.replace(cifar10.config, data=DataConfig(name="cifar100"))
