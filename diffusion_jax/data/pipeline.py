"""The input pipeline: from a source to batches on the devices.

The training stream is a pure function: the image at global position p, and
whether it is flipped, depend only on the seed and p. Position p is row
p % batch_size of batch p // batch_size. The stream is therefore the same on one
host or many, with any number of threads, and after a restart at any step; the
step number is its only state.

Grain prefetches in threads; each of its elements is a batch. Grain's shuffle,
repeat and random_map work record by record, which takes 2.6 ms for 64 digits
compared to 0.3 ms here, and its shuffle iterates over 2**16 indices: with
twenty images that takes a millisecond per record.
"""

import collections
import functools
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from diffusion_jax.data import augment, captions
from diffusion_jax.data.sources import Source
from diffusion_jax.system.errors import UserError

# Branches of the seed: order, flips, transforms and the choice of captions are
# independent.
_ORDER, _FLIP, _AUGMENT, _CAPTION = 0, 1, 2, 3


def batches(
  source: Source,
  *,
  batch_size: int,
  seed: int,
  flip: bool,
  sharding: NamedSharding,
  start_step: int = 0,
  end_step: int = sys.maxsize,
  early: int = 0,
  warn: Callable[[Exception], None] = lambda error: None,
  stacked: int = 0,
  read: bool = True,
  augmented: float = 0.0,
  num_threads: int | None = None,
) -> Iterator[dict[str, jax.Array]]:
  """Shuffled training batches as global arrays.

  Args:
    source: the source, from data.create.
    batch_size: rows of the global batch, over all processes.
    seed: 0 or more; determines the order of the images and the flips.
    flip: whether to mirror each image left to right with probability 1/2.
    sharding: sharding over the batch axis, e.g. P(('data', 'fsdp')). Each
      process reads the rows that its own devices hold.
    start_step: number of the first batch.
    end_step: number of the batch after the last.
    early: number of batches to hold in memory, so that an error is known that
      many batches before it is raised.
    warn: called with such an error, an OSError or a UserError; not if fewer
      batches are left.
    stacked: how many batches to stack to arrays [stacked, B, ...]; 0 = none.
      A stack ends before a multiple of it, so the first may have fewer.
    read: whether to read the images, not only their order, see `orders`.
    augmented: the probability of each transform of `augment`; above 0, flips
      are made there, too.
    num_threads: number of batches to read concurrently; None chooses by the
      number of CPU cores, 0 reads in the caller's thread.

  Returns:
    An iterator of {'image': uint8 [B, H, W, C], 'label': int32 [B]}, with
    latents {'moments': float32 [B, h, w, m], ...}, or of
    {'index': int32 [B], 'mirrored': bool [B]}, with 'augment' and 'choice' as
    `orders` has them; `close()` stops it early. Batches of a source with an
    `encode_fn` also have 'tokens' int32 [B, length], of one caption of each
    image.

  Raises:
    UserError: batch_size, seed or start_step is out of range, or batch_size
      cannot be divided over the mesh.
  """
  rows = local_rows(sharding, batch_size)
  how = {'batch_size': batch_size, 'seed': seed, 'flip': flip, 'rows': rows}
  how['augmented'] = augmented
  if read:
    dataset = stream(source, **how)
  else:
    dataset = orders(len(source), captioned=bool(source.encode_fn), **how)
  if start_step < 0:
    raise UserError(f'start_step is {start_step}: use 0 or more')
  iterator = _read_ahead(dataset, num_threads)
  iterator.set_state({'next_index': start_step})
  chosen = itertools.islice(iterator, end_step - start_step)
  groups = _stacks(_warned(chosen, early, warn), start_step, stacked)
  return _place(iterator, groups, sharding, batch_size, stacked > 0)


def heldout(
  source: Source,
  *,
  batch_size: int,
  num_examples: int = 0,
  rows: np.ndarray | slice = slice(None),
  num_threads: int | None = None,
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
  """One pass over the first images, in order, in batches of equal size.

  Args:
    source: the source, from data.create.
    batch_size: rows of the global batch.
    num_examples: the largest number of images; 0 for all.
    rows: the rows of each batch to read; see `local_rows`.
    num_threads: as for `batches`.

  Returns:
    An iterator of (batch, weight): a batch like those of `batches`, in NumPy,
    and float32 [B] weights of its rows, 1 or 0. The last batch is padded by
    repeating the last image with weight 0.

  Raises:
    UserError: batch_size or num_examples is out of range.
  """
  _check_batch_size(batch_size)
  if num_examples < 0:
    raise UserError(f'num_examples is {num_examples}: use 0 (all) or more')
  total = min(num_examples or len(source), len(source))
  rows = np.arange(batch_size)[rows]

  def read(step):
    positions = step * batch_size + rows
    none = np.zeros_like(rows)  # not mirrored, and the first caption
    batch = _read(source, np.minimum(positions, total - 1), none, none)
    return batch, (positions < total).astype(np.float32)

  num_batches = -(-total // batch_size)
  passes = grain.MapDataset.range(num_batches).map(read)
  return _read_ahead(passes, num_threads)


def stream(
  source: Source,
  *,
  batch_size: int,
  seed: int,
  flip: bool,
  rows: np.ndarray | slice = slice(None),
  augmented: float = 0.0,
) -> grain.MapDataset:
  """The training stream: element k is batch k, or the chosen rows of it.

  Args:
    source: the source, from data.create.
    batch_size: rows of the global batch.
    seed: 0 or more.
    flip: whether to mirror images with probability 1/2.
    rows: the rows of each batch to read, e.g. `slice(8, 16)`.
    augmented: the probability of each transform of `augment`; above 0, flips
      are made there, too.

  Returns:
    An infinite dataset of NumPy batches: 'image' uint8 [R, H, W, C] and
    'label' int32 [R], where R is the number of rows, 'augment' as `orders` has
    it, and 'tokens' as `batches` has them.

  Raises:
    UserError: batch_size or seed is out of range.
  """

  def read(order):
    batch = _read(
      source, order['index'], order['mirrored'], order.get('choice')
    )
    return batch | {k: x for k, x in order.items() if k == 'augment'}

  return orders(
    len(source), batch_size=batch_size, seed=seed, flip=flip, rows=rows,
    augmented=augmented, captioned=bool(source.encode_fn),
  ).map(read)  # fmt: skip


def orders(
  num_images: int,
  *,
  batch_size: int,
  seed: int,
  flip: bool,
  rows: np.ndarray | slice = slice(None),
  augmented: float = 0.0,
  captioned: bool = False,
) -> grain.MapDataset:
  """Which images the batches of `stream` consist of.

  Args:
    num_images: the number of images of the source.
    batch_size: rows of the global batch.
    seed: 0 or more.
    flip: whether to mirror images with probability 1/2.
    rows: the rows of each batch.
    augmented: the probability of each transform of `augment`; above 0, flips
      are made there, too.
    captioned: whether captions are to be chosen.

  Returns:
    An infinite dataset: 'index' int32 [R] of the images, 'mirrored' bool [R],
    if augmented 'augment' float32 [R, augment.SIZE], and if captioned 'choice'
    uint32 [R]: of n captions, number choice % n is taken.

  Raises:
    UserError: batch_size or seed is out of range.
  """
  _check_batch_size(batch_size)
  if seed < 0:
    raise UserError(f'seed is {seed}: use 0 or more')
  rows = np.arange(batch_size)[rows]

  @functools.lru_cache(maxsize=2)
  def order(epoch):
    # A batch spans at most two epochs, unless the set is very small.
    seed_sequence = np.random.SeedSequence(seed, spawn_key=(_ORDER, epoch))
    indices = np.arange(num_images, dtype=np.uint32)  # 4 bytes per image
    return np.random.default_rng(seed_sequence).permutation(indices)

  flips = np.random.SeedSequence(seed, spawn_key=(_FLIP,))
  flip_key = flips.generate_state(1, np.uint64)
  others = np.random.SeedSequence(seed, spawn_key=(_AUGMENT,))
  keys = others.generate_state(augment.STREAMS, np.uint64)
  texts = np.random.SeedSequence(seed, spawn_key=(_CAPTION,))
  text_key = texts.generate_state(1, np.uint64)

  def of(step):
    positions = step * batch_size + rows
    epochs, offsets = np.divmod(positions, num_images)
    indices = np.empty(len(rows), np.int32)
    for epoch in np.unique(epochs):
      chosen = epochs == epoch
      indices[chosen] = order(int(epoch))[offsets[chosen]]
    coins = (augment.hashed(flip_key, positions) >> np.uint64(63)) & flip
    coins, more = coins.astype(bool), {}
    if captioned:
      chosen = augment.hashed(text_key, positions) >> np.uint64(32)
      more['choice'] = chosen.astype(np.uint32)
    if not augmented:
      return {'index': indices, 'mirrored': coins, **more}
    return {
      'index': indices,
      **more,
      'mirrored': np.zeros_like(coins),
      'augment': augment.draw(
        keys, positions, augmented, coins if flip else None
      ),
    }

  return grain.MapDataset.range(sys.maxsize).map(of)


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
  """The rows of a global batch that this process's devices hold.

  The rows need not be contiguous: on a TPU slice the devices of a host may be
  anywhere in the mesh.

  Args:
    sharding: sharding over the batch axis.
    batch_size: rows of the global batch.

  Returns:
    int64 [R], ascending.

  Raises:
    UserError: batch_size cannot be divided over the mesh.
  """
  _check_batch_size(batch_size)
  axes = sharding.spec[0] if len(sharding.spec) else None
  axes = axes if isinstance(axes, tuple) else (axes,) if axes else ()
  num_shards = math.prod(sharding.mesh.shape[axis] for axis in axes)
  if batch_size % num_shards:
    raise UserError(
      f'batch_size {batch_size} cannot be divided over {num_shards} devices '
      f'(mesh axes {", ".join(axes)}): use a multiple of {num_shards}'
    )
  slices = sharding.addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[s] for s in slices]))


def put_rows(
  tree, sharding: NamedSharding, batch_size: int, stacked: bool = False
):
  """This process's rows of a batch, as NumPy arrays -> global arrays.

  Args:
    tree: arrays [R, ...], the rows given by `local_rows`, or [B, ...], the same
      in every process.
    sharding: sharding over the batch axis.
    batch_size: rows of the global batch.
    stacked: whether the arrays are [K, R, ...], of K batches.
  """
  where, at = sharding, 0
  if stacked:
    where = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    at = 1

  def put(array):
    shape = (*array.shape[:at], batch_size, *array.shape[at + 1 :])
    return jax.make_array_from_process_local_data(where, array, shape)

  return jax.tree.map(put, tree)


def _read(source: Source, indices, mirrored, choices=None) -> dict:
  """Reads images by index and stacks them to a batch, mirrored or not."""
  records = [source[i] for i in indices]
  read = [record[source.row] for record in records]
  if source.row == 'image':
    read = [x[:, ::-1] if m else x for x, m in zip(read, mirrored, strict=True)]
  else:  # both are there
    read = [x[int(m)] for x, m in zip(read, mirrored, strict=True)]
  batch = {
    source.row: np.stack(read),
    'label': np.array([record['label'] for record in records], np.int32),
  }
  if source.encode_fn:
    batch['tokens'] = captions.tokens(source, indices, choices)
    if source.rows_fn:
      batch |= source.rows_fn(batch['tokens'])
  return batch


def _read_ahead(
  dataset: grain.MapDataset, num_threads: int | None
) -> grain.DatasetIterator:
  """Iterates over batches, prefetched by threads."""
  if num_threads is None:
    num_threads = min(16, os.cpu_count() or 1)
  # A small buffer: batches take memory and delay the end of the program.
  options = grain.ReadOptions(
    num_threads=num_threads,
    prefetch_buffer_size=num_threads + 1 if num_threads else 0,
  )
  return iter(dataset.to_iter_dataset(options))


def _place(
  iterator: grain.DatasetIterator,
  batches: Iterator,
  sharding: NamedSharding,
  batch_size: int,
  stacked: bool,
) -> Iterator[dict[str, jax.Array]]:
  try:
    for batch in batches:
      yield put_rows(batch, sharding, batch_size, stacked)
  finally:
    iterator.close()


def _stacks(batches: Iterator, step: int, size: int) -> Iterator:
  """Stacks batches, see `batches`."""
  if not size:
    yield from batches
    return
  count = size - step % size
  while group := list(itertools.islice(batches, count)):
    yield jax.tree.map(lambda *rows: np.stack(rows), *group)
    count = size


def _warned(
  batches: Iterator, early: int, warn: Callable[[Exception], None]
) -> Iterator:
  """The same batches, read `early` ones ahead; see `batches`."""
  waiting = collections.deque()
  try:
    for batch in batches:
      waiting.append(batch)
      if len(waiting) > early:
        yield waiting.popleft()
  except (OSError, UserError) as error:
    if len(waiting) == early:
      warn(error)
    yield from waiting
    raise
  yield from waiting


def _check_batch_size(batch_size: int) -> None:
  if batch_size < 1:
    raise UserError(f'batch_size is {batch_size}: use 1 or more')
