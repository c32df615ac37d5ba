"""KID, the kernel inception distance (arXiv 1801.01401).

The squared maximum mean discrepancy of two sets of features under the kernel
k(x, y) = (x.y / D + 1)^3, by the estimate without bias of Gretton et al. (2012,
lemma 6): sets of one distribution are at 0 on average, so that some are below.
"""

from typing import NamedTuple

import numpy as np

from diffusion_jax.system.errors import UserError

NUM_SUBSETS, SUBSET_SIZE = 100, 1000


class Estimate(NamedTuple):
  """KID over random subsets.

  Attributes:
    mean: over the subsets.
    std: over the subsets (not of one fewer, as torch-fidelity): how far the
      estimate from one of them lies from the mean.
    standard_error: of the mean. It tells what drawing other subsets of these
      images would change, not what drawing other images would.
    subset_size: how many images of each set are in a subset.
  """

  mean: float
  std: float
  standard_error: float
  subset_size: int


def over_subsets(
  samples: np.ndarray,
  reference: np.ndarray,
  *,
  seed: int,
  num_subsets: int = NUM_SUBSETS,
  subset_size: int = SUBSET_SIZE,
) -> Estimate:
  """KID over random subsets, as it is reported in papers.

  The subsets are those of torch-fidelity with the same rng_seed.

  Args:
    samples: [N, D] features.
    reference: [M, D] features.
    seed: of the subsets.
    num_subsets: at least 2.
    subset_size: of each set; where there are fewer images, all are taken.

  Raises:
    UserError: there are fewer than two images, or subsets.
  """
  size = min(subset_size, len(samples), len(reference))
  if size < 2 or num_subsets < 2:
    raise UserError(
      f'KID of {num_subsets} subsets of {size} images: it takes at least 2 of '
      'both'
    )
  rng = np.random.RandomState(seed)  # its numbers are the same in any NumPy
  values = np.empty(num_subsets)
  for i in range(num_subsets):
    chosen = [
      x[rng.choice(len(x), size, replace=False)] for x in (samples, reference)
    ]
    values[i] = squared_mmd(*chosen)
  std = float(values.std())
  return Estimate(
    float(values.mean()), std, std / (num_subsets - 1) ** 0.5, size
  )


def squared_mmd(
  x: np.ndarray, y: np.ndarray, *, block_size: int = 1000
) -> float:
  """The unbiased estimate from all images at once.

  It has no noise of subsets. In blocks, so that memory is no matter; the time
  is that of (N^2 / 2 + N M + M^2 / 2) D multiplications in float64.

  Args:
    x: [N, D] features, N >= 2.
    y: [M, D] features, M >= 2.
    block_size: of the kernel matrix.

  Returns:
    the squared MMD, which may be below 0; in float64.

  Raises:
    UserError: one of the sets has fewer than two images.
  """
  if min(len(x), len(y)) < 2:
    raise UserError(
      f'KID of {len(x)} and {len(y)} images: it takes at least 2 of both'
    )
  between = sum(
    _kernel(a, b).sum()
    for a in _blocks(x, block_size)
    for b in _blocks(y, block_size)
  )
  return float(
    _mean_of_pairs(x, block_size)
    + _mean_of_pairs(y, block_size)
    - 2 * between / (len(x) * len(y))
  )


def caveats(count: int, subset_size: int = SUBSET_SIZE) -> list[str]:
  """What is to be told beside a KID, a line each.

  Args:
    count: the smaller number of images.
    subset_size: that was asked for.
  """
  if count <= subset_size:
    return [
      f'KID: {count} images in subsets of {subset_size}, so that each takes '
      'all of a set and the standard error says little'
    ]
  return []


def _mean_of_pairs(x, block_size):
  """The kernel's mean over all pairs of different images."""
  blocks, total = list(_blocks(x, block_size)), 0.0
  for i, a in enumerate(blocks):
    same = _kernel(a, a)
    total += same.sum() - np.trace(same)
    total += sum(2 * _kernel(a, b).sum() for b in blocks[:i])
  return total / (len(x) * (len(x) - 1))


def _blocks(x, size):
  return (x[i : i + size] for i in range(0, len(x), size))


def _kernel(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  k = a @ b.T / a.shape[1] + 1
  return k * k * k  # as a power it would take ten times as long
