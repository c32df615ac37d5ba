"""Denoises pictures larger than the network's by overlapping tiles."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.process.gaussian import Denoiser


def starts(size: int, tile: int, overlap: int) -> list[int]:
  """Where tiles begin along a side, evenly spaced, the last at the end.

  Args:
    size: pixels of the side.
    tile: pixels of a tile, at most `size`.
    overlap: the least number of pixels that neighbours share, below `tile`.
  """
  count = 1 + max(0, math.ceil((size - tile) / (tile - overlap)))
  return np.rint(np.linspace(0, size - tile, count)).astype(int).tolist()


def weights(size: int, tile: int, at: list[int]) -> np.ndarray:
  """The share of each tile in each pixel of a side: [len(at), tile].

  A tile weighs most at its centre, sin^2, and nothing at its borders, except
  for those of the picture; the shares of a pixel add up to 1.

  Args:
    size: pixels of the side.
    tile: pixels of a tile.
    at: where tiles begin, see `starts`.
  """
  phase = (np.arange(tile) + 0.5) / tile
  each = np.tile(np.sin(np.pi * phase) ** 2, (len(at), 1))
  total = np.zeros(size)
  for first, own in zip(at, each, strict=True):
    total[first : first + tile] += own
  return np.stack([
    own / total[first : first + tile]
    for first, own in zip(at, each, strict=True)
  ])  # fmt: skip


def tiled(
  denoiser: Denoiser,
  image_shape: tuple[int, int, int],
  tile: tuple[int, int],
  overlap: int,
) -> Denoiser:
  """A denoiser of pictures from a denoiser of their tiles.

  In every evaluation the estimates of overlapping tiles are averaged, with
  smooth weights (arXiv 2302.08113, for samples). So samplers see one picture
  and leave no seams.

  Args:
    denoiser: (xt [B P, h, w, C], t) -> Denoised, where the P tiles of a picture
      are next to each other.
    image_shape: (H, W, C) of the pictures.
    tile: (h, w).
    overlap: the least number of pixels that neighbours share.
  """
  height, width, channels = image_shape
  tops, lefts = (
    starts(size, side, overlap)
    for size, side in zip((height, width), tile, strict=True)
  )
  shares = (
    weights(height, tile[0], tops)[:, None, :, None]
    * weights(width, tile[1], lefts)[None, :, None, :]
  ).reshape(-1, *tile, 1)
  # By index, so that the program does not grow with the number of tiles.
  down = np.repeat(np.add.outer(tops, np.arange(tile[0])), len(lefts), 0)
  right = np.tile(np.add.outer(lefts, np.arange(tile[1])), (len(tops), 1))
  places = down[:, :, None], right[:, None, :]

  def cut(x):
    return x[:, *places].reshape(-1, *tile, channels)

  def joined(pieces):
    pieces = pieces.reshape(-1, len(down), *tile, channels)
    found = jnp.zeros((len(pieces), *image_shape), pieces.dtype)
    return found.at[:, *places].add(
      pieces * jnp.asarray(shares[None], pieces.dtype)
    )

  def denoise(xt, t):
    times = jnp.repeat(t, len(down)) if jnp.ndim(t) else t
    return jax.tree.map(joined, denoiser(cut(xt), times))

  return denoise


def count(
  image_shape: tuple[int, int, int], tile: tuple[int, int], overlap: int
) -> int:
  """The number of tiles of a picture; arguments as of `tiled`."""
  return math.prod(
    len(starts(size, side, overlap))
    for size, side in zip(image_shape[:2], tile, strict=True)
  )
