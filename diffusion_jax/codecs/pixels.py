"""The pixel codec: 8-bit images, diffused directly in [-1, 1]."""

import jax
import jax.numpy as jnp

from diffusion_jax.codecs.codec import Codec
from diffusion_jax.data import augment


def to_float(images: jax.Array) -> jax.Array:
  """[0, 255] -> [-1, 1], x / 127.5 - 1; float32 for integer images."""
  if not jnp.issubdtype(images.dtype, jnp.floating):
    images = images.astype(jnp.float32)
  return images / 127.5 - 1.0


def from_float(x0: jax.Array) -> jax.Array:
  """[-1, 1] -> float32 in [0, 255], clipped and not rounded."""
  return jnp.clip((x0 + 1.0) * 127.5, 0, 255).astype(jnp.float32)


def to_uint8(x0: jax.Array) -> jax.Array:
  """[-1, 1] -> uint8, clipped and rounded to the nearest."""
  return jnp.round(from_float(x0)).astype(jnp.uint8)


def create(image_shape: tuple[int, int, int]) -> Codec:
  """The codec of images.

  Args:
    image_shape: (H, W, C).
  """

  def encode(params, rows, keys):
    x0 = to_float(rows['image'])
    return augment.apply(x0, rows['augment']) if 'augment' in rows else x0

  return Codec(
    encode=encode,
    decode=lambda params, x0, keys: from_float(x0),
    shape=tuple(image_shape),
    bound=1.0,
    levels=256,
    eight_bits=True,
  )
