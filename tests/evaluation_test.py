"""Judges, statistics and neighbours, against closed forms and brute force."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import scipy.linalg

from diffusion_jax import data
from diffusion_jax.data.sources import Source
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import classifier, features, frechet, neighbours
from diffusion_jax.evaluation.measure import measure
from diffusion_jax.training import sharding

RNG = np.random.default_rng(0)


def scipy_distance(a, b):
  """The textbook's formula on features [N, D], with SciPy's matrix root."""
  covariances = [np.cov(x, rowvar=False) for x in (a, b)]
  root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
  return (
    np.square(a.mean(0) - b.mean(0)).sum()
    + np.trace(covariances[0])
    + np.trace(covariances[1])
    - 2 * np.trace(root.real)
  )


def random_features(count, dim, seed):
  rng = np.random.default_rng(seed)
  mixing = rng.normal(size=(dim, dim)) / np.sqrt(dim)
  return rng.normal(size=(count, dim)) @ mixing + rng.normal(size=dim)


@pytest.mark.parametrize('dim', [1, 2, 16, 64])
def test_distance_equals_scipys(dim):
  a, b = random_features(300, dim, 1), random_features(200, dim, 2)
  got = frechet.distance(frechet.moments_of(a), frechet.moments_of(b))
  if dim > 1:
    np.testing.assert_allclose(got, scipy_distance(a, b), rtol=1e-6)
  else:  # (m_a - m_b)^2 + (s_a - s_b)^2
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_distance_of_commuting_gaussians():
  """With C_b = c^2 C_a and means m apart: m^2 + (c - 1)^2 tr C_a, exactly."""
  a = random_features(50, 8, 3)
  b = a.mean(0) + 3 * (a - a.mean(0)) + 0.5
  got = frechet.distance(frechet.moments_of(a), frechet.moments_of(b))
  expected = 8 * 0.25 + 4 * np.trace(np.cov(a, rowvar=False))
  np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_fewer_images_than_features():
  """Covariances of rank 9 and 11 in 64 dimensions; a set is at 0 from itself.

  The roots of rounding noise, 1e-8 of the scale each, meet what the other set
  has and this one lacks: a few of them remain.
  """
  a, b = random_features(10, 64, 4), random_features(12, 64, 5)
  a_moments, b_moments = frechet.moments_of(a), frechet.moments_of(b)
  scale = np.trace(a_moments.covariance)
  assert abs(frechet.distance(a_moments, a_moments)) < 1e-12 * scale
  # In the 20 dimensions that both span, where nothing is singular by chance.
  basis = np.linalg.qr(
    np.concatenate([a - a.mean(0), b - b.mean(0), [a.mean(0) - b.mean(0)]]).T
  )[0]
  np.testing.assert_allclose(
    frechet.distance(a_moments, b_moments),
    frechet.distance(
      frechet.moments_of(a @ basis), frechet.moments_of(b @ basis)
    ),
    rtol=1e-8,
  )


@pytest.mark.parametrize('cuts', [[1], [150], [7, 8, 200], list(range(1, 300))])
def test_moments_add_up(cuts):
  """In any parts, even far from the origin, where squares would cancel."""
  x = random_features(300, 5, 6) + 1e6
  total = None
  for part in np.split(x, cuts):
    total = frechet.merge(total, frechet.moments_of(part))
  assert total.count == 300
  np.testing.assert_allclose(total.mean, x.mean(0), rtol=1e-14)
  np.testing.assert_allclose(
    total.covariance, np.cov(x, rowvar=False), rtol=1e-8, atol=1e-9
  )


# --- passes ------------------------------------------------------------------


def mesh_of(count):
  return sharding.make_mesh(devices=jax.devices()[:count])


def random_images(count, shape=(8, 8, 1), seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, *shape), dtype=np.uint8)


def source_of(images, labels=None):
  return Source(
    num_images=len(images),
    read_fn=lambda i: (images[i], -1 if labels is None else labels[i]),
    num_classes=0 if labels is None else 10,
    description='made up',
  )


@pytest.mark.parametrize(
  ('devices', 'batch_size'), [(1, 64), (1, 7), (8, 64), (8, 7), (8, 1)]
)
def test_passes_give_each_image_once_and_none_beside(devices, batch_size):
  images = random_images(50)
  batches = list(
    features.passes(
      features.pixels((8, 8, 1)),
      features.images_of(source_of(images), batch_size),
      batch_size,
      mesh_of(devices),
    )
  )
  np.testing.assert_array_equal(
    np.concatenate([batch.images for batch in batches]), images
  )
  np.testing.assert_allclose(
    np.concatenate([batch.features for batch in batches]),
    images.reshape(50, 64) / 127.5 - 1,
    atol=1e-6,
  )


@pytest.mark.parametrize(
  ('shape', 'dim', 'resize'),
  [
    ((8, 8, 1), 64, 'none'),
    ((16, 16, 3), 768, 'none'),
    ((32, 32, 3), 768, 'mean over 2x2'),
    ((33, 33, 1), 121, 'mean over 3x3'),
    ((256, 256, 3), 768, 'mean over 16x16'),
  ],
)
def test_pixels_are_averaged_to_16(shape, dim, resize):
  judge = features.pixels(shape)
  images = random_images(2, shape)
  x, probabilities = judge.apply({}, images)
  assert probabilities is None
  assert x.shape == (2, dim)
  assert judge.protocol['resize'] == resize
  np.testing.assert_allclose(
    x.mean(1), images.mean((1, 2, 3)) / 127.5 - 1, atol=1e-5
  )


# --- what is measured --------------------------------------------------------


def brightness_judge():
  """Two features, two classes: dark or bright, surely or not."""

  def apply(params, images):
    x = images.astype(np.float32).reshape(len(images), -1) / 255 * params['k']
    mean = x.mean(1)
    features = np.float32(1) * jax.numpy.stack([mean, x[:, 0]], 1)
    return features, jax.numpy.stack([1 - mean, mean], 1)

  protocol = {'features': 'brightness', 'features_sha256': '', 'resize': 'none'}
  return features.Judge(apply, {'k': np.float32(1)}, protocol, {'note': 'x'})


def brightness(images):
  x = images.reshape(len(images), -1) / 255.0
  return np.stack([x.mean(1), x[:, 0]], 1)


def levels(count, seed):
  """Images of one grey level each."""
  values = random_images(count, (1, 1, 1), seed)
  return np.broadcast_to(values, (count, 8, 8, 1))


@pytest.mark.parametrize('devices', [1, 8])
def test_measure_equals_numpy_and_scipy(devices):
  samples, train, held = levels(90, 1), levels(70, 2), levels(40, 3)
  images = []
  for each in (samples, train, held):
    noisy = each.copy()
    noisy[:, 0, 0] = random_images(len(each), (1,), len(each))
    images.append(noisy)
  samples, train, held = images
  progress = []
  got = measure(
    brightness_judge(),
    lambda first, end: np.array_split(samples[first:end], 5),
    90,
    source_of(train),
    source_of(held),
    batch_size=16,
    mesh=mesh_of(devices),
    on_images=progress.append,
  )
  x, real, near = map(brightness, (samples, train, held))
  results = got.results
  for name, expected in (
    ('frechet', scipy_distance(x, real)),
    ('frechet_heldout_count', scipy_distance(x[:40], real)),
    ('frechet_floor', scipy_distance(near, real)),
    ('confident', np.mean(np.abs(x[:, 0] - 0.5) > 0.3)),
    ('confident_heldout', np.mean(np.abs(near[:, 0] - 0.5) > 0.3)),
    ('smallest_class', min(np.mean(x[:, 0] > 0.5), np.mean(x[:, 0] < 0.5))),
  ):
    np.testing.assert_allclose(results[name], expected, rtol=1e-5, err_msg=name)
  # 1e-6 of float32 features, which near-equal sets magnify; their own
  # statistics are compared to 1e-6 above.
  assert results['frechet_ratio'] == pytest.approx(
    results['frechet_heldout_count'] / results['frechet_floor']
  )
  distances = np.linalg.norm(x[:, None] - real[None], axis=-1)
  held_distances = np.linalg.norm(near[:, None] - real[None], axis=-1).min(1)
  # By distance: two grey levels may be equally near.
  np.testing.assert_allclose(
    got.nearest.distances, np.sort(distances, 1)[:, :3], atol=1e-6
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
  assert got.protocol['num_samples'] == 90
  assert got.protocol['num_reference'] == 70
  assert got.protocol['num_heldout'] == 40
  assert got.details['note'] == 'x'
  json.dumps(got.results), json.dumps(got.details), json.dumps(got.protocol)


def test_measure_without_heldout_images():
  train = levels(30, 2)
  got = measure(
    features.pixels((8, 8, 1)),
    lambda first, end: [train[first:end]],
    10,
    source_of(train),
    None,
    batch_size=64,
    mesh=mesh_of(1),
  )
  assert got.nearer is None
  assert set(got.results) == {'frechet', 'identical', 'nearest'}
  assert got.results['nearest'] == 0  # these samples are copies
  assert got.results['identical'] == 1


def test_fewer_samples_than_heldout_images_take_some_of_all_of_those():
  """Sorted held-out images: the first twenty would all be dark."""
  held = np.sort(levels(200, 3), axis=0)
  got = measure(
    brightness_judge(),
    lambda first, end: [levels(20, 1)[first:end]],
    20,
    source_of(levels(50, 2)),
    source_of(held),
    batch_size=64,
    mesh=mesh_of(1),
  )
  assert got.protocol['num_heldout'] == 20
  dark, bright = got.details['heldout_class_histogram']
  assert 0.3 < dark < 0.7
  assert dark + bright == 1


def test_other_data_are_another_protocol():
  """In another order too: no number depends on it, but who is to know?"""

  def protocol(images, held):
    return measure(
      brightness_judge(), lambda a, b: [images[a:b]], 10, source_of(images),
      source_of(held), batch_size=64, mesh=mesh_of(1),
    ).protocol  # fmt: skip

  images, held = levels(30, 2), levels(30, 3)
  assert protocol(images, held) == protocol(images.copy(), held.copy())
  assert protocol(images, held) != protocol(images[::-1], held)
  assert protocol(images, held) != protocol(images, levels(30, 4))


@pytest.mark.parametrize('is_sorted', [False, True])
def test_honest_samples_are_not_said_to_be_copies(is_sorted):
  """Samples, training and held-out images of one kind; 3,000 are held out.

  The share of samples that are nearer than 95% of the held-out images is then
  5% on average. Of 1,000 samples and 1,000 held-out images, were they
  independent, its standard deviation is sqrt(2 * 0.05 * 0.95 / 1000) = 1%; they
  share their training images, which makes it larger, so 3% apart is let pass.
  Held-out images that stand in order (of their classes, say) change nothing.
  """
  held = random_images(3000, seed=3)
  if is_sorted:
    held = held[np.argsort(held[:, 0, 0, 0], kind='stable')]
  samples, train = random_images(1000, seed=1), random_images(400, seed=2)
  results = measure(
    brightness_judge(), lambda a, b: [samples[a:b]], 1000, source_of(train),
    source_of(held), batch_size=1000, mesh=mesh_of(1),
  ).results  # fmt: skip
  assert results['nearest_share_expected'] == pytest.approx(0.05, abs=1e-3)
  assert results['nearest_share'] == pytest.approx(0.05, abs=0.03)


def test_data_of_one_image_only_have_no_ratio():
  """All at distance 0 of each other: no traceback, no division by noise."""
  same = np.full((40, 8, 8, 1), 7, np.uint8)
  results = measure(
    features.pixels((8, 8, 1)), lambda a, b: [same[a:b]], 40, source_of(same),
    source_of(same), batch_size=64, mesh=mesh_of(1), num_near=50,
  ).results  # fmt: skip
  assert results['frechet'] == results['frechet_floor'] == 0
  assert 'frechet_ratio' not in results


# --- neighbours --------------------------------------------------------------


@pytest.mark.parametrize('batch', [1, 13, 100])
def test_neighbours_are_those_of_brute_force(batch):
  queries, train = random_features(9, 6, 7), random_features(100, 6, 8)
  train[41] = queries[4]  # a copy
  nearest = neighbours.nothing(9, 5)
  for first in range(0, 100, batch):
    nearest = neighbours.update(
      nearest, queries, train[first : first + batch], first
    )
  distances = np.linalg.norm(queries[:, None] - train[None], axis=-1)
  np.testing.assert_array_equal(
    nearest.indices, np.argsort(distances, 1)[:, :5]
  )
  np.testing.assert_allclose(
    nearest.distances, np.sort(distances, 1)[:, :5], atol=1e-6
  )
  assert nearest.indices[4, 0] == 41
  assert nearest.distances[4, 0] < 1e-6


def test_fewer_training_images_than_neighbours():
  queries = random_features(2, 3, 9)
  nearest = neighbours.update(neighbours.nothing(2, 4), queries, queries, 0)
  assert nearest.indices.tolist() == [[0, 1, -1, -1], [1, 0, -1, -1]]


def test_share_nearer():
  heldout = np.array([1.0, 2.0, 3.0, 4.0])
  got = neighbours.share_nearer(np.array([0.0, 2.5, 9.0]), heldout)
  assert got.tolist() == [0, 0.5, 1]


# --- the classifier ----------------------------------------------------------


def digits(split):
  return data.create('digits', split=split, image_size=8, channels=1)


def first_images(source, count):
  return dataclasses.replace(source, num_images=count)


@pytest.fixture(scope='module')
def judge_file(tmp_path_factory):
  """A classifier of 200 digits: 100 steps do, to test everything but skill."""
  path = tmp_path_factory.mktemp('judge') / 'deeper' / 'classifier.npz'
  classifier.train(
    path,
    first_images(digits('train'), 200),
    num_steps=100,
  )
  return path


def test_a_classifier_learns_and_says_how_often_it_is_right(judge_file):
  judge = classifier.load(judge_file, (8, 8, 1))
  test = first_images(digits('test'), 100)
  images = np.stack([test[i]['image'] for i in range(100)])
  labels = np.array([test[i]['label'] for i in range(100)])
  x, probabilities = jax.device_get(judge.apply(judge.params, images))
  assert x.shape == (100, 64)
  np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
  accuracy = np.mean(probabilities.argmax(1) == labels)
  assert accuracy > 0.7
  assert classifier.accuracy(judge, test) == pytest.approx(accuracy)
  unlabelled = dataclasses.replace(test, read_fn=lambda i: (images[i], -1))
  assert classifier.accuracy(judge, unlabelled) is None


def test_a_classifier_is_the_same_each_time(judge_file, tmp_path):
  """So that two runs on one machine are judged by equal networks."""
  again = tmp_path / 'again.npz'
  classifier.train(again, first_images(digits('train'), 200), num_steps=100)
  first = classifier.load(judge_file, (8, 8, 1))
  second = classifier.load(again, (8, 8, 1))
  assert first.protocol == second.protocol


@pytest.mark.parametrize('size', [4, 8, 28, 32])
def test_a_classifier_of_any_small_size(size):
  model = classifier.network((size, size, 3), 7)
  params = model.init(jax.random.key(0))
  x, logits = model.apply(params, np.zeros((2, size, size, 3), np.float32))
  assert x.shape == (2, 64)
  assert logits.shape == (2, 7)


def test_a_file_that_is_no_classifier_is_answered_in_one_line(
  judge_file, tmp_path
):
  other = tmp_path / 'other.npz'
  cases = {
    'no such file': lambda: None,
    'is not a classifier': lambda: other.write_bytes(b'PK nothing'),
    'not a classifier of ours': lambda: np.savez(other, a=np.zeros(3)),
    'of another network': lambda: np.savez(
      other, facts=json.dumps({'image_shape': [8, 8, 1], 'num_classes': 10})
    ),
    'Object arrays cannot be loaded': lambda: np.savez(
      other, facts=np.array([{}], object)
    ),
  }
  for said, make in cases.items():
    make()
    with pytest.raises(UserError, match=said) as error:
      classifier.load(other, (8, 8, 1))
    assert '\n' not in str(error.value)
  with pytest.raises(UserError, match='judges images of'):
    classifier.load(judge_file, (32, 32, 3))
