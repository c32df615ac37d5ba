"""Pictures that are moved, scaled and noised a little, by random keys.

What a picture shows stays the same, so networks that tell what it is are
trained on such pictures, and tested with them.
"""

import jax
import jax.numpy as jnp

from diffusion_jax.process import noise as noises

_AXES = (0, 1)  # down, right
_SIZE, _SHIFT, _NOISE = 0, 1, 3  # branches of a key


def apply(
  images: jax.Array,
  keys: jax.Array,
  shift: float,
  scale: float,
  noise: float | jax.Array,
) -> jax.Array:
  """Moves, scales and noises pictures; the result is clipped to [-1, 1].

  Args:
    images: [B, H, W, C] in [-1, 1].
    keys: [B] random keys; a picture depends on its own only.
    shift: the farthest move along each axis, in pixels; uniform.
    scale: the largest change of size: the factor is uniform in 1 - scale to
      1 + scale, about the centre.
    noise: the standard deviation of Gaussian noise, in levels of 255; a number,
      or [B].
  """
  by = 1 + scale * _uniform(keys, _SIZE)
  x = images
  for axis in _AXES:
    x = resampled(x, axis, shift * _uniform(keys, _SHIFT + axis), by)
  grain = noises.draw(keys, _NOISE, x.shape[1:], x.dtype)
  deviation = jnp.asarray(noise, x.dtype).reshape(-1, 1, 1, 1) / 127.5
  return jnp.clip(x + deviation * grain, -1, 1)


def resampled(
  images: jax.Array, axis: int, shift: jax.Array, scale: jax.Array
) -> jax.Array:
  """Moves and scales pictures along an axis, with linear interpolation.

  Beyond its edges a picture goes on as it ends.

  Args:
    images: [B, H, W, C].
    axis: 0 for the rows, 1 for the columns.
    shift: [B] moves down or to the right, in pixels.
    scale: [B] factors on the size, about the centre.
  """
  size = images.shape[1 + axis]
  centre = (size - 1) / 2
  at = jnp.arange(size) - centre
  origin = (at[None] - shift[:, None]) / scale[:, None] + centre
  origin = jnp.clip(origin, 0, size - 1)
  distance = jnp.abs(origin[:, :, None] - jnp.arange(size)[None, None])
  weights = jnp.maximum(1 - distance, 0).astype(images.dtype)
  what = ('bij,bjkc->bikc', 'bij,bkjc->bkic')[axis]
  return jnp.einsum(what, weights, images, precision='highest')


def _uniform(keys, number) -> jax.Array:
  """[B] numbers in [-1, 1)."""
  return 2 * noises.draw(keys, number, (), float, jax.random.uniform) - 1
