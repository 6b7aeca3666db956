"""The network of `configs/cifar10.py`, twice as wide, in bfloat16: for a GPU.

    python -m experiments.cifar --config configs/cifar10_gpu.py --seed 0

Not measured on any machine. The aim is 94 % at the last exit, the mean of ten seeds, in under 15
seconds of training without compilation; what it is known to reach is that network's half on two
CPU cores. 50 steps of batch 1,000 are one dispatch, more than an epoch.
"""

import dataclasses

from configs import cifar10

config = dataclasses.replace(
    cifar10.config,
    network=dataclasses.replace(cifar10.config.network, width=64, dtype="bfloat16"),
    train=dataclasses.replace(
        cifar10.config.train, epochs=12, batch=1_000, learning_rate=0.1, steps_per_dispatch=50
    ),
)
