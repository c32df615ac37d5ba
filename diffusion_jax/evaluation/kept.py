"""Arrays on disk: what files of any origin hold, and what is computed once."""

import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable

import numpy as np

from diffusion_jax.system import distributed, files

# What a file that is something else, damaged or not there raises.
DAMAGED = (
  *(OSError, ValueError, TypeError, LookupError, AttributeError, EOFError),
  *(ArithmeticError, RuntimeError, MemoryError, SyntaxError),
  *(tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


def names(path) -> list[str]:
  """What a .npz holds; nothing where it is none."""
  try:
    with (
      files.at(path).expanduser().open('rb') as file,
      zipfile.ZipFile(file) as archive,
    ):
      return [name.removesuffix('.npy') for name in archive.namelist()]
  except DAMAGED:
    return []


def read(
  path, wanted: Iterable[str] | None = None, most_bytes: int = 2**28
) -> dict[str, np.ndarray]:
  """Arrays of a .npz; nothing is unpickled.

  Args:
    path: of the file, which may come from anywhere.
    wanted: their names; None for all.
    most_bytes: of all of them together.

  Raises:
    DAMAGED: it is none, an array is not there, or they are larger.
  """
  with files.at(path).open('rb') as file:
    with zipfile.ZipFile(file) as archive:
      sizes = {
        info.filename.removesuffix('.npy'): info.file_size
        for info in archive.infolist()
      }
    file.seek(0)
    wanted = list(sizes if wanted is None else wanted)
    if (total := sum(sizes.get(name, 0) for name in wanted)) > most_bytes:
      raise ValueError(f'it takes {total} bytes')
    with np.load(file, allow_pickle=False) as archive:
      return {name: archive[name] for name in wanted}


def write(path, arrays: dict[str, np.ndarray], save=np.savez) -> None:
  """Writes a .npz, whole or not at all."""
  files.make(files.at(path).parent)
  with files.replacing(path) as file:
    save(file, **arrays)


def once(
  read_fn: Callable[[], dict],
  write_fn: Callable[[dict], None],
  compute_fn: Callable[[], dict],
) -> tuple[dict, bool]:
  """What is kept; else it is computed, and kept by process 0.

  Args:
    read_fn: () -> arrays; raises where they are not there, or damaged.
    write_fn: keeps arrays.
    compute_fn: () -> arrays.

  Returns:
    (the arrays, whether they were kept).
  """
  try:
    found = read_fn()
  except DAMAGED:
    found = None
  # A folder that only some hosts see is of no use to the others.
  if all(distributed.gather(found is not None)):
    return found, True
  found = compute_fn()
  if distributed.is_first():
    write_fn(found)
  return found, False
