"""Embedded digits: 1797 grey images of 8x8 pixels, ten classes.

They are part of scikit-learn, so that a first run needs no download.
"""

import numpy as np

from diffusion_jax.data import sources
from diffusion_jax.system.errors import UserError


def create(path: str, wanted: sources.Wanted, what: str) -> sources.Source:
  """Opens the digits; the other arguments are those of any kind of set.

  Every fifth image (index 4, 9, ...) is 'test', the others are 'train'. The
  values 0..16 become round(value * 255 / 16).

  Raises:
    UserError: another size than 8 pixels and 1 channel is wanted.
  """
  del path, what
  shape = (*(wanted.image_size or (8, 8)), wanted.channels or 1)
  if shape != (8, 8, 1):
    raise UserError(
      f'the digits are 8x8x1, not {"x".join(map(str, shape))}: set '
      'image_size=8 and channels=1'
    )
  # scikit-learn takes a second to import, and only the digits need it.
  from sklearn.datasets import load_digits

  digits = load_digits()
  images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
  wanted = wanted._replace(heldout_every=5)
  indices = sources.heldout_indices(len(images), wanted)
  images, labels = images[indices], digits.target[indices].astype(np.int32)
  images.flags.writeable = False
  name = f'digits, {wanted.split}'
  return sources.create(
    name,
    len(images),
    (8, 8, 1),
    10,
    lambda i: (images[i], labels[i]),
    class_names=[str(digit) for digit in range(10)],
    label_fn=lambda i: labels[i],
  )
