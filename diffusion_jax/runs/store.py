"""The sample store: drawn images on disk, each drawn once.

A sample is addressed by (run, seed, index), see `draw`, so it does not matter
in which batch, on which mesh or in which order it is drawn. A store is one
folder that holds samples of one protocol:

  store.json                      what the images depend on, and their dtype
  parts/000000000-000000063.npy   [n, H, W, C], indices as in the name
  took/                           a store of its own, where steps are adaptive

Images are uint8, or where 'dtype' says so float32: in [0, 255], not rounded.
What they took is int32 [n, 4], in the order of `adaptive.Took`. Parts appear
whole. A job that was interrupted draws what is missing, in batches of any size;
one that asks for more draws the rest.
"""

import json
import re
from collections.abc import Iterator

import numpy as np

from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError

PART = re.compile(r'(\d+)-(\d+)\.npy')
TOOK = 'took'
DEFAULTS = {'dtype': 'uint8'}  # of what a store.json leaves out


def open_store(directory, protocol: dict) -> None:
  """Makes the store, or checks that it holds samples of the same protocol.

  Args:
    directory: of the store; made if needed.
    protocol: all that the images depend on, as JSON can hold it; its 'dtype'
      is the images', 'uint8' where there is none.

  Raises:
    UserError: it holds others (the field that differs is named), or something
      that is not a store.
  """
  directory = files.at(directory)
  path = directory / 'store.json'
  protocol = json.loads(json.dumps(protocol))
  if path.exists():
    stored, asked = _read_protocol(path), {**DEFAULTS, **protocol}
    names = sorted(stored.keys() | asked.keys())
    for name in sorted(names, key='sampler'.__ne__):  # which has the others
      if stored.get(name) != asked.get(name):
        raise UserError(
          f'{directory} holds samples with {name}={_short(stored.get(name))}, '
          f'not {_short(asked.get(name))}: choose another --output'
        )
    return
  # A kill may have left a folder that never came to hold a store.
  if directory.exists() and files.entries(directory):
    raise UserError(
      f'{directory} is not empty and not a sample store: choose another '
      '--output'
    )
  files.make(directory)
  with files.replacing(path) as file:
    file.write(json.dumps(protocol, indent=2).encode())


def _short(value) -> str:
  """A list of a thousand numbers is no part of one line."""
  text = str(value)
  return text if len(text) <= 60 else f'{text[:57]}...'


def _read_protocol(path) -> dict:
  try:
    stored = json.loads(path.read_text())
  except (FileNotFoundError, ValueError) as e:
    raise UserError(f'{path} is damaged ({e}): choose another --output') from e
  if not isinstance(stored, dict):
    raise UserError(f'{path} is not of a sample store: choose another --output')
  return {**DEFAULTS, **stored}


def parts(directory) -> list[tuple[int, int, files.Path]]:
  """(first, last + 1, file) of every part, in order."""
  folder = files.at(directory) / 'parts'
  if not folder.is_dir():
    return []
  found = []
  for path in sorted(folder.iterdir()):
    if match := PART.fullmatch(path.name):
      found.append((int(match[1]), int(match[2]) + 1, path))
  return found


def missing(directory, num_samples: int) -> np.ndarray:
  """The indices below num_samples that are not drawn yet."""
  absent = np.ones(num_samples, bool)
  for first, end, _ in parts(directory):
    absent[first:end] = False
  return np.flatnonzero(absent)


def save(directory, indices, images: np.ndarray) -> None:
  """Keeps images [n, H, W, C] as they are; one part a run of indices."""
  folder = files.make(files.at(directory) / 'parts')
  indices = np.asarray(indices)
  cuts = np.flatnonzero(np.diff(indices) != 1) + 1
  for rows, block in zip(
    np.split(indices, cuts), np.split(images, cuts), strict=True
  ):
    path = folder / f'{rows[0]:09d}-{rows[-1]:09d}.npy'
    with files.replacing(path) as file:
      np.save(file, block, allow_pickle=False)


def load(directory, num_samples: int) -> np.ndarray:
  """The store's dtype [num_samples, H, W, C], in the order of the index.

  Args:
    directory: of the store.
    num_samples: how many, from index 0 on.

  Raises:
    UserError: some are not drawn yet, or a part is damaged.
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
  """Samples first .. end - 1, with one part of the store in memory at a time.

  Args:
    directory: of the store.
    first: the index of the first.
    end: one more than that of the last.
    batch_size: at most so many at once.

  Returns:
    an iterator of [n, H, W, C] of the store's dtype, n <= batch_size, in the
    order of the index.

  Raises:
    UserError: some are not drawn yet, or a part is damaged.
  """
  absent = missing(directory, end)
  if len(absent):
    raise UserError(
      f'{directory} lacks {len(absent)} of {end} samples, first number '
      f'{absent[0]}: draw them first'
    )
  there, at, shape = parts(directory), first, None
  dtype = np.dtype(_read_protocol(files.at(directory) / 'store.json')['dtype'])
  while at < end:
    # Parts may overlap, where jobs have drawn in batches of several sizes.
    start, stop, path = next(p for p in there if p[0] <= at < p[1])
    block = _read_part(path, stop - start, shape, dtype)
    shape = block.shape[1:]
    block = block[at - start : end - start]
    for i in range(0, len(block), batch_size):
      yield block[i : i + batch_size]
    at = stop


def _read_part(path, count, shape, dtype):
  try:
    # Mapped, so that a header that lies about the size is found out.
    block = files.mapped(path)
    if block.dtype != dtype or block.shape != (
      count,
      *(shape or block.shape[1:]),
    ):
      raise ValueError(f'{block.dtype} {block.shape}')
  except (ValueError, EOFError, AttributeError) as e:
    raise UserError(
      f'{path} is damaged: delete it and draw again, which fills the gap'
    ) from e
  return block


def fill(directory, absent, batch_size: int, draw_fn, on_batch=None) -> None:
  """Draws what is missing, batch by batch, and keeps each batch.

  Of several processes each keeps what it has drawn.

  Args:
    directory: an open store.
    absent: the indices to draw, as of `missing`; the same in all processes.
    batch_size: images drawn at once, over all devices.
    draw_fn: indices [batch_size] -> (rows [R], images [R, H, W, C] of the
      store's dtype), the rows of the batch that this process has drawn; and
      where steps are adaptive a third, what they took [R, 4].
    on_batch: called with the number of images kept after each batch.
  """
  absent = np.asarray(absent)
  for start in range(0, len(absent), batch_size):
    indices = absent[start : start + batch_size]
    # The last batch is filled up with repeats, so that one program serves all.
    rows, images, *took = draw_fn(np.resize(indices, batch_size))
    kept = rows < len(indices)
    if kept.any():
      for counts in took:  # before the images, or a kill may part them
        save(files.at(directory) / TOOK, indices[rows[kept]], counts[kept])
      save(directory, indices[rows[kept]], images[kept])
    if on_batch:
      on_batch(len(indices))


def write_npz(directory, images: np.ndarray) -> files.Path:
  """All samples as `samples.npz` (`arr_0`), as FID tools read them."""
  path = files.at(directory) / 'samples.npz'
  with files.replacing(path) as file:
    np.savez(file, images)
  return path
