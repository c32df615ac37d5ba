"""Near-copies of training images, against brute force and closed forms."""

import numpy as np
import pytest
import tiny

from diffusion_jax.evaluation import copies, features
from diffusion_jax.evaluation.metrics import neighbours
from diffusion_jax.system.errors import UserError

SHAPE = (4, 4, 1)


def level(values):
  """Images of one grey level each: of pixels' distances that are known."""
  return np.broadcast_to(
    np.array(values, np.uint8)[:, None, None, None], (len(values), *SHAPE)
  ).copy()


def images_of(array):
  return features.Images(len(array), lambda: [array], 'some images')


def distance(levels):
  """Between images whose grey levels differ by this, in the judge's units."""
  return 4 * 2 * np.asarray(levels) / 255


@pytest.fixture(scope='module')
def made():
  """Training images at 0, 100 and 200; held-out ones 1, 2, 3 and 4 away."""
  return copies.ruler(
    features.pixels(SHAPE), images_of(level([0, 100, 200])),
    images_of(level([1, 102, 197, 96])), 4, tiny.one_device(),
  )  # fmt: skip


def test_new_images_are_held_out_ones(made):
  np.testing.assert_allclose(made.new, distance([1, 2, 3, 4]), rtol=1e-5)
  assert made.basis == 'held-out images'


def test_without_them_each_training_image_is_one_without_itself():
  """Also where two are equal: these are at distance 0 from each other."""
  train = images_of(level([50, 10, 13, 50, 60]))
  found = copies.ruler(
    features.pixels(SHAPE), train, None, 4, tiny.one_device()
  )
  np.testing.assert_allclose(
    found.new, distance([0, 0, 3, 3, 10]), rtol=1e-5, atol=1e-6
  )
  assert found.basis.startswith('training images')


def test_a_verdict_is_that_of_the_distances(made):
  found = copies.judged(made, level([0, 199, 53, 103]))
  np.testing.assert_array_equal(found.identical, [True, False, False, False])
  np.testing.assert_array_equal(found.nearest, [0, 2, 1, 1])
  want = distance([0, 1, 47, 3])
  np.testing.assert_allclose(found.distances, want, rtol=1e-5, atol=1e-6)
  shares = neighbours.share_nearer(found.distances, made.new)
  np.testing.assert_array_equal(found.shares, shares)
  assert shares[2] == 1


def test_the_threshold_is_the_distance_up_to_which_samples_are_left_out(made):
  """2.5 levels away is nearer than half of the held-out images, 1 than none."""
  for near, levels in ((0.25, 1), (0.5, 2), (0.3, 2), (0.75, 3)):
    np.testing.assert_allclose(
      copies.threshold(made, near), distance(levels), rtol=1e-5
    )
  assert copies.threshold(made, 0) == 0


def chosen(made, values, labels, per_class, near=0.5):
  asked = []

  def candidates(first, end):
    asked.append((first, end))
    return level([values[i % len(values)] for i in range(first, end)])

  return copies.choose(made, candidates, labels, per_class, near), asked


def test_a_set_is_balanced_and_without_near_copies(made):
  # Classes 7 and 2 in turn: two of class 7 are left out, one of class 2.
  values = [50, 30, 0, 31, 101, 99, 51, 32, 52, 33]
  found, asked = chosen(made, values, [7, 2], 3)
  np.testing.assert_array_equal(found.indices, [0, 1, 3, 6, 7, 8])
  np.testing.assert_array_equal(
    found.images[:, 0, 0, 0], [50, 30, 31, 51, 32, 52]
  )
  assert found.identical == {7: 1, 2: 0}
  assert found.near == {7: 1, 2: 1}
  assert found.looked_at == {7: 5, 2: 4}
  assert asked[0] == (0, 8)
  assert [end for _, end in asked[:-1]] == [first for first, _ in asked[1:]]


def test_a_smaller_set_is_part_of_a_larger_one(made):
  values = np.random.default_rng(0).integers(0, 256, 97).tolist()
  large, small = (chosen(made, values, [0, 1, 2], n)[0] for n in (20, 7))
  for label in range(3):
    mine, theirs = (
      [i for i in one.indices if i % 3 == label] for one in (small, large)
    )
    assert mine == theirs[:7]


def test_at_0_only_equal_images_are_left_out(made):
  found, _ = chosen(made, [0, 1, 2, 3], [0], 3, near=0)
  np.testing.assert_array_equal(found.indices, [1, 2, 3])


def test_a_network_that_only_copies_is_refused(made):
  with pytest.raises(UserError, match='of 60 candidates of class 5, 0 are no'):
    chosen(made, [0, 100], [5], 3)


def test_one_training_image_is_too_few():
  with pytest.raises(UserError, match='at least 2'):
    copies.ruler(
      features.pixels(SHAPE), images_of(level([1])), None, 4,
      tiny.one_device(),
    )  # fmt: skip
