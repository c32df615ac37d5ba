"""Latents of images, computed before training and kept in a folder.

  latents.json                  what they are of, and the SHA-256 of each file
  train/000000000-000000255.npy float32 [n, 2, h, w, m], the encoder's output of
                                the images with these indices, as they are and
                                mirrored; [n, 1, h, w, m] if no image is
  test/...                      of the held-out images, as they are

Files are written atomically and in order, so an interrupted job goes on.
"""

import bisect
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping

import numpy as np

from diffusion_jax.data import identity
from diffusion_jax.data.sources import Source
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError

ABOUT = 'latents.json'
KEYS = frozenset(('weights', 'from', 'shape', 'per_file', 'splits'))
PER_FILE = 256  # images
ROW = 'moments'  # the name of latents in a batch
AGAIN = 'run diffusion_jax.encode again, which computes what is missing'


def name_of(first: int, end: int) -> str:
  """The name of the file of the images from `first` to before `end`."""
  return f'{first:09d}-{end - 1:09d}.npy'


def read_about(
  folder, name: str = ABOUT, keys: frozenset = KEYS, advice: str = AGAIN
) -> dict | None:
  """Reads what a folder says of itself; None if there is no such file.

  Args:
    folder: the folder.
    name: the name of the file.
    keys: what it must have.
    advice: what to do about a damaged one.

  Raises:
    UserError: it is damaged.
  """
  path = files.at(folder).expanduser() / name
  if not path.exists():
    return None
  try:
    about = json.loads(path.read_text())
    if not keys <= about.keys():
      raise ValueError('it holds something else')
    return about
  except (OSError, ValueError, AttributeError) as e:
    raise UserError(f'{path} is unreadable ({e}): {advice}') from e


def write_about(folder, about: Mapping) -> None:
  """Writes latents.json."""
  files.write_json(files.at(folder) / ABOUT, about)


def bounds(count: int, per_file: int) -> list[tuple[int, int]]:
  """(first, end) of the images of each file."""
  return [
    (first, min(first + per_file, count)) for first in range(0, count, per_file)
  ]


def write(path, latents: np.ndarray) -> str:
  """Writes one file; returns its SHA-256."""
  files.make(files.at(path).parent)
  with files.replacing(path) as file:
    np.save(file, latents)
  return sha256_of(path)


def sha256_of(path) -> str:
  """The SHA-256 of a file; '' if there is none."""
  path = files.at(path)
  if not path.exists():
    return ''
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def opened(
  folder, split: str, source: Source, weights: str, origin: str, flip: bool
) -> Source:
  """The latents of a source, in its place.

  Args:
    folder: from `diffusion_jax.encode`.
    split: 'train' or 'test', the name of its sub-folder.
    source: the images; they are not read.
    weights: the fingerprint of the autoencoder.
    origin: where it comes from, for messages.
    flip: whether mirrored latents are needed.

  Returns:
    A source of the same length and labels. Its records hold, in place of an
    image, 'moments' [E, h, w, m]: as they are, and if E = 2 mirrored.

  Raises:
    UserError: there are no such latents, they are incomplete, or of other
      images or weights.
  """
  about = read_about(folder)
  given = f'codec.cache={folder}'
  if about is None:
    raise UserError(
      f'{given} holds no latents: write them with python -m '
      'diffusion_jax.encode'
    )
  if about['weights'] != weights:
    raise UserError(
      f'{given} holds latents of other weights ({about["from"]}) than those of '
      f'the run ({origin}): encode into a new folder, or leave codec.cache out'
    )
  kept = about['splits'].get(split)
  if kept is None:
    raise UserError(f'{given} has no latents of the split {split}: {AGAIN}')
  told = identity.difference(
    kept['images'], source.identity, 'in the cache', 'in the data'
  )
  if told:
    raise UserError(
      f'{given} holds latents of other images: {told}: encode into a new '
      'folder, or leave codec.cache out'
    )
  if flip and kept['copies'] < 2:
    raise UserError(
      f'{given} has no mirrored latents, and data.flip=True: encode into a new '
      'folder with data.flip=True, or set data.flip=False'
    )
  shape = (kept['copies'], *about['shape'])
  read = _reader(
    files.at(folder).expanduser() / split, len(source), about['per_file'],
    shape, given,
  )  # fmt: skip
  label = source.label_fn or (lambda index: source.read_fn(index)[1])
  if not source.num_classes:
    label = lambda index: -1  # noqa: E731
  size = 'x'.join(map(str, about['shape']))
  return dataclasses.replace(
    source,
    read_fn=lambda index: (read(index), label(index)),
    description=f'{source.description}, as latents of {size} from {folder}',
    row=ROW,
  )


def _reader(folder, count, per_file, shape, given) -> Callable:
  """index -> float32 [E, h, w, m], memory-mapped."""
  spans = bounds(count, per_file)
  firsts = [first for first, _ in spans]

  @functools.cache
  def mapped(number):
    first, end = spans[number]
    path = folder / name_of(first, end)
    try:
      array = files.mapped(path)
    except (OSError, ValueError) as e:
      raise UserError(
        f'{given}: {path.name} cannot be read ({e}): {AGAIN}'
      ) from e
    if array.shape != (end - first, *shape) or array.dtype != np.float32:
      raise UserError(
        f'{given}: {path.name} has {array.dtype} {list(array.shape)}, not '
        f'float32 {[end - first, *shape]}: {AGAIN}'
      )
    return array

  for number in range(len(spans)):  # a missing file is found before training
    mapped(number)

  def read(index):
    number = bisect.bisect_right(firsts, index) - 1
    return mapped(number)[index - firsts[number]]

  return read
