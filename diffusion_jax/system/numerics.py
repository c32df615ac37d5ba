"""JAX's settings that numbers depend on, whatever the shell or a program says.

Variables such as JAX_DEFAULT_PRNG_IMPL or JAX_ENABLE_X64 would change the noise
of a run, or of half of it, without a word. Binaries set what the project is
made for; the library does so while it draws, and leaves a user's program as it
was.
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
  """Sets them for the whole process, before anything is computed."""
  for name, value in SETTINGS.items():
    jax.config.update(name, value)


@contextlib.contextmanager
def fixed() -> Iterator[None]:
  """Sets them for this thread while it lasts; also a decorator.

  Raises:
    UserError: the program adds an offset to seeds, which JAX has no context
      for.
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
