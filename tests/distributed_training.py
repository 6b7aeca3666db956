"""A small training as a program of its own: python -m distributed_training WORKDIR OPTIONS.

It writes `pid-K` when process K begins to train, and `final.npz` at the end. OPTIONS is JSON:
fields of `DistributedConfig`; `pause`, seconds before each dispatch; `every`, seconds between
checkpoints; `stop`, a step before which the last process sends itself SIGTERM.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from experiments import distributed


def run(workdir, *, pause=0.0, every=1e9, stop=None, **options):
    config = distributed.DistributedConfig(**options)
    if distributed.to_start(config):
        return distributed.start("distributed_training", sys.argv[1:], config)
    distributed.join(config)
    import test_mesh as small  # its arrays would look for devices before `join`

    from eejax import training
    from eejax.training import REGIMES, placement
    from experiments.data.splits import Split
    from experiments.train import loop
    from experiments.train.config import TrainConfig
    from experiments.train.feeding import Resident

    class Slow(Resident):
        def __call__(self, step, count):
            orders.append((step, np.asarray(super().__call__(step, count).order).tolist()))
            time.sleep(pause)
            if step == stop and jax.process_index() == jax.process_count() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(step, count)

    orders = []
    mesh = distributed.mesh(config)
    key = placement.replicate(mesh, small.KEY)
    phases = REGIMES["exits_only"].phases(small.OPTIONS)

    @jax.jit
    def begin(key, images):
        state = training.init_state(small.NETWORK, small.optimiser(1), key, images)
        return placement.constrain_state(mesh, state)

    first = placement.replicate(mesh, small.IMAGES[:1])
    steps = training.make_train_steps(
        *(small.NETWORK, small.optimiser, phases, small.augment),
        **{"steps": 50, "classes": small.CLASSES, "mesh": mesh},
    )
    feed = Slow(Split(small.IMAGES, small.LABELS), key, small.BATCH, flip=True, mesh=mesh)
    (workdir / f"pid-{jax.process_index()}").write_text(str(os.getpid()))
    with distributed.ending_together((KeyboardInterrupt,)):
        state, rows = loop.train(
            *(steps, lambda key: begin(key, first), key, feed),
            TrainConfig(epochs=10, batch=16, steps_per_dispatch=2, checkpoint_seconds=every),
            mesh=mesh,
            workdir=workdir,
            watch=lambda state: [],
            learning_rate=lambda step: 0.1,
            console=Console(),
        )
    leaves = jax.tree.leaves(placement.local(state))
    if distributed.first():
        np.savez(
            workdir / "final.npz",
            *leaves,
            steps=[r["step"] for r in rows],
            orders=json.dumps(orders),
        )
    distributed.leave()
    return 0


def main():
    workdir, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    try:
        return run(workdir, **options)
    except KeyboardInterrupt as stop:
        print(stop, file=sys.stderr)
        return getattr(stop, "code", 130)


if __name__ == "__main__":
    sys.exit(main())
