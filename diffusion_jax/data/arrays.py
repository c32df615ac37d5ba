"""Images in one NumPy file, .npy or .npz.

  .npy  uint8 [N, H, W, C], or [N, H, W] for one channel; memory-mapped.
  .npz  `train_images` and optionally `train_labels`, `test_images`,
        `test_labels`; or `images` (or `arr_0`) and optionally `labels`. Images
        as above; labels are integers [N] or [N, 1], 0 or more. The images of
        the requested split are read into memory.

Without `test_images`, 'test' is every `heldout_every`-th image.

Files may be untrusted, see system/npz.py.
"""

import os
import zipfile
from pathlib import Path

import numpy as np

from diffusion_jax.data import sources
from diffusion_jax.system import errors, npz
from diffusion_jax.system.errors import UserError


def create(
  path: str, wanted: sources.Wanted, what: str
) -> sources.Source | None:
  """Opens a .npy or .npz file.

  Args:
    path: the file.
    wanted: the requested split, size and channels.
    what: what to call the file in errors.

  Returns:
    A Source, or None for 'test' if there are neither test images nor
    heldout_every.

  Raises:
    UserError: the file is missing, damaged or of the wrong kind, has no images,
      or has images that are not uint8 [height, width, channels].
  """
  file = Path(path).expanduser()
  if file.suffix not in ('.npy', '.npz'):
    raise UserError(
      f'{what} is not an array file: need one that ends in .npy or .npz'
    )
  if not file.is_file():
    raise UserError(f'{what} is not a file: use a .npy or .npz')

  labels, num_classes, has_test = None, 0, False
  with errors.one_line(
    f'{what} cannot be read: ', '; write it again with np.save or np.savez'
  ):
    if file.suffix == '.npy':
      images = _map_npy(file, what, wanted)
    else:
      with zipfile.ZipFile(file) as archive:
        images, labels, num_classes, has_test = _read_npz(archive, what, wanted)

  indices = np.arange(len(images))
  if not has_test:
    indices = sources.heldout_indices(len(images), wanted)
    if indices is None:
      return None
  images.flags.writeable = False
  opened = file.open('rb') if file.suffix == '.npy' else None
  size = file.stat().st_size

  def read(index):
    # Reading a memory map past the end of its file would kill the process.
    if opened and os.fstat(opened.fileno()).st_size < size:
      raise UserError(
        f'{what} has become shorter since it was opened: write it again'
      )
    index = indices[index]
    image = np.array(images[index]) if opened else images[index]
    return image, -1 if labels is None else labels[index]

  shape = images.shape[1:]
  name = f'arrays {path}, {wanted.split}'
  return sources.create(name, len(indices), shape, num_classes, read)


def _map_npy(file: Path, what: str, wanted: sources.Wanted) -> np.ndarray:
  """Memory-maps images: uint8 [N, H, W, C]."""
  with file.open('rb') as stream:
    header = npz.read_header(stream, what)
  shape = _shape_of_images(header, what, wanted)
  npz.check_bytes(header, file.stat().st_size, what)
  return np.load(file, mmap_mode='r', allow_pickle=False).reshape(-1, *shape)


def _read_npz(
  archive: zipfile.ZipFile, what: str, wanted: sources.Wanted
) -> tuple[np.ndarray, np.ndarray | None, int, bool]:
  """The arrays of a split: images, labels, num_classes, has_test.

  Without test images (has_test is False), the arrays of the whole set.
  """
  packed = sum(info.compress_size for info in archive.infolist())
  if packed > Path(archive.filename).stat().st_size:
    raise ValueError(f'it claims {packed} bytes of data, but is smaller')
  there = [i.filename.removesuffix('.npy') for i in archive.infolist()]
  found = [k for k in ('train_images', 'images', 'arr_0') if k in there]
  if not found:
    keys = ' '.join(', '.join(there[:10]).split()) or 'nothing'
    raise UserError(
      f'{what} holds {keys}: needs train_images (and train_labels, '
      'test_images, test_labels), or images (and labels)'
    )
  has_test = 'test_images' in there
  train_labels = 'train_labels' if found[0] == 'train_images' else 'labels'
  own_test = has_test and wanted.split == 'test'
  images_key = 'test_images' if own_test else found[0]
  labels_key = 'test_labels' if own_test else train_labels

  def read(key, check):
    return npz.read_member(archive, key, f'array {key!r} in {what}', check)

  images = read(images_key, lambda *of: _shape_of_images(*of, wanted))
  if images.ndim == 3:
    images = images[..., None]
  # The labels of both splits, so that both have the same number of classes.
  labels = {
    key: _as_labels(read(key, _check_labels), f'array {key!r} in {what}')
    for key in (train_labels, 'test_labels')
    if key in there
  }
  num_classes = max((int(x.max()) + 1 for x in labels.values()), default=0)
  if labels_key in labels and len(labels[labels_key]) != len(images):
    raise UserError(
      f'{what} has {len(images)} {images_key}, but '
      f'{len(labels[labels_key])} {labels_key}: need one label per image'
    )
  return images, labels.get(labels_key), num_classes, has_test


def _check_labels(header: npz.Header, where: str) -> None:
  is_vector = len(header.shape) == 1 or header.shape[1:] == (1,)
  if header.dtype.kind not in 'iu' or not is_vector or not header.shape[0]:
    raise UserError(
      f'{where} has {header.dtype} {list(header.shape)}: labels must be '
      'integers [N], one per image'
    )


def _as_labels(array: np.ndarray, where: str) -> np.ndarray:
  """Labels of one split: int32 [N]."""
  low, high = int(array.min()), int(array.max())
  if low < 0 or high >= 2**31:
    raise UserError(
      f'{where} has labels from {low} to {high}: they must be 0, 1, 2, ...'
    )
  return array.reshape(-1).astype(np.int32)


def _shape_of_images(
  header: npz.Header, where: str, wanted: sources.Wanted
) -> tuple[int, int, int]:
  """Checks for uint8 [N, H, W, C], N > 0, of the wanted size: [H, W, C]."""
  image_size, channels = wanted.image_size, wanted.channels
  given = header.shape
  if len(given) == 3 and channels in (None, 1):
    given = (*given, 1)
  shape = given[1:]
  is_image = len(given) == 4 and 0 not in shape
  if (
    header.dtype != np.uint8
    or not is_image
    or shape[:2] != (image_size or (shape[0], shape[0]))
    or channels not in (None, shape[2])
  ):
    height, width = image_size or ('S', 'S')
    hint = (
      'set image_size and channels to theirs, or convert the images'
      if image_size or channels
      else 'images must be square, channels last'
    )
    raise UserError(
      f'{where} has {header.dtype} {list(header.shape)}, need uint8 '
      f'[N, {height}, {width}, {channels or "C"}]: {hint}'
    )
  if not given[0]:
    raise UserError(f'{where} has no images: {list(given)}')
  return shape
