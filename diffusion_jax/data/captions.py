"""The captions of images: checked, hashed, chosen, and read without images.

An image may have several captions, of which training takes one, chosen by the
image's position in the stream. An empty caption stands for none: the network
learns the picture without words.
"""

import array
import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.data.sources import Source
from diffusion_jax.system import terminal
from diffusion_jax.system.errors import UserError

AUTO = 'auto'
COLUMNS = ('captions', 'caption', 'texts', 'text')  # looked for, in this order
DESCRIBED = 100_000  # images whose captions are hashed, evenly spaced
MANY = 10_000  # captions of files: reading them takes seconds
AT_ONCE = 1024  # captions that become tokens in one call
THREADS = 16  # that wait for a disk
_SHOWN = 3  # names in a message
_ANYWHERE = (
  'give NAME.txt beside each image, a metadata.jsonl or captions.csv in a '
  "folder, or an array 'captions' in a .npz file"
)


class Captions(NamedTuple):
  """The captions of images, in little more memory than their letters.

  Attributes:
    content: all captions, one after the other, in UTF-8.
    ends: int64 [M + 1], caption k is content[ends[k] : ends[k + 1]].
    firsts: int64 [N + 1], image i has the captions from firsts[i] to before
      firsts[i + 1].
  """

  content: bytes
  ends: np.ndarray
  firsts: np.ndarray

  def of(self, index: int) -> tuple[str, ...]:
    """The captions of an image."""
    first, end = self.firsts[index : index + 2]
    at = self.ends[first : end + 1]
    return tuple(self.content[a:b].decode() for a, b in itertools.pairwise(at))


def pack(each: Iterable[Sequence[str]]) -> Captions:
  """Packs the captions of each image; an image without any gets an empty one.

  Halves of letters (lone surrogates), which JSON can hold, become '?'.
  """
  content, ends, firsts = bytearray(), array.array('q', [0]), [0]
  for texts in each:
    for text in texts or ('',):
      content += text.encode(errors='replace')
      ends.append(len(content))
    firsts.append(len(ends) - 1)
  packed = (np.array(x, np.int64) for x in (ends, firsts))
  return Captions(bytes(content), *packed)


def strings(value: Any) -> list[str] | None:
  """A value of a column as captions, stripped; None if it is no text.

  Args:
    value: a text, or a list of texts.
  """
  texts = [value] if isinstance(value, str) else value
  if not isinstance(texts, list) or not all(isinstance(x, str) for x in texts):
    return None
  return [text.strip() for text in texts]


def column(names: Iterable[str], asked: str, where: str) -> str | None:
  """The name of the column of captions; None if 'auto' finds none.

  Args:
    names: the columns that there are.
    asked: the config's data.captions: a name, or 'auto' for one of COLUMNS.
    where: what to call the place in the error.

  Raises:
    UserError: there is no column of the name that is asked for.
  """
  names = [*names]
  if asked == AUTO:
    return next((name for name in COLUMNS if name in names), None)
  if asked not in names:
    # In an order of their own, since some sources have none.
    shown = ', '.join(sorted(names)[:10]) or 'nothing'
    raise UserError(
      f'data.captions={asked!r}: {where} has {shown}: name one of these, or '
      f'use {AUTO}'
    )
  return asked


def check_whole(
  lost: int, count: int, names: Iterable[str], where: str
) -> None:
  """Checks that every image has a caption.

  Args:
    lost: the number of images without one.
    count: the number of images.
    names: those of the images without one.
    where: what holds the captions, for the message.

  Raises:
    UserError: some have none; it counts them and names the first.
  """
  if lost:
    shown = ', '.join(map(repr, itertools.islice(names, _SHOWN)))
    raise UserError(
      f'{where} has no caption for {lost:,} of {count:,} images ({shown}'
      f'{", ..." * (lost > _SHOWN)}): add them (an empty one trains without '
      'words), or remove these images'
    )


def check(train: Source, heldout: Source | None) -> None:
  """Checks that images have captions, and reads those of files.

  Args:
    train: the training images.
    heldout: the held-out images, or None.

  Raises:
    UserError: the set has no captions, or some images have none.
  """
  for source in (train, heldout):
    if source is None:
      continue
    if source.caption_fn is None:
      raise UserError(
        "conditioning.name='text' needs a caption for each image, but "
        f'{source.description} has none: {_ANYWHERE}, or set '
        "conditioning.name='none'"
      )
    told = terminal.waiting(f'reading captions of {len(source):,} images')
    with told if len(source) > MANY else contextlib.nullcontext():
      source.caption_fn(0)


def describe(source: Source) -> dict:
  """What a run remembers of the captions of its images.

  Args:
    source: the images, checked by `check`.

  Returns:
    {'images': the number of images looked at, at most DESCRIBED, evenly spaced
    in the set; 'captions': the number of their captions; 'empty': how many of
    these are empty; 'sha256': of all, in order}.
  """
  count = min(len(source), DESCRIBED)
  digest, number, empty = hashlib.sha256(), 0, 0
  for texts in of(source, np.arange(count) * len(source) // max(count, 1)):
    for text in texts:
      letters = text.encode(errors='replace')
      digest.update(len(letters).to_bytes(8) + letters)
    digest.update(b'\n')  # the end of an image
    number += len(texts)
    empty += sum(not text for text in texts)
  found = {'images': count, 'captions': number, 'empty': empty}
  return {**found, 'sha256': digest.hexdigest()}


def of(source: Source, indices: np.ndarray) -> Iterable[tuple[str, ...]]:
  """The captions of some images, in the order of the indices."""
  with futures.ThreadPoolExecutor(THREADS) as pool:
    for start in range(0, len(indices), AT_ONCE):
      part = indices[start : start + AT_ONCE]
      yield from pool.map(lambda i: source.caption_fn(int(i)), part)


def encoded(source: Source, encode_fn: Callable) -> Source:
  """The same images; batches of them have 'tokens', int32 [R, length].

  Args:
    source: images with captions.
    encode_fn: list of n texts -> int32 [n, length], token ids.
  """
  return dataclasses.replace(source, encode_fn=encode_fn)


def with_rows(source: Source, rows_fn: Callable) -> Source:
  """The same images; batches of them also have rows of their tokens.

  Args:
    source: images from `encoded`.
    rows_fn: see `Source`.
  """
  return dataclasses.replace(source, rows_fn=rows_fn)


def chosen(
  source: Source, indices: np.ndarray, choices: np.ndarray
) -> list[str]:
  """One caption of each image.

  Args:
    source: images that were read.
    indices: [R] which ones.
    choices: uint32 [R], from which one of several captions is chosen.
  """
  texts = []
  for index, choice in zip(indices, choices, strict=True):
    several = source.caption_fn(source.stand_in_fn(int(index)))
    texts.append(several[int(choice) % len(several)])
  return texts


def tokens(
  source: Source, indices: np.ndarray, choices: np.ndarray
) -> np.ndarray:
  """The tokens of one caption of each image: int32 [R, length].

  Args:
    source: images that were read, from `encoded`.
    indices: [R] which ones.
    choices: uint32 [R], see `chosen`.
  """
  texts = chosen(source, indices, choices)
  return np.asarray(source.encode_fn(texts), np.int32)


def all_tokens(source: Source) -> dict[str, np.ndarray]:
  """The tokens of all captions, for images on the devices.

  Args:
    source: images that were read, from `encoded`.

  Returns:
    {'ids': int32 [M, length], 'firsts': int32 [N + 1]}, see `Captions`.
  """
  rows = np.array([source.stand_in_fn(i) for i in range(len(source))])
  firsts, ids, texts = [0], [], []
  for several in of(source, rows):
    texts += several
    firsts.append(firsts[-1] + len(several))
    if len(texts) >= AT_ONCE:
      ids.append(np.asarray(source.encode_fn(texts), np.int32))
      texts = []
  if texts:
    ids.append(np.asarray(source.encode_fn(texts), np.int32))
  return {'ids': np.concatenate(ids), 'firsts': np.array(firsts, np.int32)}
