"""Decodes image files to uint8 arrays, with the same rules for every source.

1. Orientation. The EXIF orientation is applied. Only the first frame of an
   animation is read. Colour profiles are ignored.
2. Colour. Transparency is composited over white. Palettes, CMYK and the like
   become RGB. 16-bit samples keep their high byte. Then 3 channels are RGB,
   and 1 channel is Pillow's 'L' (ITU-R 601 luma).
3. Shape. The image is cropped to the largest centred square, or the largest
   centred rectangle of the wanted proportions (an odd pixel is cut off on the
   right or at the bottom), and resized to image_size with Pillow's BICUBIC,
   which is antialiased. Smaller images are enlarged in the same way. An image
   that has the size already is not changed.

Images for evaluation must not be changed silently. A `Rule` can therefore
refuse images that would have to be resized, or would lose their colours.
"""

import dataclasses
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from diffusion_jax.system.errors import UserError, one_line

# Detected from the content, not the file name. Only these, to limit the
# decoders that an untrusted file can reach.
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP')

_RESIZING = (
  "--image_size=N crops the centre square and resizes all (Pillow's bicubic)"
)


@dataclasses.dataclass(frozen=True)
class Rule:
  """How the images of a set are converted, and which are refused.

  Attributes:
    image_size: (height, width), in pixels.
    channels: 1 (grey) or 3 (RGB).
    is_size_exact: refuse images of another size in place of resizing them.
    is_grey_exact: with 1 channel, refuse images in colour in place of
      converting them.
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
  """The rule of a set, with defaults from its first image.

  Args:
    first: the first image: a path, or a file open for reading bytes. It is read
      only if image_size or channels is None.
    name: what to call that image in errors.
    image_size: (height, width), in pixels; None if all images must be squares
      of the first one's size.
    channels: 1 or 3; None for those of the first image. If that is grey, all
      images must be.

  Raises:
    UserError: the first image cannot be read, or is not square and image_size
      is None.
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
  """Reads an image by the rules in the module docstring.

  Args:
    file: a path, or a file open for reading bytes.
    name: what to call the image in errors.
    rule: the size and channels to convert to.

  Returns:
    uint8 [height, width, channels].

  Raises:
    UserError: the image cannot be read, is too large, or is refused by the
      rule.
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
        f'image {name} is in colour and the first one grey: channels=3 reads '
        'all as RGB, channels=1 converts all to grey'
      )
    return fit(image, rule.image_size, rule.channels)


def fit(
  image: Image.Image, image_size: tuple[int, int], channels: int
) -> np.ndarray:
  """Applies rules 2 and 3: uint8 [height, width, channels]."""
  image = _to_rgb(image)
  if channels == 1:
    image = image.convert('L')
  height, width = image_size
  # Each side, limited by what the other side and the proportions allow.
  wide = max(1, min(image.width, image.height * width // height))
  high = max(1, min(image.height, image.width * height // width))
  left, top = (image.width - wide) // 2, (image.height - high) // 2
  # Cropped first: resize(box=...) would use pixels outside the crop.
  image = image.crop((left, top, left + wide, top + high))
  if image.size != (width, height):
    image = image.resize((width, height), Image.Resampling.BICUBIC)
  return np.asarray(image).reshape(height, width, channels)


def _decode(file: str | BinaryIO) -> Image.Image:
  """Applies rule 1."""
  with Image.open(file, formats=FORMATS) as image:
    return ImageOps.exif_transpose(image)


def _is_grey(image: Image.Image) -> bool:
  """Whether the mode is grey: 1, 8 or 16 bits, with or without transparency."""
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
  return one_line(f'image {name} cannot be read: ', '; replace it or remove it')
