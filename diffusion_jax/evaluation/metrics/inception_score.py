"""The Inception Score (arXiv 1606.03498, section 4): exp E KL(p(y|x) || p(y)).

It is computed from a classifier's logits, in splits, as in the paper. Only sums
are kept, so images may come in any number of batches.
"""

from typing import NamedTuple

import numpy as np

from diffusion_jax.system.errors import UserError

NUM_SPLITS = 10


class Sums(NamedTuple):
  """Sums over the images so far, in float64.

  Attributes:
    count: int64 [S], number of images in each split.
    p: [S, K], the sum of their probabilities.
    p_log_p: [S], the sum of p log p over images and classes.
  """

  count: np.ndarray
  p: np.ndarray
  p_log_p: np.ndarray


class Score(NamedTuple):
  """The Inception Score.

  Attributes:
    mean: mean over the splits, between 1 and K; 1 if the network gives all
      images the same probabilities.
    std: standard deviation over the splits, divided by S as in the original,
      not by S - 1.
  """

  mean: float
  std: float


def splits_of(
  num_images: int, num_splits: int = NUM_SPLITS, seed: int | None = None
) -> np.ndarray:
  """The split of each image.

  Args:
    num_images: N, at least one for each split.
    num_splits: S.
    seed: seed of a permutation, the same as torch-fidelity's with this
      rng_seed. With None, as in the original, the first N / S images are the
      first split. Samples in some order, such as by class, need a seed.

  Returns:
    int64 [N], in [0, S).

  Raises:
    UserError: there are fewer images than splits, or no splits.
  """
  if not 1 <= num_splits <= num_images:
    raise UserError(
      f'Inception Score of {num_images} images in {num_splits} splits: give '
      f'between 1 and {num_images} splits'
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
  """The sums before any image has been seen.

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
  """Adds one more batch of images.

  Args:
    sums: sums over the images so far.
    logits: [n, K].
    splits: int [n], the batch's part of `splits_of`.
  """
  z = np.asarray(logits, np.float64)
  z = z - z.max(1, keepdims=True)
  log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
  p = np.exp(log_p)
  # A class of probability 0 adds 0, not 0 * -inf.
  p_log_p = (p * np.where(p > 0, log_p, 0)).sum(1)
  of_split = (splits == np.arange(len(sums.count))[:, None]).astype(np.float64)
  return Sums(
    sums.count + of_split.sum(1).astype(np.int64),
    sums.p + of_split @ p,
    sums.p_log_p + of_split @ p_log_p,
  )


def score_of(sums: Sums) -> Score:
  """The score of all images, from the scores of the splits.

  Args:
    sums: sums with at least one image in each split.
  """
  q = sums.p / sums.count[:, None]
  entropy = -(q * np.log(np.where(q > 0, q, 1))).sum(1)
  scores = np.exp(sums.p_log_p / sums.count + entropy)
  return Score(float(scores.mean()), float(scores.std()))


def caveats(
  count: int, num_classes: int, num_splits: int = NUM_SPLITS
) -> list[str]:
  """Caveats about a score, one line each.

  Args:
    count: the number of images.
    num_classes: K.
    num_splits: S.
  """
  if count >= num_classes * num_splits:
    return []
  return [
    f'Inception Score: {count} images in {num_splits} splits, fewer per split '
    f'than the {num_classes} classes, so the score is too low; use more images '
    'or fewer splits'
  ]
