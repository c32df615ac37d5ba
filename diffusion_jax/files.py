"""Files that appear whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path) -> Iterator[BinaryIO]:
  """A file to write, which takes the place of `path` once it is whole.

  A kill leaves the old file, and at most one named `path`.tmp.
  """
  path = Path(path)
  temporary = path.with_name(path.name + '.tmp')
  with temporary.open('wb') as file:
    yield file
  os.replace(temporary, path)
