"""Judges, statistics and neighbours, against closed forms and brute force."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from judges import (
  mesh_of,
  random_features,
  random_images,
  scipy_distance,
  source_of,
)

from diffusion_jax import data
from diffusion_jax.evaluation import classifier, features
from diffusion_jax.evaluation.metrics import frechet, neighbours
from diffusion_jax.system.errors import UserError


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


@pytest.mark.parametrize(
  ('devices', 'batch_size'), [(1, 64), (1, 7), (8, 64), (8, 7), (8, 1)]
)
def test_passes_give_each_image_once_and_none_beside(devices, batch_size):
  images = random_images(2 * features.BLOCK + 50)
  batches = list(
    features.passes(
      features.pixels((8, 8, 1)),
      np.split(images, [3, 300, 301]),
      batch_size,
      mesh_of(devices),
    )
  )
  assert [len(x) for x, _ in batches] == [*[features.BLOCK] * 2, 50]
  np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]), images)
  np.testing.assert_allclose(
    np.concatenate([outputs['pixels'] for _, outputs in batches]),
    images.reshape(-1, 64) / 127.5 - 1,
    atol=1e-6,
  )


def test_images_of_a_source():
  images = random_images(700)
  whole = features.images_of(source_of(images))
  np.testing.assert_array_equal(np.concatenate(list(whole.stream())), images)
  assert whole.count == 700
  some = features.images_of(source_of(images), 7)
  np.testing.assert_array_equal(
    np.concatenate(list(some.stream())), images[::100]
  )
  digest = features.sha256_of(whole)
  assert digest == features.sha256_of(features.images_of(source_of(images)))
  assert digest != features.sha256_of(
    features.images_of(source_of(images[::-1]))
  )


class Counting:
  """A judge's function that tells how many images it was asked for."""

  def __init__(self):
    self.count = 0

  def __call__(self, params, images):
    def seen(images):
      self.count += len(images)
      return images.reshape(len(images), -1)[:, :3].astype(np.float32)

    shape = jax.ShapeDtypeStruct((len(images), 3), np.float32)
    return {'x': jax.pure_callback(seen, shape, images)}


def kept_judge(apply, key='network_1234'):
  return features.Judge(apply, {}, {'x': 'frechet'}, '', {}, {}, {'x': key})


def outputs_of(judge, images, cache, sizes=64):
  batches = np.split(images, range(sizes, len(images), sizes))
  found = features.passes(judge, batches, 64, mesh_of(1), cache)
  return np.concatenate([outputs['x'] for _, outputs in found])


def test_features_are_computed_once(tmp_path):
  """Whatever the batches; other images, weights or pixel types are others."""
  images, apply = random_images(600), Counting()
  judge = kept_judge(apply)
  first = outputs_of(judge, images, tmp_path)
  assert apply.count == 640  # the last batch is filled up
  again = outputs_of(judge, images, tmp_path, sizes=600)
  assert apply.count == 640
  np.testing.assert_array_equal(first, again)
  outputs_of(judge, images[: features.BLOCK], tmp_path)
  assert apply.count == 640
  changed = images.copy()
  changed[300] ^= 1  # in the second block of three
  outputs_of(judge, changed, tmp_path)
  assert apply.count == 640 + features.BLOCK
  outputs_of(judge, images[:64].astype(np.float32), tmp_path)
  outputs_of(kept_judge(apply, 'network_5678'), images[:64], tmp_path)
  assert apply.count == 640 + features.BLOCK + 2 * 64


def test_a_pass_that_was_interrupted_goes_on(tmp_path):
  images, apply = random_images(600), Counting()
  judge = kept_judge(apply)
  passed = features.passes(judge, [images], 64, mesh_of(1), tmp_path)
  next(passed)
  next(passed)  # the first is on disk by then
  passed.close()
  outputs_of(judge, images, tmp_path)
  assert apply.count <= 640


@pytest.mark.parametrize('damage', ['cut', 'empty', 'text', 'shape', 'pickle'])
def test_damaged_features_are_computed_anew(tmp_path, damage):
  images, apply = random_images(10), Counting()
  judge = kept_judge(apply)
  first = outputs_of(judge, images, tmp_path)
  (path,) = tmp_path.rglob('*.npy')
  content = path.read_bytes()
  if damage == 'shape':
    np.save(path, first[:9])
  elif damage == 'pickle':
    np.save(path, np.array([{}], object), allow_pickle=True)
  else:
    path.write_bytes({'cut': content[:-4], 'empty': b'', 'text': b'x'}[damage])
  np.testing.assert_array_equal(outputs_of(judge, images, tmp_path), first)
  assert apply.count == 128
  assert path.read_bytes() == content


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
  x = judge.apply({}, images)['pixels']
  assert x.shape == (2, dim)
  assert judge.protocol['resize'] == resize
  np.testing.assert_allclose(
    x.mean(1), images.mean((1, 2, 3)) / 127.5 - 1, atol=1e-5
  )


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


def train_few(path, on_steps=lambda count: None):
  """20 steps: enough to compare files."""
  source = first_images(digits('train'), 200)
  classifier.train(path, source, num_steps=20, on_steps=on_steps)
  return path


@pytest.fixture(scope='module')
def few_steps_file(tmp_path_factory):
  return train_few(tmp_path_factory.mktemp('few') / 'classifier.npz')


@pytest.fixture(scope='module')
def judge_file(tmp_path_factory):
  """A classifier of 200 digits: 100 steps do, to test everything but skill."""
  path = tmp_path_factory.mktemp('judge') / 'deeper' / 'classifier.npz'
  classifier.train(
    path,
    first_images(digits('train'), 200),
    num_steps=60,
  )
  return path


def test_a_classifier_learns_and_says_how_often_it_is_right(judge_file):
  judge = classifier.load(judge_file, (8, 8, 1))
  test = first_images(digits('test'), 100)
  images = np.stack([test[i]['image'] for i in range(100)])
  labels = np.array([test[i]['label'] for i in range(100)])
  outputs = jax.device_get(judge.apply(judge.params, images))
  x, logits = outputs['hidden'], outputs['logits']
  assert x.shape == (100, 64)
  accuracy = np.mean(logits.argmax(1) == labels)
  assert accuracy > 0.7
  score = classifier.score(judge, test)
  assert score.accuracy == pytest.approx(accuracy)
  assert score.guessed == np.bincount(labels).max()
  assert score.is_skill
  unlabelled = dataclasses.replace(test, read_fn=lambda i: (images[i], -1))
  assert classifier.score(judge, unlabelled) is None


@pytest.mark.slow
def test_a_classifier_is_the_same_each_time(few_steps_file, tmp_path):
  """So that two runs on one machine are judged by equal networks."""
  again = train_few(tmp_path / 'again.npz')
  first = classifier.load(few_steps_file, (8, 8, 1))
  second = classifier.load(again, (8, 8, 1))
  assert first.protocol == second.protocol


@pytest.mark.slow
def test_an_interrupted_training_goes_on_to_the_same_end(
  few_steps_file, tmp_path, monkeypatch
):
  monkeypatch.setattr(classifier, 'KEEP_EVERY', 8)
  path, source = tmp_path / 'judge.npz', first_images(digits('train'), 200)
  done = []

  def interrupt(count):
    done.append(count)
    if sum(done) == 13:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    train_few(path, interrupt)
  (part,) = tmp_path.iterdir()
  kept = part.read_bytes()
  done.clear()
  train_few(path, done.append)
  assert done == [8] + [1] * 12
  assert list(tmp_path.iterdir()) == [path]
  whole, again = (
    classifier.load(file, (8, 8, 1)).protocol for file in (few_steps_file, path)
  )
  assert again == whole

  # Progress that is damaged, or of another training, is not used.
  for content, steps in ((kept[:-100], 3), (b'', 3), (kept, 4)):
    part.write_bytes(content)
    done.clear()
    classifier.train(path, source, num_steps=steps, on_steps=done.append)
    assert done == [1] * steps


@pytest.mark.parametrize(
  ('count', 'steps'),
  [(10, 300), (200, 300), (300, 450), (1000, 1500), (1438, 1500)],
)
def test_small_sets_take_fewer_steps(count, steps):
  """The digits, 1,438 images, take as many as ever."""
  assert classifier.num_steps_for(count) == steps


@pytest.mark.parametrize(
  ('right', 'guessed', 'count', 'is_skill'),
  [
    (9, 5, 10, False),  # 11 of 1,024 guesses are as good
    (10, 5, 10, True),  # 1 of 1,024
    (4, 2, 4, False),  # 1 of 16: too few images to say
    (0, 5, 10, False),
    (10, 10, 10, False),  # one class
    (40, 20, 100, True),
    (24, 20, 100, False),
  ],
)
def test_skill_is_more_than_guessing(right, guessed, count, is_skill):
  assert classifier.Score(right, guessed, count).is_skill == is_skill


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
    'No such file': lambda: None,
    'is not a classifier': lambda: other.write_bytes(b'PK nothing'),
    'not a classifier of this package': lambda: np.savez(other, a=np.zeros(3)),
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
