"""Four simulated CPU devices, strict types, and nothing from the network, for every test."""

import gc
import os

import jaxlib

# Compiling takes most of the time of the tests. Without LLVM's optimisations, and with the code of
# a program in one piece, it takes half of that; XLA's own passes stay. Jaxlib 0.10 can also do
# without the emitters that build loops by MLIR, which saves another half and fuses slightly
# differently. Jaxlib 0.11 lacks that flag and ends the process at a flag that it does not know. A
# caller's flags come later, so they win: XLA_FLAGS="--xla_backend_optimization_level=3
# --xla_cpu_use_fusion_emitters=true" tests what users run.
os.environ["XLA_FLAGS"] = " ".join(
    [
        *("--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"),
        "--xla_cpu_use_fusion_emitters=false" if jaxlib.version.__version_info__ < (0, 11) else "",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=4",
    ]
)
os.environ["JAX_PLATFORMS"] = "cpu"

from pathlib import PurePath

import hypothesis
import jax
import pytest
from xdist.scheduler import LoadFileScheduling

# What a shell says about colours, widths and data does not reach the tests.
for name in ("COLUMNS", "FORCE_COLOR", "LINES", "NO_COLOR", "TFDS_DATA_DIR", "TTY_COMPATIBLE"):
    os.environ.pop(name, None)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes so many objects that looking through them at the usual rate takes a twentieth.
gc.set_threshold(20_000, 20, 20)

# Compiling inside a drawn example takes longer than any deadline. A failure prints the seed that
# reproduces it.
hypothesis.settings.register_profile("eejax", deadline=None, print_blob=True)
hypothesis.settings.load_profile("eejax")


# Files that share a run of a main job go to the same process, so that it is made once.
SHARED = {
    **dict.fromkeys(
        (
            "test_deadlines",
            "test_drift",
            "test_generalisation",
            "test_job",
            "test_latency",
            "test_quantising",
            "test_serving_load",
            "test_tiers_experiment",
        ),
        "digits_run",
    ),
    **dict.fromkeys(("test_compare", "test_compare_again", "test_compare_results"), "comparison"),
}


# Files that take long begin first, so that the processes end at the same time.
LONG = (
    *("test_models", "test_inference", "test_training", "test_convert", "test_docs", "test_mesh"),
    *("test_distributed", "test_compare_grid", "test_pool_kills", "test_pool_backends"),
)


def pytest_collection_modifyitems(items):
    """Long files first; within a file nothing moves."""

    def place(item):
        return item.path.stem not in SHARED, item.path.stem not in LONG

    items.sort(key=place)


class _ByRun(LoadFileScheduling):
    def _split_scope(self, nodeid):
        file = super()._split_scope(nodeid)
        return SHARED.get(PurePath(file).stem, file)


def pytest_xdist_make_scheduler(config, log):
    """Who runs which files."""
    return _ByRun(config, log)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """The directory of a small run of the main job on the embedded data."""
    from experiments.cifar import __main__ as cifar

    path = tmp_path_factory.mktemp("job") / "run"
    flags = [
        *("--data.name", "digits", "--network.width", "4", "--train.epochs", "6"),
        *("--policies.budgets", "0.02", "0.7", "--policies.curve", "4", "--inference.repeats", "2"),
        *("--policies.thresholds", "0.25", "0.5", "0.75", "--policies.drop-confidence", "0.5"),
        *("--inference.batch", "64", "--inference.budget", "0.7"),
    ]
    flags += ["--distributed.devices", "1", "--workdir", str(path)]
    assert cifar.main(flags) == 0
    return path


@pytest.fixture(scope="session")
def digits_comparison(tmp_path_factory):
    """The directory of a small comparison on the embedded data."""
    from small_comparison import run

    path = tmp_path_factory.mktemp("compare") / "run"
    assert run(path) == 0
    return path
