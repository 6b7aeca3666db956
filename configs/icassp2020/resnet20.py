"""ResNet-20, an exit after each block, by the protocol of `configs/icassp2020/vgg13.py`.

    python -m experiments.cifar --config configs/icassp2020/resnet20.py

No replication of this network is known to us. Figures, of part of the epochs: docs/icassp2020.md.
"""

import dataclasses

from configs.icassp2020 import vgg13
from experiments.train.config import NetworkConfig

network = NetworkConfig(name="resnet", depth=20, exits=tuple(range(1, 9)))
config = dataclasses.replace(vgg13.config, network=network)
