"""Kernels of blurs: float64 arrays that sum to 1, made on the host."""

import math

import numpy as np

from diffusion_jax.system.errors import UserError

RANK_ONE = 1e-8  # the second singular value over the first, at most


def gaussian(sd: float, most: int | None = None) -> np.ndarray:
  """A Gaussian blur, cut at 3 standard deviations.

  Args:
    sd: the standard deviation in pixels.
    most: the largest side of the kernel, where it is cut earlier if need be:
      the shorter side of the picture.

  Returns:
    [K, K], K odd.

  Raises:
    UserError: sd is not above 0, or above half of `most`.
  """
  if not 0 < sd < (math.inf if most is None else most / 2 + 1e-9):
    limit = '' if most is None else f' and at most {most / 2:g}, half the side'
    raise UserError(f'sd={sd}: a blur needs a number of pixels above 0{limit}')
  radius = math.ceil(3 * sd)
  if most is not None:
    radius = min(radius, (most - 1) // 2)
  line = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sd) ** 2)
  line /= line.sum()
  return np.outer(line, line)


def motion(length: float, angle: float = 0.0) -> np.ndarray:
  """A straight motion blur: each pixel's share of a segment.

  Args:
    length: of the segment, in pixels, at least 1.
    angle: in degrees, from the row's direction and counterclockwise.

  Returns:
    [K, L], both odd, with the segment's middle in the middle.

  Raises:
    UserError: a number is out of range.
  """
  if not 1 <= length < math.inf or not math.isfinite(angle):
    raise UserError(
      f'length={length}, angle={angle}: a motion blur needs a length of at '
      'least 1 pixel and an angle in degrees'
    )
  way = np.array(
    [-math.sin(math.radians(angle)), math.cos(math.radians(angle))]
  )
  way[np.abs(way) < 1e-12] = 0
  # The parameters at which the segment crosses a border between two pixels.
  half, cuts = length / 2, [-length / 2, length / 2]
  for part in way:
    borders = np.arange(math.floor(half * abs(part)) + 1) + 0.5
    if part:
      cuts += [*(borders / part), *(-borders / part)]
  cuts = np.unique(np.clip(cuts, -half, half))
  middles, shares = (cuts[1:] + cuts[:-1]) / 2, np.diff(cuts)
  pixels = np.rint(middles[:, None] * way).astype(int)[shares > 1e-9]
  radius = np.abs(pixels).max(axis=0)
  kernel = np.zeros(2 * radius + 1)
  np.add.at(kernel, tuple((pixels + radius).T), shares[shares > 1e-9])
  return kernel / kernel.sum()


def given(kernel, shape) -> np.ndarray:
  """A kernel from numbers, divided by their sum.

  Args:
    kernel: [K, L] numbers.
    shape: (H, W, ...), of the picture.

  Returns:
    [K, L] float64.

  Raises:
    UserError: it is empty or not a matrix of finite numbers, larger than the
      picture, or sums to 0.
  """
  try:
    values = np.asarray(kernel, np.float64)
  except (TypeError, ValueError):
    values = np.zeros(())
  if values.ndim != 2 or not values.size:
    raise UserError(
      'kernel: give a matrix of numbers with at least one row and one column, '
      f'not {_shown(values.shape)}'
    )
  if not np.isfinite(values).all():
    raise UserError('kernel: it has numbers that are not finite; remove them')
  if values.shape[0] > shape[0] or values.shape[1] > shape[1]:
    raise UserError(
      f'kernel: it has {_shown(values.shape)} pixels, but the picture '
      f'{_shown(shape[:2])}: give one that is at most as large'
    )
  total = values.sum()
  if abs(total) <= 1e-9 * np.abs(values).sum():
    raise UserError('kernel: it sums to 0, so it cannot be scaled to sum to 1')
  return values / total


def _shown(shape) -> str:
  return 'x'.join(map(str, shape)) or 'a single value'


def factors(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
  """(column, row) whose outer product is the kernel; None if its rank is not 1.

  Args:
    kernel: [K, L].
  """
  u, values, vt = np.linalg.svd(kernel)
  if len(values) > 1 and values[1] > RANK_ONE * values[0]:
    return None
  root = np.sqrt(values[0])
  return root * u[:, 0], root * vt[0]
