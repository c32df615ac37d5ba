"""Statistics of a reference, in place of its images.

A mean and a covariance at each tap, of somebody's file or of the cache, where
they lie under the hashes of the images and of the network.
"""

import hashlib
import zipfile

import jax
import numpy as np

from diffusion_jax import files
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import frechet
from diffusion_jax.evaluation.features import VERSION, Judge
from diffusion_jax.evaluation.frechet import Gaussian

Statistics = dict[str, Gaussian]  # by tap

# What the spatial features' are called in the files of arXiv 2105.05233.
KEYS = {'spatial': ('mu_s', 'sigma_s')}


def is_file(path, alone: bool = False) -> bool:
  """Whether it is a .npz with mu and sigma.

  Args:
    path: of anything, or of nothing.
    alone: whether images beside them make it something else: the files of
      arXiv 2105.05233 hold both.
  """
  path = files.at(path).expanduser()
  try:
    with path.open('rb') as file, zipfile.ZipFile(file) as archive:
      names = set(archive.namelist())
  except (OSError, zipfile.BadZipFile, ValueError):
    return False
  has_images = 'arr_0.npy' in names
  return {'mu.npy', 'sigma.npy'} <= names and not (alone and has_images)


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
  return {
    tap: frechet.read(
      path,
      dim=outputs[tap].shape[1] if outputs else None,
      keys=KEYS.get(tap, ('mu', 'sigma')),
    )
    for tap in judge.taps
  }


def kept(there: dict[str, files.Path]) -> Statistics | None:
  """Those of the cache; None where one is not there, or is damaged.

  Args:
    there: of `paths`.
  """
  if not (there and all(path.exists() for path in there.values())):
    return None
  try:
    return {tap: frechet.read(path) for tap, path in there.items()}
  except UserError:
    return None  # it is computed anew, and written over


def write(path, given: Statistics) -> None:
  """Writes those of the first tap, and of the spatial features if any.

  Args:
    path: of a .npz, as `read` takes it.
    given: the statistics.
  """
  main = next(iter(given))
  arrays = {}
  for tap in dict.fromkeys([main, *KEYS]):
    if tap in given:
      keys = KEYS.get(tap, ('mu', 'sigma'))
      arrays |= dict(zip(keys, given[tap], strict=True))
  path = files.at(path).expanduser()
  files.make(path.parent)
  with files.replacing(path) as file:
    np.savez_compressed(file, **arrays)


def sha256_of(given: Statistics) -> str:
  """Of the numbers, tap by tap."""
  digest = hashlib.sha256()
  for gaussian in given.values():
    for array in gaussian:
      digest.update(np.ascontiguousarray(array, np.float64))
  return digest.hexdigest()


def paths(cache, judge: Judge, images_sha256: str) -> dict[str, files.Path]:
  """Where the cache has the statistics of a set of images, at each tap."""
  return {
    tap: files.at(cache)
    / 'statistics'
    / VERSION
    / f'{judge.keys[tap]}_{images_sha256[:32]}.npz'
    for tap in judge.taps
    if tap in judge.keys
  }
