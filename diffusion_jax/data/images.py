"""From an image file to a square uint8 array: one rule for every source.

1. Orientation. The EXIF orientation is applied. Only the first frame of an
   animation is read. Colour profiles are ignored.
2. Colour. Transparency is composited over white. Palettes, CMYK and the like
   become RGB. Samples of 16 bits keep their high byte. Then 3 channels are
   RGB, and 1 channel is Pillow's 'L' (ITU-R 601 luma).
3. Shape. The largest centred square is cut out (an odd pixel is left over on
   the right or below) and resized to image_size by Pillow's BICUBIC, which is
   antialiased. A smaller image is enlarged by the same rule. An image that
   has the size already is not touched.
"""

import struct
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from diffusion_jax.errors import UserError

# By content, whatever the name of the file says. Few formats are few decoders
# for a stranger's file to meet.
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP')

# What Pillow raises for damaged files. It has no common base class.
_DAMAGED = (
  OSError,
  SyntaxError,
  ValueError,
  EOFError,
  LookupError,
  TypeError,
  struct.error,
  Image.DecompressionBombError,
)


def check_channels(channels: int) -> None:
  """Raises UserError unless image files can be read with these channels."""
  if channels not in (1, 3):
    raise UserError(f'data.channels is {channels}: use 1 (grey) or 3 (RGB)')


def read(
  file: str | BinaryIO, name: str, *, image_size: int, channels: int
) -> np.ndarray:
  """Reads one image by the rules at the top of this file.

  Args:
    file: a path, or a file open for reading bytes.
    name: what to call the image in an error.
    image_size: height and width of the result, in pixels.
    channels: 1 or 3.

  Returns:
    uint8 [image_size, image_size, channels].

  Raises:
    UserError: that names an image that cannot be read or is too large.
  """
  try:
    with Image.open(file, formats=FORMATS) as image:
      return fit(ImageOps.exif_transpose(image), image_size, channels)
  except _DAMAGED as error:
    reason = ' '.join(str(error).split())
    raise UserError(
      f'image {name} cannot be read: {reason}; replace it or remove it'
    ) from error


def fit(image: Image.Image, image_size: int, channels: int) -> np.ndarray:
  """Rules 2 and 3: uint8 [image_size, image_size, channels]."""
  image = _to_rgb(image)
  if channels == 1:
    image = image.convert('L')
  width, height = image.size
  side = min(width, height)
  left, top = (width - side) // 2, (height - side) // 2
  # Cropped first: resize(box=...) would let pixels outside of the square in.
  image = image.crop((left, top, left + side, top + side))
  if side != image_size:
    image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
  return np.asarray(image).reshape(image_size, image_size, channels)


def _to_rgb(image: Image.Image) -> Image.Image:
  """Any mode -> 'RGB'; grey stays exactly grey."""
  if image.mode.startswith('I'):  # 16-bit grey, which convert() would clip
    high = np.asarray(image).astype(np.int32) >> 8
    image = Image.fromarray(high.astype(np.uint8))
  if image.has_transparency_data:
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image.convert('RGBA'))
  return image.convert('RGB')
