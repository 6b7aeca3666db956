"""What a finished run leaves for inference: its bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eejax import bundle
from eejax.cost import Costs
from eejax.network import Variables
from eejax.policies import Policy
from experiments.data.splits import Dataset
from experiments.train.config import NetworkConfig, network_arguments


def save_bundle(
    workdir: Path,
    config: NetworkConfig,
    dataset: Dataset,
    variables: Variables,
    policy: Policy,
    thresholds: np.ndarray,
    costs: Costs,
    metadata: Mapping[str, Any],
) -> None:
    """Writes the bundle into a run's directory, where `eejax.load` finds it.

    Args:
      workdir: the run's directory.
      config: of the network.
      dataset: its classes, images and moments.
      variables: trained.
      policy: fitted.
      thresholds: `[E - 1]`.
      costs: of stages and heads.
      metadata: plain data.
    """
    image = dataset.train.images.shape[1:]
    classes, mean, std = dataset.classes, dataset.mean, dataset.std
    parts = (network_arguments(config), classes, image, mean, std)
    whole = bundle.Bundle(config.name, *parts, variables, policy, thresholds, costs, metadata)
    bundle.save(whole, workdir / bundle.SUBDIRECTORY)
