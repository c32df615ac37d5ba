"""Scores of anomalies, thresholds and the AUROC, against closed forms."""

import numpy as np
import pytest
from scipy import special
from sklearn import metrics

from diffusion_jax.evaluation.metrics import anomaly
from diffusion_jax.system.errors import UserError

RNG = np.random.default_rng


def test_the_auroc_of_two_normal_laws_is_the_closed_form():
  """P(a > b) = Phi(d / sqrt 2), within four of the errors that are told."""
  rng = RNG(0)
  normal, anomalous = rng.normal(size=4000), rng.normal(0.7, 1, 3000)
  found = anomaly.auroc(normal, anomalous)
  assert found.value == pytest.approx(
    special.ndtr(0.7 / 2**0.5), abs=4 * found.error
  )
  assert 0.004 < found.error < 0.008


@pytest.mark.parametrize('levels', [2, 5, 1000])
def test_the_auroc_with_ties_is_scikit_learns(levels):
  rng = RNG(1)
  normal = rng.integers(0, levels, 60)
  anomalous = rng.integers(0, levels, 45) + levels // 4
  labels = np.repeat([0, 1], [60, 45])
  theirs = metrics.roc_auc_score(labels, np.concatenate([normal, anomalous]))
  found = anomaly.auroc(normal, anomalous)
  assert found.value == pytest.approx(theirs, rel=1e-12)
  # All pairs, one by one.
  pairs = np.sign(anomalous[:, None] - normal[None]) / 2 + 0.5
  assert found.value == pytest.approx(pairs.mean(), rel=1e-12)
  error = pairs.mean(1).var(ddof=1) / 45 + pairs.mean(0).var(ddof=1) / 60
  assert found.error == pytest.approx(error**0.5, rel=1e-9)


def test_the_auroc_at_its_ends():
  assert anomaly.auroc([1, 2, 3], [4, 5]) == (1.0, 0.0)
  assert anomaly.auroc([4, 5], [1, 2, 3]).value == 0.0
  assert anomaly.auroc([1, 1], [1, 1, 1]).value == 0.5


def test_the_error_of_the_auroc_is_its_spread():
  rng = RNG(2)
  found = [
    anomaly.auroc(rng.normal(size=40), rng.normal(1, 1, 30)) for _ in range(400)
  ]
  values, errors = map(np.array, zip(*found, strict=True))
  assert np.sqrt(np.mean(errors**2)) == pytest.approx(values.std(), rel=0.1)


def test_reference_images_are_scored_by_all_others():
  errors = RNG(3).gamma(2, size=(7, 4)) * [1, 10, 1e3, 1e-3]
  one_by_one = [
    anomaly.standardised(
      errors[i], anomaly.levels_of(np.delete(errors, i, axis=0))
    )
    for i in range(7)
  ]
  np.testing.assert_allclose(anomaly.left_out(errors), one_by_one, rtol=1e-9)
  own = anomaly.standardised(errors, anomaly.levels_of(errors))
  np.testing.assert_allclose(own.mean(0), 0, atol=1e-12)
  assert (np.abs(own) < np.abs(one_by_one)).all()


@pytest.mark.parametrize(('count', 'rate'), [(19, 0.1), (30, 0.2), (99, 0.05)])
def test_the_rate_of_false_alarms_is_kept(count, rate):
  """Over 3000 references, each with one more image of a skewed law."""
  rng = RNG(4)
  fair, naive = [], []
  for _ in range(3000):
    errors = rng.gamma(1.5, size=(count + 1, 3)) @ rng.random((3, 3))
    reference, other = errors[:-1], errors[-1:]
    levels = anomaly.levels_of(reference)
    score = anomaly.standardised(other, levels).mean()
    for kept, each in (
      (fair, anomaly.left_out(reference)),
      (naive, anomaly.standardised(reference, levels)),
    ):
      kept.append(score > anomaly.threshold(each.mean(1), rate))
  # The rank gives floor(rate (N + 1)) / (N + 1).
  exact = np.floor(round(rate * (count + 1), 9)) / (count + 1)
  error = (exact * (1 - exact) / 3000) ** 0.5
  assert np.mean(fair) == pytest.approx(exact, abs=3.5 * error)
  assert np.mean(naive) > np.mean(fair)


def test_thresholds_are_ranks():
  scores = np.arange(9)[::-1]
  assert anomaly.threshold(scores, 0.1) == 8  # one of ten is above
  assert anomaly.threshold(scores, 0.19) == 8
  assert anomaly.threshold(scores, 0.2) == 7
  assert anomaly.threshold(scores, 0.99) == 0
  with pytest.raises(UserError, match=r'9 reference images: give at least 19,'):
    anomaly.threshold(scores, 0.05)
  anomaly.threshold(np.arange(19), 0.05)


def test_shares_above_count_equals_and_the_image_itself():
  found = anomaly.shares_above([5.0, 2.0, -1.0, 1.5], [0, 1, 2])
  np.testing.assert_allclose(found, [1 / 4, 2 / 4, 4 / 4, 2 / 4])


@pytest.mark.parametrize('fn', [anomaly.levels_of, anomaly.left_out])
def test_a_reference_that_is_all_alike_is_refused(fn):
  errors = np.full((5, 2), 0.1)
  errors[:, 0] = [1, 2, 3, 4, 5]
  with pytest.raises(UserError, match='all have the same error'):
    fn(errors)
  if fn is anomaly.left_out:  # all but one
    errors[0, 1] = 7
    with pytest.raises(UserError, match='all have the same error'):
      fn(errors)
