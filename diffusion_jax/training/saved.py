"""The newest step that a run has saved, noted next to its checkpoints.

A folder of checkpoints can be gone, empty, a dead link, or not mounted. The
note tells such a run from one that was killed before its first checkpoint was
complete, which begins again.
"""

import contextlib
import json
import math
import os

from diffusion_jax.system import distributed, files, jsonl, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import metrics
from diffusion_jax.training.stored import steps

SAVED = 'saved.json'


def note(directory, step: int) -> None:
  """Writes in saved.json that the checkpoint of a step is complete.

  Args:
    directory: the folder of the checkpoints.
    step: the step; 0 at the start of a run.
  """
  if distributed.is_first():
    files.write_json(files.absolute(directory).parent / SAVED, {'step': step})


def note_start(directory) -> list[int]:
  """Notes the newest step at a start, and says if a newer one has been saved.

  Args:
    directory: the folder of the checkpoints.

  Returns:
    the steps that have a checkpoint.
  """
  there, step = steps(directory), 0
  newest_there = max(there, default=0)
  with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
    step = int(_json(files.absolute(directory).parent / SAVED)['step'])
  if step > newest_there:
    terminal.say(
      f'checkpoint {step} had been saved, but is no longer in {directory}: the '
      f'steps after {newest_there} are trained again'
    )
  note(directory, newest_there)
  return there


def newest(directory) -> int:
  """The newest step that had a complete checkpoint, 0 if none is known.

  Args:
    directory: the folder of the checkpoints.
  """
  if there := steps(directory):
    return there[-1]
  workdir = files.absolute(directory).parent
  with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
    return int(_json(workdir / SAVED)['step'])
  # Runs that are older than the note, or lost it: a later start had a
  # checkpoint, and so had a run that went on after a multiple of
  # checkpoint_every, or ended.
  starts = jsonl.read(workdir / 'starts.jsonl', has_step)
  found = max((start['step'] for start in starts), default=0)
  with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
    config = _json(workdir / 'config.json')
    due = min(config['checkpoint_every'] or math.inf, config['num_steps'])
    rows = metrics.read(workdir / metrics.ROWS)
    last = max((row['step'] for row in rows), default=0)
    found = max(found, last if last >= due else 0)
  return found


def has_step(value: dict) -> bool:
  """Whether an object is the note of a start: it has a step."""
  return type(value.get('step')) is int


def check(directory) -> None:
  """Raises UserError if a run has lost its checkpoints, or they are not read.

  Args:
    directory: the folder of the checkpoints.
  """
  directory = files.absolute(directory)
  try:
    if steps(directory):
      return
  except OSError as e:  # a mount that has died, say
    raise UserError(
      f'{directory} cannot be read ({e.strerror or e}): mount it again, or '
      'train in a new workdir'
    ) from e
  broken = os.path.islink(directory) and not directory.exists()
  step = newest(directory)
  is_converted = (directory.parent / 'converted.json').exists()
  if not (step or broken or is_converted):
    return
  if broken:
    state = f'is a broken link to {os.readlink(directory)}'
  elif not directory.exists():
    state = 'is gone'
  else:
    state = 'holds no checkpoint'
  reached = f'the run had reached step {step}, but ' if step else ''
  again = 'convert the weights again'
  remedy = again if is_converted else 'train in a new workdir'
  raise UserError(
    f'{reached}{directory} {state}: restore or mount it, or {remedy}'
  )


def _json(path):
  return json.loads(path.read_text())
