"""Runs that sharpen pictures: super-resolution by training (SR3).

Sample i is drawn for picture i % P of P pictures. Its noise does not depend on
the picture. See `conditioning.low_resolution`.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from diffusion_jax import runs
from diffusion_jax.conditioning import low_resolution
from diffusion_jax.data import Source
from diffusion_jax.runs import sizes
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

ROW, NOISE = low_resolution.ROW, low_resolution.NOISE
NAMES = (ROW, NOISE)  # options of samples
GIVE = f'give {ROW}, pictures'


class Pictures(NamedTuple):
  """Pictures to sharpen.

  Attributes:
    images: uint8 [P, h, w, C].
    noise: the deviation of noise to add to them, in units of [-1, 1].
  """

  images: np.ndarray
  noise: float = 0.0

  @property
  def facts(self) -> dict:
    """What samples depend on: the hash of all pictures, and the noise."""
    digest = hashlib.sha256()
    for picture in self.images:
      digest.update(bytes.fromhex(sha256(picture)))
    count = len(self.images)
    return {'sha256': digest.hexdigest(), 'count': count, 'noise': self.noise}


def sha256(picture: np.ndarray) -> str:
  """The hash of a picture, uint8 [h, w, C]: of its shape and its pixels."""
  digest = hashlib.sha256(f'{picture.dtype} {picture.shape} '.encode())
  digest.update(np.ascontiguousarray(picture))
  return digest.hexdigest()


def factor(config: Mapping) -> int:
  """How many times a run enlarges pictures; 0 if it sharpens none."""
  return config['super_resolution']['factor']


def shape_of(config: Mapping, sides=None) -> tuple[int, int, int]:
  """(h, w, C) of the pictures that a run sharpens.

  Args:
    config: its config.
    sides: (H, W) of the images to draw; None for the run's own.
  """
  *own, channels = runs.image_shape(config['data'])
  found = low_resolution.sides_of(tuple(sides or own), factor(config))
  return *found, channels


def given(
  pictures, config: Mapping, noise: float = 0.0, image_size=None
) -> Pictures:
  """Checks pictures that a run is to sharpen.

  Args:
    pictures: uint8 [P, h, w, C], or one of them, or grey ones without C.
    config: the run's config.
    noise: see `Pictures`.
    image_size: of the images to draw, see `sizes.parsed`.

  Raises:
    UserError: the run sharpens none, or other ones, or knows no such noise.
  """
  check_taken(config, True)
  images = np.asarray(pictures)
  sides = sizes.parsed(image_size, config)
  wanted = shape_of(config, sides)
  if images.ndim in (2, 3) and images.shape in (wanted, wanted[:2]):
    images = images[None]
  if images.ndim == 3 and wanted[-1] == 1:
    images = images[..., None]
  if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
    raise UserError(
      f'{ROW} is an array of {images.dtype} {list(images.shape)}: give uint8 '
      f'pictures, [N, {", ".join(map(str, wanted))}]'
    )
  if images.shape[1:] != wanted:
    raise UserError(_of_other_size(images, wanted, config, sides))
  most = config['super_resolution']['noise']
  if not 0 <= noise <= most:
    allowed = 'the run was trained without, so leave it out'
    if most:
      allowed = f'from 0 to {most:g}, which the run was trained with'
    raise UserError(f'{NOISE}={noise}: {allowed}')
  return Pictures(images, float(noise))


def _of_other_size(images, wanted, config, sides) -> str:
  """The message for pictures that are not of the wanted shape."""
  told = (
    f'{ROW} has pictures of {_shown(images.shape[1:])}, and the run sharpens '
    f'{_shown(wanted)}: give such pictures'
  )
  if sides or images.shape[-1] != wanted[-1]:
    return told
  larger = [side * factor(config) for side in images.shape[1:3]]
  return f'{told}, or image_size={_shown(larger)} for images of that size'


def check_taken(config: Mapping, there: bool) -> None:
  """Raises UserError unless pictures are given to a run that takes them.

  Args:
    config: the run's config.
    there: whether pictures are given.
  """
  if there and not factor(config):
    raise UserError(
      f'{ROW} is given, but the run sharpens no pictures: leave it out, or '
      'train with super_resolution.factor=2 or more'
    )
  if factor(config) and not there:
    shape = _shown(shape_of(config))
    raise UserError(
      f'the run sharpens pictures and has none: give {ROW}, pictures of {shape}'
    )


def applied(trained, pictures: Pictures | None):
  """A `Trained` that sharpens these pictures.

  Args:
    trained: the network.
    pictures: a result of `given`; None changes nothing.
  """
  if pictures is None:
    return trained
  return dataclasses.replace(trained, low_resolution=pictures)


def asked(trained, options: dict):
  """A `Trained` with the pictures of some options, which are taken out.

  Args:
    trained: the network.
    options: those of `Trained.sample`; of NAMES none is left.

  Raises:
    UserError: as for `given`.
  """
  pictures, noise = options.pop(ROW, None), options.pop(NOISE, 0.0)
  if pictures is None:
    if noise:
      raise UserError(f'{NOISE}={noise} is for pictures: {GIVE}, too')
    return trained
  size = options.get('image_size')
  return applied(trained, given(pictures, trained.config, noise, size))


def condition(config: Mapping, pictures: Pictures | None) -> dict:
  """What the condition of a plan says of pictures, see `plan.Plan`.

  Args:
    config: the run's config.
    pictures: those that are given, if any.

  Raises:
    UserError: the run takes pictures and has none.
  """
  check_taken(config, pictures is not None)
  return {} if pictures is None else {ROW: pictures.facts}


def rows(pictures: Pictures | None, indices: np.ndarray) -> dict:
  """The rows of pictures for samples, as the run's conditioner takes them.

  Such as recipe.conditioner.condition(params, rows, None).

  Args:
    pictures: the pictures, if any.
    indices: [N], the indices of the samples.

  Returns:
    {ROW: uint8 [N, h, w, C]}, with NOISE [N] if they get noise; {} without
    pictures.
  """
  if pictures is None:
    return {}
  images = pictures.images
  found = {ROW: images[np.asarray(indices, np.int64) % len(images)]}
  if pictures.noise:
    found[NOISE] = np.full(len(indices), pictures.noise, np.float32)
  return found


def of_sample(trained, index: int) -> str | None:
  """The hash of the picture that a sample is drawn for, if there is one.

  Args:
    trained: the network.
    index: the index of the sample.
  """
  if trained.low_resolution is None:
    return None
  images = trained.low_resolution.images
  return sha256(images[index % len(images)])


def reduced(images: np.ndarray, config: Mapping) -> np.ndarray:
  """The pictures that a run is trained to sharpen, of whole images.

  Args:
    images: [N, H, W, C] in [0, 255].
    config: the run's config.

  Returns:
    uint8 [N, h, w, C].
  """
  how = config['super_resolution']
  small = low_resolution.reduced(images, how['factor'], how['by'])
  return np.asarray(small).astype(np.uint8)


def of_grid(config: Mapping, source: Source, count: int, mesh) -> tuple:
  """The rows of a picture that is drawn during training, see `train`.

  Args:
    config: the run's config.
    source: the images to reduce, evenly spaced.
    count: how many.
    mesh: the devices.

  Returns:
    (rows on the mesh, [small pictures, the images], uint8 [count, ...]); (None,
    []) for a run that sharpens no pictures.
  """
  if not factor(config):
    return None, []
  indices = np.arange(count) * len(source) // count
  whole = np.stack([source[int(i)]['image'] for i in indices])
  small = reduced(whole, config)
  size = sharding.rounded(count, mesh)
  return sharding.put_padded({ROW: small}, size, mesh), [small, whole]


def repeated(small: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
  """Pictures in the size of images, by repeating pixels, to be shown.

  Args:
    small: uint8 [N, h, w, C].
    sides: (H, W), multiples of (h, w).
  """
  for axis, side in enumerate(sides, start=1):
    small = small.repeat(side // small.shape[axis], axis=axis)
  return small


def of_drawing(config: Mapping, count: int) -> dict:
  """The rows of the sampling program: name -> (shape, dtype); {} without.

  Args:
    config: the run's config.
    count: samples at once.
  """
  if not factor(config):
    return {}
  return {ROW: ((count, *shape_of(config)), np.uint8)}


def problems(config: Mapping) -> Iterator[tuple]:
  """Yields (holds, message) pairs for a config."""
  how, name = config['super_resolution'], 'super_resolution'
  value = how['factor']
  yield (
    value == 0 or value >= 2,
    f'{name}.factor={value}: 0 (none), or 2 or more',
  )
  yield (
    how['by'] in low_resolution.BY,
    f'{name}.by={how["by"]!r}: one of {", ".join(low_resolution.BY)}',
  )
  yield (
    0 <= how['noise'] < math.inf,
    f'{name}.noise={how["noise"]}: 0 (none) or more, finite',
  )
  if value < 2:
    return
  sides = runs.image_shape(config['data'])[:2]
  yield (
    not any(side % value for side in sides),
    f'{name}.factor={value} does not divide data.image_size='
    f'{config["data"]["image_size"]}: use a divisor of both sides',
  )
  for key, there, needed in (
    ('loss.name', config['loss']['name'], 'denoising'),
    ('codec.name', config['codec']['name'], 'pixels'),
  ):
    yield (
      there == needed,
      f'{name}.factor={value} with {key}={there!r}: set {key}={needed!r}, as '
      f'pictures are sharpened by denoising pixels, or {name}.factor=0',
    )


def check_plain(config: Mapping, told: str) -> None:
  """Raises UserError for a run that sharpens pictures, where none are given.

  Args:
    config: the run's config.
    told: what takes no pictures, the beginning of a sentence.
  """
  if factor(config):
    raise UserError(
      f'{told} takes no pictures of low resolution, which the run needs '
      f'(super_resolution.factor={factor(config)}): give another run'
    )


def _shown(shape) -> str:
  return 'x'.join(map(str, shape))
