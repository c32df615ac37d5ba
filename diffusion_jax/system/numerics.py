"""Fixes the JAX settings that results depend on, whatever the environment.

Variables such as JAX_DEFAULT_PRNG_IMPL or JAX_ENABLE_X64 would silently change
the noise of a run, or of half of it. Binaries fix these settings for the whole
process; the library fixes them only while it samples, and then restores those
of the user's program.
"""

import contextlib
from collections.abc import Iterator

import jax

from diffusion_jax.system.errors import UserError

SETTINGS = {
  'jax_default_prng_impl': 'threefry2x32',
  'jax_threefry_partitionable': True,  # the same noise on any mesh
  'jax_random_seed_offset': 0,
  'jax_enable_x64': False,
  'jax_numpy_dtype_promotion': 'standard',
}


def fix() -> None:
  """Applies SETTINGS to the whole process; call before any computation."""
  for name, value in SETTINGS.items():
    jax.config.update(name, value)


@contextlib.contextmanager
def fixed() -> Iterator[None]:
  """Applies SETTINGS to this thread within the context; also a decorator.

  Raises:
    UserError: the program sets jax_random_seed_offset, which JAX cannot
      override for a context.
  """
  offset = jax.config.jax_random_seed_offset
  if offset:
    raise UserError(
      f'jax_random_seed_offset={offset} would change the noise of every seed: '
      'leave it at 0 and give another seed'
    )
  with (
    jax.default_prng_impl(SETTINGS['jax_default_prng_impl']),
    jax.threefry_partitionable(SETTINGS['jax_threefry_partitionable']),
    jax.enable_x64(SETTINGS['jax_enable_x64']),
    jax.numpy_dtype_promotion(SETTINGS['jax_numpy_dtype_promotion']),
  ):
    yield
