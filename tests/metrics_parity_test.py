"""The metrics equal torch-fidelity's of the same features.

The golden file holds what torch-fidelity answered; the test under the marker
`parity` asks it now, where it is installed.
"""

import pytest
from parity import metrics

from diffusion_jax.evaluation.metrics import inception_score, kid, precision


def test_equals_golden():
  metrics.compare(metrics.reference_golden())


@pytest.mark.parity
def test_equals_torch_fidelity():
  pytest.importorskip('torch_fidelity', reason='see CONTRIBUTING.md')
  metrics.compare(metrics.reference_live())


def test_the_golden_numbers_say_something():
  golden = metrics.reference_golden()
  assert 0.2 < golden['precision'] < 0.95
  assert 0.2 < golden['recall'] < 0.95
  assert golden['precision'] != golden['recall']
  assert golden['score'] > 2
  assert golden['score'] != golden['shuffled_score']
  assert min(golden['kid'], golden['kid_std']) > 0


@pytest.mark.parametrize('change', ['kernel', 'k', 'splits'])
def test_a_wrong_detail_is_seen(change, monkeypatch):
  if change == 'kernel':  # without the division by D
    monkeypatch.setattr(kid, '_kernel', lambda a, b: (a @ b.T + 1) ** 3)
  elif change == 'k':  # an image that is its own neighbour
    right = precision.radii
    monkeypatch.setattr(
      precision,
      'radii',
      lambda x, ks, **how: right(x, tuple(k - 1 for k in ks), **how),
    )
  else:
    right_splits = inception_score.splits_of
    monkeypatch.setattr(
      inception_score,
      'splits_of',
      lambda count, splits, seed: right_splits(count, splits, seed)[::-1],
    )
  with pytest.raises(AssertionError, match='relative errors'):
    metrics.compare(metrics.reference_golden())
