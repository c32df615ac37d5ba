"""A run's folder: config.json and what may be written where.

config.json            the resolved config
init_from.json         whose parameters it began with, see finetune.py
converted.json         that others trained it, and where it comes from
checkpoints/           one folder a step
held.json              those that are not to be deleted, see training.held
starts.jsonl           one object a start: time, step, versions, devices
heartbeats/            of several processes, see training/watchdog.py
metrics.jsonl          one object a line; TensorBoard's events beside it
samples/               grids on the way (train_*.png) and sample stores
inversions/            images as noises, and drawn again from them
calibration/           how a checkpoint errs, see samplers/calibration.py
evaluations/           metric cards, and the networks that judged
report.html            all of it to look at
"""

import contextlib
import datetime
import fcntl
import json
import os
from collections.abc import Iterator

from ml_collections import config_dict

from diffusion_jax.runs import completion
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError

# What may differ from config.json when a run goes on, and every *_every.
MAY_CHANGE = ('num_steps', 'microbatches', 'mesh', 'data.path')

LOCK = '.lock'
INIT = 'init_from.json'
CONVERTED = 'converted.json'


def flatten(config: dict, prefix: str = '') -> dict:
  """{'a': {'b': 1}} -> {'a.b': 1}."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, dict):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[prefix + key] = value
  return flat


def to_plain(config: config_dict.ConfigDict) -> dict:
  """As it reads back from JSON: tuples are lists."""
  return json.loads(json.dumps(config.to_dict()))


def image_shape(data) -> tuple[int, int, int]:
  """(H, W, C) of a config's data."""
  size = data['image_size']
  height, width = (size, size) if isinstance(size, int) else size
  return height, width, data['channels']


def may_change(key: str) -> bool:
  """Whether a run may go on with another value of this (dotted) key."""
  if '.' not in key and key.endswith('_every'):
    return True
  return any(key == name or key.startswith(f'{name}.') for name in MAY_CHANGE)


def differences(old: dict, new: dict) -> dict[str, str]:
  """(Dotted) key -> 'key: VALUE there, VALUE now', of two plain configs."""
  old, new = flatten(old), flatten(new)
  return {
    key: f'{key}: {old.get(key)} there, {new.get(key)} now'
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key)
  }


def check(workdir, config: config_dict.ConfigDict) -> None:
  """Raises UserError unless a run of this config may begin or go on here.

  The folder is new, empty, or holds a run whose config differs only in what may
  change; keys that differ are named. Nothing is written.
  """
  usable_folder('workdir', workdir)
  path = files.at(workdir)
  if (path / CONVERTED).exists():
    raise UserError(
      f'--workdir={workdir} holds weights that were converted, without an '
      f'optimiser: --init_from={workdir} begins with them in another folder'
    )
  if (path / 'config.json').exists():
    differ = differences(read_config(workdir), to_plain(config))
    other = [line for key, line in differ.items() if not may_change(key)]
    if other:
      raise UserError(
        f'--workdir={workdir} holds a run of another config ('
        f'{"; ".join(other)}): give it its own values or another folder'
      )
  elif path.exists() and files.entries(path) - {LOCK, INIT}:
    raise UserError(
      f'--workdir={workdir} is not empty and has no config.json: give a new '
      'folder'
    )


def write_config(workdir, config: config_dict.ConfigDict) -> None:
  """Writes config.json, whole or not at all."""
  with files.replacing(files.at(workdir) / 'config.json') as file:
    file.write(json.dumps(to_plain(config), indent=2).encode() + b'\n')


def converted_from(workdir) -> str | None:
  """Where converted weights come from, absolute; None = they were trained here.

  It is None for an unfinished import too: there is no run yet.

  Raises:
    UserError: the record of it is unreadable.
  """
  path = files.at(workdir) / CONVERTED
  if not path.exists() or not (files.at(workdir) / 'config.json').exists():
    return None
  try:
    return str(json.loads(path.read_text())['from'])
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise UserError(f'{path} is unreadable ({e}): convert them anew') from e


def note_start(workdir, facts: dict) -> None:
  """Appends a line to starts.jsonl: what goes on from where, and when."""
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  folder, put = files.growing(workdir, 'starts.jsonl')
  with (folder / 'starts.jsonl').open('a') as file:
    file.write(json.dumps({'time': now, **facts}) + '\n')
  put('starts.jsonl')


@contextlib.contextmanager
def lock(workdir) -> Iterator[None]:
  """Makes the folder and holds it against a second trainer.

  A kill lets go of it. A bucket has no locks: that no two trainers write to one
  folder of it is left to the user.

  Raises:
    UserError: another process trains there, or the folder cannot be written.
  """
  try:
    folder = files.make(workdir)
  except OSError as e:
    raise UserError(f'--workdir={workdir} cannot be made ({e.strerror})') from e
  if files.in_bucket(folder):
    yield
    return
  with (folder / LOCK).open('a') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise UserError(
        f'--workdir={workdir}: another process trains there; wait for it, or '
        'give another folder'
      ) from e
    yield


def read_config(workdir, flag: str = 'workdir') -> dict:
  """The config of the run in a workdir.

  Args:
    workdir: the run's folder.
    flag: what the user gave it by, for the message.

  Raises:
    UserError: there is no run.
  """
  path = files.at(workdir) / 'config.json'
  if not path.is_file():
    raise UserError(
      f'--{flag}={workdir} holds no run (no config.json): train first'
    )
  try:
    config = json.loads(path.read_text())
  except (OSError, ValueError) as e:
    raise UserError(f'{path} is unreadable ({e})') from e
  parts = ('data', 'model', 'process', 'loss', 'sample')
  missing = [part for part in parts if part not in config]
  if missing:
    raise UserError(f'{path} is not a run of ours: it has no {missing[0]!r}')
  completion.complete(config)  # keys that are younger than the run
  return config


def usable_folder(flag: str, directory) -> None:
  """Raises UserError unless the folder exists or can be made; makes nothing."""
  path = files.absolute(directory)
  if files.in_bucket(path):
    if path.is_file():
      raise UserError(f'--{flag}={directory} is a file')
    return
  existing = next(p for p in (path, *path.parents) if os.path.lexists(p))
  if not existing.exists():
    raise UserError(f'--{flag}={directory}: {existing} is a link to nothing')
  if not existing.is_dir():
    raise UserError(f'--{flag}={directory}: {existing} is a file')
  if not os.access(existing, os.W_OK):
    raise UserError(f'--{flag}={directory}: {existing} cannot be written')


def usable_file(flag: str, path) -> None:
  """Raises UserError unless the file can be written; writes nothing."""
  path = files.at(path).expanduser()
  if path.is_dir():
    raise UserError(f'--{flag}={path} is a folder: give a file')
  usable_folder(flag, path.parent)


def usable_output(directory, name: str = 'samples', run=None) -> None:
  """Raises UserError unless a folder is usable, and no part of something else.

  Args:
    directory: of samples, or of results.
    name: the folder of a run that is for them.
    run: the only run in which they may lie, made or not; None = any.
  """
  usable_folder('output', directory)
  path, own = files.resolved(directory), run and files.resolved(run)
  if path == own:
    raise UserError(
      f'--output={directory} is the run itself: choose {own / name}, or a '
      'folder outside'
    )
  for parent in files.parents(path):
    if (parent / 'store.json').exists():
      raise UserError(
        f'--output={directory} is inside the sample store {parent}: choose '
        'another folder'
      )
    inside = path.relative_to(parent).parts[0]
    is_run = parent == own or (parent / 'config.json').exists()
    if is_run and (inside != name or own not in (None, parent)):
      raise UserError(
        f'--output={directory} is inside the run {parent}: choose a folder in '
        f'{(own or parent) / name} or outside'
      )
