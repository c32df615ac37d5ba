"""Writes labelled sets of images that this package and others read.

npz          one file with `images` and `labels`, for data.name 'arrays'
folder       LABEL_NAME/NUMBER.png and dataset.json, for data.name 'folder'
arrayrecord  a prepared set of TFDS in one shard: data.name 'tfds:NAME', where
             NAME is that of the folder, and data.path is the folder around it
"""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion_jax.data import layouts
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError

VERSION = '1.0.0'  # of a set of TFDS
_NAME = re.compile(r'[a-z][a-z0-9_]*')


class Labelled(NamedTuple):
  """A set to write.

  Attributes:
    images: uint8 [N, H, W, C]; C is 1 or 3, for npz any number.
    labels: int32 [N].
    class_names: the names of all classes, by label.
    text_of: number of an image -> text chunks of its PNG.
  """

  images: np.ndarray
  labels: np.ndarray
  class_names: Sequence[str]
  text_of: Callable[[int], Mapping[str, str]] = lambda number: {}


def check(kind: str, path: Path, channels: int) -> None:
  """Checks that a set can be written, before it is drawn.

  Args:
    kind: a key of WRITERS.
    path: its file or folder.
    channels: the number of channels.

  Raises:
    UserError: the path or the images do not fit the kind.
  """
  if files.in_bucket(path):
    raise UserError(
      f'--output={path}: data are read from a local disk: give one there'
    )
  if kind == 'npz' and path.suffix != '.npz':
    raise UserError(
      f'--output={path} with --format=npz: give a file that ends in .npz'
    )
  if kind != 'npz' and path.suffix == '.npz':
    raise UserError(
      f'--output={path} with --format={kind}: give a folder, or leave the '
      'format out'
    )
  if kind != 'npz' and channels not in (1, 3):
    raise UserError(
      f'--format={kind} takes images of 1 or 3 channels, not {channels}: use '
      'npz'
    )
  if kind == 'arrayrecord' and not _NAME.fullmatch(path.name):
    raise UserError(
      f'--output={path} with --format=arrayrecord: the folder becomes the name '
      'of a TFDS set, so give small letters, digits and _'
    )


def write(kind: str, path: Path, made: Labelled) -> None:
  """Writes a set; `path` appears once it is complete.

  Args:
    kind: a key of WRITERS.
    path: its file or folder, which must not exist.
    made: the set.
  """
  files.make(path.parent)
  with _unfinished(path) as beside:
    WRITERS[kind](beside, path.name, made)
    beside.rename(path)


@contextlib.contextmanager
def _unfinished(path: Path):
  """A place beside a path, emptied before, and removed after a failure."""
  beside = path.with_name(f'.{path.name}.unfinished')

  def clear():
    shutil.rmtree(beside, ignore_errors=True)
    if beside.is_file():
      beside.unlink()

  clear()
  try:
    yield beside
  except BaseException:  # a full disk, or Ctrl-C
    clear()
    raise


def _npz(place: Path, name: str, made: Labelled) -> None:
  del name
  with place.open('wb') as file:
    np.savez(file, allow_pickle=False, images=made.images, labels=made.labels)


def _folder(place: Path, name: str, made: Labelled) -> None:
  del name
  listed = []
  for number, (image, label) in enumerate(
    zip(made.images, made.labels, strict=True)
  ):
    folder = folder_of(int(label), made.class_names)
    (place / folder).mkdir(parents=True, exist_ok=True)
    file = f'{folder}/{number:06d}.png'
    (place / file).write_bytes(_png(image, made.text_of(number)))
    listed.append([file, int(label)])
  text = json.dumps({'labels': listed})
  (place / layouts.LABELS).write_text(text + '\n')


def folder_of(label: int, class_names: Sequence[str]) -> str:
  """The folder of a class: its number and, unless that is all, its name.

  So folders sort as labels do, and no name of a class is that of a split.

  Args:
    label: the class.
    class_names: the names of all.
  """
  number = str(label).zfill(len(str(len(class_names) - 1)))
  name = re.sub(r'[^\w-]+', '-', class_names[label]).strip('-')
  return number if not name or name.isdecimal() else f'{number}_{name}'


def _png(image: np.ndarray, text: Mapping[str, str]) -> bytes:
  chunks, stream = PngInfo(), io.BytesIO()
  for key, value in text.items():
    chunks.add_itxt(key, value)
  pixels = image[..., 0] if image.shape[-1] == 1 else image
  Image.fromarray(pixels).save(stream, format='png', pnginfo=chunks)
  return stream.getvalue()


def _arrayrecord(place: Path, name: str, made: Labelled) -> None:
  # These take a second, and only this kind needs them.
  import tensorflow_datasets as tfds
  from array_record.python.array_record_module import ArrayRecordWriter

  directory = place / VERSION
  directory.mkdir(parents=True)
  names = list(made.class_names)
  features = tfds.features.FeaturesDict(
    {
      'image': tfds.features.Image(
        shape=made.images.shape[1:], encoding_format='png'
      ),
      'label': tfds.features.ClassLabel(names=names),
    }
  )
  features.save_config(str(directory))
  shard = directory / f'{name}-train.array_record-00000-of-00001'
  writer, size = ArrayRecordWriter(str(shard), 'group_size:1'), 0
  for image, label in zip(made.images, made.labels, strict=True):
    record = _example({'image': _png(image, {}), 'label': int(label)})
    writer.write(record)
    size += len(record)
  writer.close()
  split = {
    'name': 'train',
    'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
    'numBytes': str(size),
    'shardLengths': [str(len(made.images))],
  }
  info = {
    'name': name, 'version': VERSION, 'fileFormat': 'array_record',
    'moduleName': name, 'splits': [split],
  }  # fmt: skip
  (directory / 'dataset_info.json').write_text(json.dumps(info) + '\n')


def _example(values: Mapping[str, bytes | int]) -> bytes:
  """A tf.train.Example as protobuf's wire format has it, without TensorFlow."""

  def feature(value):
    if isinstance(value, bytes):
      return _field(1, _field(1, value))  # bytes_list
    return _field(3, _field(1, _varint(value)))  # int64_list, packed

  entries = (
    _field(1, _field(1, name.encode()) + _field(2, feature(value)))
    for name, value in sorted(values.items())
  )
  return _field(1, b''.join(entries))


def _varint(number: int) -> bytes:
  parts = []
  while number > 127:
    parts.append(number & 127 | 128)
    number >>= 7
  return bytes([*parts, number])


def _field(number: int, content: bytes) -> bytes:
  """A field of protobuf with a length."""
  return _varint(number << 3 | 2) + _varint(len(content)) + content


WRITERS = {'npz': _npz, 'folder': _folder, 'arrayrecord': _arrayrecord}
