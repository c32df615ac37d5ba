"""Overlapping tiles: shares, exactness for local denoisers, no seams."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.guidance import tiles
from diffusion_jax.process.gaussian import Denoised


@pytest.mark.parametrize(('size', 'tile', 'overlap'), [
  (8, 8, 4), (9, 8, 4), (20, 8, 0), (33, 8, 7), (16, 8, 4),
])  # fmt: skip
def test_tiles_cover_a_side_and_shares_sum_to_one(size, tile, overlap):
  at = tiles.starts(size, tile, overlap)
  assert at[0] == 0
  assert at[-1] == size - tile
  shared = [tile - (b - a) for a, b in itertools.pairwise(at)]
  assert min(shared, default=tile) >= overlap
  total = np.zeros(size)
  for first, own in zip(at, tiles.weights(size, tile, at), strict=True):
    total[first : first + tile] += own
  np.testing.assert_allclose(total, 1, rtol=1e-12)


def test_what_looks_at_one_pixel_is_the_same_in_tiles():
  """With times per picture: each tile has the time of its picture."""

  def denoise(xt, t):
    t = jnp.broadcast_to(t, xt.shape[:1])[:, None, None, None]
    return Denoised(jnp.sin(3 * xt) * t, xt + t)

  x = np.float32(np.random.default_rng(0).normal(size=(3, 13, 10, 2)))
  t = np.float32([1, 2, 3])
  found = tiles.tiled(denoise, x.shape[1:], (8, 6), 3)(x, t)
  for got, wanted in zip(found[:2], denoise(x, t)[:2], strict=True):
    np.testing.assert_allclose(got, wanted, atol=1e-5)
  assert tiles.count(x.shape[1:], (8, 6), 3) == 2 * 3


def _jumps(picture, borders):
  """(mean jump across the borders, mean jump elsewhere) between rows."""
  jump = np.abs(np.diff(picture, axis=0)).mean((1, 2))
  there = np.isin(np.arange(1, len(picture)), borders)
  return jump[there].mean(), jump[~there].mean()


def test_there_is_no_seam_where_tiles_begin_and_end():
  """A denoiser whose estimates depend on the whole tile, and so disagree.

  Its error is a slope over the tile, which is largest at the borders.
  """

  def denoise(xt, t):
    slope = jnp.linspace(-1, 1, xt.shape[1])[None, :, None, None]
    x0 = xt + slope * (1 + xt.mean((1, 2, 3), keepdims=True))
    return Denoised(x0, xt)

  rng = np.random.default_rng(0)
  x = np.float32(rng.normal(size=(1, 200, 40, 1)))
  at = tiles.starts(200, 20, 10)
  borders = np.unique([*at[1:], *(first + 20 for first in at[:-1])])
  smooth = tiles.tiled(denoise, x.shape[1:], (20, 20), 10)(x, 0).x0
  across, elsewhere = _jumps(np.asarray(smooth)[0], borders)
  assert across <= 1.05 * elsewhere
  hard = tiles.tiled(denoise, x.shape[1:], (20, 20), 0)(x, 0).x0
  across, elsewhere = _jumps(np.asarray(hard)[0], tiles.starts(200, 20, 0)[1:])
  assert across > 1.3 * elsewhere  # what the test would see
