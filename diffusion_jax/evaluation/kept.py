"""Arrays on disk: safe reading of .npz files, and results computed once."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable

import numpy as np
from numpy.lib.npyio import NpzFile

from diffusion_jax.system import distributed, files
from diffusion_jax.system.npz import DAMAGED


def names(path) -> list[str]:
  """The names of the arrays in a .npz; [] if the file is not a .npz."""
  try:
    with files.at(path).expanduser().open('rb') as file, NpzFile(file) as found:
      return found.files
  except DAMAGED:
    return []


def read(
  path, wanted: Iterable[str] | None = None, most_bytes: int = 2**28
) -> dict[str, np.ndarray]:
  """Reads arrays of a .npz without unpickling anything.

  Args:
    path: the file, which may come from anywhere.
    wanted: names of the arrays; None for all.
    most_bytes: maximum total size of the arrays.

  Raises:
    npz.DAMAGED: the file is missing, not a .npz, lacks an array, or is too
      large.
  """
  with files.at(path).open('rb') as file, NpzFile(file) as found:
    wanted = list(found if wanted is None else wanted)
    total = sum(
      info.file_size
      for info in found.zip.infolist()
      if info.filename.removesuffix('.npy') in wanted
    )
    if total > most_bytes:
      raise ValueError(f'it takes {total} bytes')
    return {name: found[name] for name in wanted}


def write(path, arrays: dict[str, np.ndarray], save=np.savez) -> None:
  """Writes a .npz atomically."""
  files.make(files.at(path).parent)
  with files.replacing(path) as file:
    save(file, **arrays)


def sha256(arrays: Iterable[np.ndarray]) -> str:
  """The hash of the bytes of some arrays in order."""
  digest = hashlib.sha256()
  for array in arrays:
    digest.update(np.ascontiguousarray(array))
  return digest.hexdigest()


def once(
  place,
  compute_fn: Callable[[], dict],
  read_fn: Callable = read,
  write_fn: Callable = write,
) -> tuple[dict, bool]:
  """Reads arrays, or computes them and has process 0 write them.

  Args:
    place: where they are, as the two functions take it; by default a .npz.
    compute_fn: () -> arrays.
    read_fn: place -> arrays; raises npz.DAMAGED if missing or damaged.
    write_fn: (place, arrays) -> None.

  Returns:
    (the arrays, whether they were read).
  """
  found = None
  with contextlib.suppress(*DAMAGED):
    found = read_fn(place)
  # If only some hosts see the folder, all compute.
  if all(distributed.gather(found is not None)):
    return found, True
  found = compute_fn()
  if distributed.is_first():
    write_fn(place, found)
  return found, False
