"""Opens a set of images for evaluation, by the name a user types.

The image size is read from the images. They are never resized silently, because
the method of resizing changes the FID (arXiv 2104.11222).
"""

import dataclasses
import os

from diffusion_jax.data import arrays, digits, folders, prepared, sources
from diffusion_jax.system.errors import UserError


def open_set(
  text: str,
  *,
  path: str = '',
  image_size: int | tuple[int, int] | None = None,
  channels: int | None = None,
) -> sources.Source:
  """Opens a set of images for evaluation.

  Args:
    text: the set, optionally followed by a split, as in 'tfds:cifar10@test':
      'train' (the default; all images of a folder), 'test', or for TFDS any of
      its split strings. A folder or file of the exact name takes precedence:
        DIR             a folder of image files, see folders.py;
        FILE.npy, .npz  uint8 images, see arrays.py;
        digits          scikit-learn's 8x8 digits;
        tfds:NAME       a prepared TensorFlow data set, see prepared.py.
    path: TFDS's data_dir, '' for TFDS's default; unused for other sets.
    image_size: height and width of the images, in pixels. None reads them as
      they are: all must be squares of the same size. With a number, files and
      TFDS sets are cropped to the centre square and resized (Pillow's bicubic);
      arrays and the digits must have that size.
    channels: 1 (grey) or 3 (RGB). Files and TFDS sets are converted; arrays
      must have that number, which can be any. None uses the first image's; if
      that is grey, images in colour are refused.

  Returns:
    A `Source`, with labels if the set has them. Its first image has been read;
    reading another one that is damaged or refused raises UserError.

  Raises:
    UserError: the text names no set, or the set has no images, no such split,
      or images that are damaged or refused.
  """
  image_size = sources.sides('image_size', image_size)
  if channels is not None and channels < 1:
    raise UserError(f'channels is {channels}: use 1 or more')
  sources.check_local(text, repr(text))
  sources.check_local(path, repr(path))
  name, split = _parse(text)
  wanted = sources.Wanted(split, image_size, channels)
  source = _open(text, name, path, wanted)
  source[0]  # fails early if the first image is damaged
  return source


def _open(
  text: str, name: str, path: str, wanted: sources.Wanted
) -> sources.Source:
  """Like open_set, for arguments in range."""
  place = os.path.expanduser(name)
  is_folder = os.path.isdir(place)
  is_array = os.path.isfile(place) and name.endswith(('.npy', '.npz'))
  is_tfds = name.startswith('tfds:') and not os.path.exists(place)
  is_digits = name == 'digits' and not os.path.exists(place)
  if not wanted.split or not (is_folder or is_array or is_digits or is_tfds):
    raise UserError(
      f'{text!r} names no set of images: give a folder of image files or a '
      '.npy or .npz file that exists, digits, or tfds:NAME, optionally with a '
      'split, such as tfds:cifar10@test'
    )
  if wanted.split not in ('train', 'test') and not is_tfds:
    raise UserError(
      f'split {wanted.split!r} of {name!r} is not known: use train or test'
    )

  if is_digits:
    return digits.create(wanted)
  if is_tfds:
    source = prepared.create(name, path, wanted)
  else:
    kind = folders if is_folder else arrays
    source = kind.create(name, wanted, repr(name))
  if source is None:
    raise UserError(
      f'{text!r} has no test images: leave @test out, or give another set'
    )
  size = wanted.image_size
  if size and not is_array:
    description = (
      f'{source.description}; those of another size are cropped and resized to '
      f"{size[0]}x{size[1]} (Pillow's bicubic)"
    )
    source = dataclasses.replace(source, description=description)
  return source


def _parse(text: str) -> tuple[str, str]:
  """'NAME@SPLIT' -> (NAME, SPLIT), unless a file has this name."""
  name, at, split = text.rpartition('@')
  if not at or os.path.exists(os.path.expanduser(text)):
    return text, 'train'
  return name, split
