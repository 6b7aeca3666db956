"""Policies and regimes side by side on scikit-learn's digits, 8x8, without any download.

    python -m experiments.compare --data.name digits

Four minutes on two cores (4 min 1 s, AMD EPYC, jax 0.10.2, 2026-11-21; the same command again:
14 s). A check that everything works: with 449 test images, differences under two points are noise.
"""

from experiments.compare.config import Comparison, DriftConfig, GuaranteeConfig, TargetsConfig
from experiments.data.config import DataConfig
from experiments.train.config import NetworkConfig, TrainConfig

config = Comparison(
    regimes=("joint", "soft_auxiliary"),
    data=DataConfig(name="digits", calibrate=150, choose=250, certify=250, flip=False, shift=1),
    network=NetworkConfig(name="fast", width=16, exits=(1, 2, 3)),
    train=TrainConfig(cost_weight=0.3, epochs=40, batch=128),
    targets=TargetsConfig(budgets=(0.1, 0.2, 0.4), curve=12),
    guarantee=GuaranteeConfig(risks=(0.1,)),
    drift=DriftConfig(images=449),
)
