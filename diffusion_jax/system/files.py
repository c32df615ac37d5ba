"""File access on a local file system or in a Google Cloud Storage bucket.

A local path is a `pathlib.Path`; a path in a bucket, gs://BUCKET/..., is an
`epath.Path`, which has the same methods. A bucket has no folders, links, locks
or renames. An object cannot be appended to, and appears only once it is
uploaded completely.
"""

import contextlib
import errno
import functools
import importlib.util
import json
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

# Otherwise epath imports all of TensorFlow, where installed, to read a file.
os.environ.setdefault('EPATH_USE_TF', 'false')

from etils import epath

Path = pathlib.Path | epath.Path

PACKAGES = ('gcsfs', 'google.cloud.storage')  # for epath and Orbax
PATIENCE = 30  # seconds that a bucket may take to answer

# For fsspec. Listings are not cached, because other processes write to the
# bucket, too. Searching beyond Google's default credentials costs a minute.
OPTIONS = {'use_listings_cache': False, 'token': 'google_default'}


def at(path) -> Path:
  """Converts a user's path: local, or in a bucket that can be reached.

  Raises:
    UserError: the path is neither, or the bucket cannot be reached.
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
  """The folder for cached features and weights: `given`, or the default."""
  base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return at(given or f'{base}/diffusion_jax').expanduser()


def in_bucket(path: Path) -> bool:
  return isinstance(path, epath.Path)


@functools.cache
def _reach(bucket: str) -> None:
  """Raises UserError unless the bucket answers."""
  if not all(map(_is_installed, PACKAGES)):
    raise UserError(
      f'gs://{bucket}: buckets need two more packages: pip install gcsfs '
      'google-cloud-storage'
    )
  given = fsspec.config.conf.get('gcs', {})  # from FSSPEC_GCS_TOKEN, say
  fsspec.config.conf['gcs'] = {**OPTIONS, **given}
  # It raises everything that it logs.
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
  try:
    _objects().call('GET', 'b/{}', bucket, timeout=PATIENCE)
  except FileNotFoundError as e:
    raise UserError(
      f'gs://{bucket}: there is no such bucket; create it, or give another'
    ) from e
  except Exception as e:  # four packages raise these, with no common class
    raise UserError(
      f'gs://{bucket} cannot be reached ({_reason(e)}): check the network and '
      'your credentials, gcloud auth application-default login'
    ) from e


def _is_installed(package: str) -> bool:
  try:
    return importlib.util.find_spec(package) is not None
  except ModuleNotFoundError:  # its parent package is missing, too
    return False


def _objects() -> fsspec.AbstractFileSystem:
  return fsspec.filesystem('gcs', finalize_on_close=True)  # the one epath uses


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
  """Opens a file for writing that replaces `path` once it is complete.

  If the process is killed, the old file stays, possibly with a `path`.*.tmp
  next to it. Temporary names are unique per writer: of two concurrent writers
  the later wins.

  Raises:
    UserError: writing to the bucket failed.
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


def content(path, advice: str) -> bytes:
  """The bytes of a user's file.

  Raises:
    UserError: it cannot be read; the message ends with the advice.
  """
  try:
    return at(path).read_bytes()
  except OSError as e:
    raise UserError(
      f'{path} cannot be read ({e.strerror or e}): {advice}'
    ) from e


def write_json(path, value) -> None:
  """Writes a JSON file atomically, and creates its folder."""
  path = at(path)
  make(path.parent)
  with replacing(path) as file:
    file.write(json.dumps(value, indent=2).encode() + b'\n')


def growing(directory, *names) -> tuple[pathlib.Path, Callable[..., None]]:
  """A local folder whose files can be appended to, for any directory.

  Args:
    directory: the files' destination, local or in a bucket.
    names: existing files to append to.

  Returns:
    (folder, put). For a local directory, the directory itself and a no-op. For
    one in a bucket, a temporary folder and a function: `put()` uploads all of
    its files, `put(NAME)` one of them.
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
  """Memory-maps a .npy file; an object in a bucket is copied to disk first.

  A header that claims a wrong size is thus detected at no cost in memory.

  Raises:
    ValueError: the file is damaged, or holds Python objects.
  """
  path = at(path)
  if not in_bucket(path):
    return map_or_read(path)
  with tempfile.NamedTemporaryFile() as copy:  # stays on disk while mapped
    _objects().get_file(str(path), copy.name)
    return np.load(copy.name, mmap_mode='r', allow_pickle=False)


def map_or_read(path) -> np.ndarray:
  """Memory-maps a local .npy; reads it where the file system has no maps."""
  try:
    return np.load(path, mmap_mode='r', allow_pickle=False)
  except OSError as e:
    if e.errno not in (errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP):
      raise
    return np.load(path, allow_pickle=False)


def entries(directory) -> set[str]:
  """The names in a folder, without leftovers of killed writers."""
  return {
    path.name for path in at(directory).iterdir() if path.suffix != '.tmp'
  }


def make(directory) -> Path:
  """Creates a folder and its parents; a bucket needs none.

  Args:
    directory: the folder.

  Raises:
    UserError: the file system does not create it.
  """
  directory = at(directory)
  if not in_bucket(directory):
    try:
      directory.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as e:  # although its parents exist, as in /proc
      raise UserError(
        f'{directory} cannot be created: choose another folder'
      ) from e
  return directory


def remove(directory) -> None:
  """Removes a folder and its contents, if it exists."""
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
  """The absolute path, with links resolved."""
  path = at(path)
  return path if in_bucket(path) else path.resolve()


def parents(path: Path) -> list[Path]:
  """The folders that contain `path`, nearest first, up to the bucket."""
  # An epath's parts are '/', 'gs', the bucket, and the names in it.
  outermost = 3 if in_bucket(path) else 0
  return [p for p in path.parents if len(p.parts) >= outermost]


def modified(path: Path) -> float:
  """The modification time in seconds; whole seconds for objects."""
  return path.stat().mtime if in_bucket(path) else path.stat().st_mtime
