"""Four simulated CPU devices, strict types, and nothing from the network, for every test."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import hypothesis
import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling inside a drawn example takes longer than any deadline. A failure prints the seed that
# reproduces it.
hypothesis.settings.register_profile("eejax", deadline=None, print_blob=True)
hypothesis.settings.load_profile("eejax")
