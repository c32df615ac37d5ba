"""Pictures for people: grids of images with gutters, enlarged if small."""

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import MAX_TEXT_CHUNK, PngInfo

from diffusion_jax.reporting import captions as under
from diffusion_jax.samplers import inversion
from diffusion_jax.system import files
from diffusion_jax.system.errors import one_line

GUTTER = (255, 255, 255)
INK = (60, 60, 60)  # of labels
SAMPLE = (200, 60, 40)  # frame of samples next to real images
LABEL = 170  # the width of a label, in pixels
# Larger pictures are embedded smaller, so that a report can be mailed.
MAX_BYTES, MAX_SIDE = 500_000, 1200
# Raised by Pillow for a damaged picture, or one with too many pixels.
DAMAGED = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
SHORT = 1000  # letters of a text that are not compressed
TILE = 64  # small images are enlarged to at least this many pixels
CAPTIONED = 128  # or to this many, if their captions need the room


def enlarge(images: np.ndarray, least: int = TILE) -> np.ndarray:
  """uint8 [N, H, W, C] -> RGB [N, h, w, 3], repeating pixels up to `least`."""
  if images.dtype != np.uint8:
    raise ValueError(f'pictures need uint8 images, not {images.dtype}')
  factor = max(1, math.ceil(least / min(images.shape[1:3])))
  images = images.repeat(factor, axis=1).repeat(factor, axis=2)
  return np.broadcast_to(images, (*images.shape[:3], 3))


def gutter(tile: int) -> int:
  """The width of the white gutter between tiles of this size, in pixels."""
  return max(4, tile // 8)


class Laid(NamedTuple):
  """A grid, and where its tiles are, in pixels.

  Attributes:
    picture: uint8 [height, width, 3].
    tops: of the rows.
    tile: (height, width) of a tile.
    gap: the gutter.
  """

  picture: np.ndarray
  tops: list[int]
  tile: tuple[int, int]
  gap: int


def grid(
  images: np.ndarray,
  columns: int | None = None,
  captions: Sequence[str] | None = None,
) -> np.ndarray:
  """Images side by side, with white gutters.

  Args:
    images: uint8 [N, H, W, C], C = 1 or 3.
    columns: images per row; by default the root of N, rounded up.
    captions: N texts, written under the images; see `captions.placed`.

  Returns:
    uint8 [height, width, 3].
  """
  return _laid(images, columns, captions).picture


def _laid(images, columns=None, captions=None) -> Laid:
  """`grid`, with the places of its tiles."""
  columns = columns or math.ceil(math.sqrt(len(images)))
  for least in (TILE, CAPTIONED):
    tiles = enlarge(images, least)
    count, height, width, _ = tiles.shape
    gap = gutter(height)
    texts = under.placed(captions or (), columns, width, gap)
    if all(text.whole for text in texts):
      break
  rows = math.ceil(count / columns)
  bands = [
    band and gap // 2 + band for band in under.heights(texts, rows, width)
  ]
  tops = [gap + i * (height + gap) + sum(bands[:i]) for i in range(rows + 1)]
  size = (tops[-1], columns * (width + gap) + gap, 3)
  canvas = np.full(size, GUTTER, np.uint8)
  for i, tile in enumerate(tiles):
    top, left = tops[i // columns], gap + (i % columns) * (width + gap)
    canvas[top : top + height, left : left + width] = tile
  if any(bands):
    written = Image.fromarray(canvas)
    pen = ImageDraw.Draw(written)
    for text in texts:
      under.write(pen, text, tops[text.row] + height + gap // 2, width, INK)
    canvas = np.asarray(written)
  return Laid(canvas, tops[:-1], (height, width), gap)


def in_turn(
  images: np.ndarray, kinds: int, captions: Sequence[str] | None = None
) -> np.ndarray:
  """A grid of images whose kinds come in turn: a row for each kind.

  Args:
    images: uint8 [N, H, W, C]; image i is of kind i % kinds.
    kinds: number of kinds; with 1, or fewer images than kinds, the grid is that
      of `grid`. An incomplete last turn is left out.
    captions: N texts, written under the images.

  Returns:
    uint8 [height, width, 3].
  """
  turns = len(images) // kinds
  if kinds == 1 or not turns:
    return grid(images, captions=captions)
  order = np.arange(turns * kinds).reshape(turns, kinds).T.ravel()
  told = captions and [captions[i] for i in order]
  return grid(images[order], turns, told)


def beside(*sets: np.ndarray) -> np.ndarray:
  """A grid of images, each with those of other sets to its right.

  Args:
    *sets: uint8 [N or more, h, w, C] each, N images of the first one. The
      pixels of smaller images are repeated.

  Returns:
    uint8 [height, width, 3].
  """
  count, kinds = len(sets[0]), len(sets)
  side = max(images.shape[1] for images in sets)
  same = [
    images[:count].repeat(factor, 1).repeat(factor, 2)
    for images in sets
    for factor in [side // images.shape[1]]
  ]
  columns = kinds * math.ceil(math.sqrt(count / kinds))
  return grid(np.stack(same, 1).reshape(-1, *same[0].shape[1:]), columns)


def columns(frames: np.ndarray, labels: Sequence[str]) -> np.ndarray:
  """Images in labelled columns.

  Args:
    frames: uint8 [F, N, H, W, C]: columns, then rows.
    labels: F texts, printed above the columns.

  Returns:
    uint8 [height, width, 3].
  """
  images = frames.swapaxes(0, 1).reshape(-1, *frames.shape[2:])
  canvas, pen = _with_margins(grid(images, len(frames)), top=18)
  gap = gutter(enlarge(images[:1]).shape[1])
  pitch = (canvas.width - gap) / len(frames)
  for i, label in enumerate(labels):
    pen.text((gap / 2 + (i + 0.5) * pitch, 3), label, fill=INK, anchor='ma')
  return np.asarray(canvas)


def below(parts: Sequence[np.ndarray]) -> np.ndarray:
  """Pictures of any widths below one another, on white.

  Args:
    parts: uint8 [h, w, 3] each.

  Returns:
    uint8 [height, width, 3].
  """
  width = max(part.shape[1] for part in parts)
  sides = [((0, 0), (0, width - part.shape[1]), (0, 0)) for part in parts]
  return np.concatenate(
    [np.pad(*of, constant_values=255) for of in zip(parts, sides, strict=True)]
  )


def _with_margins(picture, top=0, right=0):
  """The picture with white margins for labels, and a pen to write them."""
  height, width, _ = picture.shape
  canvas = Image.new('RGB', (width + right, height + top), GUTTER)
  canvas.paste(Image.fromarray(picture), (0, top))
  return canvas, ImageDraw.Draw(canvas)


def trajectory(frames: np.ndarray, times) -> np.ndarray:
  """Trajectories from noise to images: a row per image, a column per time.

  Args:
    frames: uint8 [F, N, H, W, C].
    times: F labels, the t of each column.

  Returns:
    uint8 [height, width, 3].
  """
  labels = ['x0' if time < 0 else f't = {time:.4g}' for time in times]
  return columns(frames, labels)


def interpolation(
  draw_fn: Callable, ends: np.ndarray, between: int
) -> np.ndarray:
  """A picture of interpolations from noise 0 to 1, from 2 to 3, and so on.

  Args:
    draw_fn: noises [N, ...] -> uint8 images [N, H, W, C].
    ends: [N, H, W, C], two noises per row; an odd last one is ignored.
    between: number of images between two ends.

  Returns:
    uint8 [height, width, 3]: a row per pair, a column per weight, 0 to 1.
  """
  a, b = ends[:-1:2], ends[1::2]
  weights = np.linspace(0, 1, between + 2)
  each = [np.full(len(a), weight, np.float32) for weight in weights]
  ways = [inversion.slerp(a, b, weight) for weight in each]
  images = draw_fn(np.concatenate(ways))
  frames = images.reshape(len(ways), len(a), *images.shape[1:])
  return columns(frames, [f'{weight:.3g}' for weight in weights])


def neighbours(
  images: np.ndarray,
  labels: Sequence[str],
  captions: Sequence[str] | None = None,
) -> np.ndarray:
  """Framed samples with their nearest training images and labels.

  Args:
    images: uint8 [Q, 1 + k, H, W, C]: a sample, then its k nearest images.
    labels: Q texts; a semicolon starts a new line.
    captions: Q (1 + k) texts, written under the images.

  Returns:
    uint8 [height, width, 3].
  """
  flat = images.reshape(-1, *images.shape[2:])
  laid = _laid(flat, images.shape[1], captions)
  canvas, pen = _with_margins(laid.picture, right=LABEL)
  gap, (height, width) = laid.gap, laid.tile
  for top, label in zip(laid.tops, labels, strict=True):
    frame = (gap - 2, top - 2, gap + width + 1, top + height + 1)
    pen.rectangle(frame, outline=SAMPLE, width=2)
    place = (laid.picture.shape[1], top)
    pen.text(place, label.replace('; ', '\n'), fill=INK)
  return np.asarray(canvas)


def embedded(path, side: int = MAX_SIDE, most_bytes: int = MAX_BYTES) -> dict:
  """A picture to embed in a page: 'src', 'width' and 'height'.

  Args:
    path: the file.
    side: maximum side in pixels after shrinking.
    most_bytes: a picture of at most this size is embedded unchanged.

  Raises:
    DAMAGED: the file cannot be read.
  """
  content, kind = path.read_bytes(), 'png'
  with Image.open(io.BytesIO(content)) as image:
    image.load()  # reads all of it, so that damage is found
    width, height = image.size
    if len(content) > most_bytes:
      small = image.convert('RGB')
      small.thumbnail((side, side))
      for other in ('png', 'jpeg'):
        file = io.BytesIO()
        small.save(file, format=other, quality=90)
        if len(file.getvalue()) < len(content):
          content, kind = file.getvalue(), other
  code = base64.b64encode(content).decode()
  src = f'data:image/{kind};base64,{code}'
  return {'src': src, 'width': width, 'height': height}


def save(
  path, picture: np.ndarray, text: Mapping[str, str] | None = None
) -> None:
  """Writes a PNG atomically.

  Args:
    path: the file.
    picture: uint8 [H, W, 3] or [H, W, 1].
    text: the text chunks to write, by key.
  """
  if picture.shape[-1] == 1:
    picture = picture[..., 0]
  chunks = PngInfo()
  for key, value in (text or {}).items():
    # Compressed text is read up to a limit.
    worth = SHORT < len(value) < MAX_TEXT_CHUNK // 4
    chunks.add_itxt(key, value, zip=worth)
  with files.replacing(path) as file:
    Image.fromarray(picture).save(file, format='PNG', pnginfo=chunks)


def read(path) -> np.ndarray:
  """The pixels of a PNG: uint8 [H, W, 3], or [H, W, 1] if it is grey.

  Args:
    path: the file.

  Raises:
    UserError: it cannot be read.
  """
  path = files.at(path).expanduser()
  with (
    one_line(f'{path} cannot be read as a PNG (', '): give another file'),
    path.open('rb') as file,
    Image.open(file, formats=['PNG']) as image,
  ):
    kept = image if image.mode == 'L' else image.convert('RGB')
    return np.asarray(kept).reshape(image.height, image.width, -1)
