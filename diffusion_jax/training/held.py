"""Checkpoints that somebody holds: they are not deleted.

A file beside the checkpoints' folder names them. (What is in the folder and is
no whole checkpoint, Orbax takes for a torn save, and deletes.)
"""

import functools
import json
import operator
from collections.abc import Iterable

from absl import logging

from diffusion_jax.system import files

HELD = 'held.json'
# What a file of JSON raises that is damaged, or holds something else.
DAMAGED = (ValueError, TypeError, AttributeError, RecursionError)


def hold(directory, steps: Iterable[int], by: str = 'somebody') -> None:
  """Keeps checkpoints from being deleted, until they are named no more.

  For what follows a run that goes on: it holds what it reads, and the best so
  far. It is heeded from the next save on; the one that is under way has chosen
  what it deletes, so see afterwards whether they are there. Of two that write
  at one moment one may be lost: say it again now and then.

  Args:
    directory: the checkpoints'.
    steps: all that are to be held; others, held before, are let go.
    by: who holds them; others' are left alone.

  Raises:
    UserError: a bucket does not take it.
  """
  path = _held_path(directory)
  try:
    there = _holders(path)
  except DAMAGED:  # it is written anew, which mends it
    there = {}
  now = {**there, by: sorted(set(map(operator.index, steps)))}
  if now != there:
    with files.replacing(path) as file:
      file.write(json.dumps(now).encode())


def steps(directory, otherwise: Iterable[int] = ()) -> set[int]:
  """The steps that somebody holds; whether they are there is not asked.

  Args:
    directory: the checkpoints'.
    otherwise: what is held where that cannot be read, which is warned of; a
      training does not stop for it.
  """
  path = _held_path(directory)
  try:
    return set().union(*_holders(path).values())
  except Exception as e:  # of a file system, a bucket, JSON, or what is in it
    otherwise = set(otherwise)
    some = ', '.join(map(str, sorted(otherwise))) or 'none'
    _warn_once(f'{path} is unreadable ({e!r}): of checkpoints, {some} are held')
    return otherwise


def _holders(path) -> dict[str, list[int]]:
  """Who holds which steps."""
  try:
    text = path.read_text()
  except FileNotFoundError:
    return {}
  return {
    name: [operator.index(step) for step in steps]
    for name, steps in json.loads(text).items()
  }


def _held_path(directory) -> files.Path:
  return files.absolute(directory).parent / HELD


@functools.cache
def _warn_once(message: str) -> None:
  logging.warning('%s', message)


class Policy:
  """The checkpoints that somebody holds, for Orbax, which asks at each save.

  In several processes each asks for itself, but only the first one deletes.
  """

  def __init__(self, directory):
    self._directory = directory
    self._steps = set()

  def should_preserve(self, checkpoints, *, context):
    # What is gone for a moment, on a network's disk, lets go of nothing.
    self._steps = steps(self._directory, self._steps)
    return [it.step in self._steps for it in checkpoints]
