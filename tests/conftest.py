"""Fixtures of all tests."""

import atexit
import contextlib
import ctypes
import gc
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import compiled
import jax
import pytest

# Shared by the workers of a session and the processes that they start.
if 'DIFFUSION_JAX_TEST_SESSION' not in os.environ:
  SESSION = tempfile.mkdtemp(prefix='diffusion_jax_tests_')
  atexit.register(shutil.rmtree, SESSION, ignore_errors=True)
  os.environ['DIFFUSION_JAX_TEST_SESSION'] = SESSION
  os.environ['DIFFUSION_JAX_TEST_CACHE'] = str(compiled.folder(SESSION))
  compiled.tidy(compiled.folder(SESSION))

# For this process and for those that it starts.
for name, value in {
  # Many tests compile the same small programs, and so does the next session.
  'jax_compilation_cache_dir': os.environ['DIFFUSION_JAX_TEST_CACHE'],
  'jax_persistent_cache_min_compile_time_secs': 0.0,
  # Otherwise the folder's name is part of the keys.
  'jax_persistent_cache_enable_xla_caches': 'none',
  # Most programs are small and run once: compiling takes longer than running.
  'jax_disable_most_optimizations': True,
}.items():
  os.environ[name.upper()] = str(value)
  jax.config.update(name, value)

ROOM = 1.5e9  # bytes of a process, above which compiled programs are dropped

# Looking for cycles among JAX's many objects takes a seventh of the time.
gc.disable()

# Buckets are tested on a stand-in, which has no accounts.
os.environ['FSSPEC_GCS_TOKEN'] = 'anon'

# Meshes are tested on eight simulated devices, in one process.
jax.config.update('jax_num_cpu_devices', 8)
# A rank that broadcasts by accident is a wrong loss that trains.
jax.config.update('jax_numpy_rank_promotion', 'raise')

# After so many minutes no test begins, after half as many more none goes on;
# what is left out is named by `-rs`.
MINUTES = float(os.environ.get('DIFFUSION_JAX_TEST_MINUTES', 'inf'))
START = time.monotonic()


def pytest_runtest_setup(item):
  if float('inf') == MINUTES:
    return
  passed = time.monotonic() - START
  if passed > 60 * MINUTES:
    pytest.skip(f'{item.nodeid} is left out, after {MINUTES:g} minutes')

  def stop(*_):
    pytest.skip(f'{item.nodeid} is left out, unfinished')

  signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, 90 * MINUTES - passed)


def pytest_runtest_teardown():
  signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture
def x64():
  """float64 in JAX, for mathematics that is compared to its closed form."""
  with jax.enable_x64(True):
    yield


def _optimize(optimized: bool) -> None:
  os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = str(not optimized)
  jax.config.update('jax_disable_most_optimizations', not optimized)


@pytest.fixture(autouse=True, scope='module')
def programs(request):
  """Optimizes a module's programs if it is marked so; drops them after it."""
  _optimize(request.node.get_closest_marker('optimized') is not None)
  yield
  # Without programs, each module would trace again what all of them use.
  if _memory() > ROOM:
    jax.clear_caches()
    gc.collect()
    _give_back()


@pytest.fixture(autouse=True)
def networks(request):
  """Builds networks anew where a test may change how they are built."""
  if 'monkeypatch' not in request.fixturenames:
    yield
    return
  from diffusion_jax import models  # after the environment is set

  kept, models.KEPT = models.KEPT, {}
  yield
  models.KEPT = kept


def _memory() -> float:
  """Bytes that this process holds; where Linux does not tell, too many."""
  try:
    pages = int(Path('/proc/self/statm').read_text().split()[1])
  except OSError:
    return float('inf')
  return pages * os.sysconf('SC_PAGE_SIZE')


def _give_back() -> None:
  """Returns freed memory to the system, where the C library can do it.

  Otherwise the process stays above ROOM and drops its programs in each module.
  """
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).malloc_trim(0)


def pytest_collection_finish():
  gc.collect()
  gc.freeze()  # what is imported stays, and need not be looked at again


@pytest.fixture(autouse=True)
def program(request):
  """Optimizes a single test's programs if it is marked so."""
  if any(mark.name == 'optimized' for mark in request.node.own_markers):
    _optimize(True)
    yield
    _optimize(False)
  else:
    yield
