"""Images of your own, in folders, Parquet or ArrayRecord files: a ResNet-18 with three early exits.

    python -m experiments.cifar --data.name files --data.dir DIR

A beginning, not a recipe: docs/input.md has what DIR holds and how images are cropped.
"""

from experiments.cifar.config import Config
from experiments.data.config import DataConfig
from experiments.train.config import NetworkConfig, TrainConfig

config = Config(
    data=DataConfig(
        name="files", calibrate=500, choose=1_000, image_size=128, crop="random", shift=0
    ),
    network=NetworkConfig(name="resnet_imagenet", depth=18, exits=(0.25, 0.5, 0.75), gate=False),
    train=TrainConfig(regime="sdn", epochs=30, batch=128, learning_rate=0.02, weight_decay=0.1),
)
