"""Statistics of a reference, in place of its images.

A mean and a covariance at each tap, of somebody's file or of the cache, where
they lie under the hashes of the images and of the network.
"""

import hashlib

import jax
import numpy as np

from diffusion_jax.evaluation import features, kept
from diffusion_jax.evaluation.features import VERSION, Images, Judge
from diffusion_jax.evaluation.metrics.frechet import Gaussian, Moments
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError

Statistics = dict[str, Gaussian]  # by tap

# What the spatial features' are called in the files of arXiv 2105.05233.
KEYS = {'spatial': ('mu_s', 'sigma_s')}
PLAIN = 'mu', 'sigma'

MOST = 8192  # dimensions of statistics that a file may hold


def is_file(path, alone: bool = False) -> bool:
  """Whether it is a .npz with mu and sigma.

  Args:
    path: of anything, or of nothing.
    alone: whether images beside them make it something else: the files of
      arXiv 2105.05233 hold both.
  """
  there = kept.names(path)
  return {'mu', 'sigma'} <= {*there} and not (alone and 'arr_0' in there)


def read(path, judge: Judge, image_shape) -> Statistics:
  """Those of a file, at each tap of a judge.

  Args:
    path: of a .npz with mu and sigma, and mu_s and sigma_s for sFID.
    judge: the network.
    image_shape: (H, W, C) of what it judges; None where that is nothing.

  Raises:
    UserError: it holds something else, or statistics of other features.
  """
  plain = [tap for tap in judge.taps if tap not in KEYS]
  if len(plain) > 1:
    raise UserError(
      f'{path} holds statistics of one kind of features, not of '
      f'{" and ".join(plain)}: ask for one'
    )
  outputs = {}
  if image_shape:
    image = jax.ShapeDtypeStruct((1, *image_shape), np.uint8)
    outputs = jax.eval_shape(judge.apply, judge.params, image)
  path = files.at(path).expanduser()
  dims = {tap: output.shape[1] for tap, output in outputs.items()}
  return {
    tap: read_gaussian(path, dims.get(tap), KEYS.get(tap, PLAIN))
    for tap in judge.taps
  }


def cached(there: dict[str, files.Path]) -> Statistics | None:
  """Those of the cache; None where one is not there, or is damaged.

  Args:
    there: of `paths`.
  """
  if not (there and all(path.exists() for path in there.values())):
    return None
  try:
    return {tap: read_gaussian(path) for tap, path in there.items()}
  except UserError:
    return None  # it is computed anew, and written over


def write(path, given: Statistics) -> None:
  """Writes those of the first tap, and of the spatial features if any.

  Args:
    path: of a .npz, as `read` takes it.
    given: the statistics.
  """
  arrays = {}
  for tap in (next(iter(given)), *KEYS):
    if tap in given:
      arrays |= zip(KEYS.get(tap, PLAIN), given[tap], strict=True)
  kept.write(files.at(path).expanduser(), arrays, np.savez_compressed)


def sha256_of(given: Images | Statistics) -> str:
  """Of all images in order, which are read once, or of the numbers by tap."""
  if isinstance(given, Images):
    return features.sha256_of(given)
  digest = hashlib.sha256()
  for gaussian in given.values():
    for array in gaussian:
      digest.update(np.ascontiguousarray(array, np.float64))
  return digest.hexdigest()


def count_of(given: Images | Statistics) -> int:
  """How many images there are; 0 where there are statistics of some."""
  return given.count if isinstance(given, Images) else 0


def paths(cache, judge: Judge, images_sha256: str) -> dict[str, files.Path]:
  """Where the cache has the statistics of a set of images, at each tap."""
  folder = files.at(cache) / 'statistics' / VERSION
  return {
    tap: folder / f'{judge.keys[tap]}_{images_sha256[:32]}.npz'
    for tap in judge.taps
    if tap in judge.keys
  }


def write_gaussian(path, a: Moments | Gaussian) -> None:
  """Writes statistics, whole or not at all, as pytorch-fid reads them.

  Args:
    path: of a .npz, which then holds mu [D] and sigma [D, D], float64. The
      number of images is not among them.
    a: the moments.
  """
  arrays = {'mu': a.mean, 'sigma': a.covariance}
  kept.write(path, arrays, np.savez_compressed)


def read_gaussian(
  path, dim: int | None = None, keys: tuple[str, str] = PLAIN
) -> Gaussian:
  """Statistics of a file of `write_gaussian`, pytorch-fid or another tool.

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
  wanted = ' and '.join(keys)
  try:
    arrays = kept.read(path, keys, 8 * MOST * (MOST + 1) + 4096).values()
    for array in arrays:
      if array.dtype.kind != 'f' or array.ndim == 0 or len(array) > MOST:
        raise ValueError(f'{array.dtype} {list(array.shape)}')
    mean, covariance = (array.astype(np.float64) for array in arrays)
  except kept.DAMAGED as e:
    reason = ' '.join(str(e).split()) or type(e).__name__
    if there := kept.names(path):
      reason += f'; it holds {" ".join(", ".join(there[:10]).split())}'
    raise UserError(
      f'{path} holds no statistics that can be read ({reason}): give a .npz '
      f'with {wanted}'
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
