"""MSDNet on ImageNet, the network with growth 16 and five exits.

    python -m experiments.cifar --config configs/imagenet_msdnet.py --data.dir DIR

DIR as for configs/imagenet_resnet50.py. Not measured on any machine.

Huang et al., *Multi-scale dense networks for resource efficient image classification*, ICLR 2018,
https://arxiv.org/abs/1703.09844: equal weights, 90 epochs of SGD with batches of 256, learning rate
0.1. There it falls to a tenth after 30 and 60 epochs; here it falls along a cosine.
"""

import dataclasses

from configs import imagenet_resnet50
from experiments.train.config import NetworkConfig

config = dataclasses.replace(
    imagenet_resnet50.config,
    network=NetworkConfig(
        name="msdnet",
        depth=20,
        width=32,
        options=("step=4", "growth=16", "factors=(1,2,4,4)"),
        gate=False,
        dtype="bfloat16",
    ),
    train=dataclasses.replace(
        imagenet_resnet50.config.train, regime="joint", label_smoothing=0.0, warmup=0.0
    ),
)
