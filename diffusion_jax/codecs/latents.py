"""The codec of latents: those of a frozen autoencoder (arXiv 2112.10752).

The part `codec` of the parameters holds the autoencoder's and, as 'shift' and
'scale' [z], what makes the latents of the training set have zero mean and unit
variance in each channel.

Rows hold images, or the encoder's output as 'moments', computed before: both
give the same x0 with the same keys, but for rounding.
"""

import functools
import json
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from diffusion_jax import models
from diffusion_jax.codecs import dito, pixels
from diffusion_jax.codecs.codec import Codec
from diffusion_jax.data import augment
from diffusion_jax.models import autoencoder, bottleneck


def create(
  image_shape: tuple[int, int, int],
  coder: Mapping | autoencoder.Coder,
  decoding: Mapping | None = None,
  decode_rows: int = 4,
  **others,
) -> Codec:
  """The codec of an autoencoder's latents.

  Args:
    image_shape: (H, W, C) of the data.
    coder: the autoencoder, or its options, see `autoencoder.create`.
    decoding: of an autoencoder that decodes by diffusion, the groups model,
      process and loss of its config.
    decode_rows: images that a device decodes at once. More need more memory.
    **others: where the autoencoder comes from.
  """
  del others
  if not isinstance(coder, autoencoder.Coder):
    coder = coder_of(image_shape, coder)

  if decoding:
    decoded = dito.create(tuple(image_shape), coder.shape[-1], decoding).decode
  else:
    decoded = lambda part, z, keys: coder.decode(part, z)  # noqa: E731

  def encode(params, rows, keys):
    part = params['codec']
    moments = rows.get('moments')
    if moments is None:
      moments = coder.encode(part, _images(rows))
    shift, scale = _numbers(part)
    return (sample(coder, moments, keys) - shift) / scale

  def decode(params, x0, keys):
    part = params['codec']
    shift, scale = _numbers(part)
    z = coder.snap(part, x0 * scale + shift)
    return pixels.from_float(decoded(part, z, keys))

  return Codec(
    encode=encode,
    decode=decode,
    shape=coder.shape,
    eight_bits=True,
    decode_rows=decode_rows,
  )


def _numbers(part) -> tuple[jax.Array, jax.Array]:
  """Shift and scale, to be used with [B, h, w, z]."""
  return part['shift'][None, None, None], part['scale'][None, None, None]


def coder_of(image_shape, options: Mapping) -> autoencoder.Coder:
  """The autoencoder of a config's group `codec` with name='autoencoder'."""
  options = {key: options[key] for key in options if key != 'name'}
  return _made(tuple(image_shape), json.dumps(options))


@functools.lru_cache(maxsize=4)  # building the networks takes a second
def _made(image_shape, options: str) -> autoencoder.Coder:
  return autoencoder.create(image_shape, **json.loads(options))


def init_of(image_shape, codec: Mapping) -> Callable:
  """key -> an autoencoder's part of the parameters, without shift and scale.

  Args:
    image_shape: (H, W, C) of the data.
    codec: a config's group `codec` of latents.
  """
  coder = coder_of(image_shape, codec['coder'])
  if not codec['decoding']:
    return coder.init
  made = dito.create(tuple(image_shape), coder.shape[-1], codec['decoding'])
  return lambda key: {**coder.init(key), models.NET: made.network.init(key)}


def shape_of(image_shape, options: Mapping) -> tuple[int, int, int]:
  """The shape of the latents of such an autoencoder.

  Args:
    image_shape: (H, W, C) of the data.
    options: see `coder_of`.
  """
  size = 2 ** (len(options['multipliers']) - 1)
  height, width, _ = image_shape
  return height // size, width // size, autoencoder.channels_of(**options)


def moments_of(coder: autoencoder.Coder, params, rows) -> jax.Array:
  """What is kept of images, from which x0 follows: [B, h, w, m] float32.

  Args:
    coder: the autoencoder.
    params: all parts.
    rows: a batch of images.
  """
  return coder.encode(params['codec'], _images(rows))


def sample(coder: autoencoder.Coder, moments, keys) -> jax.Array:
  """Latents of the encoder's output, before shift and scale: [B, h, w, z]."""
  if coder.regulariser != 'kl':
    return moments
  return bottleneck.sample(bottleneck.posterior(moments), keys)


def first_moments(coder: autoencoder.Coder, moments) -> jax.Array:
  """The means of z and of its square over the posteriors: [2, B, z].

  Args:
    coder: the autoencoder.
    moments: [B, h, w, m], its output.
  """
  variance = 0.0
  mean = moments
  if coder.regulariser == 'kl':
    mean, log_variance = bottleneck.posterior(moments)
    variance = jnp.exp(log_variance)
  both = jnp.stack([mean, jnp.square(mean) + variance])
  return jnp.mean(both, axis=(2, 3))


def _images(rows) -> jax.Array:
  x = pixels.to_float(rows['image'])
  return augment.apply(x, rows['augment']) if 'augment' in rows else x
