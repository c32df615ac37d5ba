"""What identifies a set of images: enough to notice that it has changed.

An identity is independent of the host, of the path and of times of
modification. It costs one `stat` per file and a sample of the contents, so that
a set of a million files is identified in seconds:

  {"images": number, "kind": what else the set is,
   "names": digest of all names, "sizes": digest of all sizes,
   "sample": {name of an image: digest of its content}}
"""

import errno
import functools
import hashlib
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import numpy as np

SAMPLED = 64  # images of a set whose contents are compared, evenly spaced
LOOKED_AT = 2**16  # bytes of each that are read
PIECES = 4  # of a longer file: the first rows may be a border, and all alike
COMPARED = 100_000  # training images that may be compared with held-out ones
THREADS = 16  # that wait for a network disk


class Contents(NamedTuple):
  """Access to what a set consists of, before anything is decoded.

  Attributes:
    num_images: N.
    read_fn: index -> the content of an image, or LOOKED_AT bytes of it.
    kind: what else identifies the set: a shape, or a name and a version.
    names: the name of each image, in order; empty if they are numbered.
    sizes_fn: () -> int64 [N], bytes; None if sizes say nothing.
    spans: (file, first record, end) of each range of records, for sets that are
      slices of larger ones.
  """

  num_images: int
  read_fn: Callable[[int], bytes]
  kind: str = ''
  names: Sequence[str] = ()
  sizes_fn: Callable[[], np.ndarray] | None = None
  spans: Sequence[tuple[str, int, int]] = ()

  def name(self, index: int) -> str:
    return self.names[index] if self.names else f'image {index}'


def of_files(
  root, names: Sequence[str], whole: Sequence[tuple[str, int]]
) -> Contents:
  """The contents of a folder of image files.

  Args:
    root: the folder.
    names: paths relative to it, in order.
    whole: all names of the set that they are a split of, sorted, and sizes in
      bytes. A folder that all of them share does not count, so that a set may
      be wrapped in another folder.
  """
  ends = (os.path.dirname(name) for name, _ in (whole[0], whole[-1]))
  shared = os.path.commonpath(ends)
  start = len(shared) + 1 if shared else 0

  def read(index):
    try:
      with open(os.path.join(root, names[index]), 'rb') as file:
        return _pieces(file)
    except OSError as error:
      if error.errno in (errno.ENOENT, errno.ELOOP):
        return b''  # a link to nothing is a broken image
      raise

  @functools.cache
  def sizes():
    size_of = dict(whole)
    return np.array([size_of[name] for name in names], np.int64)

  return Contents(
    len(names), read, names=[name[start:] for name in names], sizes_fn=sizes
  )


def _pieces(file: BinaryIO) -> bytes:
  """The content of a file, or evenly spaced pieces, the last one at its end."""
  size = os.fstat(file.fileno()).st_size
  if size <= LOOKED_AT:
    return file.read()
  length, content = LOOKED_AT // PIECES, []
  for k in range(PIECES):
    file.seek(k * (size - length) // (PIECES - 1))
    content.append(file.read(length))
  return b''.join(content)


def of(contents: Contents) -> dict:
  """The identity of a set, see above.

  Raises:
    OSError: a file is gone or cannot be read.
  """
  indices = _spaced(contents.num_images, SAMPLED)
  digests = _digests(contents, indices)
  sizes = b'' if contents.sizes_fn is None else contents.sizes_fn().tobytes()
  names = '\n'.join(contents.names).encode(errors='surrogateescape')
  return {
    'images': contents.num_images,
    'kind': contents.kind,
    'names': _digest(names),
    'sizes': _digest(sizes),
    'sample': {
      contents.name(i): digest
      for i, digest in zip(indices, digests, strict=True)
    },
  }


def difference(
  a: dict, b: dict, in_a: str, in_b: str, names: Collection[str] = ()
) -> str:
  """Says in a phrase how two identities differ; '' if they are the same.

  Args:
    a: an identity.
    b: another.
    in_a: where or when the first one is found: 'then', 'in process 0'.
    in_b: where or when the second one is found.
    names: all names of the second set, if known, to find one that is missing.
  """
  if a['kind'] != b['kind']:
    return f'{a["kind"]} {in_a}, {b["kind"]} {in_b}'
  if a['images'] != b['images']:
    told = f'{a["images"]:,} images {in_a}, {b["images"]:,} {in_b}'
    return told + _missing(a, b, in_a, in_b, names)
  if a['names'] != b['names']:
    return 'other names' + _missing(a, b, in_a, in_b, names)
  others = [k for k in a['sample'] if a['sample'][k] != b['sample'].get(k)]
  if others:
    return f'{others[0]!r} has another content {in_a} than {in_b}'
  if a['sizes'] != b['sizes']:
    return f'files have other sizes {in_a} than {in_b}'
  return ''


def _missing(a, b, in_a, in_b, names) -> str:
  """Names an image that one of the sets lacks, if that can be known."""
  for one, known, where in (
    (a, names or _all_names(b), in_b),
    (b, _all_names(a), in_a),
  ):
    lost = [name for name in one['sample'] if known and name not in known]
    if lost:
      return f' ({lost[0]!r} is missing {where})'
  return ''


def _all_names(of: dict) -> Collection[str]:
  return of['sample'] if len(of['sample']) == of['images'] else ()


def together(identities: Sequence[dict]) -> dict:
  """The identity of several sets as one, as far as their number and names.

  Numbered images of a later set that have the name of an earlier one are named
  'other image 0', ...
  """
  sample = {}
  for one in identities:
    there = frozenset(sample)
    for name, digest in one['sample'].items():
      sample[f'other {name}' if name in there else name] = digest
  return {
    'images': sum(one['images'] for one in identities),
    'sample': sample,
    **{
      key: ' and '.join(dict.fromkeys(one[key] for one in identities))
      for key in ('kind', 'names', 'sizes')
    },
  }


def shared(heldout: Contents, train: Contents) -> tuple[int, int, str]:
  """Looks for held-out images among the training images.

  Slices of a prepared set are compared by their records. Otherwise a sample of
  the held-out images is compared by content with the training images of the
  same size.

  Returns:
    (number found, number looked for, an example: "'a.png' is 'b.png'").
  """
  if heldout.spans and train.spans:
    return _shared_records(heldout, train)
  indices = _spaced(heldout.num_images, SAMPLED)
  wanted = dict(
    zip(_digests(heldout, indices), map(heldout.name, indices), strict=True)
  )
  candidates = np.arange(train.num_images)
  if heldout.sizes_fn and train.sizes_fn:
    sizes = np.unique(heldout.sizes_fn()[indices])
    candidates = candidates[np.isin(train.sizes_fn(), sizes)]
  candidates = candidates[_spaced(len(candidates), COMPARED)]
  found = {
    wanted[digest]: f'{wanted[digest]!r} is {train.name(i)!r}'
    for i, digest in zip(candidates, _digests(train, candidates), strict=True)
    if digest in wanted
  }
  return len(found), len(wanted), next(iter(found.values()), '')


def _shared_records(heldout, train) -> tuple[int, int, str]:
  found, example = 0, ''
  for file, first, end in heldout.spans:
    for other, start, stop in train.spans:
      low, high = max(first, start), min(end, stop)
      if file == other and low < high:
        found += high - low
        example = example or f'record {low} of {file}'
  return found, heldout.num_images, example


def _spaced(count: int, wanted: int) -> np.ndarray:
  """At most `wanted` of the indices below count, evenly spaced."""
  wanted = min(count, wanted)
  return np.arange(wanted) * count // max(wanted, 1)


def _digests(contents: Contents, indices) -> list[str]:
  return _in_threads(lambda i: _digest(contents.read_fn(int(i))), indices)


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:16]


def _in_threads(fn, values) -> list:
  with ThreadPoolExecutor(THREADS) as pool:
    size = 1 + len(values) // (8 * THREADS)
    chunks = [values[i : i + size] for i in range(0, len(values), size)]
    done = pool.map(lambda chunk: [fn(value) for value in chunk], chunks)
    return [value for chunk in done for value in chunk]
