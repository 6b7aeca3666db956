"""Trains every regime of the table with the flags of the main job: a directory, then flags.

One process, and a cache of compiled programs, so that imports, images and the network's
initialisation are paid for once. What follows training in the main job does not depend on the
regime and is left out.
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from eejax.training import REGIMES
from experiments.cifar.config import parse
from experiments.train import trained
from experiments.train.trained import TrainRun

# Almost all of the time is compilation, of programs that run for a moment.
jax.config.update("jax_default_prng_impl", "rbg")
jax.config.update("jax_disable_most_optimizations", True)
directory, *flags = sys.argv[1:]
jax.config.update("jax_compilation_cache_dir", f"{directory}/programs")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

for regime in REGIMES:
    start = time.monotonic()
    config = parse([*flags, "--train.regime", regime]).run
    run = TrainRun(config.data, config.network, config.train)
    place = Path(directory) / regime
    place.mkdir(parents=True)
    variables, rows = trained.trained(run, config.seed, place, Console(quiet=True))
    leaves = jax.tree.leaves(variables)
    assert all(np.isfinite(leaf).all() for leaf in leaves), regime
    assert len(rows[-1]["held_out_accuracy"]) == 3, regime
    print(f"{regime}: {time.monotonic() - start:.1f} s", flush=True)
