"""Prepares one TFDS data set as ArrayRecord files; see prepare_data.sh.

The only program of the project that needs TensorFlow.
"""

import shlex
import sys
import types
from pathlib import Path

import tensorflow_datasets as tfds

FORMAT = 'array_record'


class PrepareError(Exception):
  """What stood in the way, for the user to read."""


def prepare(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
  """Downloads and prepares a data set, unless that has been done.

  Args:
    name: a set of TFDS's, perhaps with a config and a version; or a Python
      file, PATH/my_set.py, that defines one builder.
    data_dir: TFDS's folder of data sets.

  Returns:
    the builder of the prepared set.

  Raises:
    PrepareError: if the name is not known, the set is there in another file
      format, or it cannot be downloaded.
  """
  try:
    builder = _find(name, data_dir)
  except (ValueError, AssertionError, ImportError) as error:
    # The first line; the others list every data set there is.
    raise PrepareError(str(error).strip().split('\n')[0]) from error
  if builder.is_prepared():
    formats = {f.value for f in builder.info.available_file_formats()}
    if FORMAT not in formats:
      raise PrepareError(
        f'{name} in {data_dir} is prepared as {", ".join(formats)} already: '
        'give another DATA_DIR'
      )
    return builder

  # TFDS reads LSUN by tensorflow_io, which does not load with the TensorFlow of
  # today (0.37.1 with 2.21).
  sys.modules['tensorflow_io'] = types.SimpleNamespace(
    IODataset=types.SimpleNamespace(from_lmdb=_lmdb_dataset)
  )
  try:
    builder.download_and_prepare(file_format=FORMAT)
  except (
    OSError,  # the network and the disk
    AssertionError,  # files that a user has to fetch by hand
    ImportError,  # packages that only this set needs
    tfds.download.DownloadError,
  ) as error:
    raise PrepareError(f'{name} cannot be prepared: {error}') from error
  return builder


def _find(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
  """The builder of a name, or of a Python file."""
  if not name.endswith('.py'):
    return tfds.builder(name, data_dir=data_dir, try_gcs=False)
  script = Path(name)
  # Imported as a module, of its package if it lies in one: TFDS takes no
  # builder from a program, and looks for files beside a class `Builder`.
  root = script.parent
  if (root / '__init__.py').is_file():
    root = root.parent
  module = '.'.join(script.with_suffix('').relative_to(root).parts)
  sys.path.insert(0, str(root))
  builder_cls = tfds.core.community.builder_cls_from_module(module)
  return builder_cls(data_dir=data_dir)


def _lmdb_dataset(path: str):
  """The records of an LMDB file, (key, value), in the order of their keys."""
  import lmdb
  import tensorflow as tf

  def records():
    with (
      lmdb.open(path, subdir=False, readonly=True, lock=False) as database,
      database.begin() as transaction,
    ):
      yield from transaction.cursor()

  record = tf.TensorSpec((), tf.string)
  return tf.data.Dataset.from_generator(
    records, output_signature=(record, record)
  )


def main(name: str, data_dir: str) -> None:
  try:
    builder = prepare(name, data_dir)
  except PrepareError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  if name.endswith('.py'):
    name = builder.info.full_name.rpartition('/')[0]  # without the version
  print(f'{name} is prepared in {builder.data_path}')
  print(
    f'use it with --config.data.name=tfds:{name} '
    f'--config.data.path={shlex.quote(data_dir)}'
  )


if __name__ == '__main__':
  main(*sys.argv[1:])
