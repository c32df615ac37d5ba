"""Codecs: data <-> x0, the variable that is diffused."""

from diffusion_jax.codecs import pixels
from diffusion_jax.codecs.codec import Codec
from diffusion_jax.system.errors import UserError

# name -> (image_shape, **options) -> Codec
CODECS = {'pixels': pixels.create}


def create(name: str, image_shape: tuple[int, int, int], **options) -> Codec:
  """A codec by name.

  Args:
    name: a key of CODECS.
    image_shape: (H, W, C) of the data.
    **options: the codec's options.

  Raises:
    UserError: the name is not known.
  """
  if name not in CODECS:
    raise UserError(f'codec.name={name!r}: one of {", ".join(CODECS)}')
  return CODECS[name](image_shape, **options)
