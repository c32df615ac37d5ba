"""The Frechet distance between two sets of features (arXiv 1706.08500)."""

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
  """What a Gaussian fit needs of features, all float64; they can be added up.

  Attributes:
    count: N, how many images.
    mean: [D].
    scatter: [D, D], the sum of outer products of what deviates from the mean.
  """

  count: int
  mean: np.ndarray
  scatter: np.ndarray

  @property
  def covariance(self) -> np.ndarray:
    """[D, D], unbiased: divided by N - 1, as all FID tools do."""
    return self.scatter / (self.count - 1)


def moments_of(features: np.ndarray) -> Moments:
  """The moments of a batch.

  Args:
    features: [N, D], N >= 1.
  """
  features = np.asarray(features, np.float64)
  mean = features.mean(0)
  deviations = features - mean
  return Moments(len(features), mean, deviations.T @ deviations)


def merge(a: Moments | None, b: Moments) -> Moments:
  """The moments of both sets together.

  By the pairwise update of Chan, Golub and LeVeque (1983), which subtracts no
  large numbers from each other.

  Args:
    a: of one set; None is the empty one.
    b: of the other.
  """
  if a is None:
    return b
  count = a.count + b.count
  delta = b.mean - a.mean
  return Moments(
    count,
    a.mean + delta * (b.count / count),
    a.scatter
    + b.scatter
    + np.outer(delta, delta) * (a.count * b.count / count),
  )


def distance(a: Moments, b: Moments) -> float:
  """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

  Args:
    a: moments of at least two images.
    b: the others', of the same D.

  Returns:
    the squared Frechet (2-Wasserstein) distance of the two Gaussians, which the
    literature calls the distance; in units of squared features. Equal sets
    are at 0 to the rounding of their covariances.
  """
  assert min(a.count, b.count) >= 2, 'a covariance takes two images'
  # With C = R R^T, tr (C_a C_b)^(1/2) is the sum of the singular values of
  # R_a^T R_b: no root is taken of rounding noise, where a covariance has not
  # its full rank.
  roots = [_root(m.covariance) for m in (a, b)]
  cross = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
  traces = sum(np.square(root).sum() for root in roots)
  squares = np.square(a.mean - b.mean).sum()
  return max(0.0, float(squares + traces - 2 * cross))


def _root(covariance):
  values, vectors = np.linalg.eigh(covariance)
  return vectors * np.sqrt(np.maximum(values, 0))
