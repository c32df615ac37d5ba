"""No variable of the shell, and no setting of a program, changes a number."""

import os
import subprocess
import sys

import binaries
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import diffusion_jax
from diffusion_jax.system import numerics
from diffusion_jax.system.errors import UserError

HOW = {'num_samples': 3, 'num_steps': 2, 'sampler': 'ancestral'}
CHANGES = {
  'num_steps': 3, 'eval_every': 3, 'sample_every': 3, 'keep_every': 0,
}  # fmt: skip
# Together they change every setting; each alone changed losses or samples.
SHELLS = {
  'rbg_64_strict': {
    'JAX_DEFAULT_PRNG_IMPL': 'rbg',
    'JAX_ENABLE_X64': '1',
    'JAX_NUMPY_DTYPE_PROMOTION': 'strict',
  },
  'not_partitionable': {'JAX_THREEFRY_PARTITIONABLE': '0'},
}
IN_PROCESSES = [
  'rbg_64_strict',
  pytest.param('not_partitionable', marks=pytest.mark.slow),
]
LIBRARY = f"""
import sys, jax, numpy, diffusion_jax
before = dict(jax.config.values)
images = diffusion_jax.load(sys.argv[1]).sample(**{HOW})
assert dict(jax.config.values) == before
numpy.save(sys.argv[2], images)
"""


def run(*command, **environment):
  result = subprocess.run(
    [sys.executable, *map(str, command)],
    cwd=binaries.ROOT, capture_output=True, text=True, timeout=300,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', **environment},
  )  # fmt: skip
  assert result.returncode == 0, result.stderr


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('plain')
  tiny.train(workdir, **CHANGES)
  return workdir


@pytest.mark.parametrize('shell', IN_PROCESSES)
def test_a_shell_changes_neither_training_nor_grids(plain, tmp_path, shell):
  """A process of its own: JAX reads the variables when it is imported."""
  run(
    '-m', 'diffusion_jax.train', *tiny.flags(tmp_path, **CHANGES),
    **SHELLS[shell],
  )  # fmt: skip
  assert tiny.losses(tmp_path) == tiny.losses(plain)
  jax.tree.map(
    np.testing.assert_array_equal,
    tiny.final_state(tmp_path),
    tiny.final_state(plain),
  )
  (grid,) = (plain / 'samples').glob('train_*.png')
  assert (tmp_path / 'samples' / grid.name).read_bytes() == grid.read_bytes()


@pytest.mark.parametrize('shell', IN_PROCESSES)
def test_a_shell_changes_no_samples_of_the_library(plain, tmp_path, shell):
  """And the library leaves the program's settings as they are."""
  run('-c', LIBRARY, plain, tmp_path / 'images.npy', **SHELLS[shell])
  np.testing.assert_array_equal(
    np.load(tmp_path / 'images.npy'), diffusion_jax.load(plain).sample(**HOW)
  )


def draw():
  key = jax.random.key(3)
  return [
    jax.random.key_data(jax.random.split(key)),
    jax.random.normal(key, (5,)),
    jax.random.randint(key, (5,), 0, 1000),
    jnp.ones(2, jnp.int32) * jnp.ones(2, jnp.float32),
  ]


def test_each_setting_matters_and_is_fixed():
  """Otherwise the tests above would show nothing."""
  expected = draw()
  for change in (
    lambda: jax.default_prng_impl('rbg'),
    lambda: jax.threefry_partitionable(False),
    lambda: jax.enable_x64(True),
    lambda: jax.numpy_dtype_promotion('strict'),
  ):
    with change():
      try:
        found = draw()
      except jax.dtypes.TypePromotionError:
        found = []
      assert not same(found, expected)
      with numerics.fixed():
        assert same(draw(), expected)


def same(a, b):
  return len(a) == len(b) and all(
    x.dtype == y.dtype and x.shape == y.shape and np.array_equal(x, y)
    for x, y in zip(a, b, strict=True)
  )


def test_an_offset_of_seeds_is_refused_in_one_line():
  before = jax.config.jax_random_seed_offset
  jax.config.update('jax_random_seed_offset', 5)
  try:
    with pytest.raises(UserError, match='offset=5') as e, numerics.fixed():
      pass
    assert '\n' not in str(e.value)
    numerics.fix()
    assert jax.config.jax_random_seed_offset == 0
  finally:
    jax.config.update('jax_random_seed_offset', before)
