"""Captions under the pictures of a grid: wrapped, and shortened if long."""

import bisect
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import ImageDraw, ImageFont

LINES = 3  # most lines of a caption
ELLIPSIS = '…'
MOST = 1000  # letters that are looked at


class Placed(NamedTuple):
  """A caption in a grid.

  Attributes:
    row: the row of the grid.
    middle: the horizontal place of its middle, in pixels.
    lines: its lines.
    whole: whether nothing is left out.
  """

  row: int
  middle: float
  lines: list[str]
  whole: bool


def size_for(width: int) -> int:
  """The size of the letters under tiles of this width, in pixels."""
  return min(11 + max(width - 64, 0) // 32, 20)


@functools.lru_cache(maxsize=8)
def font(size: int) -> ImageFont.FreeTypeFont:
  """A font of this size in pixels, with Latin, Greek and Cyrillic letters."""
  # Pillow's own has few letters beyond ASCII. Only captions need matplotlib.
  import matplotlib

  path = Path(matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf')
  return ImageFont.truetype(path, size)


def wrapped(text: str, width: float, size: int) -> tuple[list[str], bool]:
  """The lines of a caption, at most LINES.

  Args:
    text: the caption; white space is collapsed.
    width: of a line, in pixels.
    size: of the letters.

  Returns:
    (lines, whether nothing is left out). Lines end between words, unless a
    word is longer than a line; an ellipsis stands for the rest.
  """
  start = ' '.join(text[:MOST].split())
  rest = ''.join(letter for letter in start if letter.isprintable())
  lines = []
  while rest and len(lines) < LINES:
    line = _beginning(rest, width, size)
    lines.append(line)
    rest = rest[len(line) :].lstrip()
  whole = not rest and len(text) <= MOST
  if lines and not whole:
    lines[-1] = _shortened(lines[-1], width, size)
  return lines, whole


def _beginning(text, width, size) -> str:
  """The longest beginning of a text that fits, at least a letter."""
  fits = _fitting(text, width, size)
  if fits < len(text):
    fits = max(text.rfind(' ', 0, fits + 1), 0) or max(fits, 1)
  return text[:fits]


def _shortened(line, width, size) -> str:
  room = width - font(size).getlength(ELLIPSIS)
  return line[: _fitting(line, room, size)].rstrip() + ELLIPSIS


def _fitting(text, width, size) -> int:
  """How many letters of a text fit."""
  lengths = range(1, len(text) + 1)
  length = font(size).getlength
  return bisect.bisect_right(lengths, width, key=lambda n: length(text[:n]))


def placed(
  texts: Sequence[str], columns: int, width: int, gap: int
) -> list[Placed]:
  """The captions of a grid's tiles.

  Args:
    texts: a caption for each tile, row by row. A row in which all are equal has
      it once, across.
    columns: tiles in a row.
    width: of a tile, in pixels.
    gap: between tiles, in pixels.
  """
  found, size = [], size_for(width)
  for start in range(0, len(texts), columns):
    row = texts[start : start + columns]
    spans = [(text, i, 1) for i, text in enumerate(row)]
    if len({*row}) == 1:
      spans = [(row[0], 0, len(row))]
    for text, first, count in spans:
      room = count * (width + gap) - gap
      middle = gap + first * (width + gap) + room / 2
      lines, whole = wrapped(text, room, size)
      found.append(Placed(start // columns, middle, lines, whole))
  return found


def heights(of_grid: Sequence[Placed], rows: int, width: int) -> list[int]:
  """The pixels that the captions of each row of a grid take.

  Args:
    of_grid: the captions.
    rows: the number of rows.
    width: of a tile.
  """
  most = [0] * rows
  for one in of_grid:
    most[one.row] = max(most[one.row], len(one.lines))
  return [lines * _pitch(width) for lines in most]


def _pitch(width) -> int:
  """Pixels from one line to the next."""
  return round(1.3 * size_for(width))


def write(
  pen: ImageDraw.ImageDraw, one: Placed, top: int, width: int, ink
) -> None:
  """Writes a caption.

  Args:
    pen: of the picture.
    one: the caption.
    top: of the first line, in pixels.
    width: of a tile.
    ink: the colour.
  """
  for number, line in enumerate(one.lines):
    place = one.middle, top + number * _pitch(width)
    pen.text(place, line, fill=ink, font=font(size_for(width)), anchor='ma')
