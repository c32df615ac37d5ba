"""The codec of an autoencoder in training: 8-bit images <-> its latents.

Its parameters are the part 'codec'. Unlike the codec `latents`, it draws no
samples of the posterior and rescales nothing: decoded again, x0 is the
reconstruction of an image.
"""

from collections.abc import Callable

from diffusion_jax.codecs import pixels
from diffusion_jax.codecs.codec import Codec
from diffusion_jax.models import autoencoder, bottleneck

PART = 'codec'


def create(image_shape: tuple[int, int, int], **options) -> Codec:
  """The codec of an autoencoder with a decoder.

  Args:
    image_shape: (H, W, C).
    **options: see `models.autoencoder.create`.
  """
  return of_coder(autoencoder.create(image_shape, **options), image_shape)


def of_coder(
  coder: autoencoder.Coder,
  image_shape: tuple[int, int, int],
  decode: Callable | None = None,
) -> Codec:
  """The codec of an autoencoder.

  Args:
    coder: the autoencoder.
    image_shape: (H, W, C).
    decode: (params of all parts, z, keys) -> images in about [-1, 1], for an
      autoencoder without a decoder.
  """
  plain = pixels.create(image_shape)

  def encode(params, rows, keys):
    found = coder.encode(params[PART], plain.encode(params, rows, keys))
    if coder.regulariser == 'kl':
      return bottleneck.posterior(found).mean
    return coder.snap(params[PART], found)

  def decoded(params, x0, keys):
    seen = decode or (lambda params, z, keys: coder.decode(params[PART], z))
    return plain.decode(params, seen(params, x0, keys), keys)

  return Codec(encode, decoded, coder.shape)
