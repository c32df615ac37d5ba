"""Opens a set of images for evaluation, by the name a user types.

The image size is read from the images. They are never resized silently, because
the method of resizing changes the FID (arXiv 2104.11222).
"""

import dataclasses
import os

from diffusion_jax.data import arrays, digits, emoji, folders, shards, sources
from diffusion_jax.system.errors import UserError

KINDS = {
  'digits': digits,
  'emoji': emoji,
  'arrays': arrays,
  'folder': folders,
  'webdataset': shards,
}
NAMED = ('digits', 'emoji')  # sets that need no path


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
      'train' (the default; all images of a folder without splits, see
      layouts.py), 'test', 'all' of sets without test images of their own, or
      for TFDS any of its split strings. A folder or file of the exact name
      takes precedence:
        DIR             a folder of image files, see folders.py;
        FILE.npy, .npz  uint8 images, see arrays.py;
        FILE.tar        a shard of images, see shards.py;
        digits          scikit-learn's 8x8 digits;
        emoji           drawn from Noto Color Emoji, see emoji.py;
        tfds:NAME       a prepared TensorFlow data set, see prepared.py.
    path: TFDS's data_dir, '' for TFDS's default; the font of the emoji, '' for
      an installed one; unused for other sets.
    image_size: height and width of the images, in pixels. None reads them as
      they are: all must be squares of the same size. With a number, files and
      TFDS sets are cropped to the centre square and resized (Pillow's bicubic);
      arrays and the digits must have that size.
    channels: 1 (grey) or 3 (RGB). Files and TFDS sets are converted, and grey
      arrays to RGB; other arrays must have that number, which can be any. None
      takes files for grey if all are, otherwise for RGB.

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
  kind = _kind(name)
  if not split or not kind:
    raise UserError(
      f'{text!r} names no set of images{_why_not(name)}: give a folder of '
      'image files or a .npy or .npz file that exists, digits, or tfds:NAME, '
      'optionally with a split, such as tfds:cifar10@test'
    )
  place = path if kind.startswith('tfds:') or kind in NAMED else name
  source = open_kind(kind, place, wanted, repr(name))
  if source is None:
    raise UserError(
      f'{text!r} has no test images: leave @test out, or give another set'
    )
  if image_size and kind not in ('arrays', *NAMED):
    height, width = image_size
    description = (
      f'{source.description}; those of another size are cropped and resized to '
      f"{height}x{width} (Pillow's bicubic)"
    )
    source = dataclasses.replace(source, description=description)
  source[0]  # fails early if the first image is damaged
  return source


def open_kind(
  kind: str, path: str, wanted: sources.Wanted, what: str
) -> sources.Source | None:
  """Opens a set of a known kind.

  Args:
    kind: a key of KINDS, or 'tfds:NAME'.
    path: the file or folder, TFDS's data_dir, or the emoji's font; unused for
      the digits.
    wanted: the requested split, size and channels.
    what: what to call the set in errors.

  Returns:
    A `Source`, or None for split 'test' if no images are held out.

  Raises:
    UserError: as for `data.create`.
  """
  if kind.startswith('tfds:'):
    # It imports TFDS, which takes most of a second.
    from diffusion_jax.data import prepared

    return prepared.create(kind, path, wanted)
  if wanted.split not in ('train', 'test', sources.ALL):
    raise UserError(
      f'split {wanted.split!r} of {what} is not known: use train, test or '
      f'{sources.ALL}'
    )
  return KINDS[kind].create(path, wanted, what)


def _kind(name: str) -> str:
  """The kind that `open_kind` takes, or ''."""
  place = os.path.expanduser(name)
  if os.path.isdir(place):
    return 'folder'
  if os.path.isfile(place) and name.endswith(('.npy', '.npz')):
    return 'arrays'
  if os.path.isfile(place) and name.endswith('.tar'):
    return 'webdataset'
  is_named = name in NAMED or name.startswith('tfds:')
  return name if is_named and not os.path.exists(place) else ''


def _why_not(name: str) -> str:
  """A remark on a file that is no set of images, or ''."""
  is_archive = os.path.isfile(
    os.path.expanduser(name)
  ) and name.lower().endswith(folders.ARCHIVES)
  return ' (unpack the archive)' * is_archive


def _parse(text: str) -> tuple[str, str]:
  """'NAME@SPLIT' -> (NAME, SPLIT), unless a file has this name."""
  name, at, split = text.rpartition('@')
  if not at or os.path.exists(os.path.expanduser(text)):
    return text, 'train'
  return name, split
