"""Emoji drawn from Noto Color Emoji: 1,382 images of 64x64 with captions.

No download but the font, which package managers have. The set is the same with
any font that has all of CODEPOINTS, whatever the version of Python; another
version of the font draws other pictures, so its hash is part of the identity.

Each glyph is drawn at the size of the font's bitmaps, 136x128 pixels, of which
columns 4 to 131 are kept, on white, and resized by Lanczos. The caption is the
code point's name in Unicode. Every tenth image is held out (index 9, 19, ...),
and so are twelve combinations of a colour and a thing, both of which occur in
other captions.
"""

import functools
import hashlib
import os
import struct
import unicodedata
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusion_jax.data import identity, sources
from diffusion_jax.system.errors import UserError

BITMAP = 109  # the font's only size, in pixels per em
CANVAS = (136, 128)
KEPT = (4, 0, 132, 128)  # of the canvas, a square
EVERY = 10  # image is held out
# The code points of Unicode 14 that have a glyph in Noto Color Emoji 2.042.
CODEPOINTS = """
2194-2199 21a9-21aa 231a-231b 2328 23cf 23e9-23f3 23f8-23fa 24c2 25aa-25ab
25b6 25c0 25fb-25fe 2600-2604 260e 2611 2614-2615 2618 261d 2620 2622-2623
2626 262a 262e-262f 2638-263a 2640 2642 2648-2653 265f-2660 2663 2665-2666
2668 267b 267e-267f 2692-2697 2699 269b-269c 26a0-26a1 26a7 26aa-26ab
26b0-26b1 26bd-26be 26c4-26c5 26c8 26ce-26cf 26d1 26d3-26d4 26e9-26ea
26f0-26f5 26f7-26fa 26fd 2702 2705 2708-270d 270f 2712 2714 2716 271d 2721
2728 2733-2734 2744 2747 274c 274e 2753-2755 2757 2763-2764 2795-2797 27a1
27b0 27bf 2934-2935 2b05-2b07 2b1b-2b1c 2b50 2b55 1f004 1f0cf 1f170-1f171
1f17e-1f17f 1f18e 1f191-1f19a 1f1e6-1f1ff 1f201-1f202 1f21a 1f22f
1f232-1f23a 1f250-1f251 1f300-1f321 1f324-1f393 1f396-1f397 1f399-1f39b
1f39e-1f3f0 1f3f3-1f3f5 1f3f7-1f4fd 1f4ff-1f53d 1f549-1f54e 1f550-1f567
1f56f-1f570 1f573-1f57a 1f587 1f58a-1f58d 1f590 1f595-1f596 1f5a4-1f5a5
1f5a8 1f5b1-1f5b2 1f5bc 1f5c2-1f5c4 1f5d1-1f5d3 1f5dc-1f5de 1f5e1 1f5e3
1f5e8 1f5ef 1f5f3 1f5fa-1f64f 1f680-1f6c5 1f6cb-1f6d2 1f6d5-1f6d7
1f6dd-1f6e5 1f6e9 1f6eb-1f6ec 1f6f0 1f6f3-1f6fc 1f7e0-1f7eb 1f7f0
1f90c-1f93a 1f93c-1f945 1f947-1f9ff 1fa70-1fa74 1fa78-1fa7c 1fa80-1fa86
1fa90-1faac 1fab0-1faba 1fac0-1fac5 1fad0-1fad9 1fae0-1fae7 1faf0-1faf6
"""
# Green, purple and yellow heart; orange book; green apple; large green, brown
# and orange circle; large blue and purple square; small blue diamond;
# up-pointing small red triangle.
COMBINATIONS = """
1f49a 1f49c 1f49b 1f4d9 1f34f 1f7e2 1f7e4 1f7e0 1f7e6 1f7ea 1f539 1f53c
"""
# Where the package of Debian and Ubuntu, Fedora, Arch and Homebrew puts it.
PLACES = (
  '/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf',
  '/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf',
  '/usr/share/fonts/noto/NotoColorEmoji.ttf',
  '~/Library/Fonts/NotoColorEmoji.ttf',
)
INSTALL = (
  'install the package fonts-noto-color-emoji (Homebrew: '
  'font-noto-color-emoji), or give NotoColorEmoji.ttf as the path'
)


def codepoints(text: str = CODEPOINTS) -> list[int]:
  """The code points of a text like CODEPOINTS, in its order."""
  ends = [[int(x, 16) for x in part.split('-')] for part in text.split()]
  return [c for pair in ends for c in range(pair[0], pair[-1] + 1)]


def captions() -> list[str]:
  """The caption of each image, such as 'grinning face'."""
  return [unicodedata.name(chr(c)).lower() for c in codepoints()]


def combinations() -> list[str]:
  """The captions of COMBINATIONS, which are held out."""
  return [unicodedata.name(chr(c)).lower() for c in codepoints(COMBINATIONS)]


def heldout(split: str) -> np.ndarray:
  """The indices of a split, 'train', 'test' or 'all', ascending."""
  known = codepoints()
  named = [known.index(c) for c in codepoints(COMBINATIONS)]
  wanted = sources.Wanted(split, None, None, EVERY)
  return sources.heldout_indices(len(known), wanted, named)


def create(path: str, wanted: sources.Wanted, what: str) -> sources.Source:
  """Opens the emoji.

  Args:
    path: the font file; '' looks in PLACES.
    wanted: the requested split, size and channels.
    what: what to call the font in errors.

  Raises:
    UserError: there is no font, it has no colour bitmaps or lacks a glyph, or
      another shape than a square with 3 channels is wanted.
  """
  height, width = wanted.image_size or (64, 64)
  if height != width or (wanted.channels or 3) != 3:
    raise UserError(
      f'the emoji are square and in colour, not {height}x{width}x'
      f'{wanted.channels}: set image_size=64 and channels=3'
    )
  font = _find(path, what)
  images, sha256 = _images(font, os.stat(font).st_mtime_ns, width, what)
  indices, names = heldout(wanted.split), captions()
  shape = (width, width, 3)
  contents = identity.Contents(
    len(indices),
    lambda i: images[indices[i]].tobytes(),
    f'uint8 {width}x{width}x3 emoji of font {sha256[:16]}',
  )
  return sources.create(
    f'emoji (font {sha256[:16]}), {wanted.split}',
    len(indices),
    shape,
    0,
    lambda i: (images[indices[i]], -1),
    contents=contents,
    caption_fn=lambda i: (names[indices[i]],),
  )


def _find(path: str, what: str) -> str:
  """The font file, checked to have colour bitmaps."""
  places = [path] if path else PLACES
  found = next(
    (p for p in map(os.path.expanduser, places) if os.path.isfile(p)), None
  )
  if found is None:
    missing = f'{what} is not a file' if path else 'the emoji need a font'
    raise UserError(f'{missing}: {INSTALL}')
  if 'CBDT' not in _tables(found):
    raise UserError(f'{found} has no glyphs in colour (CBDT): {INSTALL}')
  return found


def _tables(path: str) -> set[str]:
  """The names of the tables of an OpenType font; none of another file."""
  with open(path, 'rb') as file:
    head = file.read(12)
    if head[:4] not in (b'\0\1\0\0', b'OTTO', b'true'):
      return set()
    rows = file.read(16 * struct.unpack('>4xH6x', head)[0])
  names = (rows[i : i + 4] for i in range(0, len(rows), 16))
  return {name.decode('latin-1') for name in names}


@functools.lru_cache(maxsize=2)
def _images(path: str, changed: int, size: int, what: str):
  """(uint8 [N, size, size, 3], the SHA-256 of the font); both splits use it.

  Args:
    path: the font file.
    changed: when it was; another one is drawn again.
    size: pixels per side.
    what: what to call the font in errors.
  """
  del changed
  try:
    font = ImageFont.truetype(path, BITMAP)
    images = np.stack([*_drawn(font, size)])
  except (OSError, ValueError) as e:
    raise UserError(
      f'{what}: {path} cannot be drawn with ({e}): {INSTALL}'
    ) from e
  images.flags.writeable = False
  with open(path, 'rb') as file:
    return images, hashlib.file_digest(file, 'sha256').hexdigest()


def _drawn(font: ImageFont.FreeTypeFont, size: int) -> Iterator[np.ndarray]:
  for code in codepoints():
    canvas = Image.new('RGBA', CANVAS, (255, 255, 255, 0))
    left, top, *_ = font.getbbox(chr(code))
    ImageDraw.Draw(canvas).text(
      (-left, -top), chr(code), font=font, embedded_color=True
    )
    if not canvas.getchannel('A').getbbox():
      raise ValueError(f'it has no glyph of U+{code:04X}')
    white = Image.new('RGBA', CANVAS, 'white')
    flat = Image.alpha_composite(white, canvas).convert('RGB').crop(KEPT)
    yield np.asarray(flat.resize((size, size), Image.Resampling.LANCZOS))
