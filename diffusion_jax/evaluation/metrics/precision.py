"""Precision and recall, density and coverage, by nearest neighbours.

Precision is the share of samples that lie in a ball around a real image, recall
the share of real images in a ball around a sample; the ball of an image reaches
to its k-th nearest neighbour of its own set (arXiv 1904.06991, eq. 1 and 2).
Density counts the balls around real images that a sample lies in, coverage the
balls around real images with a sample inside (arXiv 2002.09797, section 3).

Balls are closed: what lies on the surface is inside, up to rounding. An image
is no neighbour of itself, but another one that equals it is, at distance 0.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.system.errors import UserError

K, DENSITY_K = 3, 5  # what the two papers take

# In epsilons of |a|^2 + |b|^2: the rounding of a squared distance is below 10
# even in 8192 dimensions, and a comparison has two of them.
TIE = 32


class Precision(NamedTuple):
  """What share of which set lies where the other one is.

  Attributes:
    precision: of the samples, in [0, 1].
    recall: of the reference, in [0, 1].
    density: balls around a sample, over k; 1 on average where both sets are of
      one distribution, and not bounded by it.
    coverage: of the balls of the reference, in [0, 1].
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
  dtype=np.float32,
  block_size: int = 500,
) -> Precision:
  """All four, from three passes over blocks of distances.

  The numbers depend on the numbers of images: compare them at equal ones, and
  take as many samples as there are real images.

  Args:
    samples: [N, D] features.
    reference: [M, D] features of real images.
    k: of the balls for precision and recall.
    density_k: of the balls for density and coverage.
    dtype: of the distances. In np.float32, on the device, what lies outside by
      4e-6 of |a|^2 + |b|^2 is still inside: a pair in thousands; np.float64
      knows 1e-14, runs on the host and takes several times as long.
    block_size: rows of a block, which takes block_size * max(N, M) numbers.

  Raises:
    UserError: a set has not the k neighbours of each image.
  """
  # Distances do not change, and rounding is that of smaller numbers.
  center = np.mean(reference, 0, dtype=np.float64)
  x, y = ((z - center).astype(dtype) for z in (samples, reference))
  (x_radii,) = radii(x, (k,), block_size=block_size)
  y_radii, density_radii = radii(y, (k, density_k), block_size=block_size)
  in_y = density = 0
  in_x, covered = np.zeros((2, len(y)), bool)
  shrink = 1 - TIE * np.finfo(dtype).eps
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
  """The squared distances to the k-th nearest other images of one set.

  Args:
    x: [N, D] features, floats that lie around 0.
    ks: which neighbours, counted from 1.
    block_size: rows of a block of distances.

  Returns:
    [len(ks), N], in the dtype of x.

  Raises:
    UserError: there are fewer than k others.
  """
  if not 1 <= min(ks) <= max(ks) < len(x):
    raise UserError(
      f'neighbours {", ".join(map(str, ks))} of {len(x)} images: each has '
      f'{len(x) - 1} others; take more images or a smaller k'
    )
  places = [k - 1 for k in ks]
  found = []
  for rows, squares in _squares(x, x, block_size):
    squares[np.arange(len(squares)), rows] = np.inf  # itself
    squares.partition(sorted(set(places)), axis=1)
    found.append(squares[:, places])
  return np.maximum(np.concatenate(found), 0).T


def _squares(x, y, block_size, shrink=1.0) -> Iterator:
  """(rows, [n, M]): squared distances of rows of x to all of y, with rounding.

  Where they are to be shrunk, it is by what may be rounding.
  """
  x_norms, y_norms = (
    np.square(z).sum(1) * z.dtype.type(shrink) for z in (x, y)
  )
  # XLA is faster than NumPy, but has float64 only where it is switched on.
  in_float32 = y.dtype == np.float32
  product, y = (_product, jnp.asarray(y)) if in_float32 else (_plain, y)
  for first in range(0, len(x), block_size):
    rows = np.arange(first, min(first + block_size, len(x)))
    squares = -2 * np.asarray(product(x[rows], y))
    squares += x_norms[rows, None]
    squares += y_norms
    yield rows, squares


@jax.jit
def _product(a, b):
  return jnp.matmul(a, b.T, precision='highest')


def _plain(a, b):
  return a @ b.T
