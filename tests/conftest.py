"""What every test shares: strict promotion, a compilation cache, fake devices."""

import gc
import os
from importlib.metadata import version

# Before JAX starts: four CPU devices, so that data parallelism is tested on any machine. The rest
# is for time: most programs of the suite run once and compiling is most of its work, so code is
# generated plainly, and passes over loops that do not come to an end are left out. For programs
# that run long there is `oracles.optimised`.
FLAGS = [
    "--xla_force_host_platform_device_count=4",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_disable_hlo_passes=while-loop-invariant-code-motion,simplify-while-loops",
]
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # unknown to later versions
if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker has a core to itself: threads of one program would only wait for each other.
    FLAGS.append("--xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

gc.set_threshold(100_000, 50, 100)  # tracing makes objects by the thousand, and keeps most
if "PYTEST_XDIST_WORKER" in os.environ:
    threadpool_limits(1, "blas")  # for the same reason
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
