"""Codecs: data <-> x0, the variable that is diffused."""

from collections.abc import Mapping

from diffusion_jax.codecs import autoencoder, latents, pixels
from diffusion_jax.codecs.codec import Codec
from diffusion_jax.system.errors import one_of

# name -> (image_shape, **options) -> Codec
CODECS = {
  'pixels': pixels.create,
  'autoencoder': autoencoder.create,
  'latents': latents.create,
}


def reconstructs(config: Mapping) -> bool:
  """Whether a run trains an autoencoder: decoded, x0 is a reconstruction.

  Args:
    config: the run's config.
  """
  return _name(config) == 'autoencoder'


def is_in_latents(config: Mapping) -> bool:
  """Whether a run diffuses in the latents of an autoencoder.

  Args:
    config: the run's config.
  """
  return _name(config) == 'latents'


def _name(config):
  return config.get('codec', {}).get('name')


def x0_shape(image_shape, config: Mapping) -> tuple[int, int, int]:
  """The shape of what is diffused, by arithmetic.

  Args:
    image_shape: (H, W, C) of the data.
    config: a config's group `codec`; of latents with their 'coder'.
  """
  if config['name'] == 'latents' and config['coder']:
    return latents.shape_of(image_shape, config['coder'])
  return tuple(image_shape)


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
