"""Tar shards of images with captions, as WebDataset has them.

Members of one name up to the first dot are a sample: an image, and optionally
KEY.txt (captions, one a line), KEY.json (an object with a column of captions)
and KEY.cls (a class, a whole number). Nothing is unpacked: the headers of all
shards are read once when the set is opened, which gives the place of each
image, and images are read from there. So a set of shards has random access, an
order, held-out images and exact resumption like any other.

Shards may be untrusted: a member is only ever read, at most LARGEST bytes of
it; links, devices and sparse members are passed over, and names that lead
upwards are refused.
"""

import array
import collections
import contextlib
import functools
import io
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion_jax.data import (
  caption_files,
  captions,
  folders,
  identity,
  images,
  layouts,
  looks,
  sources,
)
from diffusion_jax.system import terminal
from diffusion_jax.system.errors import UserError, one_line

LARGEST = 2**28  # bytes of a member
BLOCK = 512  # bytes of a tar's header
# Bytes of a long name or of PAX headers: tarfile's search of them is quadratic.
_LONGEST = 2**16
_RANGE = re.compile(r'\{(\d+)\.\.(\d+)\}')
_MOST_SHARDS = 10**6
MANY = 20  # shards: reading their headers takes seconds
_COPY = 'copy it again'


class _Bounded(io.BufferedReader):
  """A file from which little is read at once, which a header cannot change."""

  def read(self, size=-1):
    if not 0 <= size <= _LONGEST:
      raise ValueError(f'a header of {size:,} bytes, at most {_LONGEST:,}')
    return super().read(size)


class Index(NamedTuple):
  """Where the samples of a set lie.

  Attributes:
    shards: paths.
    keys: the name of each sample in its shard.
    shard: int32 [N], the shard of each sample.
    spans: name of a kind ('image', 'txt', 'json') -> int64 [N, 2]: the position
      and the bytes of that member; -1 of those that have none.
    labels: int32 [N], -1 of those without a class.
    passed: suffix or another reason -> number of members passed over.
  """

  shards: list[str]
  keys: list[str]
  shard: np.ndarray
  spans: dict[str, np.ndarray]
  labels: np.ndarray
  passed: collections.Counter


def create(
  path: str, wanted: sources.Wanted, what: str
) -> sources.Source | None:
  """Opens tar shards.

  Args:
    path: a folder of .tar files, also in sub-folders; one .tar file; or a
      pattern with a range, such as 'a/train-{000..127}.tar'.
    wanted: the requested split, size, channels, classes and captions. If names
      of shards or of their folders say train and test (or val and the like),
      these are the splits; otherwise every n-th sample is held out.
    what: what to call the set in errors.

  Returns:
    A Source, or None for 'test' if no images are held out. Samples are in the
    order of the shards' paths and of their members.

  Raises:
    UserError: there are no shards or images, or a shard is truncated, damaged,
      compressed, or has names that lead upwards.
  """
  images.check_channels(wanted.channels)
  root, shards = _shards(path, what)
  parts, notes = _by_split(shards)
  if parts:
    sources.check_split(wanted, what)
  shards = parts.get(wanted.split, shards)
  if parts and wanted.heldout_every:
    notes.append('data.heldout_every is ignored, as the shards hold out')
  states = [os.stat(root / shard) for shard in shards]
  changed = tuple((state.st_size, state.st_mtime_ns) for state in states)
  index = _indexed(root, tuple(shards), changed)
  if not index.keys:
    suffixes = ', '.join(folders.SUFFIXES)
    raise UserError(f'{what} has no images: members must end in {suffixes}')
  indices = np.arange(len(index.keys))
  if not parts:
    indices = sources.heldout_indices(len(indices), wanted)
    if indices is None:
      return None
  return _source(path, wanted, what, root, index, indices, notes)


def _source(path, wanted, what, root, index, indices, notes) -> sources.Source:
  """The samples of an index with these numbers."""
  count = len(indices)

  def name_of(number):
    return f'{index.shards[index.shard[number]]}/{index.keys[number]}'

  def open_fn(i):
    number = indices[i]
    content = _read(root, index, number, 'image')
    return io.BytesIO(content), f'{name_of(number)!r} in {path!r}'

  rule = images.rule_of(open_fn, count, wanted)
  labels, num_classes, told = _labels(index, wanted)

  def read(i):
    return images.read(*open_fn(i), rule), labels[indices[i]]

  # A name asks for a column, which only .json has.
  kinds = ('txt', 'json')[wanted.captions != captions.AUTO :]
  kind = next((k for k in kinds if (index.spans[k] >= 0).any()), '')

  @functools.cache
  def all_captions():
    return _captions(root, index, indices, kind, wanted.captions, name_of, what)

  notes = (
    notes + told + _told(index) + [f'captions are in .{kind}'] * bool(kind)
  )
  notes += looks.files(open_fn, count, rule.channels, wanted)
  contents = identity.Contents(
    count,
    lambda i: _read(root, index, indices[i], 'image', identity.LOOKED_AT),
    'webdataset',
    [name_of(number) for number in indices],
    lambda: index.spans['image'][indices, 1],
  )
  return sources.create(
    f'webdataset {path}, {wanted.split}', count, rule.shape, num_classes, read,
    notes, contents, (), lambda i: labels[indices[i]],
    (lambda i: all_captions().of(i)) if kind else None,
  )  # fmt: skip


def _shards(path: str, what: str) -> tuple[Path, list[str]]:
  """The folder of the shards, and their paths in it, in order."""
  place = Path(path).expanduser()
  if found := _RANGE.search(str(place)):
    first, last = found.groups()
    if int(last) - int(first) not in range(_MOST_SHARDS):
      raise UserError(
        f'{what} has the range {found[0]}: from the lower number to the higher'
      )
    if _RANGE.search(str(place.parent)):
      raise UserError(
        f'{what} has the range {found[0]} in the name of a folder, and only '
        'names of shards may have one: give the folder around them'
      )
    names = [
      _RANGE.sub(f'{k:0{len(first)}d}', str(place), count=1)
      for k in range(int(first), int(last) + 1)
    ]
    lost = [name for name in names if not os.path.isfile(name)]
    if lost:
      raise UserError(
        f'{what} names {len(names)} shards, of which {len(lost)} do not exist '
        f'({lost[0]!r}): give the range of those that do'
      )
    return Path(names[0]).parent, [os.path.basename(name) for name in names]
  if place.is_file():
    return place.parent, [place.name]
  if not place.is_dir():
    raise UserError(
      f'{what} does not exist: give a folder of .tar files, one of them, or a '
      "range, such as 'train-{000..127}.tar'"
    )
  names = sorted(
    found.relative_to(place).as_posix()
    for found in place.rglob('*')
    if found.name.endswith('.tar') and not found.name.startswith('.')
  )
  if not names:
    packed = [*place.rglob('*.tar.*'), *place.rglob('*.tgz')]
    told = f' ({packed[0].name} is compressed: gunzip it)' if packed else ''
    raise UserError(
      f'{what} has no .tar files{told}: images in a folder are of data.name '
      "'folder'"
    )
  return place, names


def _by_split(shards) -> tuple[dict[str, list[str]], list[str]]:
  """'train' and 'test' -> shards, {} if names do not say so; and notes."""
  parts = layouts.by_words(shards)
  if not parts:
    return {}, []
  train, test = (len(parts[split]) for split in ('train', 'test'))
  told = f'by their names, {train} shards are trained on and {test} held out'
  left = len(shards) - train - test
  return parts, [told + f'; {left} others are left out' * (left > 0)]


@functools.lru_cache(maxsize=2)  # both splits may be in the same shards
def _indexed(root: Path, shards: tuple[str, ...], changed: tuple) -> Index:
  """Reads the headers of all shards.

  Args:
    root: their folder.
    shards: their paths in it.
    changed: their sizes and when they were changed; others are read again.
  """
  told = terminal.waiting(f'reading the headers of {len(shards)} shards')
  with told if len(shards) > MANY else contextlib.nullcontext():
    return _index_of(root, shards)


def _index_of(root: Path, shards: Sequence[str]) -> Index:
  keys, of, labels = [], array.array('i'), array.array('i')
  spans = {kind: array.array('q') for kind in ('image', 'txt', 'json')}
  passed = collections.Counter()
  for number, shard in enumerate(shards):
    found = _members(root / shard, repr(shard), passed)
    for key, kinds in found.items():
      if 'image' not in kinds:
        passed['samples without an image'] += 1
        continue
      keys.append(key)
      of.append(number)
      labels.append(kinds.get('cls', -1))
      for kind, span in spans.items():
        span.extend(kinds.get(kind, (-1, -1)))
  return Index(
    list(shards), keys, np.array(of, np.int32),
    {k: np.array(x, np.int64).reshape(-1, 2) for k, x in spans.items()},
    np.array(labels, np.int32), passed,
  )  # fmt: skip


def _members(path: Path, where: str, passed) -> dict[str, dict]:
  """Key of a sample -> kind -> (position, bytes), of one shard.

  Of 'cls' the class. Counts what is passed over in `passed`.
  """
  found, size = {}, path.stat().st_size
  with (
    one_line(f'shard {where} cannot be read: ', f': {_COPY}'),
    _Bounded(io.FileIO(path)) as file,
  ):
    if file.read(2) == b'\x1f\x8b':
      raise UserError(
        f'shard {where} is compressed, and has no random access: gunzip it'
      )
    file.seek(0)
    with tarfile.open(fileobj=file, mode='r:') as shard:
      while (member := shard.next()) is not None:
        shard.members = []  # or it keeps all of them
        # It would be read again and again.
        if member.size < 0 or shard.offset <= member.offset:
          raise ValueError(f'{member.name!r:.80} has {member.size:,} bytes')
        if kind_key := _kind(member, size, where, passed):
          kind, key = kind_key
          kinds = found.setdefault(key, {})
          if kind in kinds:
            raise UserError(
              f'shard {where} has two members of {key!r:.80} for {kind}: '
              'leave one'
            )
          span = member.offset_data, member.size
          kinds[kind] = span
          if kind == 'cls':
            text = os.pread(file.fileno(), min(span[1], 32), span[0])
            kinds[kind] = _class(text, member.name, where)
      end = shard.offset
    file.seek(end)
    if file.read(BLOCK) != bytes(BLOCK):
      raise UserError(
        f'shard {where} is truncated or damaged after {end:,} bytes: {_COPY}'
      )
  return found


def _kind(member, size, where, passed) -> tuple[str, str] | None:
  """(kind, key of the sample) of a member of a shard; None to pass it over."""
  parts = member.name.split('/')
  if '..' in parts or member.name.startswith('/') or '\0' in member.name:
    raise UserError(
      f'shard {where} has a member {member.name!r:.80}, which leads out of it: '
      'remove it, or leave the shard out'
    )
  name = '/'.join(part for part in parts if part not in ('', '.'))
  folder, _, last = name.rpartition('/')
  stem, _, suffix = last.partition('.')
  suffix = f'.{suffix.lower()}'
  if not member.isreg() or member.issparse():
    passed['no regular file'] += not member.isdir()
    return None
  kind = 'image' if suffix in folders.SUFFIXES else suffix[1:]
  if not stem or kind not in ('image', 'txt', 'json', 'cls'):
    passed[f'.{suffix.rpartition(".")[2]}'] += 1
    return None
  if member.offset_data + member.size > size:
    raise UserError(
      f'shard {where} is truncated: {member.name!r:.80} ends after it: {_COPY}'
    )
  if member.size > LARGEST:
    raise UserError(
      f'shard {where}: {member.name!r:.80} has {member.size:,} bytes, at most '
      f'{LARGEST:,}: remove it'
    )
  return kind, f'{folder}/{stem}' if folder else stem


def _class(text: bytes, name: str, where: str) -> int:
  """The class in the content of KEY.cls."""
  text = text.strip()
  if not text.isdigit() or int(text) >= 2**31:
    raise UserError(
      f'shard {where}: {name!r:.80} is {text[:20]!r}: need a class, 0, 1, ...'
    )
  return int(text)


def _read(root, index, number, kind, most: int = LARGEST) -> bytes:
  """The content of a member, at most some bytes of it."""
  position, size = index.spans[kind][number].tolist()
  shard = index.shards[index.shard[number]]
  with images.reading(f'{index.keys[number]!r} in {shard!r}'):
    with open(root / shard, 'rb') as file:
      content = os.pread(file.fileno(), min(size, most), position)
    if len(content) < min(size, most):
      raise ValueError('the shard has become shorter')
  return content


def _labels(index: Index, wanted) -> tuple[np.ndarray, int, list[str]]:
  """Labels, the number of classes, and notes."""
  lacking = int((index.labels < 0).sum())
  none = np.full(len(index.labels), -1, np.int32)
  if wanted.classes == 'none' or lacking == len(none):
    return none, 0, []
  if lacking:
    told = f'{lacking} of {len(none)} images have none'
    return none, 0, [f'the labels of .cls are left out: {told}']
  return index.labels, int(index.labels.max()) + 1, []


def _captions(root, index, indices, kind, asked, name_of, what):
  """Reads the captions of samples, see `Captions`."""
  lost = indices[index.spans[kind][indices, 0] < 0]
  captions.check_whole(
    len(lost), len(indices), map(name_of, lost), f'.{kind} in {what}'
  )

  def texts(number):
    where = f"'{name_of(number)}.{kind}' in {what}"
    if kind == 'txt':
      content = _read(root, index, number, kind, caption_files.LARGEST + 1)
      return caption_files.of_text(content, where)
    content = _read(root, index, number, kind)
    return caption_files.of_json(content, asked, where)

  return captions.pack(map(texts, indices))


def _told(index: Index) -> list[str]:
  if not index.passed:
    return []
  kinds = ', '.join(f'{n} {kind}' for kind, n in index.passed.most_common(6))
  return [f'of the members of shards, these are passed over: {kinds}']
