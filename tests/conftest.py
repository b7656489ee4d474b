"""What every test shares: strict promotion, a compilation cache, fake devices."""

import os

# Before JAX starts: four CPU devices, so that data parallelism is tested on any machine; and less
# optimisation, since compiling is most of the suite's time, and its programs run once.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=1"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker has a core to itself: threads of BLAS would only wait for each other.
    threadpool_limits(1, "blas")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(tempfile.gettempdir()) / "jaxdiff-xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs of one file are of no use to the next, and gigabytes in all."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def gmm_data():
    """2,000 fresh points of the five-mode mixture, for the sampler gate."""
    import oracles

    return np.asarray(oracles.GMM5.sample(jax.random.key(100), 2000))


@pytest.fixture(scope="session")
def gmm_null(gmm_data):
    """The energy distance of data to data at that size: the largest of eight."""
    import oracles

    from jaxdiff.metrics import energy_distance

    fresh = [oracles.GMM5.sample(jax.random.key(200 + i), 2000) for i in range(8)]
    return max(energy_distance(x, gmm_data) for x in fresh)
