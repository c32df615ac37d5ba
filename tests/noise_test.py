"""Samples that are still noise, by the correlation of neighbouring pixels."""

import numpy as np
import pytest
from judges import images_of, levels, random_images

from diffusion_jax.evaluation import noise

RHO = 0.8


def smooth(count, size, seed=0):
  """Images of variance 1 whose neighbours correlate by RHO in each direction.

  Each column, and each row, is an autoregressive process.
  """
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((count, size, size))
  for axis in (1, 2):
    x = np.moveaxis(x, axis, 0)
    for i in range(1, size):
      x[i] = RHO * x[i - 1] + np.sqrt(1 - RHO**2) * x[i]
    x = np.moveaxis(x, 0, axis)
  return x[..., None]


def white(shape, seed=1):
  return np.random.default_rng(seed).standard_normal(shape)


def of(images):
  return noise.correlation(np.array_split(images, 3))


@pytest.mark.parametrize('shape', [(2, 2, 1), (8, 8, 1), (5, 9, 3)])
def test_white_noise_correlates_only_by_its_mean(shape):
  found = of(white((3000, *shape)))
  height, width, _ = shape
  expected = -1 / (height * width - 1)
  assert abs(found.value - expected) < 4 * found.error


def test_smooth_images_correlate_as_they_were_made():
  found = of(smooth(200, 64))
  # Subtracting each image's mean takes a few percent.
  assert RHO - 0.04 < found.value < RHO + 0.01


def test_the_error_is_the_spread_over_repeated_sets():
  found = [of(smooth(60, 8, seed)) for seed in range(200)]
  spread = np.std([one.value for one in found])
  assert np.mean([one.error for one in found]) == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize('share', [0.0, 0.3, 0.6, 0.9, 1.0])
def test_added_noise_takes_its_share(share):
  """And more than half of the variance is called noise, less is not."""
  images = smooth(500, 32)
  noisy = np.sqrt(1 - share) * images + np.sqrt(share) * white(images.shape)
  real, found = of(smooth(500, 32, 2)), of(noisy)
  assert 1 - found.value / real.value == pytest.approx(share, abs=0.03)
  assert noise.is_noise(found, real) == (share > 0.5)


@pytest.mark.parametrize('size', [2, 8])
def test_nothing_is_concluded_from_a_reference_of_noise(size):
  for seed in range(20):
    samples, reference = (
      of(white((300, size, size, 1), [seed, i])) for i in range(2)
    )
    assert not noise.is_noise(samples, reference)


def test_flat_or_single_images_have_no_correlation():
  assert of(np.full((9, 4, 4, 1), 7)) is None
  assert noise.correlation([white((1, 4, 4, 1))]) is None
  assert noise.correlation([]) is None


def test_it_is_said_of_noise_and_not_of_images():
  real = np.clip(128 + 40 * smooth(300, 8), 0, 255).astype(np.uint8)
  (line,) = noise.caveats(images_of(random_images(300)), images_of(real))
  assert 'the samples look like noise' in line
  assert 'train longer' in line
  assert noise.caveats(images_of(real), images_of(real[::-1])) == []
  assert noise.caveats(images_of(real), images_of(random_images(300))) == []
  few = images_of(levels(1, 1))
  assert noise.caveats(few, images_of(real)) == []
