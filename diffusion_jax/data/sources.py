"""The interface of image sources, and the rule for held-out images."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from diffusion_jax.data import identity
from diffusion_jax.system import terminal
from diffusion_jax.system.errors import UserError, one_line

KEEP_BYTES = 2**30
ALL = 'all'  # the split of all images


class Wanted(NamedTuple):
  """The requested split, size and channels of a set of images.

  Attributes:
    split: 'train', 'test', or 'all' for both if the set itself does not divide
      them; for TFDS any split string.
    image_size: (height, width) of the images, in pixels; None for any square,
      for image files the first one's size.
    channels: number of channels, 1 or 3 for files; None for any, for image
      files 1 if all are grey, otherwise 3.
    heldout_every: see `heldout_indices`.
    classes: 'auto', 'folders' or 'none', see layouts.py.
    bits: bits of a grey sample, see images.py.
    captions: 'auto', or the name of the column of captions, see captions.py.
    has_config: whether a config's keys can be changed; messages then name them.
  """

  split: str
  image_size: tuple[int, int] | None
  channels: int | None
  heldout_every: int = 0
  classes: str = 'auto'
  bits: int = 0
  captions: str = 'auto'
  has_config: bool = False


def sides(name: str, image_size) -> tuple[int, int] | None:
  """An image size as (height, width).

  Args:
    name: the name of the setting, for the message.
    image_size: one number for squares, a pair, or None, which is returned.

  Raises:
    UserError: image_size is something else.
  """
  if image_size is None:
    return None
  pair = (image_size,) * 2 if isinstance(image_size, int) else image_size
  if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
    raise UserError(
      f'{name} is {image_size}: use 1 or more, or (height, width)'
    )
  return tuple(pair)


@dataclasses.dataclass(frozen=True)
class Source:
  """Random access to images; safe to read from several threads.

  `len(source)` is the number of images and `source[i]` is

    {'image': uint8 [height, width, channels], 'label': np.int32}

  with label -1 if the set has no labels, so `grain.MapDataset.source` accepts
  it. The image may be a read-only view: copy it before writing to it.

  Attributes:
    num_images: the number of images.
    read_fn: index in [0, num_images) -> (image, label).
    num_classes: labels are in [0, num_classes); 0 for an unlabelled set.
    description: one line for the log.
    notes: what was understood, assumed or passed over, a sentence each.
    broken: index of a broken image -> its error, for the images that were met
      and left out, see `broken.left_out`.
    contents: what the set consists of; None takes the images themselves.
    class_names: the names of the classes, by label; () if they have none.
    label_fn: index -> label, without decoding the image; None if there is no
      cheaper way than `read_fn`.
    caption_fn: index -> the captions of the image, one or more, some perhaps
      empty, without decoding it; None for a set without captions. The first
      call may read all, and raise UserError.
    encode_fn: makes tokens of captions, see `captions.encoded`; None for none.
    rows_fn: tokens int32 [R, length] -> further rows {name: [R, ...]}, see
      `encoded_captions`; None for none.
    stand_in_fn: index -> that of the image that was read in its place, see
      `broken.left_out`.
    row: the name of what `read_fn` gives: 'image', or 'moments' [E, h, w, m]
      float32, latents of the image and, if E = 2, of its mirror image.
  """

  num_images: int
  read_fn: Callable[[int], tuple[np.ndarray, int]]
  num_classes: int
  description: str
  notes: tuple[str, ...] = ()
  broken: Mapping[int, str] = dataclasses.field(default_factory=dict)
  contents: identity.Contents | None = None
  class_names: tuple[str, ...] = ()
  label_fn: Callable[[int], int] | None = None
  caption_fn: Callable[[int], tuple[str, ...]] | None = None
  encode_fn: Callable[[list[str]], np.ndarray] | None = None
  rows_fn: Callable[[np.ndarray], dict[str, np.ndarray]] | None = None
  stand_in_fn: Callable[[int], int] = lambda index: index
  row: str = 'image'

  def __len__(self) -> int:
    return self.num_images

  def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
    index = operator.index(index)
    if not 0 <= index < self.num_images:
      raise IndexError(f'image {index} of {self.num_images}')
    image, label = self.read_fn(index)
    return {self.row: image, 'label': np.int32(label)}

  @functools.cached_property
  def identity(self) -> dict:
    """What a run remembers of these images, see identity.py.

    Raises:
      UserError: a file is gone or cannot be read.
    """
    with one_line(f'{self.description}: '):
      return identity.of(contents_of(self))


def contents_of(source: Source, with_labels=True) -> identity.Contents:
  """What a set consists of; without files, its images and labels."""
  if source.contents:
    return source.contents

  def read(index):
    image, label = source.read_fn(index)
    labelled = np.int32(label).tobytes() * with_labels
    return labelled + np.ascontiguousarray(image).tobytes()

  image, _ = source.read_fn(0)
  shape = 'x'.join(map(str, image.shape))
  return identity.Contents(len(source), read, f'{image.dtype} {shape}')


def create(
  name: str,
  num_images: int,
  shape: tuple[int, int, int],
  num_classes: int,
  read_fn: Callable,
  notes: Sequence[str] = (),
  contents: identity.Contents | None = None,
  class_names: Sequence[str] = (),
  label_fn: Callable[[int], int] | None = None,
  caption_fn: Callable[[int], tuple[str, ...]] | None = None,
) -> Source:
  """Makes a Source with a description from its name and sizes.

  Args:
    name: the name of the set and its split.
    num_images: see `Source`.
    shape: (height, width, channels).
    num_classes: see `Source`.
    read_fn: see `Source`.
    notes: see `Source`.
    contents: see `Source`.
    class_names: see `Source`.
    label_fn: see `Source`.
    caption_fn: see `Source`.
  """
  size = 'x'.join(map(str, shape))
  labels = f'{num_classes} classes' if num_classes else 'unlabelled'
  description = f'{name}: {num_images} images of {size}, {labels}'
  return Source(
    num_images,
    read_fn,
    num_classes,
    description,
    notes=tuple(notes),
    contents=contents,
    class_names=tuple(class_names),
    label_fn=label_fn,
    caption_fn=caption_fn,
  )


def say_notes(*opened: Source | None) -> None:
  """Prints the notes of sources on stderr, each once; None has none."""
  notes = (note for source in opened if source for note in source.notes)
  for note in dict.fromkeys(notes):
    terminal.say(f'data: {note}')


def keep_in_memory(source: Source, shape: tuple[int, int, int]) -> Source:
  """Caches decoded images in memory, unless the set exceeds KEEP_BYTES.

  Decoding a CIFAR-10 image takes a hundred times as long as copying it, and
  the whole set is 154 MB. Images are cached when they are first read; images of
  larger sets are decoded each time.

  Args:
    source: a source of read-only images of the given shape.
    shape: (height, width, channels).

  Returns:
    A Source of the same images.
  """
  if len(source) * (math.prod(shape) + 500) > KEEP_BYTES:  # 500 for Python
    return source
  return dataclasses.replace(source, read_fn=functools.cache(source.read_fn))


def check_local(path: str, what: str) -> None:
  """Raises UserError, with a message starting with `what`, if path is a URL."""
  if '://' in path:
    raise UserError(
      f'{what}: data need random access on a local disk; copy them to one, or '
      'mount the bucket as a folder (gcsfuse)'
    )


def heldout_indices(
  num_images: int, wanted: Wanted, named: Sequence[int] = ()
) -> np.ndarray | None:
  """The indices of a split in which every n-th image is 'test'.

  Args:
    num_images: size of the whole set.
    wanted: the split and n = heldout_every: images n - 1, 2 n - 1, ... are
      'test'; 0 holds out none. 'all' are all images.
    named: indices of further images that are 'test'.

  Returns:
    int64 indices in ascending order; None for 'test' if there are none.

  Raises:
    UserError: the set is too small to hold out a single image.
  """
  indices = np.arange(num_images)
  split, every = wanted.split, wanted.heldout_every
  if split == ALL or (not every and not len(named)):
    return None if split == 'test' else indices
  if num_images < every:
    raise UserError(
      f'data.heldout_every is {every}, but the set has only {num_images} '
      'images: use a smaller number, or 0 to hold out none'
    )
  is_test = np.isin(indices, named)
  if every:
    is_test |= indices % every == every - 1
  return indices[is_test if split == 'test' else ~is_test]


def check_split(wanted: Wanted, what: str) -> None:
  """Checks the split of a set that has test images of its own.

  Args:
    wanted: the split.
    what: what to call the set in the error.

  Raises:
    UserError: all images are wanted.
  """
  if wanted.split == ALL:
    raise UserError(
      f'split {ALL!r} of {what}: it has test images of its own: use train or '
      'test'
    )
