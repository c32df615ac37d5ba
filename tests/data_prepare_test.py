"""launch/prepare_data.sh: prepared with TensorFlow, read back without."""

import os
import subprocess
import sys

import binaries
import numpy as np
import pytest
from imagesets import random_images

# A set of one's own, for TFDS; its images lie beside it.
BUILDER = """
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds


class MySet(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = {
      'image': tfds.features.Image(shape=(8, 8, 3)),
      'label': tfds.features.ClassLabel(names=['ape', 'bee', 'cat']),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    images = np.load(Path(__file__).with_name('images.npy'))
    return {
      'train': self._generate_examples(images[:20]),
      'test': self._generate_examples(images[20:]),
    }

  def _generate_examples(self, images):
    for i, image in enumerate(images):
      yield i, {'image': image, 'label': i % 3}
"""

# Reads a split as where TensorFlow is not installed: NAME DATA_DIR SPLIT SIZE
# FILE.
READ = """
import sys
from importlib.machinery import PathFinder


class WithoutTensorFlow(PathFinder):
  @classmethod
  def find_spec(cls, name, path=None, target=None):
    if name == 'tensorflow':
      return None
    return super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTensorFlow
try:
  import tensorflow
except ImportError:
  pass
else:
  raise SystemExit('TensorFlow can be imported')
import numpy as np
from diffusion_jax import data

name, path, split, size, file = sys.argv[1:]
source = data.create(
  name, path=path, split=split, image_size=int(size), channels=3
)
images, labels = zip(*((r['image'], r['label']) for r in source))
np.savez(file, images=images, labels=labels, num_classes=source.num_classes)
"""

# Prepares lsun/church_outdoor, of databases that are made up: FOLDER DATA_DIR.
LSUN = """
import io
import sys
from unittest import mock

import lmdb
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

sys.path.insert(0, 'launch')
import prepare_data

folder, data_dir = sys.argv[1:]
images = np.load(f'{folder}/images.npy')
for split, part in (('train', images[:20]), ('val', images[20:])):
  database = lmdb.open(
    f'{folder}/church_outdoor_{split}_lmdb', map_size=2**24
  )
  with database.begin(write=True) as transaction:
    for i, image in enumerate(part):
      stream = io.BytesIO()
      Image.fromarray(image).save(stream, format='webp', lossless=True)
      transaction.put(b'%040d' % i, stream.getvalue())
  database.close()
with mock.patch.object(
  tfds.download.DownloadManager,
  'download_and_extract',
  lambda self, urls: dict.fromkeys(urls, folder),
):
  prepare_data.prepare('lsun/church_outdoor', data_dir)
"""


def run(*command):
  """Runs a command in the environment of the tests, where its Python is."""
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'TF_CPP_MIN_LOG_LEVEL': '3',
    'VIRTUAL_ENV': sys.prefix,
    'PATH': os.pathsep.join([f'{sys.prefix}/bin', os.environ['PATH']]),
  }
  return subprocess.run(
    list(map(str, command)),
    cwd=binaries.ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )


def prepare_data(*arguments):
  return run('bash', 'launch/prepare_data.sh', *arguments)


def read(tmp_path, name, split, size):
  """{'images', 'labels', 'num_classes'} of a prepared split."""
  result = run(
    sys.executable, '-c', READ, name, tmp_path / 'data', split, size,
    tmp_path / 'read.npz',
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  return np.load(tmp_path / 'read.npz')


def as_set(images, labels):
  """Without the order, in which TFDS shuffles what it writes."""
  return sorted(
    (image.tobytes(), int(label))
    for image, label in zip(images, labels, strict=True)
  )


@pytest.mark.parametrize(
  ('arguments', 'code', 'must_name'),
  [
    ([], 2, 'prepare_data.sh NAME'),
    (['--help'], 0, 'prepare_data.sh NAME'),
    (['--frobnicate'], 2, '--frobnicate'),
    (['a', 'b', 'c'], 2, '3 arguments'),
    (['none/my_set.py'], 2, 'none/my_set.py is not a file'),
  ],
)
def test_prepare_data_explains_itself(arguments, code, must_name):
  result = prepare_data(*arguments)
  assert result.returncode == code
  assert must_name in (result.stderr if code else result.stdout)


@pytest.mark.prepare
@pytest.mark.parametrize('layout', ['file', 'package'])
def test_a_set_of_ones_own_is_prepared_and_read_back(tmp_path, layout):
  images = random_images(25)
  code, data_dir = tmp_path / 'my_set', tmp_path / 'data'
  code.mkdir()
  np.save(code / 'images.npy', images)
  if layout == 'file':
    script = code / 'my_set.py'
    script.write_text(BUILDER)
  else:  # as `tfds new` makes it
    script = code / 'my_set_dataset_builder.py'
    script.write_text(BUILDER.replace('MySet', 'Builder'))
    (code / '__init__.py').touch()

  result = prepare_data(script, data_dir)
  assert result.returncode == 0, result.stderr
  assert f'--config.data.name=tfds:my_set --config.data.path={data_dir}' in (
    result.stdout
  )
  for split, part in (('train', images[:20]), ('test', images[20:])):
    found = read(tmp_path, 'tfds:my_set', split, 8)
    assert found['num_classes'] == 3
    assert as_set(found['images'], found['labels']) == as_set(
      part, np.arange(len(part)) % 3
    )

  # Again, it is left as it is.
  files = sorted((data_dir / 'my_set' / '1.0.0').iterdir())
  times = [file.stat().st_mtime_ns for file in files]
  assert prepare_data(script, data_dir).returncode == 0
  assert [file.stat().st_mtime_ns for file in files] == times

  # In another format, it cannot be read at random.
  info = data_dir / 'my_set' / '1.0.0' / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  result = prepare_data(script, data_dir)
  assert result.returncode == 2
  assert 'tfrecord already: give another DATA_DIR' in result.stderr


@pytest.mark.prepare
def test_lsun_is_prepared_and_read_back(tmp_path):
  images = random_images(23, size=256)
  (tmp_path / 'zip').mkdir()
  np.save(tmp_path / 'zip' / 'images.npy', images)
  result = run(sys.executable, '-c', LSUN, tmp_path / 'zip', tmp_path / 'data')
  assert result.returncode == 0, result.stderr
  for split, part in (('train', images[:20]), ('validation', images[20:])):
    found = read(tmp_path, 'tfds:lsun/church_outdoor', split, 256)
    assert found['num_classes'] == 0
    assert as_set(found['images'], found['labels']) == as_set(
      part, [-1] * len(part)
    )


@pytest.mark.prepare
def test_an_unknown_set_is_answered_in_one_line(tmp_path):
  result = prepare_data('cifr10', tmp_path / 'data')
  assert result.returncode == 2
  assert result.stderr.strip() == 'error: Dataset cifr10 not found.'
  assert not (tmp_path / 'data').exists()
