"""Decodes image files to uint8 arrays, with the same rules for every source.

1. Orientation. The EXIF orientation is applied, unless the EXIF block is
   damaged. Remarks in a PNG that are damaged or very long are ignored. Only the
   first frame of an animation, or page of a TIFF, is read. Colour profiles are
   ignored.
2. Samples. 16-bit samples keep their high byte, and 12-bit samples of a TIFF
   their 8 highest bits. With `bits`, grey samples have that many bits, whatever
   the file says; but not more than 8 in a file of 8 bits. Negative samples,
   larger ones and floats are refused.
3. Colour. Transparency is composited over white. Palettes, CMYK and the like
   become RGB. Then 3 channels are RGB, and 1 channel is Pillow's 'L' (ITU-R 601
   luma).
4. Shape. The image is cropped to the largest centred square, or the largest
   centred rectangle of the wanted proportions (an odd pixel is cut off on the
   right or at the bottom), and resized to image_size with Pillow's BICUBIC,
   which is antialiased. Smaller images are enlarged in the same way. An image
   that has the size already is not changed.

Images for evaluation must not be changed silently. A `Rule` can therefore
refuse images that would have to be resized.
"""

import contextlib
import dataclasses
import errno
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from diffusion_jax.data import sources
from diffusion_jax.system.errors import UserError, one_line

# Detected from the content, not the file name. Only these, to limit the
# decoders that an untrusted file can reach.
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM')

_PNG = b'\x89PNG\r\n\x1a\n'
_BITS_PER_SAMPLE = 258  # a tag of TIFF

# EXIF orientation -> how to turn the stored image upright.
_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}

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
    bits: bits of a grey sample, 1 to 16; 0 = as each file says.
  """

  image_size: tuple[int, int]
  channels: int
  is_size_exact: bool = False
  bits: int = 0

  @property
  def shape(self) -> tuple[int, int, int]:
    return *self.image_size, self.channels


def check_channels(channels: int | None) -> None:
  """Raises UserError unless image files can be read with these channels."""
  if channels not in (None, 1, 3):
    raise UserError(f'channels is {channels}: use 1 (grey) or 3 (RGB)')


class Broken(UserError):
  """An image that cannot be read, here or on any host; the message names it.

  Not one that cannot be read at the moment, because of the disk or the memory.
  """


# Index of an image -> a path or a file open for reading bytes, and a name for
# errors.
Open = Callable[[int], tuple[str | BinaryIO, str]]


def rule_of(open_fn: Open, count: int, wanted: sources.Wanted) -> Rule:
  """The rule of a set; what is not wanted explicitly is as in the images.

  Without `wanted.image_size`, all images must be squares of the first one's
  size. Without `wanted.channels`, the set is grey if every image is; the
  headers are read up to the first image in colour.

  Args:
    open_fn: see `Open`.
    count: number of images.
    wanted: the requested size, channels and bits.

  Raises:
    UserError: the first image cannot be read, or is not square and image_size
      is None.
  """
  size, channels = wanted.image_size, wanted.channels
  if size is None:
    file, name = open_fn(0)
    with reading(name):
      image = _decode(file)
    if image.width != image.height:
      raise UserError(
        f'image {name} is {_size(image)} and must be square: {_RESIZING}'
      )
    size = (image.height, image.width)
  if channels is None:
    heads = headers(open_fn, range(count))
    channels = 1 if all(head.is_grey for head in heads) else 3
  return Rule(size, channels, wanted.image_size is None, wanted.bits)


class Header(NamedTuple):
  """What the header of an image file says.

  Attributes:
    is_grey: whether the image is grey, with 1, 8 or 16 bits.
    is_animated: whether it has several frames or pages.
  """

  is_grey: bool
  is_animated: bool


def headers(open_fn: Open, indices: Iterable[int]) -> Iterator[Header]:
  """The headers of images; those that cannot be read are skipped.

  Args:
    open_fn: see `Open`.
    indices: the images.
  """
  for index in indices:
    with contextlib.suppress(Broken):
      file, name = open_fn(index)
      with reading(name):
        header = _header(file)
      yield header


def size_of(file: str | BinaryIO) -> tuple[int, int] | None:
  """(width, height) of an image file, as stored; None if it is broken."""
  with (
    contextlib.suppress(UserError),
    reading(str(file)),
    Image.open(file, formats=FORMATS) as image,
  ):
    return image.size
  return None


def brightest(file: str | BinaryIO, name: str) -> tuple[int, int]:
  """The largest sample of an image, and the bits of its samples, 8 or 16.

  Args:
    file: a path, or a file open for reading bytes.
    name: what to call the image in errors.

  Raises:
    Broken: the image cannot be read.
    UserError: its samples are floats, which have no range.
  """
  with reading(name):
    image = _decode(file)
    if image.mode == 'F':
      raise UserError(f'image {name} has floats')
    if _is_wide(image):
      return int(np.asarray(image).max()), 16
    return int(np.asarray(image.convert('RGB')).max()), 8


def read(file: str | BinaryIO, name: str, rule: Rule) -> np.ndarray:
  """Reads an image by the rules in the module docstring.

  Args:
    file: a path, or a file open for reading bytes.
    name: what to call the image in errors.
    rule: the size and channels to convert to.

  Returns:
    uint8 [height, width, channels].

  Raises:
    Broken: the image cannot be read, or is too large.
    UserError: the rule refuses it.
  """
  height, width = rule.image_size
  with reading(name):
    image = _decode(file)
    if rule.is_size_exact and image.size != (width, height):
      raise UserError(
        f'image {name} is {_size(image)} and the first one {width}x{height}: '
        f'{_RESIZING}'
      )
    image = _eight_bits(image, rule.bits, name)
    return fit(image, rule.image_size, rule.channels)


def whole(file: str | BinaryIO, name: str) -> np.ndarray:
  """Reads an image at its own size, in RGB.

  Args:
    file: a path, or a file open for reading bytes.
    name: what to call the image in errors.

  Returns:
    uint8 [height, width, 3].

  Raises:
    Broken: the image cannot be read, or is too large.
    UserError: its samples are negative, too large or floats.
  """
  with reading(name):
    return np.asarray(_to_rgb(_eight_bits(_decode(file), 0, name)))


def opacity(file: str | BinaryIO, name: str) -> np.ndarray | None:
  """The alpha channel of an image: uint8 [height, width]; None without one.

  Args:
    file: a path, or a file open for reading bytes.
    name: what to call the image in errors.
  """
  with reading(name):
    image = _decode(file)
    clear = image.has_transparency_data
    return np.asarray(image.convert('RGBA').getchannel('A')) if clear else None


def fit(
  image: Image.Image, image_size: tuple[int, int], channels: int
) -> np.ndarray:
  """Applies rules 3 and 4: uint8 [height, width, channels]."""
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


def _header(file: str | BinaryIO) -> Header:
  try:
    with Image.open(file, formats=FORMATS) as image:
      return Header(_is_grey(image), getattr(image, 'is_animated', False))
  except Exception:  # a PNG may be readable without its remarks
    return Header(_is_grey(_decode(file)), False)


def _decode(file: str | BinaryIO) -> Image.Image:
  """Applies rule 1."""
  try:
    return _upright(file)
  except Exception as error:
    if bare := _without_remarks(file):
      return _upright(bare)
    if isinstance(error, UnidentifiedImageError):
      kinds = ', '.join(FORMATS)
      raise ValueError(
        f'it is none of {kinds}, or a variant that Pillow does not read'
      ) from error
    raise


def _upright(file: str | BinaryIO) -> Image.Image:
  with Image.open(file, formats=FORMATS) as image:
    image.load()
    try:
      turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception as error:  # damaged EXIF raises anything
      if not _lasts(error):  # a fault of the disk, not of the file
        raise
      turn = None  # the pixels are whole
    # TIFF declares samples of 12 bits, which Pillow holds in 16.
    bits = getattr(image, 'tag_v2', {}).get(_BITS_PER_SAMPLE)
    upright = image.copy() if turn is None else image.transpose(turn)
    if image.mode.startswith('I;16') and bits == (12,):
      upright = Image.fromarray(np.asarray(upright) << 4)
    return upright


def _without_remarks(file: str | BinaryIO) -> BinaryIO | None:
  """A PNG without the chunks that its pixels do not need; None for others.

  Pillow refuses files with a damaged remark, or one above a megabyte.
  """
  if isinstance(file, str):
    content = Path(file).read_bytes()
  else:
    file.seek(0)
    content = file.read()
  if not content.startswith(_PNG):
    return None
  kept, at = [_PNG], len(_PNG)
  while at < len(content):  # length, name, data, checksum
    end = at + 12 + int.from_bytes(content[at : at + 4])
    name, checksum = content[at + 4 : at + 8], content[end - 4 : end]
    is_whole = zlib.crc32(content[at + 4 : end - 4]) == int.from_bytes(checksum)
    if name[:1].isupper() or name == b'tRNS' or (name == b'eXIf' and is_whole):
      kept.append(content[at:end])
    at = end
  return io.BytesIO(b''.join(kept))


def _eight_bits(image: Image.Image, bits: int, name: str) -> Image.Image:
  """Applies rule 2.

  Args:
    image: any mode.
    bits: bits of a grey sample; 0 = as the mode says.
    name: what to call the image in errors.
  """
  if not _is_wide(image) and not (0 < bits < 8 and image.mode == 'L'):
    return image
  samples = np.asarray(image)
  low, high = samples.min(), samples.max()
  bits = bits or 16
  if image.mode == 'F' or low < 0 or high >= 2**bits:
    found = f'samples from {low:g} to {high:g}'
    raise UserError(
      f'image {name} has {found}, not whole numbers of {bits} bits (0 to '
      f'{2**bits - 1}): save it with 8 or 16 bits'
    )
  if bits > 8:
    return Image.fromarray((samples >> (bits - 8)).astype(np.uint8))
  spread = np.rint(samples * (255 / (2**bits - 1)))
  return Image.fromarray(spread.astype(np.uint8))


def _is_wide(image: Image.Image) -> bool:
  """Whether samples have more than 8 bits."""
  return image.mode.startswith('I') or image.mode == 'F'


def _is_grey(image: Image.Image) -> bool:
  """Whether the mode is grey: 1, 8 or 16 bits, with or without transparency."""
  return Image.getmodebase(image.mode) == 'L'


def _size(image: Image.Image) -> str:
  return f'{image.width}x{image.height}'


def _to_rgb(image: Image.Image) -> Image.Image:
  """Any mode of 8 bits -> 'RGB'; grey stays exactly grey."""
  if image.has_transparency_data:
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image.convert('RGBA'))
  return image.convert('RGB')


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
  """Turns the errors of reading an image into UserError, or Broken if it lasts.

  Args:
    name: what to call the image.
  """
  try:
    with one_line(
      f'image {name} cannot be read: ', '; replace it or remove it'
    ):
      yield
  except UserError as error:
    if _lasts(error.__cause__):
      raise Broken(str(error)) from error.__cause__
    raise


def _lasts(cause: BaseException | None) -> bool:
  """Whether an error is one of the file: Pillow's errors have no errno."""
  if isinstance(cause, OSError):
    return cause.errno in (None, errno.ENOENT, errno.ELOOP)
  return cause is not None and not isinstance(cause, MemoryError)
