"""What every test shares: strict promotion, a compilation cache, fake devices by mark."""

import functools
import gc
import os
import subprocess
import sys
from importlib.metadata import version

# Before JAX starts, and for time: most programs of the suite run once and compiling is most of its
# work, so code is generated plainly, and passes over loops that do not come to an end are left out.
# For programs that run long there is `oracles.optimised`.
FLAGS = [
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_disable_hlo_passes=while-loop-invariant-code-motion,simplify-while-loops",
]
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # unknown to later versions
if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker has a core to itself: threads of one program would only wait for each other, and
    # that busily.
    FLAGS.append("--xla_cpu_multi_thread_eigen=false")
    os.environ.setdefault("PJRT_NPROC", "1")
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


def pytest_pyfunc_call(pyfuncitem):
    """Runs the tests of a file with the mark `devices(n)` in a process that has n fake devices.

    The others have one: threads of devices that a program does not use wait busily, for a quarter
    of the time.
    """
    mark = pyfuncitem.get_closest_marker("devices")
    if mark is None or jax.device_count() == mark.args[0]:
        return None
    alike = [
        item.nodeid
        for item in pyfuncitem.session.items
        if item.path == pyfuncitem.path and item.get_closest_marker("devices") == mark
    ]
    said = _with_devices(mark.args[0], tuple(alike), pyfuncitem.config.rootpath)
    assert f"PASSED {pyfuncitem.nodeid}" in said.splitlines(), said
    return True


@functools.cache
def _with_devices(number, tests, folder):
    options = ["-m", "pytest", "-rp", "--durations=0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, *options, *tests],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(number)},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


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
