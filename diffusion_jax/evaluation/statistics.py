"""Statistics of a reference, used instead of its images.

They are a mean and a covariance at each tap, from a user's file or from the
cache, where they are stored under the hashes of the images and of the network.

Files that this project writes say which network and convention they were made
with (`made_with`, JSON by the name of the mean), so that unlike statistics are
not compared. Those of other tools do not say it.
"""

import json

import jax
import numpy as np

from diffusion_jax.evaluation import features, kept, stored_features
from diffusion_jax.evaluation.features import VERSION, Images, Judge
from diffusion_jax.evaluation.metrics.frechet import Gaussian
from diffusion_jax.system import errors, files, terminal
from diffusion_jax.system.npz import DAMAGED

Statistics = dict[str, Gaussian]  # by tap
Set = Images | Statistics  # a set of images, or what replaces it

# The names of the spatial features in the files of arXiv 2105.05233.
KEYS = {'spatial': ('mu_s', 'sigma_s')}
PLAIN = 'mu', 'sigma'
PAIRS = (PLAIN, ('mean', 'cov'), ('m', 's'))  # as different tools name them
MADE_WITH = 'made_with'

MOST = 8192  # most dimensions of statistics in a file
INCEPTION = 2048  # dimensions that are usually those of its last features


def is_file(path, alone: bool = False) -> bool:
  """Whether a path is a .npz with mu and sigma, or holds features.

  Args:
    path: any path, which need not exist.
    alone: return False if the file also holds images, as the files of arXiv
      2105.05233 do.
  """
  if _pair_in(path):
    return not (alone and 'arr_0' in kept.names(path))
  return stored_features.find(path) is not None


def _pair_in(path) -> tuple[str, str] | None:
  """The names of the mean and the covariance in a file."""
  there = {*kept.names(path)}
  return next((pair for pair in PAIRS if there >= {*pair}), None)


def read(path, judge: Judge, image_shape) -> Statistics:
  """Reads the statistics of a file, at each tap of a judge.

  Args:
    path: a .npz with mu and sigma, and mu_s and sigma_s for sFID.
    judge: the network.
    image_shape: (H, W, C) of the images to judge; None if there are none.

  Raises:
    UserError: the file holds something else, or statistics of other features,
      as far as it says which.
  """
  plain = [tap for tap in judge.taps if tap not in KEYS]
  if len(plain) > 1:
    raise errors.UserError(
      f'{path} holds statistics of one tap, not of {" and ".join(plain)}: give '
      'one tap'
    )
  outputs = {}
  if image_shape:
    image = jax.ShapeDtypeStruct((1, *image_shape), np.uint8)
    outputs = jax.eval_shape(judge.apply, judge.params, image)
  path = files.at(path).expanduser()
  if judge.apply:
    check_alike(path, origin(path), describe(judge))
  dims = {tap: output.shape[1] for tap, output in outputs.items()}
  return {
    tap: read_gaussian(path, dims.get(tap), KEYS.get(tap, PLAIN))
    for tap in judge.taps
  }


def cached(there: dict[str, files.Path]) -> Statistics | None:
  """Reads statistics from the cache; None if any is missing or damaged.

  Args:
    there: a result of `paths`.
  """
  try:
    return {tap: read_gaussian(path) for tap, path in there.items()} or None
  except errors.UserError:
    return None  # computed again and overwritten


def keep(there: dict[str, files.Path], given: Statistics) -> None:
  """Writes statistics to the cache, to the files of `paths`."""
  for tap, path in there.items():
    arrays = dict(zip(PLAIN, given[tap], strict=True))
    kept.write(path, arrays, np.savez_compressed)


def write(path, given: Statistics, made_with: dict | None = None) -> None:
  """Writes statistics of the first tap, and of the spatial features if any.

  Args:
    path: a .npz for `read`, written atomically in pytorch-fid's format: it will
      hold mu [D] and sigma [D, D], float64.
    given: the statistics.
    made_with: what they were made with, see `describe`, if that is known.
  """
  arrays = {}
  for tap in _written(given):
    arrays |= zip(KEYS.get(tap, PLAIN), given[tap], strict=True)
  if made_with:
    arrays[MADE_WITH] = json.dumps(made_with)
  kept.write(files.at(path).expanduser(), arrays, np.savez_compressed)


def _written(taps) -> list[str]:
  """The taps that a file has room for."""
  first = next(iter(taps))
  return [first, *(tap for tap in KEYS if tap in taps and tap != first)]


def describe(judge: Judge, num_images: int | None = None) -> dict[str, dict]:
  """What the statistics in a file of `write` were made with.

  Args:
    judge: the network.
    num_images: the number of images, if that is known.

  Returns:
    name of the mean -> its facts, see `Judge.about`, as JSON.
  """
  count = {} if num_images is None else {'num_images': num_images}
  return {
    KEYS.get(tap, PLAIN)[0]: {**judge.about(tap), **count}
    for tap in _written(judge.taps)
  }


def origin(path) -> dict[str, dict]:
  """What a file says about its statistics, see `describe`; {} if nothing."""
  path = files.at(path).expanduser()
  try:
    found = json.loads(str(kept.read(path, [MADE_WITH], 2**16)[MADE_WITH]))
  except DAMAGED:
    return {}
  is_known = isinstance(found, dict)
  return found if is_known and all(map(_is_facts, found.values())) else {}


def _is_facts(value) -> bool:
  return isinstance(value, dict)


def check_alike(path, there: dict[str, dict], here: dict[str, dict]) -> None:
  """Raises UserError if two descriptions are of unlike features.

  Args:
    path: the file of the first, for the message.
    there: a result of `origin`.
    here: a result of `origin` or `describe`.
  """
  unlike = {
    f'{name}: {a[name]} there, {b[name]} here'
    for a, b in ((there[mean], here[mean]) for mean in there.keys() & here)
    for name in a.keys() & b.keys() - {'num_images'}
    if a[name] != b[name]
  }
  if unlike:
    raise errors.UserError(
      f'{path} holds statistics of other features ({"; ".join(sorted(unlike))})'
      ': judge with the network and convention that they were made with, or '
      'compute them again from images'
    )


def sha256_of(given: Set) -> str:
  """The hash of all images in order, read once, or of the statistics."""
  if isinstance(given, Images):
    return features.sha256_of(given)
  return kept.sha256(x.astype(np.float64) for g in given.values() for x in g)


def count_of(given: Set) -> int:
  """The number of images; 0 for statistics."""
  return given.count if isinstance(given, Images) else 0


def paths(cache, judge: Judge, images_sha256: str) -> dict[str, files.Path]:
  """The cache files for the statistics of a set of images, at each tap."""
  folder = files.at(cache) / 'statistics' / VERSION
  return {
    tap: folder / f'{judge.keys[tap]}_{images_sha256[:32]}.npz'
    for tap in judge.taps
    if tap in judge.keys
  }


def read_gaussian(
  path, dim: int | None = None, keys: tuple[str, str] = PLAIN
) -> Gaussian:
  """Reads statistics written by `write`, pytorch-fid or another tool.

  The file may come from anywhere: nothing is unpickled, and the size is
  limited. Other arrays in the file are not read. If the file holds features,
  see `stored_features`, the statistics are computed from them.

  Args:
    path: the .npz file, or a .npy of features.
    dim: the required D; None accepts any.
    keys: the names of the mean and the covariance; ('mu_s', 'sigma_s') are
      those of the spatial features in the reference files of arXiv 2105.05233.

  Raises:
    UserError: there is no such file, it holds something else, or statistics of
      another D.
  """
  pair = _pair_in(path) if keys == PLAIN else keys
  stored = None if pair else stored_features.find(path)
  if stored:
    mean, covariance = _computed(stored)
    has = f'{path} has {stored}'
  else:
    mean, covariance = _read(path, pair or PLAIN)
    has = f'{path} has {len(mean)} dimensions'
  if dim is not None and len(mean) != dim:
    inception = ', which --features=inception is' * (len(mean) == INCEPTION)
    raise errors.UserError(
      f'{has}, but the features here have {dim}: judge with the network that '
      f'the file is of{inception}, or give statistics of the same network'
    )
  return Gaussian(mean, (covariance + covariance.T) / 2)


def _computed(stored) -> tuple[np.ndarray, np.ndarray]:
  """The mean and the covariance of features; says so."""
  moments = stored_features.moments(stored)
  few = '; these are fewer than dimensions, so the distance is far too large'
  terminal.say(
    f'{stored.path}: mean and covariance are computed from {stored}'
    + few * (moments.count <= len(moments.mean))
  )
  return moments.mean, moments.covariance


def _read(path, keys) -> tuple[np.ndarray, np.ndarray]:
  """The mean and the covariance in a file, float64."""
  there = ' '.join(', '.join(kept.names(path)[:10]).split())
  with errors.one_line(
    f'{path} holds no readable statistics (',
    f'; it holds {there}' * bool(there)
    + f'): give a .npz with {" and ".join(keys)}',
  ):
    arrays = kept.read(path, keys, 8 * MOST * (MOST + 1) + 4096).values()
    for array in arrays:
      if array.dtype.kind != 'f' or array.ndim == 0 or len(array) > MOST:
        raise ValueError(f'{array.dtype} {list(array.shape)}')
    mean, covariance = (array.astype(np.float64) for array in arrays)
  if wrong := _wrong(mean, covariance):
    raise errors.UserError(
      f'{path} {wrong}: statistics are {keys[0]} [D] and a symmetric '
      f'{keys[1]} [D, D] of finite numbers; compute them again'
    )
  return mean, covariance


def _wrong(mean, covariance):
  """A description of what is wrong with statistics, or ''."""
  shapes = [list(x.shape) for x in (mean, covariance)]
  if mean.ndim != 1 or not mean.size or shapes[1] != [len(mean)] * 2:
    return f'has the shapes {shapes[0]} and {shapes[1]}'
  if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
    return 'has numbers that are not finite'
  # Products in float32 may have made the two halves differ.
  unlike = np.abs(covariance - covariance.T).max()
  if unlike > 1e-5 * np.abs(covariance).max():
    return f'has a covariance whose halves differ by {unlike:.2g}'
  if covariance.diagonal().min() < 0:
    return 'has variances below 0'
  return ''
