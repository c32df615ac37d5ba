"""Reads noise schedules from files: betas or alpha_bar, one number a step."""

import hashlib
import io
import json

import numpy as np

from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError

READERS = {
  '.npy': lambda content: np.load(io.BytesIO(content), allow_pickle=False),
  '.json': lambda content: json.loads(content),
  '.txt': lambda content: content.decode().replace(',', ' ').split(),
}


def sha256(path) -> str:
  """The hash of a file's content.

  Raises:
    UserError: the file cannot be read.
  """
  return hashlib.sha256(_content(path)).hexdigest()


def read(path, num_timesteps: int, expected: str = '') -> np.ndarray:
  """Reads a list of numbers: .npy, .json, or .txt with spaces or lines.

  Args:
    path: the file.
    num_timesteps: how many numbers there must be.
    expected: the hash that the file must have, '' for any.

  Returns:
    [num_timesteps] float64.

  Raises:
    UserError: the file cannot be read, has changed, or has other content.
  """
  content, suffix = _content(path), files.at(path).suffix
  if expected and hashlib.sha256(content).hexdigest() != expected:
    raise UserError(
      f'process.path={path} has changed since the run began: put back the '
      'file with the SHA-256 that config.json records as process.sha256'
    )
  if suffix not in READERS:
    raise UserError(
      f'process.path={path}: the name must end in {", ".join(READERS)}'
    )
  try:
    values = np.asarray(READERS[suffix](content), np.float64)
  except (ValueError, TypeError, UnicodeDecodeError) as e:
    raise UserError(f'process.path={path} is not a list of numbers') from e
  if values.ndim != 1 or not np.isfinite(values).all():
    raise UserError(f'process.path={path} is not a list of finite numbers')
  if len(values) != num_timesteps:
    raise UserError(
      f'process.path={path} has {len(values)} numbers, but '
      f'process.num_timesteps={num_timesteps}: set it to {len(values)}'
    )
  return values


def _content(path) -> bytes:
  if not path:
    raise UserError(
      'process.path is empty: give the file of the schedule, or another '
      'process.schedule'
    )
  return files.content(
    files.at(path).expanduser(), 'process.path is the file of the schedule'
  )
