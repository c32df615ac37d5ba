"""Files of JSON objects, one a line, that outlive kills, power cuts and copies.

A kill can tear a line, a file system can fill it with NUL bytes after a power
cut, and a copy can be cut off. What is whole is used; the rest is left out with
a word.
"""

import json
from collections.abc import Callable

from diffusion_jax.system import files, terminal


def read(path, is_well: Callable[[dict], bool] = bool) -> list[dict]:
  """Reads the whole objects of a file, and says once which lines are damaged.

  Args:
    path: the file.
    is_well: whether an object is what the file should hold.

  Returns:
    the objects in order; [] if there is no file.
  """
  path = files.at(path)
  if not path.exists():
    return []
  good, bad = parse(path.read_bytes(), is_well)
  if bad:
    terminal.say_once(f'{path} {damage(bad)}: left out')
  return good


def parse(
  content: bytes, is_well: Callable[[dict], bool] = bool
) -> tuple[list[dict], list[int]]:
  """The whole objects of a file, and the numbers of its damaged lines.

  An object that follows a torn one on the same line is whole. A last line
  without an end may still be being written: it is used if it is whole, and not
  damaged if it is not.

  Args:
    content: of the file.
    is_well: see `read`.
  """
  good, bad = [], []
  lines = content.decode(errors='replace').split('\n')
  for number, line in enumerate(lines, 1):
    text = line.strip('\0 \t\r')
    whole = _object(text, is_well)
    if line.strip() and number < len(lines) and (not whole or '\0' in line):
      bad.append(number)
    starts = (i for i, sign in enumerate(text) if sign == '{')
    later = (found for i in starts if (found := _object(text[i:], is_well)))
    if whole := whole or next(later, None):
      good.append(whole)
  return good, bad


def damage(lines: list[int]) -> str:
  """Says which lines are damaged."""
  more = f' and {len(lines) - 1} more' * (len(lines) > 1)
  return f'is damaged in line {lines[0]}{more}'


def append(directory, name: str, value: dict) -> None:
  """Appends an object to a file, on a line of its own.

  Args:
    directory: the folder of the file, local or in a bucket.
    name: the file's name.
    value: the object.
  """
  folder, put = files.growing(directory, name)
  path = folder / name
  before = path.read_bytes() if path.exists() else b''
  torn = bool(before) and not before.endswith(b'\n')
  with path.open('a') as file:
    file.write('\n' * torn + json.dumps(value) + '\n')
  put(name)


def _object(text: str, is_well) -> dict | None:
  try:
    value = json.loads(text)
  except (ValueError, RecursionError):
    return None
  return value if isinstance(value, dict) and is_well(value) else None
