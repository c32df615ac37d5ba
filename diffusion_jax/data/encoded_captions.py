"""Encoded captions, computed before training and kept in a folder.

  captions.json            what they are of, and the SHA-256 of each file
  tokens.npy               int32 [N, length], the tokens of each caption, sorted
  000000000-000000255.npy  float32 [n, m], what the text encoders make of them

Files are written atomically and in order, so an interrupted job goes on.
"""

import functools
from collections.abc import Callable, Mapping

import numpy as np

from diffusion_jax.data import latents
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError

ABOUT, TOKENS = 'captions.json', 'tokens.npy'
AGAIN = 'run diffusion_jax.encode --captions again'
KEYS = frozenset(('weights', 'tokenizers', 'captions', 'shapes', 'files'))


def read_about(folder) -> dict | None:
  """Reads captions.json, see `latents.read_about`."""
  return latents.read_about(folder, ABOUT, KEYS, AGAIN)


def opened(folder, about: Mapping) -> Callable:
  """Tokens int32 [R, length] -> rows of their encodings, by name.

  Args:
    folder: the folder.
    about: its captions.json.

  Raises:
    UserError: files are missing or damaged; of the function, a caption is not
      there.
  """
  folder = files.at(folder).expanduser()
  shapes = about['shapes']
  sizes = [int(np.prod(shape)) for shape in shapes.values()]
  known = _mapped(folder, TOKENS)
  numbers = {row.tobytes(): number for number, row in enumerate(known)}
  spans = latents.bounds(len(known), latents.PER_FILE)

  @functools.cache
  def part(number):
    first, end = spans[number]
    found = _mapped(folder, latents.name_of(first, end))
    if found.shape != (end - first, sum(sizes)):
      raise UserError(
        f'conditioning.cache={folder}: {latents.name_of(first, end)} has '
        f'{list(found.shape)}, not {[end - first, sum(sizes)]}: {AGAIN}'
      )
    return found

  for number in range(len(spans)):  # a missing file is found before training
    part(number)

  def rows(tokens):
    places = [numbers.get(row.tobytes()) for row in tokens]
    if None in places:
      raise UserError(
        f'conditioning.cache={folder} lacks a caption of the data: {AGAIN}'
      )
    found = np.stack(
      [part(n // latents.PER_FILE)[n % latents.PER_FILE] for n in places]
    )
    pieces = np.split(found, np.cumsum(sizes)[:-1], axis=1)
    return {
      name: piece.reshape(-1, *shape)
      for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }

  return rows


def _mapped(folder, name) -> np.ndarray:
  try:
    return files.mapped(folder / name)
  except (OSError, ValueError) as e:
    raise UserError(
      f'conditioning.cache={folder}: {name} cannot be read ({e}): {AGAIN}'
    ) from e
