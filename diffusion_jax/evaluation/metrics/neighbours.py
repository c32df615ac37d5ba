"""Has it copied? The training images that lie nearest to samples."""

from typing import NamedTuple

import numpy as np


class Nearest(NamedTuple):
  """The nearest training images of Q queries, nearest first.

  Attributes:
    distances: [Q, k] float64, Euclidean, between features.
    indices: [Q, k] int64, of the training images; -1 where there were fewer.
  """

  distances: np.ndarray
  indices: np.ndarray


def nothing(num_queries: int, k: int) -> Nearest:
  """Before any training image was looked at."""
  return Nearest(
    np.full((num_queries, k), np.inf), np.full((num_queries, k), -1)
  )


def update(
  nearest: Nearest, queries: np.ndarray, features: np.ndarray, first: int
) -> Nearest:
  """Looks at one more batch of training images.

  Args:
    nearest: what was found so far.
    queries: [Q, D] features.
    features: [n, D], of training images first .. first + n - 1.
    first: the index of the first of them.
  """
  # In float64: |a|^2 + |b|^2 - 2ab of a copy is to be next to nothing.
  a, b = queries.astype(np.float64), features.astype(np.float64)
  squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None]
  found = np.sqrt(np.maximum(squares - 2 * a @ b.T, 0))
  distances = np.concatenate([nearest.distances, found], 1)
  numbers = np.broadcast_to(np.arange(first, first + len(b)), found.shape)
  indices = np.concatenate([nearest.indices, numbers], 1)
  order = np.argsort(distances, 1, kind='stable')
  order = order[:, : nearest.distances.shape[1]]
  return Nearest(
    np.take_along_axis(distances, order, 1),
    np.take_along_axis(indices, order, 1),
  )


def share_nearer(distances: np.ndarray, heldout: np.ndarray) -> np.ndarray:
  """The share of held-out images that lie nearer to a training image.

  Args:
    distances: [Q], of samples from their nearest training images.
    heldout: [M], of held-out images from theirs.

  Returns:
    [Q]; 0 says that a sample is nearer than any held-out image is.
  """
  ranks = np.searchsorted(np.sort(heldout), distances, side='left')
  return ranks / len(heldout)
