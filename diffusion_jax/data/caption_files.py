"""Captions in files of a folder of images.

  metadata.jsonl  an object a line, with the image's `file_name` (or `image`,
                  `file`, `filename`) and a column of captions, a text or a
                  list of texts
  captions.csv, metadata.csv
                  a table with a header of the same names; several lines for an
                  image are several captions
  NAME.txt        beside NAME.png: each line that is not empty is a caption

Names of images are relative to the folder of the file. Of these kinds the first
one that is there is used. Text is UTF-8.
"""

import collections
import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

from diffusion_jax.data import captions
from diffusion_jax.system.errors import UserError, one_line

TABLES = ('metadata.jsonl', 'captions.csv', 'metadata.csv')
NAMES = ('file_name', 'filename', 'file', 'image', 'image_name', 'name')
SUFFIXES = ('.jsonl', '.csv', '.txt')
LARGEST = 2**20  # bytes of NAME.txt: a larger one is no caption


class Found(NamedTuple):
  """The files of captions of a folder.

  Attributes:
    tables: paths of files of one of TABLES, relative to the folder.
    beside: name of an image -> path of its NAME.txt.
    kind: 'metadata.jsonl' and so on, or 'NAME.txt'.
  """

  tables: list[str]
  beside: Mapping[str, str]
  kind: str


def find(others: Sequence[str], images: Sequence[str]) -> Found | None:
  """Finds the files of captions of a folder; None if there are none.

  Args:
    others: paths of files that are no images, relative to the folder.
    images: paths of the images.
  """
  for kind in TABLES:
    tables = [name for name in others if os.path.basename(name) == kind]
    if tables:
      return Found(tables, {}, kind)
  texts = {
    os.path.splitext(name)[0]: name
    for name in others
    if name.lower().endswith('.txt')
  }
  beside = {
    name: texts[stem]
    for name in images
    if (stem := os.path.splitext(name)[0]) in texts
  }
  return Found([], beside, 'NAME.txt') if beside else None


def read(
  root: Path, found: Found, names: Sequence[str], asked: str, what: str
) -> captions.Captions:
  """Reads the captions of images.

  Args:
    root: the folder.
    found: its files of captions.
    names: the images, relative paths in order.
    asked: the config's data.captions.
    what: what to call the folder in errors.

  Raises:
    UserError: a file is damaged, is not UTF-8 or lacks a column, or images have
      no caption.
  """
  if found.tables:
    known = collections.defaultdict(list)
    for table in found.tables:
      folder = table[: -len(found.kind)]
      where = f'{table!r} in {what}'
      with one_line(f'{where} cannot be read: '):
        for name, texts in _rows(root / table, asked, where):
          known[os.path.normpath(folder + name).replace(os.sep, '/')] += texts
    lost = [name for name in names if name not in known]
    where = f'{found.kind} in {what}'
    captions.check_whole(len(lost), len(names), lost, where)
    return captions.pack(known[name] for name in names)
  lost = [name for name in names if name not in found.beside]
  captions.check_whole(len(lost), len(names), lost, what)
  with futures.ThreadPoolExecutor(captions.THREADS) as pool:
    return captions.pack(
      pool.map(lambda name: _lines(root, found.beside[name], what), names)
    )


def _rows(path: Path, asked: str, where: str) -> Iterator[tuple]:
  """(name of an image, captions) of each line of a table."""
  if path.suffix == '.csv':
    yield from _csv_rows(path, asked, where)
    return
  with path.open('rb') as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      told = f'line {number} of {where}'
      try:
        row = json.loads(decoded(line, told).removeprefix('\ufeff'))
      except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
          raise
        raise UserError(
          f'{told} is no JSON ({error}): write one object a line'
        ) from error
      if not isinstance(row, dict):
        raise UserError(f'{told} is no object: write one object a line')
      yield _of_row(row, asked, told)


def _csv_rows(path: Path, asked: str, where: str) -> Iterator[tuple]:
  with path.open('rb') as file:
    lines = (
      decoded(line, f'line {number} of {where}')
      for number, line in enumerate(file, 1)
    )
    first = next(lines, '').removeprefix('\ufeff')
    header = next(csv.reader([first]), [])
    columns = _columns(header, asked, where)
    reader = csv.DictReader(lines, header)
    for row in reader:
      # A line that is too short has None in the last columns, one that is too
      # long has the rest under None.
      short = any(row[key] is None for key in columns)
      if short or any(row.get(None, ())):
        raise UserError(
          f'line {reader.line_num + 1} of {where} has '
          f'{"fewer" if short else "more"} columns than the '
          f'header ({", ".join(header)}): put texts with commas in quotes'
        )
      yield row[columns[0]].strip(), captions.strings(row[columns[1]])


def _of_row(row: Mapping, asked: str, where: str) -> tuple[str, list[str]]:
  name, key = _columns(row, asked, where)
  texts = captions.strings(row[key])
  if texts is None or not isinstance(row[name], str):
    wrong = name if texts is not None else key
    raise UserError(
      f'{where} has {wrong}={row[wrong]!r:.50}: need a text'
      + ', or a list of texts' * (wrong == key)
    )
  return row[name], texts or ['']


def _columns(there, asked: str, where: str) -> tuple[str, str]:
  """The columns of the images' names and of the captions."""
  name = next((name for name in NAMES if name in there), None)
  key = captions.column(there, asked, where)
  if name is None or key is None:
    lacks = 'names of images' if name is None else 'captions'
    known = NAMES if name is None else captions.COLUMNS
    shown = ', '.join(map(str, [*there][:10])) or 'nothing'
    raise UserError(
      f'{where} has the columns {shown}, and none of {lacks}: name it '
      f'{" or ".join(known)}'
      + ', or set data.captions to its name'
      * (name is not None)
    )
  return name, key


def _lines(root: Path, name: str, what: str) -> list[str]:
  """The captions in NAME.txt."""
  where = f'{name!r} in {what}'
  with one_line(f'{where} cannot be read: '), (root / name).open('rb') as file:
    content = file.read(LARGEST + 1)
  return of_text(content, where)


def of_text(content: bytes, where: str) -> list[str]:
  """The captions in the content of a NAME.txt: its lines that are not empty.

  Raises:
    UserError: it is too long, or not UTF-8.
  """
  if len(content) > LARGEST:
    raise UserError(
      f'{where} has more than {LARGEST:,} bytes, which is no caption: shorten '
      'it, or rename it'
    )
  text = decoded(content, where).removeprefix('\ufeff')
  return [line.strip() for line in text.splitlines() if line.strip()]


def of_json(content: bytes, asked: str, where: str) -> list[str]:
  """The captions in the content of a JSON object.

  Raises:
    UserError: it has none, is no JSON, or not UTF-8.
  """
  try:
    row = json.loads(decoded(content, where))
  except (json.JSONDecodeError, RecursionError) as error:
    raise UserError(f'{where} is no JSON ({error})') from error
  key = captions.column(row, asked, where) if isinstance(row, dict) else None
  found = captions.strings(row[key]) if key else None
  if found is None:
    raise UserError(
      f'{where} has no captions: need an object with one of '
      f'{", ".join(captions.COLUMNS)}, or set data.captions to its column'
    )
  return found


def decoded(content: bytes, where: str) -> str:
  """Bytes as text; UserError if they are not UTF-8."""
  try:
    return content.decode()
  except UnicodeDecodeError as error:
    raise UserError(
      f'{where} is not UTF-8 (byte {error.start}): save it as UTF-8'
    ) from error
