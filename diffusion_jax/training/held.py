"""Held checkpoints: other processes can protect checkpoints from deletion.

A file next to the checkpoints' folder lists them. (It cannot be in the folder:
Orbax would take it for an incomplete save and delete it.)
"""

import functools
import json
import operator
from collections.abc import Iterable

from absl import logging

from diffusion_jax.system import files

HELD = 'held.json'
# The exceptions raised when the JSON is damaged or holds something else.
DAMAGED = (ValueError, TypeError, AttributeError, RecursionError)


def hold(directory, steps: Iterable[int], by: str = 'somebody') -> None:
  """Protects checkpoints from deletion until a later call no longer lists them.

  For programs that follow a run in progress: they hold the checkpoint they
  read and the best one so far. A hold applies from the next save on. A save in
  progress has already chosen what to delete, so check afterwards that the
  checkpoints still exist. If two holders write at the same moment, one of the
  writes may be lost: repeat the call now and then.

  Args:
    directory: the folder of the checkpoints.
    steps: all steps to hold; steps held earlier by this holder are released.
    by: the name of the holder; steps held by other holders stay held.

  Raises:
    UserError: writing to the bucket failed.
  """
  path = _held_path(directory)
  try:
    there = _holders(path)
  except DAMAGED:  # rewriting the file repairs it
    there = {}
  now = {**there, by: sorted(set(map(operator.index, steps)))}
  if now != there:
    files.write_json(path, now)


def steps(directory, otherwise: Iterable[int] = ()) -> set[int]:
  """The held steps, whether or not their checkpoints exist.

  Args:
    directory: the folder of the checkpoints.
    otherwise: what to return, with a warning, if the file cannot be read;
      training does not stop for this.
  """
  path = _held_path(directory)
  try:
    return set().union(*_holders(path).values())
  except Exception as e:  # from the file system, a bucket, or damaged JSON
    otherwise = set(otherwise)
    some = ', '.join(map(str, sorted(otherwise))) or 'none'
    _warn_once(f'{path} is unreadable ({e!r}): held checkpoints: {some}')
    return otherwise


def _holders(path) -> dict[str, list[int]]:
  """Holder -> the steps it holds."""
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
  """Orbax's preservation policy for held checkpoints, queried at each save.

  Every process evaluates the policy, but only the first one deletes.
  """

  def __init__(self, directory):
    self._directory = directory
    self._steps = set()

  def should_preserve(self, checkpoints, *, context):
    # If a network disk is briefly unavailable, the last known holds apply.
    self._steps = steps(self._directory, self._steps)
    return [it.step in self._steps for it in checkpoints]
