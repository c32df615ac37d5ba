"""The Inception Score (arXiv 1606.03498, section 4): exp E KL(p(y|x) || p(y)).

Of a classifier's logits, in splits, as it was reported first. Only sums are
kept, so that images may come in any number of batches.
"""

from typing import NamedTuple

import numpy as np

from diffusion_jax.system.errors import UserError

NUM_SPLITS = 10


class Sums(NamedTuple):
  """What the score needs of the images so far, all of it in float64.

  Attributes:
    count: int64 [S], images of each split.
    p: [S, K], the sum of their probabilities.
    p_log_p: [S], the sum of p log p over images and classes.
  """

  count: np.ndarray
  p: np.ndarray
  p_log_p: np.ndarray


class Score(NamedTuple):
  """The Inception Score.

  Attributes:
    mean: over the splits; from 1, where all images look alike to the network
      or like nothing, to K.
    std: over the splits (not of one fewer, as the original).
  """

  mean: float
  std: float


def splits_of(
  num_images: int, num_splits: int = NUM_SPLITS, seed: int | None = None
) -> np.ndarray:
  """Which split each image goes to.

  Args:
    num_images: N, at least one for each split.
    num_splits: S.
    seed: of a permutation, that of torch-fidelity with the same rng_seed; None
      is the original's order, the first N / S images being the first split.
      Samples that stand in order, of their classes say, need one.

  Returns:
    int64 [N], in [0, S).

  Raises:
    UserError: there are fewer images than splits, or no split.
  """
  if not 1 <= num_splits <= num_images:
    raise UserError(
      f'Inception Score of {num_images} images in {num_splits} splits: give 1 '
      'to as many splits as there are images'
    )
  ends = [i * num_images // num_splits for i in range(1, num_splits + 1)]
  splits = np.searchsorted(ends, np.arange(num_images), side='right')
  if seed is None:
    return splits
  order = np.random.RandomState(seed).permutation(num_images)
  shuffled = np.empty_like(splits)
  shuffled[order] = splits
  return shuffled


def nothing(num_splits: int, num_classes: int) -> Sums:
  """Before any image was looked at.

  Args:
    num_splits: S.
    num_classes: K.
  """
  return Sums(
    np.zeros(num_splits, np.int64),
    np.zeros((num_splits, num_classes)),
    np.zeros(num_splits),
  )


def update(sums: Sums, logits: np.ndarray, splits: np.ndarray) -> Sums:
  """Looks at one more batch of images.

  Args:
    sums: of the images so far.
    logits: [n, K].
    splits: int [n], the batch's part of `splits_of`.
  """
  z = np.asarray(logits, np.float64)
  z = z - z.max(1, keepdims=True)
  log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
  p = np.exp(log_p)
  # A class that is out of the question adds 0, not 0 * -inf.
  p_log_p = (p * np.where(p > 0, log_p, 0)).sum(1)
  of_split = (splits == np.arange(len(sums.count))[:, None]).astype(np.float64)
  return Sums(
    sums.count + of_split.sum(1).astype(np.int64),
    sums.p + of_split @ p,
    sums.p_log_p + of_split @ p_log_p,
  )


def score_of(sums: Sums) -> Score:
  """The score of all images, each split by itself.

  Args:
    sums: with at least one image in each split.
  """
  q = sums.p / sums.count[:, None]
  entropy = -(q * np.log(np.where(q > 0, q, 1))).sum(1)
  scores = np.exp(sums.p_log_p / sums.count + entropy)
  return Score(float(scores.mean()), float(scores.std()))


def caveats(
  count: int, num_classes: int, num_splits: int = NUM_SPLITS
) -> list[str]:
  """What is to be told beside a score, a line each.

  Args:
    count: the number of images.
    num_classes: K.
    num_splits: S.
  """
  if count >= num_classes * num_splits:
    return []
  return [
    f'Inception Score: {count} images in {num_splits} splits, fewer in a split '
    f'than the {num_classes} classes, so it comes out too low; take more '
    'images or fewer splits'
  ]
