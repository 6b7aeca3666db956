"""Compiled inference against the plain network, in wall-clock time."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from eejax import benchmark
from eejax.inference.compaction import compact
from eejax.inference.executors import cond
from eejax.inference.predictors import predictor
from eejax.network import EarlyExitNetwork, Variables
from eejax.policies.base import Policy
from experiments.evaluate.config import InferenceConfig


def inference_rows(
    network: EarlyExitNetwork,
    variables: Variables,
    policy: Policy,
    thresholds: np.ndarray,
    images: np.ndarray,
    config: InferenceConfig,
) -> list[dict[str, Any]]:
    """A row for `cond` on single images, and one for `compact` on batches.

    A row has the columns of `benchmark_rows`, and `stage_ms` `[E]`.

    Args:
      network, variables, policy, thresholds: as for `eejax.predictor`.
      images: `[N, ...]` on the host, at least one.
      config: batch of `compact`, at most N, and timed passes.
    """
    rows = []
    for strategy, executor, batch, batches in (
        ("cond", cond, 1, 50),
        ("compact", compact, min(config.batch, len(images)), 4),
    ):
        batches = min(batches, len(images) // batch)
        pieces = [images[i * batch : (i + 1) * batch] for i in range(batches)]
        largest = max(256, 1 << (batch - 1).bit_length())
        predict = predictor(network, policy, variables, executor, max_batch=largest)
        stages = benchmark.stage_seconds(
            network, variables, jnp.asarray(pieces[0]), max(config.repeats, 10)
        )
        entries = [
            benchmark.plain_entry(benchmark.plain_programs(network, variables), pieces),
            benchmark.predictor_entry(strategy, predict, jnp.asarray(thresholds), pieces, stages),
        ]
        row = benchmark.benchmark_rows(entries, batch, config.repeats)[1]
        rows.append({**row, "stage_ms": (1e3 * stages).tolist()})
    return rows
