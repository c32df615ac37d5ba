"""What is measured of samples, against NumPy, SciPy and brute force."""

import json

import jax
import numpy as np
import pytest
from judges import (
  brightness,
  brightness_of,
  images_of,
  levels,
  mesh_of,
  random_images,
  scipy_distance,
)

from diffusion_jax.evaluation import cards, features, measure, tables
from diffusion_jax.evaluation.features import Judge
from diffusion_jax.evaluation.metrics import frechet, kid, precision
from diffusion_jax.evaluation.metrics.frechet import Gaussian
from diffusion_jax.system.errors import UserError

USUAL = ('fid', 'copies', 'classes')


def measured(
  samples, train, held=None, metrics=USUAL, *, judge=None, devices=1, **more
):
  """All are arrays of images."""
  task = measure.Task(
    judge or brightness(),
    train if isinstance(train, dict) else images_of(train),
    metrics,
    more.pop('options', measure.DEFAULTS),
    None if held is None else images_of(held),
  )
  return measure.measure(
    task,
    images_of(samples, 5),
    batch_size=more.pop('batch_size', 64),
    mesh=mesh_of(devices),
    **more,
  )


@pytest.mark.parametrize('devices', [1, 8])
def test_it_equals_numpy_and_scipy(devices):
  samples, train, held = levels(90, 1), levels(70, 2), levels(40, 3)
  progress = []
  got = measured(
    samples, train, held, devices=devices, batch_size=16,
    on_images=progress.append,
  )  # fmt: skip
  (x, first, _), (real, real_first, _), (near, near_first, _) = map(
    brightness_of, (samples, train, held)
  )
  results = got.results
  for name, expected in (
    ('frechet', scipy_distance(x, real)),
    ('frechet_heldout_count', scipy_distance(x[:40], real)),
    ('frechet_floor', scipy_distance(near, real)),
    ('sfid', scipy_distance(first, real_first)),
    ('sfid_floor', scipy_distance(near_first, real_first)),
    ('confident', np.mean(np.abs(x[:, 0] - 0.5) > 0.3)),
    ('confident_heldout', np.mean(np.abs(near[:, 0] - 0.5) > 0.3)),
    ('smallest_class', min(np.mean(x[:, 0] > 0.5), np.mean(x[:, 0] < 0.5))),
  ):
    np.testing.assert_allclose(results[name], expected, rtol=1e-5, err_msg=name)
  # 1e-6 of float32 features, which near-equal sets magnify; their own
  # statistics are compared to 1e-6 elsewhere.
  assert results['frechet_ratio'] == pytest.approx(
    results['frechet_heldout_count'] / results['frechet_floor']
  )
  distances = np.linalg.norm(x[:, None] - real[None], axis=-1)
  held_distances = np.linalg.norm(near[:, None] - real[None], axis=-1).min(1)
  # By distance: two grey levels may be equally near.
  np.testing.assert_array_equal(got.searched, np.arange(90))
  np.testing.assert_allclose(
    got.nearest.distances, np.sort(distances, 1)[:, :4], atol=1e-6
  )
  np.testing.assert_allclose(
    np.take_along_axis(distances, got.nearest.indices, 1),
    got.nearest.distances,
    atol=1e-6,
  )
  assert results['nearest'] == pytest.approx(
    np.median(distances.min(1)), rel=1e-4
  )
  assert results['nearest_heldout'] == pytest.approx(
    np.median(held_distances), rel=1e-4
  )
  rank = [np.mean(held_distances < d) for d in distances.min(1)]
  np.testing.assert_allclose(got.nearer, rank, atol=0.026)  # ties: one of 40
  assert sum(progress) == 90 + 70 + 40
  assert got.details['note'] == 'x'
  json.dumps(got.results), json.dumps(got.details)


def test_samples_are_counted_by_label_and_class():
  """A third label, which the judge does not know, is never right."""
  samples, train, held = levels(90, 1), levels(70, 2), levels(40, 3)
  asked, real = np.arange(90) % 3, np.arange(40) % 2
  task = measure.Task(
    brightness(), images_of(train), ('classes',),
    heldout=images_of(held)._replace(labels=real),
  )  # fmt: skip
  got = measure.measure(
    task, images_of(samples, 5)._replace(labels=asked), batch_size=64,
    mesh=mesh_of(1),
  )  # fmt: skip
  classes, of_held = (brightness_of(x)[2].argmax(1) for x in (samples, held))
  want = [[np.sum(classes[asked == k] == j) for j in (0, 1)] for k in range(3)]
  assert got.details['confusion'] == want
  assert got.results['label_accuracy'] == (want[0][0] + want[1][1]) / 90
  assert got.results['label_accuracy_heldout'] == np.mean(of_held == real)
  card = cards.create({'step': 1}, {}, got.results, got.details)
  assert cards.is_card(card)
  told = tables.text(card)
  rows = [
    line.split() for line in told.splitlines() if line[:2] in ('0 ', '2 ')
  ]
  share = f'{want[0][0] / 30:.1%}'
  assert rows[-2][:4] == ['0', *map(str, want[0]), share]
  assert rows[-1] == ['2', *map(str, want[2]), '–', '–']
  card['details']['confusion'] = [3]
  assert not cards.is_card(card)


def test_the_distance_of_each_label_is_scipys():
  """Label 2 has no training images, so it has no distance."""
  samples, train = levels(90, 1), levels(70, 2)
  asked, real = np.arange(90) % 3, np.arange(70) % 2

  def of(asked, metrics=('fid', 'copies')):
    task = measure.Task(
      brightness(), images_of(train)._replace(labels=real), metrics
    )
    sized = images_of(samples[: len(asked)], 5)._replace(labels=asked)
    return measure.measure(task, sized, batch_size=64, mesh=mesh_of(1)).details

  (x, *_), (y, *_) = map(brightness_of, (samples, train))
  got = of(asked)
  assert got['frechet_by_class'] == {
    str(k): pytest.approx(scipy_distance(x[asked == k], y[real == k]), rel=1e-5)
    for k in (0, 1)
  }
  card = cards.create({'step': 1}, {}, {}, {**got, 'class_names': ['no', 'a']})
  assert cards.is_card(card)
  lines = tables.text(card).splitlines()
  (head,) = (line for line in lines if line.startswith('label'))
  assert head.split() == ['label', 'no', 'a']
  card['details']['frechet_by_class'] = {'0': 'x'}
  assert not cards.is_card(card)
  # Two images do not span two dimensions; statistics have no labels.
  few = of(np.array([0] * 80 + [1] * 2))
  assert 'frechet_by_class' not in few
  assert few['caveats'][-1] == (
    'no distance by class: of the samples, class 1 has 2, and features of 2 '
    'dimensions need more than 2'
  )
  assert 'frechet_by_class' not in of(asked, ('fid',))


def test_kid_precision_and_the_inception_score_are_those_of_their_modules():
  """Which are compared with NumPy and torch-fidelity themselves."""
  samples, train, held = levels(900, 1), levels(800, 2), levels(300, 3)
  options = measure.Options(
    kid_subsets=7, kid_subset_size=100, kid_seed=5, is_splits=3, is_seed=None,
    pr_k=4,
  )  # fmt: skip
  got = measured(
    samples, train, held, ('kid', 'is', 'pr'), options=options
  ).results
  (x, _, logits), (real, _, _), (near, _, _) = map(
    brightness_of, (samples, train, held)
  )
  expected = kid.over_subsets(x, real, seed=5, num_subsets=7, subset_size=100)
  assert got['kid'] == pytest.approx(expected.mean, rel=1e-3, abs=1e-8)
  assert got['kid_error'] == pytest.approx(expected.standard_error, rel=1e-3)
  floor = kid.over_subsets(near, real, seed=5, num_subsets=7, subset_size=100)
  assert got['kid_heldout'] == pytest.approx(floor.mean, rel=1e-3, abs=1e-8)
  p = np.exp(logits)
  scores = []
  for part in np.split(p, 3):
    entropies = (part * np.log(part / part.mean(0))).sum(1)
    scores.append(np.exp(entropies.mean()))
  assert got['inception_score'] == pytest.approx(np.mean(scores), rel=1e-5)
  assert got['inception_score_std'] == pytest.approx(np.std(scores), rel=1e-3)
  near = precision.precision_recall(x, real, k=4)
  for name, value in near._asdict().items():
    assert got[name] == pytest.approx(value, abs=2e-3)  # ties of grey levels
  assert not {'frechet', 'identical', 'confident'} & set(got)


def test_without_heldout_images():
  train = levels(30, 2)
  got = measured(
    train[:10], train, metrics=['fid', 'copies'],
    judge=features.pixels((8, 8, 1)),
  )  # fmt: skip
  assert got.nearer is None
  assert set(got.results) == {'frechet', 'identical', 'nearest'}
  assert got.results['nearest'] == 0  # these samples are copies
  assert got.results['identical'] == 1


def test_unrounded_copies_are_copies():
  train = levels(30, 2)
  samples = train[:10] + np.linspace(-0.4, 0.4, 10)[:, None, None, None]
  got = measured(np.clip(samples, 0, 255).astype(np.float32), train)
  assert got.results['identical'] == 1
  assert got.results['nearest'] > 0


@pytest.mark.parametrize('is_sorted', [False, True])
def test_honest_samples_are_not_said_to_be_copies(is_sorted):
  """Samples, training and held-out images of one kind; 1,000 are held out.

  The share of samples that are nearer than 95% of the held-out images is then
  5% on average. Of 1,000 samples and 1,000 held-out images, were they
  independent, its standard deviation is sqrt(2 * 0.05 * 0.95 / 1000) = 1%; they
  share their training images, which makes it larger, so 3% apart is let pass.
  Samples that stand in order (of their classes, say) change nothing.
  """
  held = random_images(1000, seed=3)
  samples, train = random_images(1000, seed=1), random_images(400, seed=2)
  if is_sorted:
    samples = samples[np.argsort(samples[:, 0, 0, 0], kind='stable')]
  results = measured(samples, train, held, ['copies']).results
  assert results['nearest_share_expected'] == pytest.approx(0.05, abs=1e-3)
  assert results['nearest_share'] == pytest.approx(0.05, abs=0.03)


def test_data_of_one_image_only_have_no_ratio():
  """All at distance 0 of each other: no traceback, no division by noise.

  There are fewer training images than nearest ones to find.
  """
  same = np.full((3, 8, 8, 1), 7, np.uint8)
  results = measured(
    same, same, same, ['fid', 'copies'], judge=features.pixels((8, 8, 1)),
  ).results  # fmt: skip
  assert results['frechet'] == results['frechet_floor'] == 0
  assert 'frechet_ratio' not in results


def test_statistics_serve_as_the_images_do():
  samples, train = levels(90, 1), levels(70, 2)
  of_images = measured(samples, train, metrics=['fid', 'sfid'])
  assert set(of_images.statistics) == {'both', 'first'}
  of_statistics = measured(
    samples, of_images.statistics, metrics=['fid', 'sfid']
  )
  assert of_statistics.results == of_images.results


def test_few_images_are_told_with_the_bias_that_they_cause():
  """A set of 20 in 64 dimensions, beside 20 draws from its own distribution.

  Features are standard normal here, as is the reference's fit nearly; so the
  bias is that of 20 draws from a standard normal, worked out below by drawing
  them anew: 64 dimensions, of which 45 have no variance at all.
  """

  def apply(params, images):
    del params
    x = images.reshape(len(images), -1).astype(np.float32)
    return {'x': jax.scipy.special.ndtri((x + 0.5) / 256)}

  judge = Judge(apply, {}, {'x': 'frechet'}, '', {'features': 'x'}, {})
  got = measured(
    random_images(20), random_images(3000, seed=1), metrics=['fid'], judge=judge
  )
  (caveat,) = got.details['caveats']
  assert caveat.startswith('frechet: 20 images in 64 dimensions')
  told = float(caveat.split()[-3])
  rng = np.random.default_rng(3)
  unit = Gaussian(np.zeros(64), np.eye(64))
  drawn = np.mean(
    [
      frechet.distance(frechet.moments_of(rng.normal(size=(20, 64))), unit)
      for _ in range(20)
    ]
  )
  assert told == pytest.approx(drawn, rel=0.1)
  # And it is what the samples, honest ones, are at.
  assert got.results['frechet'] == pytest.approx(told, rel=0.1)
  many = [random_images(90, seed=seed) for seed in (0, 1)]
  enough = measured(*many, metrics=['fid'], judge=judge)
  assert 'caveats' not in enough.details


def test_the_caveats_of_other_metrics():
  got = measured(levels(20, 1), levels(30, 2), metrics=['kid', 'is'])
  kinds = [caveat.split(':')[0] for caveat in got.details['caveats']]
  assert kinds == ['KID']
  one = levels(1, 1)
  (caveat,) = measured(np.repeat(one, 12, 0), levels(30, 2), metrics=['is'])\
    .details['caveats']  # fmt: skip
  assert 'Inception Score: 12 images in 10 splits' in caveat


@pytest.mark.parametrize(
  ('given', 'must'),
  [
    ({'metrics': ['is'], 'judge': features.pixels((8, 8, 1))}, 'has none'),
    ({'metrics': ['classes'], 'judge': features.pixels((8, 8, 1))}, 'pixels'),
    ({'metrics': ['fid', 'kid'], 'reference': {}}, 'kid need images'),
    ({'metrics': ['is'], 'samples': {}}, 'is need images'),
    ({'metrics': ['pr'], 'samples': images_of(levels(5, 1))}, '6 images'),
    ({'metrics': ['fid'], 'reference': images_of(levels(1, 1), 1)}, '2 images'),
  ],
)
def test_what_cannot_be_measured_is_told_beforehand(given, must):
  whole = {
    'judge': brightness(), 'samples': images_of(levels(20, 1)),
    'reference': images_of(levels(20, 2)), **given,
  }  # fmt: skip
  samples = whole.pop('samples')
  with pytest.raises(UserError, match=must):
    measure.check(measure.Task(**whole), samples)


def test_the_protocol_tells_the_options_of_the_metrics_asked_for():
  def told(*metrics, **options):
    return measure.Task(
      brightness(), {}, metrics, measure.Options(**options)
    ).protocol

  assert told('sfid', 'fid')['metrics'] == ['fid', 'sfid']
  assert told('fid', kid_subsets=3) == told('fid')
  assert told('kid', kid_subsets=3) != told('kid')
  assert told('is', is_splits=1)['is_splits'] == 1
  assert 'is_splits' not in told('kid')
