"""Prepared TFDS sets, written and read without TensorFlow."""

import os
import re
import subprocess
import sys

import binaries
import numpy as np
import pytest
from imagesets import (
  all_images,
  all_labels,
  error_line,
  folder,
  png,
  random_images,
  write_tfds,
)
from ml_collections import ConfigDict
from PIL import Image

from diffusion_jax import data
from diffusion_jax.data import pipeline, sources
from diffusion_jax.system.errors import UserError


def write_cifar10(data_dir, version='3.0.2', num_train=20, num_test=5):
  """A small set under a name that TFDS knows; returns images and labels."""
  import tensorflow_datasets as tfds

  images = random_images(num_train + num_test, size=32)
  labels = np.arange(len(images)) % 10
  examples = [
    {'image': png(image), 'label': int(label), 'id': b'x'}
    for image, label in zip(images, labels, strict=True)
  ]
  directory = write_tfds(
    data_dir,
    'cifar10',
    version,
    {
      'id': tfds.features.Text(),
      'image': tfds.features.Image(shape=(32, 32, 3)),
      'label': tfds.features.ClassLabel(num_classes=10),
    },
    {'train': examples[:num_train], 'test': examples[num_train:]},
  )
  return images, labels, directory


def tfds_source(data_dir, name='cifar10', split='train', **kwargs):
  return data.create(
    f'tfds:{name}',
    path=str(data_dir),
    split=split,
    **({'image_size': 32, 'channels': 3} | kwargs),
  )


@pytest.mark.parametrize('version', ['3.0.2', '2.9.9'])
def test_a_prepared_set_is_read_back_equal(tmp_path, version):
  images, labels, _ = write_cifar10(tmp_path, version)
  train = tfds_source(tmp_path)
  test = tfds_source(tmp_path, split='test')
  np.testing.assert_array_equal(all_images(train), images[:20])
  np.testing.assert_array_equal(all_images(test), images[20:])
  assert all_labels(train) == list(labels[:20])
  assert train.num_classes == 10
  part = tfds_source(tmp_path, split='train[5:15]')
  np.testing.assert_array_equal(all_images(part), images[5:15])


def test_the_rules_for_tfds_are_those_for_folders(tmp_path):
  images, _, _ = write_cifar10(tmp_path / 'tfds', num_train=2)
  (tmp_path / 'files').mkdir()
  for i in range(2):
    Image.fromarray(images[i]).save(tmp_path / 'files' / f'{i}.png')
  size = {'image_size': 12, 'channels': 1}
  np.testing.assert_array_equal(
    all_images(tfds_source(tmp_path / 'tfds', **size)),
    all_images(folder(tmp_path / 'files', **size)),
  )


def test_what_train_proposes_holds_images_out(tmp_path):
  import tensorflow_datasets as tfds

  write_tfds(
    tmp_path,
    'my_own',
    '1.0.0',
    {'image': tfds.features.Image(shape=(None, None, 3))},
    {'train': [{'image': png(image)} for image in random_images(20)]},
  )
  config = ConfigDict(
    {
      'name': 'tfds:my_own',
      'path': str(tmp_path),
      'image_size': 8,
      'channels': 3,
      'train_split': 'train',
      'heldout_split': 'test',
    }
  )
  assert data.splits(config)[1] is None
  told = data.not_held_out(config)
  proposed = re.findall(r"data\.(\w+)='(.*?)'", told)
  assert len(proposed) == 2
  config.update(dict(proposed))
  assert [len(source) for source in data.splits(config)] == [18, 2]
  config.heldout_split = ''
  assert 'data.heldout_split is empty' in data.not_held_out(config)
  config.name, config.heldout_split = 'folder', 'test'
  assert 'data.heldout_every=10' in data.not_held_out(config)


def test_a_broken_first_record_is_left_out(tmp_path):
  import tensorflow_datasets as tfds

  files = [b'no image', *map(png, random_images(2))]
  write_tfds(
    tmp_path,
    'my_own',
    '1.0.0',
    {'image': tfds.features.Image(shape=(None, None, 3))},
    {'train': [{'image': file} for file in files]},
  )
  config = {
    'name': 'tfds:my_own', 'path': str(tmp_path), 'image_size': 8,
    'channels': 3, 'train_split': 'train', 'heldout_split': '',
  }  # fmt: skip
  with pytest.raises(UserError, match='cannot be read'):
    data.splits(config)
  train, _ = data.splits(config | {'skip_broken': True})
  np.testing.assert_array_equal(train[0]['image'], train[1]['image'])


def test_a_set_of_ones_own_without_labels_and_test(tmp_path):
  import tensorflow_datasets as tfds

  images = random_images(3, channels=1)
  write_tfds(
    tmp_path,
    'my_own',
    '1.0.0',
    {'image': tfds.features.Image(shape=(None, None, 1))},
    {'train': [{'image': png(image[..., 0])} for image in images]},
  )
  size = {'image_size': 8, 'channels': 1}
  source = tfds_source(tmp_path, 'my_own', **size)
  np.testing.assert_array_equal(all_images(source), images)
  assert all_labels(source) == [-1] * 3
  assert source.num_classes == 0
  assert tfds_source(tmp_path, 'my_own', split='test', **size) is None


def test_tfds_reads_from_several_threads(tmp_path, monkeypatch):
  monkeypatch.setattr(sources, 'KEEP_BYTES', 0)
  images, labels, _ = write_cifar10(tmp_path)
  passes = pipeline.heldout(tfds_source(tmp_path), batch_size=3, num_threads=4)
  batches = [batch for batch, _ in passes]
  stacked = np.concatenate([batch['image'] for batch in batches])
  np.testing.assert_array_equal(stacked[:20], images[:20])
  stacked = np.concatenate([batch['label'] for batch in batches])
  np.testing.assert_array_equal(stacked[:20], labels[:20])


TFDS_MISTAKES = {
  'unknown': ({'name': 'cifr10'}, ['cifr10', 'mean tfds:cifar10']),
  'not prepared': ({'name': 'mnist'}, ['mnist', 'prepare_data.sh']),
  'needs TensorFlow': ({'name': 'coco'}, ['coco', 'prepare_data.sh']),
  'other version': ({'name': 'cifar10:9.9.9'}, ['9.9.9', 'prepare_data.sh']),
  'no name': ({'name': ''}, ["'tfds:'"]),
  'namespace': ({'name': 'huggingface:mnist'}, ['huggingface:mnist']),
  'split': ({'split': 'valid'}, ["'valid'", "'train'"]),
  'split syntax': ({'split': 'train[:10'}, ["'train[:10'"]),
  'empty split': ({'split': 'train[5:3]'}, ["'train[5:3]'"]),
  'heldout_every': ({'heldout_every': 5}, ['heldout_every is 5']),
  'channels': ({'channels': 2}, ['channels is 2']),
}


@pytest.mark.parametrize('case', TFDS_MISTAKES)
def test_a_mistake_with_tfds_is_answered_in_one_line(tmp_path, capfd, case):
  kwargs, must_name = TFDS_MISTAKES[case]
  write_cifar10(tmp_path, num_train=2, num_test=1)
  with pytest.raises(UserError) as caught:
    tfds_source(tmp_path, **kwargs)
  assert '\n' not in str(caught.value)
  for part in must_name:
    assert part in str(caught.value)
  assert [path.name for path in tmp_path.iterdir()] == ['cifar10']
  assert capfd.readouterr() == ('', '')


def remove_shard(directory):
  (directory / 'cifar10-train.array_record-00000-of-00001').unlink()


def truncate_shard(directory):
  shard = directory / 'cifar10-train.array_record-00000-of-00001'
  shard.write_bytes(shard.read_bytes()[:-10000])


def truncate_info(directory):
  info = directory / 'dataset_info.json'
  info.write_text(info.read_text()[:-20])


def as_tfrecord(directory):
  info = directory / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))


@pytest.mark.parametrize(
  ('damage_fn', 'must_name'),
  [
    (remove_shard, 'cifar10-train'),
    (truncate_shard, 'cifar10'),
    (truncate_info, 'cifar10'),
    (as_tfrecord, 'tfrecord'),
  ],
)
def test_a_damaged_tfds_set_is_answered_in_one_line(
  tmp_path, damage_fn, must_name
):
  damage_fn(write_cifar10(tmp_path)[-1])
  message = error_line(
    'tfds:cifar10', path=str(tmp_path), image_size=32, channels=3
  )
  assert must_name in message


def test_tfds_without_an_image(tmp_path):
  import tensorflow_datasets as tfds

  features = {'words': tfds.features.Text()}
  write_tfds(tmp_path, 'prose', '1.0.0', features, {'train': [{'words': b'a'}]})
  message = error_line(
    'tfds:prose', path=str(tmp_path), image_size=32, channels=3
  )
  assert 'words' in message


@pytest.mark.slow
def test_an_unprepared_set_makes_no_folder_and_loads_no_tensorflow(tmp_path):
  script = """
import sys
from diffusion_jax import data
from diffusion_jax.system.errors import UserError
try:
  data.create('tfds:cifar10', path=sys.argv[1], image_size=32, channels=3)
except UserError as error:
  assert 'prepare_data.sh' in str(error), error
else:
  raise SystemExit('no error')
assert 'tensorflow' not in sys.modules
"""
  result = subprocess.run(
    [sys.executable, '-c', script, str(tmp_path / 'none')],
    cwd=binaries.ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  assert result.stderr == ''
  assert not (tmp_path / 'none').exists()
