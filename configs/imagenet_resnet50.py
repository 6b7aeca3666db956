"""ResNet-50 on ImageNet, with exits at a quarter, half and three quarters of its cost.

    python -m experiments.cifar --config configs/imagenet_resnet50.py --data.dir DIR

DIR holds image folders `train/` and `val/`, ArrayRecord files as tensorflow-datasets prepares
`imagenet2012`, or Parquet files (docs/input.md). The 50,000 validation images are decoded once into
7.5 GB of --data.cache.

Not measured on any machine. The recipe, by which the plain network reaches 76 % in the literature:
He et al., *Deep residual learning for image recognition*, CVPR 2016,
https://arxiv.org/abs/1512.03385, with the warm-up of Goyal et al., *Accurate, large minibatch SGD*,
2017, https://arxiv.org/abs/1706.02677, and the cosine schedule of He et al., *Bag of tricks for
image classification*, CVPR 2019, https://arxiv.org/abs/1812.01187. The learning rate is for batches
of 256 and grows with them. The exits' regime is that of configs/cifar10.py.
"""

from experiments.cifar.config import Config
from experiments.data.config import DataConfig
from experiments.train.config import NetworkConfig, TrainConfig

config = Config(
    data=DataConfig(name="files", calibrate=5_000, choose=10_000, crop="random", shift=0),
    network=NetworkConfig(
        name="resnet_imagenet", depth=50, exits=(0.25, 0.5, 0.75), gate=False, dtype="bfloat16"
    ),
    train=TrainConfig(
        regime="sdn",
        label_smoothing=0.1,
        epochs=90,
        batch=256,
        optimiser="sgd",
        learning_rate=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        schedule="cosine",
        warmup=5 / 90,
        steps_per_dispatch=4,
        checkpoint_seconds=600.0,
    ),
)
