"""AlexNet, an exit after each convolution, by the protocol of `configs/icassp2020/vgg13.py`.

    python -m experiments.cifar --config configs/icassp2020/alexnet.py

No replication of this network is known to us. Figures, of part of the epochs: docs/icassp2020.md.
"""

import dataclasses

from configs.icassp2020 import vgg13
from experiments.train.config import NetworkConfig

network = NetworkConfig(name="alexnet", exits=(1, 2, 3, 4))
config = dataclasses.replace(vgg13.config, network=network)
