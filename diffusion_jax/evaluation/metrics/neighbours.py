"""The nearest training images of samples, to see whether a network copies."""

from typing import NamedTuple

import numpy as np


class Nearest(NamedTuple):
  """The nearest training images of Q queries, nearest first.

  Attributes:
    distances: [Q, k] float64, Euclidean, between features.
    indices: [Q, k] int64, of the training images; -1 if there are fewer.
  """

  distances: np.ndarray
  indices: np.ndarray


def nothing(num_queries: int, k: int) -> Nearest:
  """The result before any training image has been seen."""
  return Nearest(
    np.full((num_queries, k), np.inf), np.full((num_queries, k), -1)
  )


def update(
  nearest: Nearest, queries: np.ndarray, features: np.ndarray, first: int
) -> Nearest:
  """Updates the nearest images with one more batch of training images.

  Args:
    nearest: the result so far.
    queries: [Q, D] features.
    features: [n, D], of training images first .. first + n - 1.
    first: the index of the first image of the batch.
  """
  # In float64, so that |a|^2 + |b|^2 - 2ab is close to 0 for a copy.
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
  """The share of held-out images that are nearer to a training image.

  Args:
    distances: [Q], from samples to their nearest training images.
    heldout: [M], from held-out images to their nearest training images.

  Returns:
    [Q]; 0 means that a sample is nearer than every held-out image.
  """
  ranks = np.searchsorted(np.sort(heldout), distances, side='left')
  return ranks / len(heldout)
