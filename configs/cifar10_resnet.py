"""A wide ResNet-20 on CIFAR-10, trained to the end: for a GPU.

    python -m experiments.cifar --config configs/cifar10_resnet.py

Not measured yet on any machine. Networks of this size reach 94 % to 95 % in the literature; the
aim is 93.5 % at the last exit.

He et al., *Deep residual learning for image recognition*, CVPR 2016,
https://arxiv.org/abs/1512.03385; exits as in BranchyNet (Teerapittayanon et al., ICPR 2016).
"""

from experiments.cifar.config import Config
from experiments.data.config import DataConfig
from experiments.train.config import NetworkConfig, TrainConfig

config = Config(
    data=DataConfig(name="cifar10", shift=4, cutout=8),
    network=NetworkConfig(name="resnet", depth=20, width=64, exits=(3, 5, 7), gate=False),
    train=TrainConfig(
        regime="joint",
        exit_weights=(0.3, 0.3, 0.3, 1.0),
        label_smoothing=0.1,
        epochs=100,
        batch=256,
        optimiser="sgd",
        learning_rate=0.1,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="cosine",
        warmup=0.05,
        steps_per_dispatch=50,
    ),
)
