"""ViT-S/16 on ImageNet, with exits after blocks 4, 6, 8 and 10 of 12.

    python -m experiments.cifar --config configs/imagenet_vit.py --data.dir DIR

DIR as for configs/imagenet_resnet50.py. Not measured on any machine.

Beyer, Zhai, Kolesnikov, *Better plain ViT baselines for ImageNet-1k*, 2022,
https://arxiv.org/abs/2205.01580: 90 epochs of batches of 1,024, Adam at 0.001 after 10,000 steps of
warm-up, mean pooling; 76.5 % for the plain network. Theirs, and not here: RandAugment, mixup, and
fixed positions. Their weight decay of 0.0001 is not multiplied by the learning rate. Here it is, so
0.1 is the same.
"""

import dataclasses

from configs import imagenet_resnet50
from experiments.train.config import NetworkConfig, TrainConfig

config = dataclasses.replace(
    imagenet_resnet50.config,
    network=NetworkConfig(
        name="vit",
        exits=(4, 6, 8, 10),
        options=("size=S", "patch=16", "pool=mean"),
        gate=False,
        dtype="bfloat16",
    ),
    train=TrainConfig(
        regime="sdn",
        label_smoothing=0.0,
        epochs=90,
        batch=1024,
        optimiser="adam",
        learning_rate=1e-3,
        weight_decay=0.1,
        schedule="cosine",
        warmup=10_000 / 112_590,
        steps_per_dispatch=2,
        checkpoint_seconds=600.0,
    ),
)
