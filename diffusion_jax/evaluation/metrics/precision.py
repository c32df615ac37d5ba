"""Precision and recall, density and coverage, by nearest neighbours.

Precision is the share of samples inside a ball around a real image, recall the
share of real images inside a ball around a sample. The radius of an image's
ball is the distance to its k-th nearest neighbour in its own set (arXiv
1904.06991, eq. 1 and 2). Density counts the balls around real images that
contain a sample; coverage is the share of those balls that contain at least one
(arXiv 2002.09797, section 3).

Balls are closed: points on the surface are inside, up to rounding. An image is
not a neighbour of itself, but an equal image is, at distance 0.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.system.errors import UserError

K, DENSITY_K = 3, 5  # as in the two papers

# In epsilons of |a|^2 + |b|^2: the rounding error of a squared distance is
# below 10 even in 8192 dimensions, and a comparison involves two distances.
TIE = 32


class Precision(NamedTuple):
  """How far two sets of images overlap.

  Attributes:
    precision: share of the samples, in [0, 1].
    recall: share of the reference, in [0, 1].
    density: mean number of balls that contain a sample, over k; 1 on average if
      both sets have one distribution, but it can be larger.
    coverage: share of the reference's balls, in [0, 1].
  """

  precision: float
  recall: float
  density: float
  coverage: float


def precision_recall(
  samples: np.ndarray,
  reference: np.ndarray,
  *,
  k: int = K,
  density_k: int = DENSITY_K,
  block_size: int = 500,
) -> Precision:
  """Computes all four, in three passes over blocks of distances.

  The results depend on the numbers of images: compare them only at equal
  numbers, and use as many samples as there are real images. Distances are
  float32: a point that is outside by less than 4e-6 of |a|^2 + |b|^2 counts as
  inside, about one pair in thousands.

  Args:
    samples: [N, D] features.
    reference: [M, D] features of real images.
    k: neighbour that sets the radius for precision and recall.
    density_k: neighbour that sets the radius for density and coverage.
    block_size: rows per block; a block has block_size * max(N, M) numbers.

  Raises:
    UserError: a set has too few images for k neighbours of each image.
  """
  # Centring leaves distances unchanged and reduces rounding.
  center = np.mean(reference, 0, dtype=np.float64)
  x, y = ((z - center).astype(np.float32) for z in (samples, reference))
  (x_radii,) = radii(x, (k,), block_size=block_size)
  y_radii, density_radii = radii(y, (k, density_k), block_size=block_size)
  in_y = density = 0
  in_x, covered = np.zeros((2, len(y)), bool)
  shrink = 1 - TIE * np.finfo(np.float32).eps
  for rows, squares in _squares(x, y, block_size, shrink):
    in_y += (squares <= y_radii).any(1).sum()
    in_x |= (squares <= x_radii[rows, None]).any(0)
    inside = squares <= density_radii
    density += inside.sum()
    covered |= inside.any(0)
  return Precision(
    float(in_y / len(x)),
    float(in_x.mean()),
    float(density / (density_k * len(x))),
    float(covered.mean()),
  )


def radii(
  x: np.ndarray, ks: tuple[int, ...], *, block_size: int = 500
) -> np.ndarray:
  """Squared distances to the k-th nearest other images of one set.

  Args:
    x: [N, D] features, float32, centred near 0.
    ks: which neighbours, counted from 1.
    block_size: rows per block of distances.

  Returns:
    float32 [len(ks), N].

  Raises:
    UserError: there are fewer than k other images.
  """
  if not 1 <= min(ks) <= max(ks) < len(x):
    raise UserError(
      f'neighbours {", ".join(map(str, ks))} of {len(x)} images: each has only '
      f'{len(x) - 1} others; use more images or a smaller k'
    )
  places = [k - 1 for k in ks]
  found = []
  for rows, squares in _squares(x, x, block_size):
    squares[np.arange(len(squares)), rows] = np.inf  # itself
    squares.partition(sorted(set(places)), axis=1)
    found.append(squares[:, places])
  return np.maximum(np.concatenate(found), 0).T


def _squares(x, y, block_size, shrink=1.0) -> Iterator:
  """Yields (rows, [n, M]): squared distances from rows of x to all of y.

  They have rounding errors; `shrink` lowers them by what may be rounding.
  """
  x_norms, y_norms = (np.square(z).sum(1) * np.float32(shrink) for z in (x, y))
  y = jnp.asarray(y)
  for rows in np.split(
    np.arange(len(x)), range(block_size, len(x), block_size)
  ):
    squares = -2 * np.asarray(_product(x[rows], y))
    squares += x_norms[rows, None]
    squares += y_norms
    yield rows, squares


@jax.jit
def _product(a, b):
  return jnp.matmul(a, b.T, precision='highest')
