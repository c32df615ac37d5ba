"""benchmarks/augmentation.py, with sets of a few pixels."""

import augmentation
import jax
import numpy as np
import pytest
from augmentation import Arm, Set


def dark_and_light(count=20, flip=False):
  """Class 0 is dark, class 1 is light, or the other way round."""
  labels = np.arange(count, dtype=np.int32) % 2
  levels = np.where(labels == flip, 40, 200).astype(np.uint8)
  images = np.broadcast_to(levels[:, None, None, None], (count, 4, 4, 1))
  return Set(images.copy(), labels)


@pytest.mark.parametrize(
  ('arm', 'right'), [(Arm(1), 1), (Arm(0, 'new'), 0)], ids=['real', 'new']
)
def test_a_classifier_learns_from_the_sets_of_its_arm(monkeypatch, arm, right):
  """The new images have the labels of the others."""
  monkeypatch.setattr(augmentation, 'BATCH', 8)
  sets = {'real': dark_and_light(), 'new': dark_and_light(flip=True)}
  (trained,) = augmentation.train(sets, arm, [0], steps=20)
  assert augmentation.accuracy(trained, dark_and_light(6)) == right


def test_shifts_are_by_at_most_a_pixel_and_reach_every_place():
  image = np.arange(16.0).reshape(4, 4, 1)
  padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), 'edge')
  keys = jax.random.split(jax.random.key(0), 200)
  moved = jax.jit(jax.vmap(augmentation.shifted, (0, None)))(keys, image)
  want = {padded[i : i + 4, j : j + 4].tobytes() for i in range(3)
          for j in range(3)}  # fmt: skip
  assert {np.float64(x).tobytes() for x in moved} == want


def test_the_first_of_each_class_are_taken():
  labels = np.array([3, 1, 3, 3, 1, 0], np.int32)
  given = Set(np.arange(6)[:, None, None, None], labels)
  found = augmentation.first_of_each(given, 2)
  assert found.images.ravel().tolist() == [0, 1, 2, 4, 5]
  assert found.labels.tolist() == [3, 1, 3, 1, 0]
