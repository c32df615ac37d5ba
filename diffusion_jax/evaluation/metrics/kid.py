"""KID, the kernel inception distance (arXiv 1801.01401).

The squared maximum mean discrepancy of two sets of features under the kernel
k(x, y) = (x.y / D + 1)^3, by the unbiased estimator of Gretton et al. (2012,
lemma 6). For two sets from one distribution it is 0 on average, so it may be
negative.
"""

from typing import NamedTuple

import numpy as np

from diffusion_jax.system.errors import UserError

NUM_SUBSETS, SUBSET_SIZE = 100, 1000


class Estimate(NamedTuple):
  """KID over random subsets.

  Attributes:
    mean: mean over the subsets.
    std: standard deviation over the subsets, divided by their number as in
      torch-fidelity, not by one less.
    standard_error: standard error of the mean. It covers the choice of subsets
      of these images, not the choice of images.
    subset_size: images per subset, from each set.
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
  """KID over random subsets, as papers report it.

  The subsets are those of torch-fidelity with the same rng_seed.

  Args:
    samples: [N, D] features.
    reference: [M, D] features.
    seed: seed of the subsets.
    num_subsets: number of subsets, at least 2.
    subset_size: images per subset, from each set; at most all images.

  Raises:
    UserError: there are fewer than two images or subsets.
  """
  size = min(subset_size, len(samples), len(reference))
  if size < 2 or num_subsets < 2:
    raise UserError(
      f'KID of {num_subsets} subsets of {size} images: it needs at least 2 of '
      'both'
    )
  rng = np.random.RandomState(seed)  # the same numbers in any NumPy version
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

  It has no noise from subsets. It works in blocks to limit memory, and takes
  (N^2 / 2 + N M + M^2 / 2) D multiplications in float64.

  Args:
    x: [N, D] features, N >= 2.
    y: [M, D] features, M >= 2.
    block_size: rows and columns of a block of the kernel matrix.

  Returns:
    the squared MMD in float64, which may be negative.
  """
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
  """Caveats about a KID, one line each.

  Args:
    count: number of images in the smaller set.
    subset_size: the requested size of the subsets.
  """
  if count <= subset_size:
    return [
      f'KID: {count} images in subsets of {subset_size}, so each subset is a '
      'whole set and the standard error means little'
    ]
  return []


def _mean_of_pairs(x, block_size):
  """The mean of the kernel over all pairs of different images."""
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
