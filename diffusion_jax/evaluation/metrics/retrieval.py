"""Whether pictures find their texts among many (recall at k).

Vectors of pictures and texts are compared by their cosine, as in CLIP (arXiv
2103.00020). The chance of recall, its interval and the p-value of a permutation
say what a number means.
"""

import numpy as np
import scipy.special

BLOCK = 1024  # pictures compared with all texts at once
PERMUTATIONS = 9999
LEVEL = 0.95  # of intervals


def ranks(images: np.ndarray, texts: np.ndarray, own: np.ndarray) -> np.ndarray:
  """How many other texts are at least as similar to a picture as its own.

  Args:
    images: [N, D] unit vectors.
    texts: [C, D] unit vectors.
    own: int [N, M], the numbers of each picture's texts, of which the most
      similar one counts. Fewer than M are filled up with repeats.

  Returns:
    int64 [N]; 0 if the picture's own text is the most similar one.
  """
  found = []
  for first in range(0, len(images), BLOCK):
    mine = own[first : first + BLOCK]
    cosines = images[first : first + BLOCK] @ texts.T
    best = np.take_along_axis(cosines, mine, axis=1).max(axis=1)
    np.put_along_axis(cosines, mine, -np.inf, axis=1)
    found.append(np.count_nonzero(cosines >= best[:, None], axis=1))
  return np.concatenate(found)


def recall(found: np.ndarray, k: int) -> float:
  """The share of pictures whose text is among the first k, of their ranks."""
  return float(np.mean(found < k))


def chance(own: np.ndarray, num_texts: int, k: int) -> float:
  """The recall at k of a random order of the texts.

  Args:
    own: see `ranks`.
    num_texts: the number of texts.
    k: the number of first texts.
  """
  ordered = np.sort(own, axis=1)
  counts = 1 + np.count_nonzero(np.diff(ordered, axis=1), axis=1)
  drawn = np.arange(min(k, num_texts))
  left = num_texts - counts[:, None] - drawn
  missed = np.prod(np.maximum(left, 0) / (num_texts - drawn), axis=1)
  return float(np.mean(1 - missed))


def interval(
  hits: np.ndarray, groups: np.ndarray
) -> tuple[float, float] | None:
  """A 95% interval of a share, of pictures that may share their texts.

  Clopper and Pearson's, with as many pictures as independent ones would be that
  have the variance between groups (Korn and Graubard 1998).

  Args:
    hits: bool [N].
    groups: int [N], the group of each picture, from 0 on; pictures of one group
      depend on each other.

  Returns:
    (low, high); None for a single group of several pictures.
  """
  count, share = len(hits), float(np.mean(hits))
  sizes = np.bincount(groups)
  sizes, sums = sizes[sizes > 0], np.bincount(groups, hits)[sizes > 0]
  if len(sizes) == 1 < count:
    return None
  effective = float(count)
  if len(sizes) < count:
    effective = _effective(share, sizes, sums)
  right = share * effective
  tail = (1 - LEVEL) / 2
  wrong = effective - right
  low = scipy.special.betaincinv(right, wrong + 1, tail) if right else 0.0
  high = scipy.special.betaincinv(right + 1, wrong, 1 - tail) if wrong else 1.0
  return float(low), float(high)


def _effective(share, sizes, sums) -> float:
  """The number of independent pictures with the same variance of the share."""
  groups, count = len(sizes), float(sizes.sum())
  if share in (0.0, 1.0):  # there is no variance to measure
    return float(groups)
  between = np.square(sums - share * sizes).sum() / count**2
  variance = between * groups / (groups - 1)
  if not variance:
    return count
  alone = share * (1 - share) / variance
  # The variance is an estimate, with the number of groups less 1 as its degrees
  # of freedom.
  half = (1 + LEVEL) / 2
  wide = scipy.special.stdtrit(groups - 1, half)
  usual = scipy.special.stdtrit(count - 1, half)
  return min(alone * (usual / wide) ** 2, count)


def by_text(
  images: np.ndarray,
  texts: np.ndarray,
  groups: np.ndarray,
  asked: np.ndarray,
  k: int,
) -> np.ndarray:
  """The recall at k that each group would have with the text of each group.

  Args:
    images: [N, D] unit vectors.
    texts: [C, D] unit vectors.
    groups: int [N], of each picture, from 0 to G - 1.
    asked: int [G], the numbers of the groups' texts.
    k: the number of first texts.

  Returns:
    int64 [G, G]: the pictures of group g that have the text of group h among
    their first k.
  """
  counts = np.zeros((len(asked), len(asked)), np.int64)
  for first in range(0, len(images), BLOCK):
    cosines = images[first : first + BLOCK] @ texts.T
    of_groups = cosines[:, asked]
    inside = np.ones(of_groups.shape, bool)
    if k < len(texts):
      place = len(texts) - k - 1  # of the largest one that is not among them
      inside = of_groups > np.partition(cosines, place, axis=1)[:, place, None]
    np.add.at(counts, groups[first : first + BLOCK], inside)
  return counts


def permuted(
  scores: np.ndarray, count: int = PERMUTATIONS, seed: int = 0
) -> float:
  """The p-value of texts that are permuted over the groups of pictures.

  Under the hypothesis that the pictures do not depend on their texts, it is at
  most p with a probability of at most p.

  Args:
    scores: [G, G], the sum over the pictures of group g if the text of group h
      were theirs.
    count: the number of random permutations.
    seed: their seed.

  Returns:
    the share of permutations, with the true order among them, whose total is at
    least the true one.
  """
  rng, rows = np.random.default_rng(seed), np.arange(len(scores))
  true = np.trace(scores)
  slack = 1e-9 * np.abs(scores).sum()
  totals = np.array(
    [scores[rows, rng.permutation(len(scores))].sum() for _ in range(count)]
  )
  return (1 + np.count_nonzero(totals >= true - slack)) / (1 + count)
