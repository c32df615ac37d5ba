"""Files that appear whole or not at all."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path) -> Iterator[BinaryIO]:
  """A file to write, which takes the place of `path` once it is whole.

  A kill leaves the old file, and at most a `path`.*.tmp beside it. Each writer
  has a name of its own, so that of two at once the later one wins.
  """
  path = Path(path)
  own = f'{socket.gethostname()}-{os.getpid()}'
  temporary = path.with_name(f'{path.name}.{own}.tmp')
  try:
    with temporary.open('wb') as file:
      yield file
    os.replace(temporary, path)
  except BaseException:  # a full disk, or Ctrl-C
    temporary.unlink(missing_ok=True)
    raise


def entries(directory) -> set[str]:
  """The names in a folder, but for what a killed writer left."""
  return {
    path.name for path in Path(directory).iterdir() if path.suffix != '.tmp'
  }
