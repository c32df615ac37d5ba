"""Prepares one TFDS data set as ArrayRecord files; see prepare_data.sh.

The only program of the project that needs TensorFlow.
"""

import shlex
import sys

import tensorflow_datasets as tfds

FORMAT = 'array_record'


class PrepareError(Exception):
  """What stood in the way, for the user to read."""


def prepare(name: str, data_dir: str) -> str:
  """Downloads and prepares a data set, unless that has been done.

  Args:
    name: the set's name, perhaps with a config and a version.
    data_dir: TFDS's folder of data sets.

  Returns:
    the folder of the prepared set.

  Raises:
    PrepareError: if the name is not known, the set is there in another file
      format, or it cannot be downloaded.
  """
  try:
    builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
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
    return str(builder.data_path)

  try:
    builder.download_and_prepare(file_format=FORMAT)
  except (
    OSError,  # the network and the disk
    AssertionError,  # files that a user has to fetch by hand
    ImportError,  # packages that only this set needs
    tfds.download.DownloadError,
  ) as error:
    raise PrepareError(f'{name} cannot be prepared: {error}') from error
  return str(builder.data_path)


def main(name: str, data_dir: str) -> None:
  try:
    folder = prepare(name, data_dir)
  except PrepareError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  print(f'{name} is prepared in {folder}')
  print(
    f'use it with --config.data.name=tfds:{name} '
    f'--config.data.path={shlex.quote(data_dir)}'
  )


if __name__ == '__main__':
  main(*sys.argv[1:])
