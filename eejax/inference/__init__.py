"""Compiled inference in which each sample stops at its own exit.

An executor is a pure function `(network, policy, variables, thresholds, images, count) ->
Prediction` (`step.Executor`). `predictor` compiles one for use from Python, with batches of any
size; `sharded` gives each device of a mesh its share.

| executor | granularity | method |
|---|---|---|
| `full` | none | runs every stage and head, then selects: the baseline of correctness |
| `cond` | whole batch | nested `lax.cond`, while a sample is undecided; for batch 1 |
| `compact` | sample | tiles of samples in loops; survivors are packed together |
| `loop` | sample | the same, with equal stages as one `lax.while_loop` over depth |

Three more are driven from the host: `dispatch.host`, `streaming.stream` and `deadline.anytime`;
`automatic.auto` picks the fastest. All agree with `evaluation.routing.route`.
"""

from eejax.inference.compaction import compact, loop
from eejax.inference.executors import cond, full
from eejax.inference.predictors import Predictor, predictor, sharded
from eejax.inference.step import Executor, Prediction

EXECUTORS: dict[str, Executor] = {"full": full, "cond": cond, "compact": compact, "loop": loop}
"""The executors by name; `auto`, the latency benchmark and the tests run over this table."""

__all__ = [
    "EXECUTORS",
    "Executor",
    "Prediction",
    "Predictor",
    "compact",
    "cond",
    "full",
    "loop",
    "predictor",
    "sharded",
]
