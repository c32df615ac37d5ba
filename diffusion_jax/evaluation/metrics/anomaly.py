"""Scores of anomalies: standardised on a reference, a threshold, the AUROC.

An image has an error at each of K noise levels. A level's errors are
standardised by their mean and deviation over reference images, and an image's
score is the mean over levels (arXiv 2211.07740). More than the threshold is an
anomaly.

The threshold must not be fitted on what the levels are standardised with: an
image pulls the mean and the deviation of its own errors towards itself, so that
scores of reference images are too small. `left_out` therefore standardises each
by all others, which gives it a score as that of an image from outside, without
a second set. The threshold is a rank of these scores: a further image of the
same kind is equally likely to have any rank among them, whatever their
distribution (split conformal prediction, arXiv 2107.07511). What is left is the
one image by which the two sets of others differ.
"""

from typing import NamedTuple

import numpy as np

from diffusion_jax.system.errors import UserError


class Levels(NamedTuple):
  """The errors of a reference: float64 [K] each.

  Attributes:
    mean: the mean at each level.
    deviation: the standard deviation, of N - 1.
  """

  mean: np.ndarray
  deviation: np.ndarray


def levels_of(errors) -> Levels:
  """The mean and the deviation at each level.

  Args:
    errors: [N, K], N > 1.

  Raises:
    UserError: the errors of all images are the same.
  """
  errors = np.asarray(errors, np.float64)
  return Levels(errors.mean(0), _positive(errors.std(0, ddof=1)))


def standardised(errors, levels: Levels) -> np.ndarray:
  """Errors of images that are not of the reference: float64 [N, K].

  Args:
    errors: [N, K].
    levels: those of the reference.
  """
  return (np.asarray(errors, np.float64) - levels.mean) / levels.deviation


def left_out(errors) -> np.ndarray:
  """Errors of reference images, each standardised by all others.

  With d = x - mean of N errors of deviation s, those of the others are
  mean - d / (N - 1) and the root of ((N - 1) s^2 - N d^2 / (N - 1)) / (N - 2).

  Args:
    errors: [N, K], N > 2.

  Returns:
    float64 [N, K].

  Raises:
    UserError: the errors of all but one image are the same.
  """
  errors = np.asarray(errors, np.float64)
  n = len(errors)
  off = errors - errors.mean(0)
  squares = np.square(off)
  left = (squares.sum(0) - n * squares / (n - 1)) / (n - 2)
  # A difference of large numbers is not exactly 0.
  left = np.where(left > 1e-12 * squares.sum(0), left, 0.0)
  return n / (n - 1) * off / _positive(np.sqrt(left))


def _positive(deviation) -> np.ndarray:
  if not (deviation > 0).all():
    raise UserError(
      'the reference images all have the same error, so none can be told from '
      'them: give more, and different ones'
    )
  return deviation


def threshold(reference, rate: float) -> float:
  """The score that a share of further normal images exceeds.

  It is the k-th smallest of N scores, k = ceil((N + 1) (1 - rate)): the least
  with at most this rate.

  Args:
    reference: [N] scores, see `left_out`.
    rate: the rate of false alarms, above 0 and below 1.

  Raises:
    UserError: N scores do not tell: the rate is below 1 / (N + 1).
  """
  count = len(reference)
  # Rounding must not take k for the next one: (N + 1) (1 - 0.9) of N = 9.
  k = int(np.ceil(round((count + 1) * (1 - rate), 9)))
  if k > count:
    raise UserError(
      f'a false-alarm rate of {rate:g} cannot be seen on {count} reference '
      f'images: give at least {int(np.ceil(round(1 / rate, 9))) - 1}, or a '
      f'rate of at least {1 / (count + 1):.2g}'
    )
  return float(np.sort(reference)[max(k, 1) - 1])


def shares_above(values, reference) -> np.ndarray:
  """The chance that a normal image has such a score or more: float64 [N].

  (1 + the number of reference scores that are not smaller) / (M + 1): a p-value
  for images from outside of the reference.

  Args:
    values: [N] scores.
    reference: [M] scores, see `left_out`.
  """
  below = np.searchsorted(np.sort(reference), values, side='left')
  return (1 + len(reference) - below) / (len(reference) + 1)


class Auroc(NamedTuple):
  """The area under the ROC curve.

  Attributes:
    value: the chance that an anomaly has the larger score, where ties count
      half.
    error: its standard error over images (DeLong et al., Biometrics 1988).
  """

  value: float
  error: float


def auroc(normal, anomalous) -> Auroc:
  """The area under the ROC curve of two sets of scores, by ranks.

  Args:
    normal: [N] scores, N > 1.
    anomalous: [M] scores, M > 1.
  """
  normal, anomalous = (np.asarray(x, np.float64) for x in (normal, anomalous))
  beaten = _share_below(anomalous, normal)  # of each anomaly
  passed = 1 - _share_below(normal, anomalous)  # of each normal image
  variance = sum(x.var(ddof=1) / len(x) for x in (beaten, passed))
  return Auroc(float(beaten.mean()), float(np.sqrt(variance)))


def _share_below(values, others) -> np.ndarray:
  """The share of the others below each value; those that are equal count half.

  By ranks: two searches in place of all pairs.
  """
  others = np.sort(others)
  below = np.searchsorted(others, values, side='left')
  upto = np.searchsorted(others, values, side='right')
  return (below + upto) / (2 * len(others))
