"""Made-up images, and what the tests of the data ask of any source."""

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.data import sources
from diffusion_jax.errors import UserError


def random_images(num_images, size=8, channels=3, seed=0):
  shape = (num_images, size, size, channels)
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def all_images(source):
  return np.stack([source[i]['image'] for i in range(len(source))])


def all_labels(source):
  return [int(source[i]['label']) for i in range(len(source))]


def error_line(*args, **kwargs):
  """The message of the UserError that create() answers with."""

  def read_first():  # a folder is read lazily
    return data.create(*args, **kwargs)[0]

  with pytest.raises(UserError) as caught:
    read_first()
  message = str(caught.value)
  assert '\n' not in message
  return message


def numbered(num_images, size=4):
  """A source whose image i is filled with i, but for a marked left column."""
  images = np.zeros((num_images, size, size, 1), np.uint8)
  images += np.arange(num_images, dtype=np.uint8)[:, None, None, None]
  images[:, :, 0] = 255
  return sources.Source(num_images, lambda i: (images[i], i), num_images, '')


def folder(path, image_size=8, channels=3, **kwargs):
  return data.create(
    'folder',
    path=str(path),
    image_size=image_size,
    channels=channels,
    **kwargs,
  )
