"""Images in one NumPy file, .npy or .npz.

  .npy  uint8 [N, H, W, C], or [N, H, W] for one channel; memory-mapped.
  .npz  `train_images` and, if there are any, `train_labels`, `test_images`,
        `test_labels`; or `images` (or `arr_0`) and `labels`. Images as above,
        labels are integers [N] or [N, 1], 0 or more. The images of the split
        that is asked for are read into memory.

Where there are no `test_images`, 'test' is every `heldout_every`-th image.

A file may come from anywhere: nothing is unpickled, and what a header claims
is checked against the size of the file before any memory is taken.
"""

import contextlib
import dataclasses
import io
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from diffusion_jax.data import sources
from diffusion_jax.system.errors import UserError

# Longer headers than this belong to no array of numbers.
_MAX_HEADER_BYTES = 16384
# Deflate's limit, 1032, and room for a few bytes of block headers.
_MAX_COMPRESSION = 1040
# What NumPy and zipfile raise for damaged files.
_DAMAGED = (
  OSError,
  EOFError,
  ValueError,
  RuntimeError,
  SyntaxError,
  TypeError,
  OverflowError,
  MemoryError,
  tokenize.TokenError,
  zipfile.BadZipFile,
  zlib.error,
)


@dataclasses.dataclass(frozen=True)
class _Header:
  """What the head of a .npy stream says."""

  shape: tuple[int, ...]
  dtype: np.dtype
  order: str  # 'C' or 'F'
  offset: int  # bytes before the data

  @property
  def num_bytes(self) -> int:
    return self.offset + math.prod(self.shape) * self.dtype.itemsize


def create(
  path: str,
  split: str,
  image_size: int | None,
  channels: int | None,
  heldout_every: int,
  *,
  what: str,
) -> sources.Source | None:
  """Opens a .npy or .npz file.

  Args:
    path: the file.
    split: 'train' or 'test'.
    image_size: height and width of the images, in pixels; None for any.
    channels: of the images; None for any.
    heldout_every: see sources.heldout_indices.
    what: what to call the file in an error.

  Returns:
    a Source, or None for 'test' where there are neither test images nor
    heldout_every.

  Raises:
    UserError: if the file is missing, damaged or of the wrong kind, has no
      images, or images that are not uint8 [image_size, image_size, channels].
  """
  file = Path(path).expanduser()
  if file.suffix not in ('.npy', '.npz'):
    raise UserError(
      f'{what} is not an array file: need one that ends in .npy or .npz'
    )
  if not file.is_file():
    raise UserError(f'{what} is not a file: use a .npy or .npz')

  labels, num_classes, has_test = None, 0, False
  with _one_line_errors(what):
    if file.suffix == '.npy':
      images = _map_npy(file, what, image_size, channels)
    else:
      with zipfile.ZipFile(file) as archive:
        images, labels, num_classes, has_test = _read_npz(
          archive, what, split, image_size, channels
        )

  indices = np.arange(len(images))
  if not has_test:
    indices = sources.heldout_indices(len(images), split, heldout_every)
    if indices is None:
      return None
  images.flags.writeable = False
  opened = file.open('rb') if file.suffix == '.npy' else None
  size = file.stat().st_size

  def read(index):
    # A memory map ends the process where its file does, without a word.
    if opened and os.fstat(opened.fileno()).st_size < size:
      raise UserError(
        f'{what} has become shorter since it was opened: write it again'
      )
    index = indices[index]
    image = np.array(images[index]) if opened else images[index]
    return image, -1 if labels is None else labels[index]

  return sources.Source(
    num_images=len(indices),
    read_fn=read,
    num_classes=num_classes,
    description=sources.describe(
      f'arrays {path}', split, len(indices), images.shape[1:], num_classes
    ),
  )


def _map_npy(
  file: Path, what: str, image_size: int | None, channels: int | None
) -> np.ndarray:
  """Memory-maps images: uint8 [N, H, W, C]."""
  with file.open('rb') as stream:
    header = _read_header(stream, what)
  shape = _shape_of_images(header, what, image_size, channels)
  _check_bytes(header, file.stat().st_size, what)
  images = np.memmap(
    file, np.uint8, 'r', header.offset, header.shape, header.order
  )
  return images.reshape(-1, *shape)


def _read_npz(
  archive: zipfile.ZipFile,
  what: str,
  split: str,
  image_size: int | None,
  channels: int | None,
) -> tuple[np.ndarray, np.ndarray | None, int, bool]:
  """The arrays of a split: images, labels, num_classes, has_test.

  Without test images (has_test is False) they are those of the whole set.
  """
  packed = sum(info.compress_size for info in archive.infolist())
  if packed > Path(archive.filename).stat().st_size:
    raise ValueError(f'it claims {packed} bytes of data, and is smaller')
  infos = {i.filename.removesuffix('.npy'): i for i in archive.infolist()}
  found = [k for k in ('train_images', 'images', 'arr_0') if k in infos]
  if not found:
    keys = ' '.join(', '.join(list(infos)[:10]).split()) or 'nothing'
    raise UserError(
      f'{what} holds {keys}: needs train_images (and train_labels, '
      'test_images, test_labels), or images (and labels)'
    )
  train_images, has_test = found[0], 'test_images' in infos
  train_labels = 'train_labels' if train_images == 'train_images' else 'labels'

  own_test = has_test and split == 'test'
  images_key = 'test_images' if own_test else train_images
  labels_key = 'test_labels' if own_test else train_labels
  images = _read_member(
    archive,
    infos[images_key],
    f'array {images_key!r} in {what}',
    lambda header, where: _shape_of_images(header, where, image_size, channels),
  )
  if images.ndim == 3:
    images = images[..., None]

  # Both splits' labels, so that both have the same number of classes.
  labels = {
    key: _read_labels(archive, infos[key], f'array {key!r} in {what}')
    for key in (train_labels, 'test_labels')
    if key in infos
  }
  num_classes = max((int(x.max()) + 1 for x in labels.values()), default=0)
  if labels_key in labels and len(labels[labels_key]) != len(images):
    raise UserError(
      f'{what} has {len(images)} {images_key}, but '
      f'{len(labels[labels_key])} {labels_key}: need one label an image'
    )
  return images, labels.get(labels_key), num_classes, has_test


def _read_labels(
  archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str
) -> np.ndarray:
  """Labels of one split: int32 [N]."""

  def check(header, where):
    is_vector = len(header.shape) == 1 or header.shape[1:] == (1,)
    if header.dtype.kind not in 'iu' or not is_vector or not header.shape[0]:
      raise UserError(
        f'{where} has {header.dtype} {list(header.shape)}: labels must be '
        'integers [N], one an image'
      )

  labels = _read_member(archive, info, where, check).reshape(-1)
  low, high = int(labels.min()), int(labels.max())
  if low < 0 or high >= 2**31:
    raise UserError(
      f'{where} has labels from {low} to {high}: they must be 0, 1, 2, ...'
    )
  return labels.astype(np.int32)


def _read_member(
  archive: zipfile.ZipFile,
  info: zipfile.ZipInfo,
  where: str,
  check_fn: Callable[[_Header, str], None],
) -> np.ndarray:
  """Reads one array of a .npz, once its header has passed the checks."""
  with archive.open(info) as stream:
    header = _read_header(stream, where)
  check_fn(header, where)
  _check_bytes(header, info.file_size, where)
  # np.savez knows these two, and both bound what a small file can hold.
  if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    raise UserError(
      f'{where} is compressed in a way that NumPy does not use: write it with '
      'np.savez or np.savez_compressed'
    )
  if info.file_size > _MAX_COMPRESSION * info.compress_size + 1024:
    raise UserError(
      f'{where} claims {info.file_size} bytes in {info.compress_size} '
      'compressed ones: the file is damaged'
    )

  data = np.empty(header.num_bytes - header.offset, np.uint8)
  with archive.open(info) as stream:
    stream.read(header.offset)
    view = memoryview(data)
    while view:
      count = stream.readinto(view[: 2**24])
      if not count:
        raise EOFError('it ends too early')
      view = view[count:]
  return data.view(header.dtype).reshape(header.shape, order=header.order)


def _read_header(stream: BinaryIO, where: str) -> _Header:
  """Parses the head of a .npy stream, reading a bounded number of bytes."""
  head = io.BytesIO(stream.read(_MAX_HEADER_BYTES))
  version = np.lib.format.read_magic(head)
  if version == (1, 0):
    fields = np.lib.format.read_array_header_1_0(head)
  elif version == (2, 0):
    fields = np.lib.format.read_array_header_2_0(head)
  else:  # 3.0 is for names in Unicode, which pixels do not have
    raise ValueError(f'npy version {version}, need (1, 0) or (2, 0)')
  shape, is_fortran, dtype = fields
  if dtype.hasobject:
    raise UserError(
      f'{where} holds pickled Python objects, which are never loaded: write a '
      'plain array of numbers'
    )
  if min(shape, default=0) < 0:
    raise ValueError(f'shape {shape}')
  return _Header(shape, dtype, 'F' if is_fortran else 'C', head.tell())


def _shape_of_images(
  header: _Header, where: str, image_size: int | None, channels: int | None
) -> tuple[int, int, int]:
  """[H, W, C] of uint8 [N, H, W, C], N > 0; None is what the header says."""
  given = header.shape
  if len(given) == 3 and channels in (None, 1):
    given = (*given, 1)
  shape = given[1:]
  is_image = len(given) == 4 and shape[0] == shape[1] and 0 not in shape
  if (
    header.dtype != np.uint8
    or not is_image
    or image_size not in (None, shape[0])
    or channels not in (None, shape[2])
  ):
    size = image_size or 'S'
    hint = (
      'set image_size and channels to theirs, or convert the images'
      if image_size or channels
      else 'images must be square, channels last'
    )
    raise UserError(
      f'{where} has {header.dtype} {list(header.shape)}, need uint8 '
      f'[N, {size}, {size}, {channels or "C"}]: {hint}'
    )
  if not given[0]:
    raise UserError(f'{where} has no images: {list(given)}')
  return shape


def _check_bytes(header: _Header, num_bytes: int, where: str) -> None:
  """Raises UserError unless the array fills its file exactly."""
  if header.num_bytes != num_bytes:
    raise UserError(
      f'{where} is damaged: {header.dtype} {list(header.shape)} takes '
      f'{header.num_bytes} bytes, but it has {num_bytes}'
    )


@contextlib.contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
  """Turns what damaged files raise into a UserError that names the file."""
  try:
    yield
  except UserError:  # a ValueError too, and says already what is wrong
    raise
  except _DAMAGED as error:
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise UserError(
      f'{what} cannot be read: {reason}; write it again with np.save or '
      'np.savez'
    ) from error
