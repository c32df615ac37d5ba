"""Pictures for people: grids with gutters, at a size that can be seen."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from diffusion_jax.samplers import inversion
from diffusion_jax.system import files

GUTTER = (255, 255, 255)
SAMPLE = (200, 60, 40)  # round what is drawn, beside what is real
TILE = 64  # small images are enlarged to at least this many pixels


def enlarge(images: np.ndarray) -> np.ndarray:
  """uint8 [N, H, W, C] -> RGB [N, h, w, 3], by whole pixels to TILE or more."""
  if images.dtype != np.uint8:
    raise ValueError(f'pictures are made of uint8 images, not {images.dtype}')
  factor = max(1, math.ceil(TILE / min(images.shape[1:3])))
  images = images.repeat(factor, axis=1).repeat(factor, axis=2)
  return np.broadcast_to(images, (*images.shape[:3], 3))


def gutter(tile: int) -> int:
  """The width of the white between tiles of this size, in pixels."""
  return max(4, tile // 8)


def grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
  """Images side by side, with white gutters.

  Args:
    images: uint8 [N, H, W, C], C = 1 or 3.
    columns: how many stand in a row; the root of N, rounded up, by default.

  Returns:
    uint8 [height, width, 3].
  """
  tiles = enlarge(images)
  count, height, width, _ = tiles.shape
  columns = columns or math.ceil(math.sqrt(count))
  rows = math.ceil(count / columns)
  gap = gutter(height)
  canvas = np.full(
    (rows * (height + gap) + gap, columns * (width + gap) + gap, 3),
    GUTTER,
    np.uint8,
  )
  for i, tile in enumerate(tiles):
    top = gap + (i // columns) * (height + gap)
    left = gap + (i % columns) * (width + gap)
    canvas[top : top + height, left : left + width] = tile
  return canvas


def columns(frames: np.ndarray, labels: Sequence[str]) -> np.ndarray:
  """Images in labelled columns, which line up what belongs together in rows.

  Args:
    frames: uint8 [F, N, H, W, C]: columns, then rows.
    labels: F texts, to stand above the columns.

  Returns:
    uint8 [height, width, 3].
  """
  picture = grid(
    frames.swapaxes(0, 1).reshape(-1, *frames.shape[2:]), len(frames)
  )
  band = 18
  canvas = Image.new('RGB', (picture.shape[1], picture.shape[0] + band), GUTTER)
  canvas.paste(Image.fromarray(picture), (0, band))
  pen = ImageDraw.Draw(canvas)
  gap = gutter(enlarge(frames[:1, 0]).shape[1])
  pitch = (picture.shape[1] - gap) / len(frames)
  for i, label in enumerate(labels):
    pen.text(
      (gap / 2 + (i + 0.5) * pitch, 3), label, fill=(60, 60, 60), anchor='ma'
    )
  return np.asarray(canvas)


def trajectory(frames: np.ndarray, times) -> np.ndarray:
  """The way from noise to images: a row each, a labelled column for each time.

  Args:
    frames: uint8 [F, N, H, W, C].
    times: F labels, the t of each column.

  Returns:
    uint8 [height, width, 3].
  """
  return columns(
    frames, ['x0' if time < 0 else f't = {time:.4g}' for time in times]
  )


def interpolation(
  draw_fn: Callable, ends: np.ndarray, between: int
) -> np.ndarray:
  """A picture of the ways from noise 0 to 1, from 2 to 3, and so on.

  Args:
    draw_fn: noises [N, ...] -> uint8 images [N, H, W, C].
    ends: [N, H, W, C], two noises a row; an odd last one is left out.
    between: how many images stand between two ends.

  Returns:
    uint8 [height, width, 3]: a row a pair, a column a weight, 0 to 1.
  """
  weights = np.linspace(0, 1, between + 2)
  a, b = ends[:-1:2], ends[1::2]
  ways = [
    inversion.slerp(a, b, np.full(len(a), weight, np.float32))
    for weight in weights
  ]
  flat = np.concatenate(ways)
  images = draw_fn(flat)
  return columns(
    images.reshape(len(weights), len(a), *images.shape[1:]),
    [f'{weight:.3g}' for weight in weights],
  )


def neighbours(
  images: np.ndarray, labels: Sequence[str], columns: int = 2
) -> np.ndarray:
  """Samples, framed, beside their nearest training images; labels below.

  Args:
    images: uint8 [Q, 1 + k, H, W, C]: a sample, then its k nearest.
    labels: Q texts.
    columns: how many such rows stand side by side.

  Returns:
    uint8 [height, width, 3].
  """
  strips = [grid(row, len(row)) for row in images]
  height, width, _ = strips[0].shape
  gap = gutter(enlarge(images[0, :1]).shape[1])
  tile = (width - gap) // images.shape[1] - gap
  band, apart = 18, 3 * gap
  columns = min(columns, len(strips))
  rows = math.ceil(len(strips) / columns)
  canvas = Image.new(
    'RGB',
    (columns * width + (columns - 1) * apart, rows * (height + band)),
    GUTTER,
  )
  pen = ImageDraw.Draw(canvas)
  for i, (strip, label) in enumerate(zip(strips, labels, strict=True)):
    left = (i % columns) * (width + apart)
    top = (i // columns) * (height + band)
    canvas.paste(Image.fromarray(strip), (left, top))
    frame = (left + gap - 2, top + gap - 2, left + gap + tile + 1,
             top + gap + tile + 1)  # fmt: skip
    pen.rectangle(frame, outline=SAMPLE, width=2)
    pen.text((left + gap, top + height - 1), label, fill=(60, 60, 60))
  return np.asarray(canvas)


def save(path, picture: np.ndarray) -> None:
  """Writes a PNG, whole or not at all.

  Args:
    path: of the file.
    picture: uint8 [H, W, 3] or [H, W, 1].
  """
  if picture.shape[-1] == 1:
    picture = picture[..., 0]
  with files.replacing(path) as file:
    Image.fromarray(picture).save(file, format='PNG')
