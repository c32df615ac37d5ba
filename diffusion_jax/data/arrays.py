"""Images in one NumPy file, .npy or .npz.

  .npy  uint8 [N, H, W, C], or [N, H, W] for one channel; memory-mapped.
  .npz  `train_images` and optionally `train_labels`, `test_images`,
        `test_labels`; or `x_train` and so on, as Keras names them; or `images`
        (or `arr_0`) and optionally `labels`. Images as above; labels are
        integers [N] or [N, 1], 0 or more, and others are left out. The images
        of the requested split are memory-mapped, or read into memory if they
        are compressed.

Captions are strings, `captions` beside `images`, otherwise `train_captions` and
`test_captions`: [N], or [N, K] for up to K captions of an image, filled up with
empty ones.

Without `test_images`, 'test' is every `heldout_every`-th image, and those whose
indices a .npz has as `heldout_combinations`, integers [n].

Files may be untrusted, see system/npz.py.
"""

import functools
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from diffusion_jax.data import captions, looks, sources
from diffusion_jax.system import errors, files, npz
from diffusion_jax.system.errors import UserError

# Images to train on -> their labels, the test images, and the labels of those.
_TEST = ('test_images', 'test_labels')
_KEYS = {
  'train_images': ('train_labels', *_TEST),
  'x_train': ('y_train', 'x_test', 'y_test'),
  'images': ('labels', *_TEST),
  'arr_0': ('labels', *_TEST),
}
_CAPTIONS = {'train_images': 'train_captions', 'x_train': 'train_captions'}
_NAMED = 'heldout_combinations'


def create(
  path: str, wanted: sources.Wanted, what: str
) -> sources.Source | None:
  """Opens a .npy or .npz file.

  Args:
    path: the file.
    wanted: the requested split, size and channels.
    what: what to call the file in errors.

  Returns:
    A Source, or None for 'test' if no images are held out.

  Raises:
    UserError: the file is missing, damaged or of the wrong kind, has no images,
      or has images that are not uint8 [height, width, channels].
  """
  file = _file(path, what)
  labels, num_classes, has_test, notes, named = None, 0, False, [], ()
  caption_fn = None
  with errors.one_line(
    f'{what} cannot be read: ', '; write it again with np.save or np.savez'
  ):
    if file.suffix == '.npy':
      images = _map_npy(file, what, wanted)
    else:
      with zipfile.ZipFile(file) as archive:
        images, labels, num_classes, has_test, notes = _read_npz(
          archive, what, wanted
        )
        named = () if has_test else _read_named(archive, what, len(images))
        caption_fn = _captions(archive, what, wanted, len(images))

  indices = np.arange(len(images))
  if has_test:
    sources.check_split(wanted, what)
  else:
    indices = sources.heldout_indices(len(images), wanted, named)
  if indices is None:
    return None
  images.flags.writeable = False
  if labels is None:
    labels = np.broadcast_to(np.int32(-1), len(images))
  opened = file.open('rb') if isinstance(images, np.memmap) else None
  num_bytes = file.stat().st_size

  def read(index):
    # Reading a memory map past the end of its file would kill the process.
    if opened and os.fstat(opened.fileno()).st_size < num_bytes:
      raise UserError(
        f'{what} has become shorter since it was opened: write it again'
      )
    index = indices[index]
    image = np.array(images[index]) if opened else images[index]
    if as_rgb:
      image = np.repeat(image, 3, -1)
    return image, labels[index]

  *size, channels = images.shape[1:]
  as_rgb = channels < (wanted.channels or 0)
  notes += ['the images are grey, and read as RGB'] * as_rgb
  if has_test and wanted.heldout_every:
    notes.append('data.heldout_every is ignored, as the file has test images')
  notes += looks.arrays(lambda index: read(index)[0], len(indices))
  return sources.create(
    f'arrays {path}, {wanted.split}',
    len(indices),
    (*size, wanted.channels or channels),
    num_classes,
    read,
    notes,
    label_fn=lambda index: labels[indices[index]],
    caption_fn=caption_fn and (lambda index: caption_fn(indices[index])),
  )


def _file(path: str, what: str) -> Path:
  """The path of an array file, checked to exist."""
  file = Path(path).expanduser()
  if file.suffix not in ('.npy', '.npz'):
    remedy = (
      "a folder of images is of data.name 'folder'"
      if file.is_dir()
      else 'need one that ends in .npy or .npz'
    )
    raise UserError(f'{what} is not an array file: {remedy}')
  if not file.is_file():
    found = 'is not a file' if file.exists() else 'does not exist'
    raise UserError(f'{what} {found}: give a .npy or .npz file')
  return file


def _map_npy(file: Path, what: str, wanted: sources.Wanted) -> np.ndarray:
  """Memory-maps images: uint8 [N, H, W, C]."""
  with file.open('rb') as stream:
    header = npz.read_header(stream, what)
  shape = _shape_of_images(header, what, wanted)
  npz.check_bytes(header, file.stat().st_size, what)
  return files.map_or_read(file).reshape(-1, *shape)


def _read_npz(
  archive: zipfile.ZipFile, what: str, wanted: sources.Wanted
) -> tuple[np.ndarray, np.ndarray | None, int, bool, list[str]]:
  """The arrays of a split: images, labels, num_classes, has_test, notes.

  Without test images (has_test is False), the arrays of the whole set.
  """
  packed = sum(info.compress_size for info in archive.infolist())
  if packed > Path(archive.filename).stat().st_size:
    raise ValueError(f'it claims {packed} bytes of data, but is smaller')
  there = [i.filename.removesuffix('.npy') for i in archive.infolist()]
  found = [key for key in _KEYS if key in there]
  if not found:
    keys = ' '.join(', '.join(there[:10]).split()) or 'nothing'
    raise UserError(
      f'{what} holds {keys}: needs train_images (and train_labels, '
      'test_images, test_labels), or images (and labels)'
    )
  train_labels, test_images, test_labels = _KEYS[found[0]]
  has_test = test_images in there
  own_test = has_test and wanted.split == 'test'
  images_key = test_images if own_test else found[0]
  labels_key = test_labels if own_test else train_labels

  def read(key, check):
    where = f'array {key!r} in {what}'
    return npz.read_member(archive, key, where, check, mapped=True)

  images = read(images_key, lambda *of: _shape_of_images(*of, wanted))
  if images.ndim == 3:
    images = images[..., None]
  labels, num_classes, notes = None, 0, []
  try:
    # The labels of both splits, so that both have the same number of classes.
    both = {
      key: _as_labels(read(key, _check_labels), f'array {key!r} in {what}')
      for key in (train_labels, test_labels)
      if key in there
    }
    labels = both.get(labels_key)
    if labels is not None and len(labels) != len(images):
      raise UserError(
        f'{what} has {len(images)} {images_key}, but {len(labels)} '
        f'{labels_key}: need one label per image'
      )
    num_classes = max((int(x.max()) + 1 for x in both.values()), default=0)
  except UserError as error:  # images can be used without labels
    labels, notes = None, [f'the labels are left out: {error}']
  return images, labels, num_classes, has_test, notes


def _read_named(archive, what: str, num_images: int) -> np.ndarray:
  """The indices of the images that the file names as held out."""
  if f'{_NAMED}.npy' not in archive.namelist():
    return np.zeros(0, int)
  where = f'array {_NAMED!r} in {what}'
  named = npz.read_member(archive, _NAMED, where, _check_labels).reshape(-1)
  if named.min() < 0 or named.max() >= num_images:
    raise UserError(
      f'{where} has indices from {named.min()} to {named.max()}: they must be '
      f'0 to {num_images - 1}, of images in the file'
    )
  return named


def _captions(archive, what: str, wanted, num_images: int) -> Callable | None:
  """index -> captions, which opens the array when first called, or None."""
  there = [name.removesuffix('.npy') for name in archive.namelist()]
  images_key = next(key for key in _KEYS if key in there)
  key = _CAPTIONS.get(images_key, 'captions')
  if wanted.captions != captions.AUTO:
    key = captions.column(there, wanted.captions, what)
  if _TEST[0] in there and wanted.split == 'test':
    key = f'test_{key.removeprefix("train_")}'
  if key not in there:
    return None
  where, path = f'array {key!r} in {what}', archive.filename

  def check(header, where):
    shape = header.shape
    if header.dtype.kind != 'U' or len(shape) not in (1, 2) or 0 in shape:
      raise UserError(
        f'{where} has {header.dtype} {list(shape)}: captions must be strings '
        '[N] or [N, K], from np.array(captions)'
      )
    if shape[0] != num_images:
      raise UserError(
        f'{where} has captions of {shape[0]} images, and there are '
        f'{num_images}: need one for each'
      )

  @functools.cache
  def array():
    with (
      errors.one_line(f'{where} cannot be read: '),
      zipfile.ZipFile(path) as opened,
    ):
      return npz.read_member(opened, key, where, check, mapped=True)

  def of(index):
    rows = array()
    try:
      texts = rows[index].reshape(-1).tolist()
    except (ValueError, SystemError) as error:  # by the version of NumPy
      raise UserError(
        f'{where} has text of image {index} that is not Unicode: write the '
        'captions again'
      ) from error
    return tuple(filter(None, map(str.strip, texts))) or ('',)

  return of


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
  may_be_grey = channels in (None, 1) or (
    channels == 3 and not wanted.has_config
  )
  if len(given) == 3 and may_be_grey:
    given = (*given, 1)
  shape = given[1:]
  if may_be_grey and shape[2:] == (1,):
    channels = 1
  is_image = len(given) == 4 and 0 not in shape
  if (
    header.dtype != np.uint8
    or not is_image
    or shape[:2] != (image_size or (shape[0], shape[0]))
    or channels not in (None, shape[2])
  ):
    height, width = image_size or ('S', 'S')
    raise UserError(
      f'{where} has {header.dtype} {list(header.shape)}, need uint8 '
      f'[N, {height}, {width}, {wanted.channels or "C"}]: '
      f'{_remedy(header, wanted)}'
    )
  if not given[0]:
    raise UserError(f'{where} has no images: {list(given)}')
  return shape


def _remedy(header: npz.Header, wanted: sources.Wanted) -> str:
  """What to do with an array that does not hold the wanted images."""
  shape, kind = header.shape, header.dtype.kind
  remedies = []
  if kind == 'f':
    remedies.append(
      'if the values are from 0 to 1, save (images * 255).round().astype'
      '(np.uint8)'
    )
  elif kind == 'b':
    remedies.append('save images.astype(np.uint8) * 255')
  elif header.dtype != np.uint8:
    remedies.append(
      'if the values are from 0 to 255, save images.astype(np.uint8)'
    )
  if len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
    remedies.append(
      'the channels come first: save them channels last, with '
      'np.moveaxis(images, 1, -1)'
    )
  elif len(shape) == 3 and shape[2] in (1, 3):
    remedies.append('if it is one image, save images[None]')
  elif len(shape) == 3 and wanted.channels == 3:
    remedies.append('the images are grey: set channels to 1')
  if remedies:
    return '; '.join(remedies)
  if wanted.image_size or wanted.channels:
    return 'set image_size and channels to theirs, or convert the images'
  return 'images must be square, channels last'
