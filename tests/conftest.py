"""Four simulated CPU devices, strict types, and nothing from the network, for every test."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

from pathlib import PurePath

import hypothesis
import jax
import pytest
from xdist.scheduler import LoadFileScheduling

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling inside a drawn example takes longer than any deadline. A failure prints the seed that
# reproduces it.
hypothesis.settings.register_profile("eejax", deadline=None, print_blob=True)
hypothesis.settings.load_profile("eejax")


# Files that share a run of a main job go to the same process, so that it is made once.
SHARED = {
    **dict.fromkeys(("test_deadlines", "test_job", "test_latency"), "digits_run"),
    **dict.fromkeys(("test_compare", "test_compare_again", "test_compare_results"), "comparison"),
}


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
    from experiments import cifar

    path = tmp_path_factory.mktemp("job") / "run"
    flags = [
        *("--data.name", "digits", "--network.width", "4", "--train.epochs", "6"),
        *("--policies.budgets", "0.02", "0.7", "--policies.curve", "4", "--inference.repeats", "2"),
        *("--policies.thresholds", "1", "2", "3"),
        *("--inference.batch", "64", "--inference.budget", "0.7"),
    ]
    assert cifar.main([*flags, "--workdir", str(path)]) == 0
    return path


@pytest.fixture(scope="session")
def digits_comparison(tmp_path_factory):
    """The directory of a small comparison on the embedded data."""
    from small_comparison import quick_to_compile, run

    path = tmp_path_factory.mktemp("compare") / "run"
    with quick_to_compile():
        assert run(path) == 0
    return path
