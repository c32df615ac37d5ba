"""Features of images that other tools have saved, used as statistics.

Tools save the output of a network for each image under one of NAMES, as .npz or
.npy, [N, D]. The mean and the covariance are computed from them block by block,
so that memory does not grow with N, except for arrays in Fortran's order.
"""

import contextlib
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from diffusion_jax.evaluation.metrics import frechet
from diffusion_jax.system import npz
from diffusion_jax.system.errors import UserError, one_line

NAMES = (
  *('pool_3', 'pool3', 'features', 'feats', 'feat', 'activations', 'acts'),
  *('act', 'embeddings', 'arr_0'),
)
MOST = 8192  # most dimensions
ROWS = 1024  # read at once


class Stored(NamedTuple):
  """Features in a file.

  Attributes:
    path: the file.
    name: the array's name; '' in a .npy.
    header: of the array, [N, D] or [N, 1, 1, D], floats.
  """

  path: Path
  name: str
  header: npz.Header

  @property
  def shape(self) -> tuple[int, int]:
    count, *rest = self.header.shape
    return count, math.prod(rest)

  def __str__(self) -> str:
    return f'{self.name or "features"} {list(self.shape)}'


def find(path) -> Stored | None:
  """The features in a local file; None if it holds none that can be read."""
  path = Path(path).expanduser()
  if path.suffix not in ('.npy', '.npz') or not path.is_file():
    return None
  for name in NAMES if path.suffix == '.npz' else ('',):
    with contextlib.suppress(*npz.DAMAGED), _opened(path, name) as (file, _):
      header = npz.read_header(file, str(path))
      rest = header.shape[1:]
      is_flat = bool(rest) and sorted(rest)[:-1] == [1] * (len(rest) - 1)
      if header.dtype.kind == 'f' and is_flat:
        return Stored(path, name, header)
  return None


def moments(stored: Stored) -> frechet.Moments:
  """The moments of stored features.

  Args:
    stored: a result of `find`.

  Raises:
    UserError: there are fewer than 2 rows, too many dimensions, or numbers that
      are not finite, or the file is damaged.
  """
  path, (count, dims), found = stored.path, stored.shape, None
  if count < 2 or not 0 < dims <= MOST:
    raise UserError(
      f'{path} has {stored}: a covariance needs at least 2 rows of at most '
      f'{MOST} numbers'
    )
  itemsize = stored.header.dtype.itemsize
  with (
    one_line(f'{path} cannot be read: ', ': write it again with np.savez'),
    _opened(path, stored.name) as (file, num_bytes),
  ):
    npz.check_bytes(stored.header, num_bytes, str(path))
    file.read(stored.header.offset)
    # Fortran's order has all rows of a dimension together.
    order = stored.header.order
    most = count if order == 'F' else ROWS
    for first in range(0, count, most):
      rows = min(most, count - first)
      content = file.read(rows * dims * itemsize)
      block = np.frombuffer(content, stored.header.dtype)
      block = block.reshape(rows, dims, order=order)
      if not np.isfinite(block).all():
        raise UserError(
          f'{path} has {stored} with numbers that are not finite: compute them '
          'again'
        )
      found = frechet.merge(found, frechet.moments_of(block))
  return found


@contextlib.contextmanager
def _opened(path, name) -> Iterator[tuple[BinaryIO, int]]:
  """(the bytes of a .npy or of an array of a .npz, their number)."""
  if not name:
    with path.open('rb') as file:
      yield file, path.stat().st_size
    return
  with zipfile.ZipFile(path) as archive:
    info = archive.getinfo(f'{name}.npy')
    with archive.open(info) as file:
      yield file, info.file_size
