"""VGG-13, nine early exits, by the soft gates' protocol: Adam, batch 128.

    python -m experiments.cifar --config configs/icassp2020/vgg13.py

`--train.regime soft_auxiliary` (the default here) is soft gates with the exits' own losses beside
them, `soft_literal` soft gates to the letter, `joint` jointly trained branches; `joint` with
`--network.exits` and no exit after it is the plain network. `--data.name` takes cifar10, cifar100
or cinic10.

Scardapane, Comminiello, Scarpiniti, Baccarelli, Uncini, *Differentiable branching in deep networks
for fast inference*, ICASSP 2020, 4167-4171,
https://sigport.org/documents/differentiable-branching-deep-networks-fast-inference.

Replicated once, with nine branches and gates that are not learned; accuracy in % on CIFAR-10,
CIFAR-100 and CINIC-10: plain 77.4, 32.9, 66.9; joint 78.9, 40.0, 69.3; entropy as the gate 77.4,
31.4, 68.2. Not run here.

Ours, not the paper's: the number of epochs, the learning rate and its schedule, a price of 0.1 of
the expected cost, the heads of the family, shift and flip. Figures: docs/icassp2020.md. The
files beside this one change the network alone.
"""

from experiments.cifar.config import Config, PoliciesConfig
from experiments.data.config import DataConfig
from experiments.train.config import NetworkConfig, TrainConfig

config = Config(
    data=DataConfig(name="cifar10"),
    network=NetworkConfig(name="vgg", depth=13, exits=tuple(range(1, 10))),
    train=TrainConfig(
        regime="soft_auxiliary",
        cost_weight=0.1,
        label_smoothing=0.0,
        epochs=60,
        batch=128,
        optimiser="adam",
        learning_rate=1e-3,
        schedule="cosine",
        warmup=0.05,
        steps_per_dispatch=50,
    ),
    policies=PoliciesConfig(names=("max_prob", "gate")),
)
