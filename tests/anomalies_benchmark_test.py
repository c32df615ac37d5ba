"""The benchmark of anomalies: what it makes of digits, and what it reports."""

import anomalies
import numpy as np


def test_anomalies_are_made_of_the_digits():
  digits = np.random.default_rng(1).integers(0, 256, (20, 8, 8, 1), np.uint8)
  found, masks = anomalies.others(digits)
  assert found.keys() == {'negatives', 'shuffled', 'block'}
  np.testing.assert_array_equal(found['negatives'], 255 - digits)
  shuffled = found['shuffled'].reshape(20, -1)
  np.testing.assert_array_equal(
    np.sort(shuffled, 1), np.sort(digits.reshape(20, -1), 1)
  )
  assert (shuffled != digits.reshape(20, -1)).mean() > 0.9
  # 255 - x is never x.
  changed = (found['block'] != digits)[..., 0]
  np.testing.assert_array_equal(changed, masks['block'])
  assert (changed.sum((1, 2)) == 4).all()
  assert (changed.any(1).sum(1) == 2).all()  # two columns


def test_the_best_setting_is_by_the_mean_over_runs():
  normal = {'a': [[0, 1], [0, 1]], 'b': [[0, 1], [0, 1]]}
  odd = {'a': [[2, 3], [-1, -2]], 'b': [[2, 3], [0.5, 3]]}
  found = anomalies.best(normal, odd)
  assert found['setting'] == 'b'
  assert found['auroc'] == (1 + 0.75) / 2
