"""The Frechet distance between two sets of features (arXiv 1706.08500).

Of an Inception network's pooled features it is the FID, of its spatial ones
the sFID (arXiv 2103.03841). Few images make it too large, see `bias`.
"""

import tokenize
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from diffusion_jax import files
from diffusion_jax.errors import UserError

MOST = 8192  # dimensions of statistics that a file may hold

# What a file that is something else, or damaged, raises.
_DAMAGED = (
  *(OSError, ValueError, TypeError, EOFError, RuntimeError, SyntaxError),
  *(OverflowError, MemoryError, tokenize.TokenError),
  *(zipfile.BadZipFile, zlib.error),
)


class Gaussian(NamedTuple):
  """A Gaussian fit of features, all that the distance asks for; float64.

  Attributes:
    mean: [D].
    covariance: [D, D].
  """

  mean: np.ndarray
  covariance: np.ndarray


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
    assert self.count >= 2, 'a covariance takes two images'
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


def distance(a: Moments | Gaussian, b: Moments | Gaussian) -> float:
  """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

  Covariances may be singular, as those of fewer images than dimensions are. It
  takes O(D^3): for D = 2048, up to a minute of two CPU cores.

  Args:
    a: moments of at least two images, or a Gaussian.
    b: the others', of the same D.

  Returns:
    the squared Frechet (2-Wasserstein) distance of the two Gaussians, which the
    literature calls the distance; in units of squared features. Equal sets
    are at 0 to the rounding of their covariances.
  """
  # With C = R R^T, tr (C_a C_b)^(1/2) is the sum of the singular values of
  # R_a^T R_b. So no root is taken of the eigenvalues of a product, whose
  # rounding would be 1e-8 of the largest in each of D dimensions.
  roots = [_root(x.covariance) for x in (a, b)]
  cross = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
  traces = sum(np.square(root).sum() for root in roots)
  squares = np.square(a.mean - b.mean).sum()
  return max(0.0, float(squares + traces - 2 * cross))


def _root(covariance):
  """R [D, rank] of C = R R^T; eigenvalues of rounding noise are left out."""
  values, vectors = np.linalg.eigh(covariance)
  kept = values > len(values) * np.finfo(float).eps * values[-1]
  return vectors[:, kept] * np.sqrt(values[kept])


def bias(a: Moments | Gaussian, count: int) -> float:
  """How far `count` images of a Gaussian lie from it, to order 1 / count.

  With eigenvalues l_i of C, to second order in the Wishart noise of the
  covariance and without any in the mean,

    E d = [ sum_i l_i + sum_ij l_i l_j / (2 (l_i + l_j)) + sum_i l_i / 4 ] / N

  which is (1 + (D + 1) / 4) tr C / N where all l_i are equal: it grows with D.
  (D being 1, it is s^2 / N + s^2 / (2 N), of the mean and of the deviation).
  Two sets of one Gaussian lie apart by the sum of both their biases. It holds
  for N far above the dimensions that C takes up, and no longer where N is
  below them. The order is that of arXiv 1911.07023; the terms are worked out
  here.

  Args:
    a: the Gaussian, or moments of far more images than `count`.
    count: N, how many images are drawn from it.

  Returns:
    the expected distance, in units of squared features.
  """
  values = np.maximum(np.linalg.eigvalsh(a.covariance), 0)
  values = values[values > 0]
  pairs = values[:, None] * values / (values[:, None] + values)
  return float((1.25 * values.sum() + pairs.sum() / 2) / count)


def simulated_bias(a: Moments | Gaussian, count: int, seed: int = 0) -> float:
  """How far `count` draws from a Gaussian lie from it, by drawing them once.

  It holds for fewer images than dimensions too, where `bias` does not. In
  hundreds of dimensions one set of draws is as good as many.

  Args:
    a: the Gaussian.
    count: N, at least 2.
    seed: of the draws.

  Returns:
    the distance, in units of squared features.
  """
  root = _root(a.covariance)
  noise = np.random.default_rng(seed).standard_normal((count, root.shape[1]))
  return distance(moments_of(a.mean + noise @ root.T), a)


def caveats(count: int, dim: int) -> list[str]:
  """What is to be told beside a distance, a line each.

  Args:
    count: the smaller number of images.
    dim: D, of the features.
  """
  if count > dim:
    return []
  return [
    f'{count} images in {dim} dimensions, so a covariance is singular and the '
    'distance far too large; compare it only at equal numbers'
  ]


def write(path, a: Moments | Gaussian) -> None:
  """Writes statistics, whole or not at all, as pytorch-fid reads them.

  Args:
    path: of a .npz, which then holds mu [D] and sigma [D, D], float64. The
      number of images is not among them.
    a: the moments.
  """
  files.make(files.at(path).parent)
  with files.replacing(path) as file:
    np.savez_compressed(file, mu=a.mean, sigma=a.covariance)


def read(
  path, dim: int | None = None, keys: tuple[str, str] = ('mu', 'sigma')
) -> Gaussian:
  """Statistics of a file that `write`, pytorch-fid or another tool wrote.

  Files may come from anywhere: nothing is unpickled, and no more is read than
  statistics take. Other arrays in the file are left alone.

  Args:
    path: of the .npz.
    dim: D that it must have; None takes any.
    keys: the names of the mean and the covariance; ('mu_s', 'sigma_s') are
      those of the spatial features in the reference files of arXiv 2105.05233.

  Raises:
    UserError: there is no such file, it holds something else, or statistics of
      another D.
  """
  try:
    with files.at(path).open('rb') as file, zipfile.ZipFile(file) as archive:
      infos = {x.filename.removesuffix('.npy'): x for x in archive.infolist()}
      if missing := [key for key in keys if key not in infos]:
        there = ' '.join(', '.join(list(infos)[:10]).split()) or 'nothing'
        raise UserError(
          f'{path} has no {" and no ".join(missing)} but {there}: statistics '
          f'of features are {keys[0]} [D] and {keys[1]} [D, D] in one .npz'
        )
      mean, covariance = (_array(archive, infos[key]) for key in keys)
  except FileNotFoundError as e:
    raise UserError(
      f'{path}: there is no such file of statistics; give a .npz with '
      f'{" and ".join(keys)}'
    ) from e
  except UserError:
    raise
  except _DAMAGED as e:
    reason = ' '.join(str(e).split()) or type(e).__name__
    raise UserError(
      f'{path} holds no statistics that can be read ({reason}): give a .npz '
      f'with {" and ".join(keys)}'
    ) from e
  if wrong := _wrong(mean, covariance):
    raise UserError(
      f'{path} {wrong}: statistics are {keys[0]} [D] and a symmetric '
      f'{keys[1]} [D, D] of finite numbers; make the file again'
    )
  if dim is not None and len(mean) != dim:
    raise UserError(
      f'{path} is of {len(mean)} dimensions and the features here have {dim}: '
      'give statistics of the same network'
    )
  return Gaussian(mean, (covariance + covariance.T) / 2)


def _array(archive, info):
  """An array of floats, of at most the bytes that a covariance can have."""
  if info.file_size > 8 * MOST**2 + 4096:
    raise ValueError(f'{info.filename} takes {info.file_size} bytes')
  with archive.open(info) as stream:
    array = np.lib.format.read_array(stream, allow_pickle=False)
  if array.dtype.kind != 'f' or array.ndim == 0 or len(array) > MOST:
    raise ValueError(f'{info.filename} is {array.dtype} {list(array.shape)}')
  return array.astype(np.float64)


def _wrong(mean, covariance):
  """What is wrong with statistics, or ''."""
  shapes = [list(x.shape) for x in (mean, covariance)]
  if mean.ndim != 1 or not mean.size or shapes[1] != [len(mean)] * 2:
    return f'has the shapes {shapes[0]} and {shapes[1]}'
  if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
    return 'has numbers that are not finite'
  # Products in float32 may have left the two halves unlike.
  unlike = np.abs(covariance - covariance.T).max()
  if unlike > 1e-5 * np.abs(covariance).max():
    return f'has a covariance whose halves differ by {unlike:.2g}'
  if covariance.diagonal().min() < 0:
    return 'has variances below 0'
  return ''
