"""A run's files, on a file system or in a bucket, and all that differs there.

A local path is a `pathlib.Path`; one in a bucket, gs://BUCKET/..., is an
`epath.Path`, which has the same methods. A bucket has no folders, links, locks
or renames. An object cannot grow, and appears whole once it is uploaded.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import pathlib
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from typing import BinaryIO

import fsspec
import numpy as np

from diffusion_jax.system.errors import UserError

# Where TensorFlow is installed, epath would import all of it to read a file.
os.environ.setdefault('EPATH_USE_TF', 'false')

from etils import epath

Path = pathlib.Path | epath.Path

PACKAGES = ('gcsfs', 'google.cloud.storage')  # epath needs one, Orbax the other
PATIENCE = 30  # seconds that a bucket may take to answer

# For fsspec. Others write to a bucket too, so nobody's listing may be kept. The
# search for more than Google's own credentials takes a minute in vain.
OPTIONS = {'use_listings_cache': False, 'token': 'google_default'}


def at(path) -> Path:
  """A path as a user gave it: local, or in a bucket that has answered.

  Raises:
    UserError: it is neither, or the bucket cannot be reached.
  """
  text = os.fspath(path)
  if not re.match(r'\w+:/', text):
    return pathlib.Path(text)
  scheme, _, place = text.partition('://')
  bucket, *names = place.split('/')
  if scheme != 'gs' or not bucket or '..' in names:
    raise UserError(
      f"{text}: give a local folder, or gs://BUCKET/FOLDER without '..' in it"
    )
  _reach(bucket)
  return epath.Path(text)


def cache(given: str | None = None) -> Path:
  """The folder for features and weights: the one given, or the user's own."""
  base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return at(given or f'{base}/diffusion_jax').expanduser()


def in_bucket(path: Path) -> bool:
  return isinstance(path, epath.Path)


@functools.cache
def _reach(bucket: str) -> None:
  """Raises UserError unless the bucket answers."""
  if not all(map(_is_installed, PACKAGES)):
    raise UserError(
      f'gs://{bucket}: a bucket takes two packages more, pip install gcsfs '
      'google-cloud-storage'
    )
  given = fsspec.config.conf.get('gcs', {})  # by FSSPEC_GCS_TOKEN, say
  fsspec.config.conf['gcs'] = {**OPTIONS, **given}
  # What it logs, it also raises.
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
  try:
    _objects().call('GET', 'b/{}', bucket, timeout=PATIENCE)
  except FileNotFoundError as e:
    raise UserError(
      f'gs://{bucket}: there is no such bucket; make it first, or give another'
    ) from e
  except Exception as e:  # of four packages, without a class in common
    raise UserError(
      f'gs://{bucket} cannot be reached ({_reason(e)}): see to the network and '
      'to credentials that may read it, gcloud auth application-default login'
    ) from e


def _is_installed(package: str) -> bool:
  try:
    return importlib.util.find_spec(package) is not None
  except ModuleNotFoundError:  # nor what it is a part of
    return False


def _objects() -> fsspec.AbstractFileSystem:
  return fsspec.filesystem('gcs', finalize_on_close=True)  # epath's own


def _reason(error: Exception) -> str:
  if isinstance(error, TimeoutError):
    return f'no answer in {PATIENCE} s'
  lines = str(error).split('\n')
  return lines[-1][:200] or type(error).__name__


def _upload(file, path: Path) -> None:
  try:
    _objects().put_file(str(file), str(path))
  except Exception as e:
    raise UserError(f'{path} cannot be written ({_reason(e)})') from e


@contextlib.contextmanager
def replacing(path) -> Iterator[BinaryIO]:
  """A file to write, which takes the place of `path` once it is whole.

  A kill leaves the old file, and at most a `path`.*.tmp beside it. Each writer
  has a name of its own, so that of two at once the later one wins.

  Raises:
    UserError: a bucket does not take it.
  """
  path = at(path)
  if in_bucket(path):
    with tempfile.NamedTemporaryFile() as file:
      yield file
      file.flush()
      _upload(file.name, path)
    return
  own = f'{socket.gethostname()}-{os.getpid()}'
  temporary = path.with_name(f'{path.name}.{own}.tmp')
  try:
    with temporary.open('wb') as file:
      yield file
    os.replace(temporary, path)
  except BaseException:  # a full disk, or Ctrl-C
    temporary.unlink(missing_ok=True)
    raise


def growing(directory, *names) -> tuple[pathlib.Path, Callable[..., None]]:
  """A local folder, in which files can grow, for one that may be in a bucket.

  Args:
    directory: where the files belong.
    names: those that are there already and are to grow.

  Returns:
    (the folder, put): the directory itself, or a temporary one. `put()` brings
    all of its files to a bucket, `put(NAME)` one of them; else it does nothing.
  """
  directory = at(directory)
  if not in_bucket(directory):
    return directory, lambda *names: None
  folder = tempfile.TemporaryDirectory()
  local = pathlib.Path(folder.name)
  for name in names:
    with contextlib.suppress(FileNotFoundError):
      (local / name).write_bytes((directory / name).read_bytes())

  def put(*names):
    for name in names or os.listdir(folder.name):
      _upload(local / name, directory / name)

  return local, put


def mapped(path) -> np.ndarray:
  """The array of a .npy file, mapped; of an object, a copy on disk is.

  So a header that lies about the size is found out, and costs no memory.

  Raises:
    ValueError: the file is damaged, or holds Python objects.
  """
  path = at(path)
  if not in_bucket(path):
    return np.load(path, mmap_mode='r', allow_pickle=False)
  with tempfile.NamedTemporaryFile() as copy:  # lives on while it is mapped
    _objects().get_file(str(path), copy.name)
    return np.load(copy.name, mmap_mode='r', allow_pickle=False)


def entries(directory) -> set[str]:
  """The names in a folder, but for what a killed writer left."""
  return {
    path.name for path in at(directory).iterdir() if path.suffix != '.tmp'
  }


def make(directory) -> Path:
  """Makes a folder, and those it lies in; a bucket needs none."""
  directory = at(directory)
  if not in_bucket(directory):
    directory.mkdir(parents=True, exist_ok=True)
  return directory


def remove(directory) -> None:
  """Removes a folder and all that is in it, if it is there."""
  directory = at(directory)
  if in_bucket(directory):
    if directory.exists():
      directory.rmtree()
  else:
    shutil.rmtree(directory, ignore_errors=True)


def absolute(path) -> Path:
  path = at(path)
  return path if in_bucket(path) else path.absolute()


def resolved(path) -> Path:
  """Absolute, and through links."""
  path = at(path)
  return path if in_bucket(path) else path.resolve()


def parents(path: Path) -> list[Path]:
  """The folders that it lies in, the nearest first, up to the bucket."""
  # An epath's parts are '/', 'gs', the bucket, and the names in it.
  outermost = 3 if in_bucket(path) else 0
  return [p for p in path.parents if len(p.parts) >= outermost]


def modified(path: Path) -> float:
  """When it was written, in seconds; of an object, in whole ones."""
  return path.stat().mtime if in_bucket(path) else path.stat().st_mtime
