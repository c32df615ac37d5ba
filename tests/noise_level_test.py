"""The estimate of a picture's noise, on pictures whose noise is known."""

import numpy as np
import pytest

from diffusion_jax.editing import noise_level
from diffusion_jax.system.errors import UserError


def smooth(height, width, channels):
  """Waves in [-1, 1], other ones in each channel."""
  i, j, c = np.ogrid[:height, :width, :channels]
  return np.sin(0.11 * i + c) * np.cos(0.17 * j - 2 * c)


@pytest.mark.parametrize('shape', [(64, 96, 1), (32, 32, 3), (160, 160, 3)])
@pytest.mark.parametrize('level', [0.02, 0.1, 0.5])
def test_it_is_near_the_noise(shape, level):
  rng = np.random.default_rng(0)
  for clean in (np.zeros(shape), smooth(*shape)):
    noisy = clean + level * rng.normal(size=shape)
    for how in ('by_details', 'by_patches', 'estimate'):
      found = getattr(noise_level, how)(noisy)
      assert found == pytest.approx(level, rel=0.12), how


def test_both_estimates_are_consistent():
  """Of a large flat picture to 2%: their constants are those of the normal."""
  noisy = 0.3 * np.random.default_rng(0).normal(size=(300, 300, 1))
  for how in (noise_level.by_details, noise_level.by_patches):
    assert how(noisy) == pytest.approx(0.3, rel=0.02)


def test_without_noise_it_is_nothing():
  assert noise_level.estimate(np.full((8, 8, 3), 0.4)) == 0
  i, j, _ = np.ogrid[:32, :32, :1]
  assert noise_level.estimate(0.02 * i * np.ones_like(j) - 0.5) < 1e-9


def test_edges_and_textures_hardly_raise_it():
  """Edges of half of all pixels; stripes that go together in all channels."""
  rng = np.random.default_rng(0)
  edges = np.where(smooth(64, 64, 1) > 0, 1.0, -1.0)
  stripes = np.sin(2.9 * np.arange(64) * np.ones((64, 1)))[..., None]
  for clean in (edges * np.ones(3), stripes * np.ones(3)):
    found = noise_level.estimate(clean + 0.1 * rng.normal(size=(64, 64, 3)))
    assert found == pytest.approx(0.1, rel=0.15)


def test_small_pictures_have_an_estimate_and_tiny_ones_have_none():
  rng = np.random.default_rng(0)
  found = [noise_level.estimate(rng.normal(size=(8, 8, 3))) for _ in range(20)]
  assert np.median(found) == pytest.approx(1, rel=0.1)
  assert noise_level.by_patches(np.zeros((8, 8, 3))) == np.inf
  with pytest.raises(UserError, match='2x9'):
    noise_level.estimate(np.zeros((2, 9, 1)))
