"""Made-up images, and what the tests of the data ask of any source."""

import io
import json

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from diffusion_jax import data
from diffusion_jax.data import sources
from diffusion_jax.system.errors import UserError


def random_images(num_images, size=8, channels=3, seed=0):
  shape = (num_images, size, size, channels)
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def all_images(source):
  return np.stack([source[i]['image'] for i in range(len(source))])


def all_labels(source):
  return [int(source[i]['label']) for i in range(len(source))]


def error_line(*args, **kwargs):
  """The message of the UserError that create() answers with."""

  def read_first():  # a folder is read lazily
    return data.create(*args, **kwargs)[0]

  with pytest.raises(UserError) as caught:
    read_first()
  message = str(caught.value)
  assert '\n' not in message
  return message


def numbered(num_images, size=4):
  """A source whose image i is filled with i, but for a marked left column."""
  images = np.zeros((num_images, size, size, 1), np.uint8)
  images += np.arange(num_images, dtype=np.uint8)[:, None, None, None]
  images[:, :, 0] = 255
  return sources.Source(num_images, lambda i: (images[i], i), num_images, '')


def folder(path, image_size=8, channels=3, **kwargs):
  return data.create(
    'folder',
    path=str(path),
    image_size=image_size,
    channels=channels,
    **kwargs,
  )


def varint(number):
  """A protobuf varint."""
  groups = [number >> i & 127 for i in range(0, number.bit_length() or 1, 7)]
  return bytes([group | 128 for group in groups[:-1]] + groups[-1:])


def field(number, content):
  """A protobuf field with a length."""
  return varint(number << 3 | 2) + varint(len(content)) + content


def tf_example(**features):
  """tf.train.Example of bytes and integers, without TensorFlow."""

  def value(x):
    if isinstance(x, bytes):
      return field(1, field(1, x))
    return field(3, field(1, varint(x)))

  entries = [
    field(1, field(1, name.encode()) + field(2, value(x)))
    for name, x in sorted(features.items())
  ]
  return field(1, b''.join(entries))


def write_tfds(data_dir, name, version, features, splits):
  """A prepared set: features {name: connector}, splits {name: examples}."""
  import tensorflow_datasets as tfds

  directory = data_dir / name / version
  directory.mkdir(parents=True)
  tfds.features.FeaturesDict(features).save_config(str(directory))
  infos = []
  for split, examples in splits.items():
    shard = directory / f'{name}-{split}.array_record-00000-of-00001'
    writer = ArrayRecordWriter(str(shard), 'group_size:1')
    for example in examples:
      writer.write(tf_example(**example))
    writer.close()
    infos.append(
      {
        'name': split,
        'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
        'numBytes': '1',
        'shardLengths': [str(len(examples))],
      }
    )
  info = {
    'name': name,
    'version': version,
    'fileFormat': 'array_record',
    'moduleName': name,
    'splits': infos,
  }
  (directory / 'dataset_info.json').write_text(json.dumps(info))
  return directory


def png(image):
  stream = io.BytesIO()
  Image.fromarray(image).save(stream, format='png')
  return stream.getvalue()
