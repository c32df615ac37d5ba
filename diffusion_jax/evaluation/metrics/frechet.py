"""The Frechet distance between two sets of features (arXiv 1706.08500).

For an Inception network's pooled features it is the FID, for its spatial
features the sFID (arXiv 2103.03841). Few images make it too large, by an order
of 1 / N (arXiv 1911.07023).
"""

from typing import NamedTuple

import numpy as np


class Gaussian(NamedTuple):
  """A Gaussian fit of features, which is all that the distance needs; float64.

  Attributes:
    mean: [D].
    covariance: [D, D].
  """

  mean: np.ndarray
  covariance: np.ndarray


class Moments(NamedTuple):
  """Sums for a Gaussian fit of features, all float64; `merge` adds them up.

  Attributes:
    count: N, number of images.
    mean: [D].
    scatter: [D, D], the sum of outer products of deviations from the mean.
  """

  count: int
  mean: np.ndarray
  scatter: np.ndarray

  @property
  def covariance(self) -> np.ndarray:
    """[D, D], unbiased: divided by N - 1, as all FID tools do."""
    assert self.count >= 2, 'a covariance needs two images'
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
  """The moments of the union of two sets.

  It uses the pairwise update of Chan, Golub and LeVeque (1983), which subtracts
  no large numbers from each other.

  Args:
    a: moments of one set; None for the empty set.
    b: moments of the other set.
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


def distance(a: Moments | Gaussian, b: Moments | Gaussian) -> float:
  """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

  Covariances may be singular, as with fewer images than dimensions. The time is
  O(D^3): for D = 2048, up to a minute on two CPU cores.

  Args:
    a: moments of at least two images, or a Gaussian.
    b: the same for the other set, with the same D.

  Returns:
    the squared Frechet (2-Wasserstein) distance of the two Gaussians, which the
    literature calls the distance, in units of squared features. For equal sets
    it is 0 up to the rounding of their covariances.
  """
  # With C = R R^T, tr (C_a C_b)^(1/2) is the sum of the singular values of
  # R_a^T R_b. This avoids roots of the eigenvalues of a product, whose rounding
  # would be 1e-8 of the largest in each of D dimensions.
  roots = [_root(x.covariance) for x in (a, b)]
  cross = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
  traces = sum(np.square(root).sum() for root in roots)
  squares = np.square(a.mean - b.mean).sum()
  return max(0.0, float(squares + traces - 2 * cross))


def _root(covariance):
  """R [D, rank] of C = R R^T; eigenvalues at rounding level are dropped."""
  values, vectors = np.linalg.eigh(covariance)
  kept = values > len(values) * np.finfo(float).eps * values[-1]
  return vectors[:, kept] * np.sqrt(values[kept])


def simulated_bias(a: Moments | Gaussian, count: int, seed: int = 0) -> float:
  """Distance of `count` draws from their Gaussian, found by drawing them once.

  In hundreds of dimensions, one set of draws is as good as many.

  Args:
    a: the Gaussian.
    count: N, at least 2.
    seed: seed of the draws.

  Returns:
    the distance, in units of squared features.
  """
  root = _root(a.covariance)
  noise = np.random.default_rng(seed).standard_normal((count, root.shape[1]))
  return distance(moments_of(a.mean + noise @ root.T), a)


def caveats(count: int, dim: int) -> list[str]:
  """Caveats about a distance, one line each.

  Args:
    count: number of images in the smaller set.
    dim: D, dimension of the features.
  """
  if count > dim:
    return []
  return [
    f'{count} images in {dim} dimensions, so a covariance is singular and the '
    'distance far too large; compare it only at equal numbers of images'
  ]
