"""Checks of what fails most often on a pod, run before compilation."""

import contextlib
import hashlib
import importlib.metadata
import re
import sys
import uuid
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from diffusion_jax import data
from diffusion_jax.data import broken, captions, images, labels, sources
from diffusion_jax.runs import dataset
from diffusion_jax.system import distributed, environment, files
from diffusion_jax.system.errors import UserError

LOOKED_AT = 64  # images whose hash represents the whole set


class Check(NamedTuple):
  """The result of a check.

  Attributes:
    name: name of the check.
    well: whether it passed.
    told: one line: what was found, or what is wrong and what to do.
  """

  name: str
  well: bool
  told: str


def run(config: Mapping, workdir, all_images: bool = False) -> list[Check]:
  """Checks the data, the workdir and the software on all processes.

  Args:
    config: the run's config.
    workdir: folder of the planned run; None skips this check. It is left
      unchanged.
    all_images: whether to decode all images.

  Returns:
    the results, the same on all processes.
  """
  return [
    check('data', _data, config['data'], config.get('conditioning')),
    *([check('images', _images, config['data'])] if all_images else []),
    *([check('workdir', _workdir, workdir)] if workdir else []),
    check('versions', _versions),
    *([check('libtpu', _libtpu)] if _version_of('libtpu') else []),
    check('TensorFlow', _tensorflow),
  ]


def check(name: str, look: Callable[..., str], *given) -> Check:
  """Runs one check.

  Args:
    name: name of the check.
    look: returns what it found, or raises UserError if something is wrong.
    *given: its arguments.
  """
  try:
    return Check(name, True, look(*given))
  except UserError as e:
    return Check(name, False, str(e))


def _data(config, conditioning) -> str:
  told = error = ''
  try:
    train, heldout = data.splits(config)
    sources.say_notes(train)
    if classes := dataset.num_classes(conditioning):
      labels.check(train, heldout, classes)
      labels.describe(train, classes)
    if dataset.has_captions(conditioning):
      captions.check(train, heldout)
    count = min(LOOKED_AT, len(train))
    digest = hashlib.sha256()
    for i in np.arange(count) * len(train) // count:
      digest.update(np.ascontiguousarray(train.read_fn(int(i))[0]))
    told = (
      f'{train.description}, {len(train):,} images, sha256 of {count} of them '
      f'{digest.hexdigest()[:16]}'
    )
  except (OSError, UserError) as e:
    error = str(e)
  every = _gathered(told, error)
  for index, there in enumerate(every):
    if there != every[0]:
      raise UserError(
        f'{_where(index, every)}{there}, but process 0 has {every[0]}: copy '
        'one of them to all hosts'
      )
  return every[0]


def _images(config) -> str:
  """Each process decodes all of its images."""
  opened, wrong, count = (), '', 0
  try:
    opened = data.both(config)
    count = sum(len(source) for source in opened if source)
    if errors := broken.find(*opened):
      wrong = (
        f'{len(errors)} of {count:,} images are broken: '
        f'{broken.listed(errors)}{_skipping(config, errors)}'
      )
  except (OSError, UserError) as e:
    wrong = str(e)
  _gathered(None, wrong)
  return f'all {count:,} can be read'


def _skipping(config, errors) -> str:
  """The remedy of leaving images out, which does not help with refused ones."""
  damaged = sum(isinstance(error, images.Broken) for error in errors)
  if config['skip_broken'] or not damaged:
    return ''
  them = 'them' if damaged == len(errors) else 'the damaged ones'
  return f', or set data.skip_broken=True to leave {them} out'


def _workdir(workdir) -> str:
  """Each process writes a file there, and checks that it sees the others'."""
  name = distributed.on_first(lambda: uuid.uuid4().hex)
  with contextlib.ExitStack() as undo:
    every = _gathered(None, _try_to_write(workdir, name, undo))
    every = distributed.gather(
      [_trace(workdir, name, i).exists() for i in range(len(every))]
    )
  for index, seen in enumerate(every):
    if not all(seen):
      raise UserError(
        f'{_where(index, every)}{workdir} is not the same folder as on '
        f'process {seen.index(False)}: give a path that all hosts share'
      )
  by = f' by all {len(every)} processes' if len(every) > 1 else ''
  return f'{workdir} can be written{by}'


def _trace(workdir, name, index):
  return files.at(workdir) / f'.{name}-{index}.tmp'


def _try_to_write(workdir, name, undo) -> str:
  """What is wrong with the folder, or ''; `undo` restores it."""
  new, wrong = [], ''
  try:
    path = files.at(workdir)
    if not files.in_bucket(path):  # a bucket has no folders
      new = [folder for folder in (path, *path.parents) if not folder.exists()]
  except (OSError, UserError) as e:
    wrong = _reason(workdir, e)
  distributed.gather(None)  # all must have looked before one creates them
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
  with contextlib.suppress(OSError):  # not empty: another process uses it
    folder.rmdir()


def _versions() -> str:
  facts = environment.describe()
  here = {**facts['versions'], 'git revision': facts['revision']}
  every = distributed.gather(here)
  for index, there in enumerate(every):
    for name, value in there.items():
      if value != every[0][name]:
        raise UserError(
          f'process {index} has {name} {value}, process 0 has '
          f'{every[0][name]}: install the same version on all hosts'
        )
  shown = ', '.join(f'{name} {here[name]}' for name in ('python', 'jax'))
  same = f', the same on all {len(every)} processes' if len(every) > 1 else ''
  return shown + same


def _libtpu() -> str:
  """Whether libtpu is the version that this JAX is made for."""
  here, wrong = _version_of('libtpu'), ''
  needs = ' '.join(importlib.metadata.requires('jax') or [])
  wanted = re.search(r'libtpu==([\d.]+)', needs)  # 'libtpu==0.0.42.*'
  series = wanted[1].rstrip('.') if wanted else here
  if not f'{here}.'.startswith(f'{series}.'):
    jax = _version_of('jax')
    wrong = (
      f'{here} is installed, but jax {jax} needs {series}: pip install '
      f"'jax[tpu]=={jax}'"
    )
  _gathered(None, wrong)
  return here


def _version_of(package) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _tensorflow() -> str:
  wrong = (
    "it is imported, and takes the accelerators' memory: find what imports it "
    '(python -X importtime)'
  )
  _gathered(None, wrong * ('tensorflow' in sys.modules))
  return 'is not imported'


def _gathered(value, wrong: str) -> list:
  """The values of all processes; UserError if anything is wrong on one."""
  every = distributed.gather([value, wrong])
  for index, (_, wrong) in enumerate(every):
    if wrong:
      raise UserError(_where(index, every) + wrong)
  return [value for value, _ in every]


def _where(index, every) -> str:
  return f'process {index}: ' if len(every) > 1 else ''
