"""From an image file to a uint8 array: one rule for every source.

1. Orientation. The EXIF orientation is applied. Only the first frame of an
   animation is read. Colour profiles are ignored.
2. Colour. Transparency is composited over white. Palettes, CMYK and the like
   become RGB. Samples of 16 bits keep their high byte. Then 3 channels are
   RGB, and 1 channel is Pillow's 'L' (ITU-R 601 luma).
3. Shape. The largest centred square is cut out, or the largest rectangle of the
   wanted proportions (an odd pixel is left over on the right or below), and
   resized to image_size by Pillow's BICUBIC, which is antialiased. A smaller
   image is enlarged by the same rule. An image that has the size already is
   not touched.

What is judged must not be changed in silence. So a `Rule` may refuse images
that would have to be resized, or that would lose their colours.
"""

import dataclasses
import struct
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from diffusion_jax.system import errors
from diffusion_jax.system.errors import UserError

# By content, whatever the name of the file says. Few formats are few decoders
# for a stranger's file to meet.
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP')

_RESIZING = (
  "--image_size=N crops the centre square and resizes all (Pillow's bicubic)"
)

# What Pillow raises for damaged files. It has no common base class.
_DAMAGED = (
  *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError),
  *(struct.error, Image.DecompressionBombError),
)


@dataclasses.dataclass(frozen=True)
class Rule:
  """What the images of a set become, and which of them are refused.

  Attributes:
    image_size: (height, width), in pixels.
    channels: 1 (grey) or 3 (RGB).
    is_size_exact: an image of another size is refused, not cropped and resized.
    is_grey_exact: with 1 channel, an image in colour is refused, not made grey.
  """

  image_size: tuple[int, int]
  channels: int
  is_size_exact: bool = False
  is_grey_exact: bool = False

  @property
  def shape(self) -> tuple[int, int, int]:
    return *self.image_size, self.channels


def check_channels(channels: int | None) -> None:
  """Raises UserError unless image files can be read with these channels."""
  if channels not in (None, 1, 3):
    raise UserError(f'channels is {channels}: use 1 (grey) or 3 (RGB)')


def rule_of(
  first: str | BinaryIO,
  name: str,
  image_size: tuple[int, int] | None,
  channels: int | None,
) -> Rule:
  """The rule of a set; what is None is taken from its first image.

  Args:
    first: the first image: a path, or a file open for reading bytes. It is read
      only where something is None.
    name: what to call that image in an error.
    image_size: (height, width), in pixels; None if all images must be squares
      of the first one's size.
    channels: 1 or 3; None for 1 if the first image is grey, and all must be.

  Raises:
    UserError: the first image cannot be read, or is no square though
      image_size is None.
  """
  if image_size is not None and channels is not None:
    return Rule(image_size, channels)
  with _one_line_errors(name):
    image = _decode(first)
    if image_size is None and image.width != image.height:
      raise UserError(
        f'image {name} is {_size(image)} and must be square: {_RESIZING}'
      )
  return Rule(
    image_size or (image.height, image.width),
    channels or (1 if _is_grey(image) else 3),
    is_size_exact=image_size is None,
    is_grey_exact=channels is None,
  )


def read(file: str | BinaryIO, name: str, rule: Rule) -> np.ndarray:
  """Reads one image by the rules at the top of this file.

  Args:
    file: a path, or a file open for reading bytes.
    name: what to call the image in an error.
    rule: what it becomes.

  Returns:
    uint8 [height, width, channels].

  Raises:
    UserError: that names an image that cannot be read, is too large, or is
      refused by the rule.
  """
  height, width = rule.image_size
  with _one_line_errors(name):
    image = _decode(file)
    if rule.is_size_exact and image.size != (width, height):
      raise UserError(
        f'image {name} is {_size(image)} and the first one {width}x{height}: '
        f'{_RESIZING}'
      )
    if rule.is_grey_exact and rule.channels == 1 and not _is_grey(image):
      raise UserError(
        f'image {name} is in colour and the first one grey: channels=3 takes '
        'all as RGB, channels=1 makes all grey'
      )
    return fit(image, rule.image_size, rule.channels)


def fit(
  image: Image.Image, image_size: tuple[int, int], channels: int
) -> np.ndarray:
  """Rules 2 and 3: uint8 [height, width, channels]."""
  image = _to_rgb(image)
  if channels == 1:
    image = image.convert('L')
  wanted = image_size[::-1]  # (width, height), as Pillow has it
  # Exact for squares: of each side, what the other one leaves.
  cut = [
    max(1, min(side, other * here // there))
    for side, other, here, there in zip(
      image.size, image.size[::-1], wanted, image_size, strict=True
    )
  ]
  left, top = (
    (side - kept) // 2 for side, kept in zip(image.size, cut, strict=True)
  )
  # Cropped first: resize(box=...) would let pixels outside of the cut in.
  image = image.crop((left, top, left + cut[0], top + cut[1]))
  if image.size != wanted:
    image = image.resize(wanted, Image.Resampling.BICUBIC)
  return np.asarray(image).reshape(*image_size, channels)


def _decode(file: str | BinaryIO) -> Image.Image:
  """Rule 1."""
  with Image.open(file, formats=FORMATS) as image:
    return ImageOps.exif_transpose(image)


def _is_grey(image: Image.Image) -> bool:
  """By its mode: one bit, 8 or 16 bits of grey, perhaps with transparency."""
  return Image.getmodebase(image.mode) == 'L'


def _size(image: Image.Image) -> str:
  return f'{image.width}x{image.height}'


def _to_rgb(image: Image.Image) -> Image.Image:
  """Any mode -> 'RGB'; grey stays exactly grey."""
  if image.mode.startswith('I'):  # 16-bit grey, which convert() would clip
    high = np.asarray(image).astype(np.int32) >> 8
    image = Image.fromarray(high.astype(np.uint8))
  if image.has_transparency_data:
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image.convert('RGBA'))
  return image.convert('RGB')


def _one_line_errors(name: str):
  return errors.one_line(
    _DAMAGED,
    lambda reason: (
      f'image {name} cannot be read: {reason}; replace it or remove it'
    ),
  )
