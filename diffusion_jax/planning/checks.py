"""What fails most often on a pod, looked at before anything is compiled."""

import contextlib
import hashlib
import sys
import uuid
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from diffusion_jax import data
from diffusion_jax.system import distributed, environment, files
from diffusion_jax.system.errors import UserError

LOOKED_AT = 64  # images whose hash stands for the whole set


class Check(NamedTuple):
  """A thing that was looked at.

  Attributes:
    name: of what.
    well: whether it is as it should be.
    told: what was found, or what is wrong and what to do; one line.
  """

  name: str
  well: bool
  told: str


def run(config: Mapping, workdir) -> list[Check]:
  """Looks at the data, the workdir and the software, on all processes.

  Args:
    config: of the run.
    workdir: of the run to come; None = not given, and not looked at. It is as
      before when this returns.

  Returns:
    what was found, well or not, on all processes alike.
  """
  return [
    _data(config['data']),
    *([_workdir(workdir)] if workdir else []),
    _versions(),
    _tensorflow(),
  ]


def _data(config) -> Check:
  try:
    train, _ = data.splits(config)
    chosen = np.arange(min(LOOKED_AT, len(train)))
    chosen = chosen * len(train) // len(chosen)
    digest = hashlib.sha256()
    for i in chosen:
      digest.update(np.ascontiguousarray(train.read_fn(int(i))[0]))
    found = {
      'images': len(train),
      'sha256': digest.hexdigest(),
      'description': train.description,
    }
  except (OSError, UserError) as e:
    found = {'error': str(e)}
  every = distributed.gather(found)
  for index, there in enumerate(every):
    if 'error' in there:
      return Check('data', False, _where(index, every) + there['error'])
    if there != every[0]:
      return Check(
        'data', False,
        f'{_where(index, every)}{_told(there)}, but process 0 has '
        f'{_told(every[0])}: copy one to all hosts',
      )  # fmt: skip
  return Check('data', True, _told(every[0]))


def _told(found) -> str:
  return (
    f'{found["description"]}, {found["images"]:,} images, sha256 of '
    f'{min(LOOKED_AT, found["images"])} of them {found["sha256"][:16]}'
  )


def _workdir(workdir) -> Check:
  """Each process writes a file there, and looks for those of the others."""
  name = distributed.on_first(lambda: uuid.uuid4().hex)
  with contextlib.ExitStack() as undo:
    wrong = _try_to_write(workdir, name, undo)
    every = distributed.gather(wrong)
    seen = distributed.gather(
      [
        not wrong and _trace(workdir, name, i).exists()
        for i in range(len(every))
      ]
    )
  for index, wrong in enumerate(every):
    if wrong:
      return Check('workdir', False, f'{_where(index, every)}{wrong}')
    if not all(seen[index]):
      return Check(
        'workdir', False,
        f'{_where(index, every)}{workdir} is another folder than that of '
        f'process {seen[index].index(False)}: give a path that all hosts share',
      )  # fmt: skip
  by = f' by all {len(every)} processes' if len(every) > 1 else ''
  return Check('workdir', True, f'{workdir} can be written{by}')


def _trace(workdir, name, index):
  return files.at(workdir) / f'.{name}-{index}.tmp'


def _try_to_write(workdir, name, undo) -> str:
  """What is wrong with the folder, or ''; `undo` leaves it as it was."""
  new, wrong = [], ''
  try:
    path = files.at(workdir)
    if not files.in_bucket(path):  # which has no folders
      new = [folder for folder in (path, *path.parents) if not folder.exists()]
  except (OSError, UserError) as e:
    wrong = _reason(workdir, e)
  distributed.gather(None)  # all have looked before one makes them
  if wrong:
    return wrong
  try:
    for folder in reversed(new):
      folder.mkdir(exist_ok=True)
      undo.callback(_remove_empty, folder)
    own = _trace(workdir, name, distributed.index())
    with files.replacing(own) as file:
      file.write(name.encode())
    undo.callback(own.unlink)
  except (OSError, UserError) as e:
    return _reason(workdir, e)
  return ''


def _reason(workdir, error) -> str:
  if isinstance(error, UserError):
    return str(error)
  return f'{workdir} cannot be written ({error.strerror or error})'


def _remove_empty(folder):
  with contextlib.suppress(OSError):  # another process has more in it
    folder.rmdir()


def _versions() -> Check:
  facts = environment.describe()
  here = {**facts['versions'], 'git revision': facts['revision']}
  every = distributed.gather(here)
  for index, there in enumerate(every):
    for name, value in there.items():
      if value != every[0][name]:
        return Check(
          'versions', False,
          f'process {index} has {name} {value}, process 0 has '
          f'{every[0][name]}: install the same on all hosts',
        )  # fmt: skip
  shown = ', '.join(f'{name} {here[name]}' for name in ('python', 'jax'))
  same = f', the same on all {len(every)} processes' if len(every) > 1 else ''
  return Check('versions', True, shown + same)


def _tensorflow() -> Check:
  every = distributed.gather('tensorflow' in sys.modules)
  if any(every):
    return Check(
      'TensorFlow', False,
      f'{_where(every.index(True), every)}it is imported, and takes the '
      "accelerators' memory: find who imports it (python -X importtime)",
    )  # fmt: skip
  return Check('TensorFlow', True, 'is not imported')


def _where(index, every) -> str:
  return f'process {index}: ' if len(every) > 1 else ''
