"""scikit-learn's digits, 8x8: the main job's data set if CIFAR-10 cannot be had.

    python -m experiments.cifar --data.name digits

Half a minute on two CPU cores; last exit 98 % to 99 %. A check that everything works: with 449
test images, differences under a point are noise.
"""

from experiments.cifar.config import Config
from experiments.data.config import DataConfig
from experiments.train.config import NetworkConfig, TrainConfig

config = Config(
    data=DataConfig(name="digits", calibrate=150, choose=300, flip=False, shift=1),
    network=NetworkConfig(name="fast", width=16, exits=(1, 2, 3)),
    train=TrainConfig(cost_weight=0.3, epochs=60, batch=128),
)
