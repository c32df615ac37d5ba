"""The sample store: a folder of samples on disk, each drawn only once.

A sample is identified by (run, seed, index), see `draw`, so the batch, the mesh
and the order it is drawn in do not matter. A store is a folder that holds the
samples of one protocol:

  store.json                      what the images depend on, and their dtype;
                                  'numerics' records what may change the
                                  rounding
  parts/000000000-000000063.npy   [n, H, W, C], indices as in the name
  took/                           a nested store, for adaptive samplers

Images are uint8 or, if 'dtype' is float32, in [0, 255] and not rounded. Entries
of took/ are int32 [n, 4], the fields of `adaptive.Took` in order. Parts are
written atomically. An interrupted job draws only the missing samples when it is
run again, with any batch size, and so does a job that asks for more samples.
"""

import itertools
import json
import re
import zipfile
from collections.abc import Iterator

import numpy as np

from diffusion_jax.runs import completion, folder
from diffusion_jax.system import files, npz
from diffusion_jax.system.errors import UserError

PART = re.compile(r'(\d+)-(\d+)\.npy')
TOOK = 'took'
DEFAULTS = {'dtype': 'uint8'}  # for keys missing in a store.json
NUMERICS = 'numerics'
ARRAY = 'arr_0'  # in samples.npz, as np.savez names it
BLOCK = 4096  # most images written to it at once


def open_store(directory, protocol: dict, numerics: dict | None = None) -> dict:
  """Creates the store, or checks that it holds samples of the same protocol.

  Args:
    directory: the store's folder; created if needed.
    protocol: everything that the images depend on, JSON-serializable; 'dtype'
      is the images' dtype, by default 'uint8'.
    numerics: what may change their rounding, see `numerics.describe`; a new
      store records it.

  Returns:
    `numerics` of the first samples; {} if there are none, or no record.

  Raises:
    UserError: the store has another protocol (the message names the field that
      differs), or the folder is not a store.
  """
  directory = files.at(directory)
  path = directory / 'store.json'
  protocol = json.loads(json.dumps(protocol))
  if path.exists():
    stored, asked = _read_protocol(path), {**DEFAULTS, **protocol}
    before = stored.pop(NUMERICS, {})
    completion.complete_parts(stored)  # config keys newer than the store
    names = sorted(stored.keys() | asked.keys())
    for name in sorted(names, key='sampler'.__ne__):  # the sampler first
      if stored.get(name) != asked.get(name):
        raise UserError(
          f'{directory} holds samples with {name}={_short(stored.get(name))}, '
          f'not {_short(asked.get(name))}: choose another --output'
        )
    return before
  # A kill may have left a folder without a store; a launch, a log.
  if there := sorted(folder.foreign(directory)):
    more = f' and {len(there) - 1} more' * (len(there) > 1)
    raise UserError(
      f'{directory} is not empty and not a sample store (in the way: '
      f'{there[0]}{more}): choose another --output'
    )
  recorded = {NUMERICS: numerics} if numerics else {}
  files.write_json(path, {**protocol, **recorded})
  return {}


def _short(value) -> str:
  """Shortens a long value, such as a grid, for a one-line message."""
  text = str(value)
  return text if len(text) <= 60 else f'{text[:57]}...'


def _read_protocol(path) -> dict:
  try:
    stored = json.loads(path.read_text())
  except (FileNotFoundError, ValueError) as e:
    raise UserError(f'{path} is damaged ({e}): choose another --output') from e
  if not isinstance(stored, dict):
    raise UserError(f'{path} is no sample store: choose another --output')
  return {**DEFAULTS, **stored}


def parts(directory) -> list[tuple[int, int, files.Path]]:
  """(first index, last index + 1, file) of every part, in order."""
  place = files.at(directory) / 'parts'
  if not place.is_dir():
    return []
  found = []
  for path in sorted(place.iterdir()):
    if match := PART.fullmatch(path.name):
      found.append((int(match[1]), int(match[2]) + 1, path))
  return found


def drawn(directory) -> int:
  """The number of samples that are drawn, up to the first that is missing."""
  count = 0
  for first, end, _ in parts(directory):  # in order of their first samples
    if first > count:
      break
    count = max(count, end)
  return count


def missing(directory, num_samples: int) -> np.ndarray:
  """The indices below num_samples of samples that are not drawn yet."""
  absent = np.ones(num_samples, bool)
  for first, end, _ in parts(directory):
    absent[first:end] = False
  return np.flatnonzero(absent)


def consecutive(indices: np.ndarray) -> list[tuple[int, int]]:
  """(first, last + 1) of each run of consecutive indices [n], n > 0."""
  cuts = np.flatnonzero(np.diff(indices) != 1)
  firsts, lasts = indices[[0, *(cuts + 1)]], indices[[*cuts, -1]]
  return list(zip(firsts.tolist(), (lasts + 1).tolist(), strict=True))


def save(directory, indices, images: np.ndarray) -> None:
  """Saves images [n, H, W, C]; one part per run of consecutive indices."""
  place, at = files.make(files.at(directory) / 'parts'), 0
  for first, end in consecutive(np.asarray(indices)):
    path = place / f'{first:09d}-{end - 1:09d}.npy'
    with files.replacing(path) as file:
      np.save(file, images[at : at + end - first], allow_pickle=False)
    at += end - first


def load(directory, num_samples: int) -> np.ndarray:
  """Loads samples as [num_samples, H, W, C] of the store's dtype, by index.

  Args:
    directory: the store's folder.
    num_samples: the number of samples, from index 0.

  Raises:
    UserError: some samples are not drawn yet, or a part is damaged.
  """
  images, at = None, 0
  for block in stream(directory, 0, num_samples, num_samples):
    if images is None:
      images = np.empty((num_samples, *block.shape[1:]), block.dtype)
    images[at : at + len(block)] = block
    at += len(block)
  return images


def stream(
  directory, first: int, end: int, batch_size: int
) -> Iterator[np.ndarray]:
  """Streams samples first .. end - 1, with one part in memory at a time.

  Args:
    directory: the store's folder.
    first: the first index.
    end: the last index plus 1.
    batch_size: the largest number of samples per array.

  Returns:
    An iterator of [n, H, W, C] of the store's dtype, n <= batch_size, in index
    order.

  Raises:
    UserError: some samples are not drawn yet, or a part is damaged.
  """
  absent = missing(directory, end)
  if len(absent):
    raise UserError(
      f'{directory} lacks {len(absent)} of {end} samples, the first is number '
      f'{absent[0]}: draw them first'
    )
  at, shape = first, None
  dtype = np.dtype(_read_protocol(files.at(directory) / 'store.json')['dtype'])
  # Parts may overlap if jobs have used different batch sizes.
  for start, stop, path in parts(directory):
    if at >= end:
      return
    if stop <= at:
      continue
    block = _read_part(path, stop - start, shape, dtype)
    shape = block.shape[1:]
    block = block[at - start : end - start]
    for i in range(0, len(block), batch_size):
      yield block[i : i + batch_size]
    at = stop


def _read_part(path, count, shape, dtype):
  try:
    # Memory-mapped, which detects a header with a wrong size.
    block = files.mapped(path)
    wanted = dtype, (count, *(shape or block.shape[1:]))
    if (block.dtype, block.shape) != wanted:
      raise ValueError(f'{block.dtype} {block.shape}')
  except (ValueError, EOFError, AttributeError) as e:
    raise UserError(
      f'{path} is damaged: delete it and sample again to fill the gap'
    ) from e
  return block


def fill(directory, absent, batch_size: int, draw_fn, on_batch=None) -> None:
  """Draws missing samples batch by batch, and saves each batch.

  Each process saves the samples that it has drawn.

  Args:
    directory: the folder of an open store.
    absent: the indices to draw, see `missing`; the same in all processes.
    batch_size: images drawn at once, over all devices.
    draw_fn: indices [batch_size] -> (rows [R], images [R, H, W, C] of the
      store's dtype), where rows are the rows of the batch drawn by this
      process; for adaptive samplers a third array, `adaptive.Took` as [R, 4].
    on_batch: called after each batch with the number of images saved.
  """
  absent = np.asarray(absent)
  for start in range(0, len(absent), batch_size):
    indices = absent[start : start + batch_size]
    # The last batch is padded with repeats, so that only one shape compiles.
    rows, images, *took = draw_fn(np.resize(indices, batch_size))
    kept = rows < len(indices)
    if kept.any():
      for counts in took:  # before the images, so that a kill loses neither
        save(files.at(directory) / TOOK, indices[rows[kept]], counts[kept])
      save(directory, indices[rows[kept]], images[kept])
    if on_batch:
      on_batch(len(indices))


def write_npz(directory) -> files.Path:
  """Writes all samples to `samples.npz` (`arr_0`), the format of FID tools.

  It is written part by part, and never becomes smaller: a file with more images
  than the store has without a gap is kept.

  Args:
    directory: the folder of a store that holds sample 0.

  Raises:
    UserError: a part is damaged.
  """
  path = files.at(directory) / 'samples.npz'
  count = drawn(directory)
  if _count_in(path) > count:
    return path
  blocks = stream(directory, 0, count, BLOCK)
  first = next(blocks)
  header = {
    'descr': np.lib.format.dtype_to_descr(first.dtype),
    'fortran_order': False,
    'shape': (count, *first.shape[1:]),
  }
  with (
    files.replacing(path) as file,
    zipfile.ZipFile(file, 'w') as archive,
    archive.open(f'{ARRAY}.npy', 'w', force_zip64=True) as member,
  ):
    np.lib.format.write_array_header_1_0(member, header)
    for block in itertools.chain([first], blocks):
      member.write(np.ascontiguousarray(block))
  return path


def _count_in(path) -> int:
  """The number of images in a samples.npz; 0 if it is missing or damaged."""
  try:
    with (
      files.at(path).open('rb') as file,
      zipfile.ZipFile(file) as archive,
      archive.open(f'{ARRAY}.npy') as member,
    ):
      return npz.read_header(member, str(path)).shape[0]
  except npz.DAMAGED:
    return 0
