"""Embedded digits: 1797 grey images of 8x8 pixels, ten classes.

They come with scikit-learn, so that a first run needs no download.
"""

import numpy as np

from diffusion_jax.data import sources
from diffusion_jax.system.errors import UserError


def create(split: str, image_size: int, channels: int) -> sources.Source:
  """Every fifth image (index 4, 9, ...) is 'test', the others are 'train'.

  The values 0..16 become round(value * 255 / 16).

  Raises:
    UserError: unless image_size is 8 and channels is 1.
  """
  if (image_size, channels) != (8, 1):
    raise UserError(
      f'the digits are 8x8x1, not {image_size}x{image_size}x{channels}: set '
      'image_size=8 and channels=1'
    )
  # scikit-learn takes a second to import, and only this source needs it.
  from sklearn.datasets import load_digits

  digits = load_digits()
  images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
  indices = sources.heldout_indices(len(images), split, every=5)
  images, labels = images[indices], digits.target[indices].astype(np.int32)
  images.flags.writeable = False
  return sources.Source(
    num_images=len(images),
    read_fn=lambda i: (images[i], labels[i]),
    num_classes=10,
    description=sources.describe('digits', split, len(images), (8, 8, 1), 10),
  )
