"""Scores of sets of images, a threshold, and areas under the ROC curve."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from diffusion_jax.evaluation.anomalies import SCORES, Found, How
from diffusion_jax.evaluation.metrics import anomaly


class Scored(NamedTuple):
  """The scores of N images.

  Attributes:
    levels: score -> its standardised errors [N, levels].
    shares: [N], see `anomaly.shares_above`, by the score that decides.
    above: [N], whether that score is above the threshold.
  """

  levels: dict[str, np.ndarray]
  shares: np.ndarray
  above: np.ndarray

  def score(self, name: str) -> np.ndarray:
    """One of SCORES: [N]."""
    return self.levels[name].mean(1)


def judge(
  found: Mapping[str, Found], decides: str, rate: float
) -> tuple[dict[str, Scored], float]:
  """The scores of sets of images, and the threshold.

  Args:
    found: name of a set -> its errors; 'reference' is what others are
      standardised on, and each of its images is by all others of it.
    decides: the score with the threshold, one of SCORES.
    rate: the rate of false alarms.

  Raises:
    UserError: see `anomaly.levels_of` and `anomaly.threshold`.
  """
  base = found['reference']
  known = {name: anomaly.levels_of(base.errors(name)) for name in SCORES}
  own = {name: anomaly.left_out(base.errors(name)) for name in SCORES}
  usual = own[decides].mean(1)
  limit = anomaly.threshold(usual, rate)

  def scored(one):
    levels = own
    if one is not base:
      levels = {
        name: anomaly.standardised(one.errors(name), known[name])
        for name in SCORES
      }
    score = levels[decides].mean(1)
    shares = anomaly.shares_above(score, usual)
    return Scored(levels, shares, score > limit)

  return {name: scored(one) for name, one in found.items()}, limit


def levels(reference: Found) -> dict[str, dict[str, list[float]]]:
  """What errors are standardised with, for a card: score -> its levels."""
  found = {name: anomaly.levels_of(reference.errors(name)) for name in SCORES}
  return {
    name: {part: x.tolist() for part, x in one._asdict().items()}
    for name, one in found.items()
  }


class Group(NamedTuple):
  """Some images of a set, such as the normal ones.

  Attributes:
    scored: the scores of the set.
    which: their indices, or a mask; None for all.
  """

  scored: Scored
  which: np.ndarray | None = None

  def of(self, values: np.ndarray) -> np.ndarray:
    return values if self.which is None else values[self.which]


def compare(normal: Group, anomalous: Group, how: How) -> tuple[dict, dict]:
  """How well scores tell anomalies from normal images.

  Args:
    normal: the normal images.
    anomalous: the anomalies.
    how: the settings.

  Returns:
    (results, details): the areas under the ROC curve with their errors, and
    the shares above the threshold; and the areas at each level.
  """
  results, details = {}, {}
  times = {'bound': how.bound_times, 'reconstruction': how.start_times}
  for name in SCORES:
    pair = [one.of(one.scored.levels[name]) for one in (normal, anomalous)]
    area = anomaly.auroc(*(x.mean(1) for x in pair))
    results |= {f'auroc_{name}': area.value, f'auroc_{name}_error': area.error}
    details[f'auroc_{name}_by_time'] = {
      str(time): anomaly.auroc(*(x[:, i] for x in pair)).value
      for i, time in enumerate(times[name])
    }
  for name, one in (('false_alarms', normal), ('detected', anomalous)):
    results[name] = float(one.of(one.scored.above).mean())
  return results, details
