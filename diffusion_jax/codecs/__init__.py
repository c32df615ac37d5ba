"""Codecs: data <-> x0, the variable that is diffused."""

from diffusion_jax.codecs import autoencoder, pixels
from diffusion_jax.codecs.codec import Codec
from diffusion_jax.system.errors import one_of

# name -> (image_shape, **options) -> Codec
CODECS = {'pixels': pixels.create, 'autoencoder': autoencoder.create}


def create(name: str, image_shape: tuple[int, int, int], **options) -> Codec:
  """A codec by name.

  Args:
    name: a key of CODECS.
    image_shape: (H, W, C) of the data.
    **options: the codec's options.

  Raises:
    UserError: the name is not known.
  """
  return CODECS[one_of('codec.name', name, CODECS)](image_shape, **options)
