"""Fixtures of all tests."""

import atexit
import os
import shutil
import tempfile

import jax
import pytest

# Many tests compile the same small programs, the binaries that they start too:
# one cache for the session, its workers and their children.
CACHE = os.environ.get('DIFFUSION_JAX_TEST_CACHE')
if not CACHE:
  CACHE = tempfile.mkdtemp(prefix='diffusion_jax_tests_')
  atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
  os.environ['DIFFUSION_JAX_TEST_CACHE'] = CACHE
os.environ['JAX_COMPILATION_CACHE_DIR'] = CACHE
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
jax.config.update('jax_compilation_cache_dir', CACHE)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)

# Buckets are tested on a stand-in, which has no accounts.
os.environ['FSSPEC_GCS_TOKEN'] = 'anon'

# Meshes are tested on eight simulated devices, in one process.
jax.config.update('jax_num_cpu_devices', 8)
# A rank that broadcasts by accident is a wrong loss that trains.
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture
def x64():
  """float64 in JAX, for mathematics that is compared to its closed form."""
  with jax.enable_x64(True):
    yield
