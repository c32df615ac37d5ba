"""Recognises samples that are still mostly noise.

The measure is the correlation of neighbouring pixels. Add white noise to images
whose neighbours correlate by c, so that the noise has the share f of the total
variance: the correlation becomes (1 - f) c, because the noise of one pixel is
independent of its neighbour's. So f = 1 - r / c for samples that correlate by
r, and samples are mostly noise if r < c / 2. Both correlations are measured,
and are taken ERRORS standard errors on the safe side. A reference that is
itself noise has c = 0 within its error, and nothing is concluded from it.
"""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from diffusion_jax.evaluation import features

BLOCKS = 4  # of features.BLOCK images, which suffice for an error of 1%
ERRORS = 3


class Correlation(NamedTuple):
  """The correlation of neighbouring pixels, and its standard error."""

  value: float
  error: float


def correlation(batches: Iterable[np.ndarray]) -> Correlation | None:
  """Measures the correlation of neighbouring pixels over a set of images.

  It is the ratio of two sums over all images, so that flat images count little.
  Each channel's mean is subtracted, which takes white noise to
  -1 / (H W - 1) instead of 0.

  Args:
    batches: images [n, H, W, C] each, with H > 1 or W > 1.

  Returns:
    The correlation, with the standard error of a ratio; None for fewer than 2
    images, or if all are flat.
  """
  products, squares = [], []
  for images in batches:
    x = images.astype(np.float64)
    x -= x.mean((1, 2), keepdims=True)
    pairs = ((x[:, :, 1:], x[:, :, :-1]), (x[:, 1:], x[:, :-1]))
    products.append(sum((a * b).sum((1, 2, 3)) for a, b in pairs))
    squares.append(sum((a * a + b * b).sum((1, 2, 3)) for a, b in pairs) / 2)
  a, b = (np.concatenate([*x, []]) for x in (products, squares))
  if len(a) < 2 or b.sum() == 0:
    return None
  value = a.sum() / b.sum()
  squared = np.square(a - value * b).sum() * len(a) / (len(a) - 1)
  return Correlation(float(value), float(np.sqrt(squared) / b.sum()))


def is_noise(samples: Correlation, reference: Correlation) -> bool:
  """Whether noise has more than half of the samples' variance."""
  most = samples.value + ERRORS * samples.error
  least = reference.value - ERRORS * reference.error
  return least > 0 and most < least / 2


def caveats(samples: features.Images, reference: features.Images) -> list[str]:
  """A line if the samples are mostly noise, by the first images of both sets.

  Args:
    samples: the images to judge.
    reference: real images of the same size.
  """
  found = [
    correlation(itertools.islice(features.blocks(one.stream()), BLOCKS))
    for one in (samples, reference)
  ]
  if None in found or not is_noise(*found):
    return []
  drawn, real = found
  return [
    'the samples look like noise: neighbouring pixels correlate by '
    f'{drawn.value:.2f}, those of real images by {real.value:.2f}; train longer'
  ]
