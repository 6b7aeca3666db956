"""CINIC-10 on two CPU cores, as `configs/cifar10.py`.

    python -m experiments.cifar --data.name cinic10

Twice as many images as CIFAR-10: about half an hour. Not measured yet.
"""

import dataclasses

from configs import cifar10
from experiments.data.config import DataConfig

config = dataclasses.replace(cifar10.config, data=DataConfig(name="cinic10"))
