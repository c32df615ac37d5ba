"""Checkpoints: the only file that knows Orbax.

A checkpoint holds the whole `TrainState`, with a checksum of each of its
arrays, and can be restored on any mesh. What a restore would silently accept
(another dtype, flipped bits) or answer with pages (another tree, a damaged
file) is told in one line, and so is what keeps a save from being written.
"""

import contextlib
import functools
import json
import logging
import operator
import os
import re
import sys
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from absl import logging as absl
from orbax.checkpoint import v1 as ocp

from diffusion_jax import models
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checksum
from diffusion_jax.training.state import TrainState

SUMS = 'checksums'  # the key, in Orbax's metadata of a step
WHOLE = 'commit_success.txt'  # Orbax's last word on a step in a bucket

# Beside the checkpoints' folder: what is in it and has no WHOLE, Orbax takes
# for a torn save, and deletes.
HELD = 'held.json'
# What a file of JSON raises that is damaged, or holds something else.
DAMAGED = (ValueError, TypeError, AttributeError, RecursionError)


def _hush() -> None:
  """What Orbax prints in pages, from its threads at any time, it also raises.

  It logs at level ERROR. And where one read or write of many fails, it closes
  its event loop, and TensorStore prints a traceback for each that ends later.
  """
  printed = sys.unraisablehook

  def logs(record):
    return 'orbax' not in record.pathname or absl.get_verbosity() >= absl.INFO

  def prints(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed':
      printed(unraisable)

  logging.getLogger('absl').addFilter(logs)
  sys.unraisablehook = prints


_hush()


class Checkpoints:
  """The checkpoints of a run, in `directory`, one folder a step.

  Older ones are deleted when a new one is whole, but for those that somebody
  holds, see `hold`.

  Args:
    directory: where they lie; made if needed.
    keep_last: how many of the newest are kept.
    keep_every: those at multiples of this many steps are kept for ever; 0 =
      none.
  """

  def __init__(self, directory, keep_last: int = 3, keep_every: int = 0):
    self.directory = files.absolute(directory)
    self._saving = None  # (step, what Orbax gives to wait for)
    kept = [
      ocp.training.preservation_policies.LatestN(keep_last),
      _Held(self.directory),
    ]
    if keep_every:
      kept += [ocp.training.preservation_policies.EveryNSteps(keep_every)]
    self._checkpointer = ocp.training.Checkpointer(
      self.directory,
      # The loop decides when to save.
      save_decision_policy=(
        ocp.training.save_decision_policies.FixedIntervalPolicy(1)
      ),
      preservation_policy=(
        ocp.training.preservation_policies.AnyPreservationPolicy(kept)
      ),
      cleanup_tmp_directories=True,
    )

  def __enter__(self):
    return self

  def __exit__(self, *raised):
    try:
      if not any(raised):
        self.wait()
    finally:
      # What goes wrong here has been told: by wait(), or by what was raised.
      with contextlib.suppress(Exception):
        self._checkpointer.close()

  def save(self, step: int, state: TrainState) -> None:
    """Begins to save; returns once the state may be donated.

    Raises:
      UserError: it, or the save before it, cannot be written.
    """
    self.wait()
    tree = state._asdict()
    sums = checksum.of(tree)  # of what the devices hold, before any copy
    with _writing(step):
      saving = self._checkpointer.save_async(
        step, tree, custom_metadata={SUMS: sums}
      )
    self._saving = step, saving

  def wait(self) -> None:
    """Returns when the last save is whole on disk.

    Raises:
      UserError: it cannot be written; once.
    """
    if self._saving is not None:
      (step, saving), self._saving = self._saving, None
      with _writing(step):
        saving.result()

  def restore(self, step: int, abstract: TrainState) -> TrainState:
    """The state at `step`, laid out as `abstract` says.

    Raises:
      UserError: the checkpoint is damaged or holds another model.
    """
    return TrainState(
      **_load(self._checkpointer, self.directory, step, abstract._asdict())
    )


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


def held(directory, otherwise: Iterable[int] = ()) -> set[int]:
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
  absl.warning('%s', message)


class _Held:
  """The checkpoints that somebody holds, for Orbax, which asks at each save.

  In several processes each asks for itself, but only the first one deletes.
  """

  def __init__(self, directory):
    self._directory = directory
    self._steps = set()

  def should_preserve(self, checkpoints, *, context):
    # What is gone for a moment, on a network's disk, lets go of nothing.
    self._steps = held(self._directory, self._steps)
    return [it.step in self._steps for it in checkpoints]


def steps(directory) -> list[int]:
  """The steps that have a checkpoint, in order; nothing is written.

  Args:
    directory: the checkpoints'; [] where it does not exist.
  """
  directory = files.at(directory)
  if not directory.is_dir():
    return []
  # A save under way bears a longer name; it gets its own by renaming. In a
  # bucket it has its own, and a file is added that says that it is whole.
  return sorted(
    int(entry.name)
    for entry in directory.iterdir()
    if entry.name.isdecimal()
    and (not files.in_bucket(entry) or (entry / WHOLE).exists())
  )


def newest(directory) -> str:
  """For people: what a run goes on from."""
  there = steps(directory)
  if not there:
    return 'there is no checkpoint yet'
  return (
    f'checkpoint {there[-1]} is whole, and the same command goes on from it'
  )


def find_step(directory, step: int | None, flag: str = 'step') -> int:
  """`step`, or the newest.

  Args:
    directory: the checkpoints'.
    step: which one; None = the newest.
    flag: what the user gave the step by, for the message.

  Raises:
    UserError: there is no such checkpoint; the message lists those there are.
  """
  there = steps(directory)
  if not there:
    raise UserError(
      f'{directory} holds no checkpoint: train first, at least to the first '
      'multiple of checkpoint_every'
    )
  if step is None:
    return there[-1]
  if step not in there:
    raise UserError(
      f'--{flag}={step}: there is no such checkpoint in {directory}; there are '
      f'{", ".join(map(str, there))}'
    )
  return step


def save_params(directory, step: int, ema_params, params=None) -> None:
  """Writes a checkpoint of parameters alone, from which no training goes on.

  Args:
    directory: of the checkpoints; made if needed.
    step: the training step that they are of.
    ema_params: the average, a nested dict of arrays.
    params: the raw parameters, or None where nobody has them.

  Raises:
    UserError: it cannot be written.
  """
  tree = {'ema_params': ema_params}
  if params is not None:
    tree['params'] = params
  tree = jax.tree.map(jnp.asarray, tree)
  sums = checksum.of(tree)
  with (
    _writing(step),
    ocp.training.Checkpointer(files.absolute(directory)) as checkpointer,
  ):
    checkpointer.save(step, tree, custom_metadata={SUMS: sums})


def load_params(directory, step: int, abstract, *, ema: bool = True):
  """The parameters alone, read without the optimiser's moments.

  Args:
    directory: the checkpoints'.
    step: which one.
    abstract: the parameters' shapes, dtypes and shardings.
    ema: the average, or the raw parameters.

  Raises:
    UserError: the checkpoint is damaged or holds another model.
  """
  name = 'ema_params' if ema else 'params'
  checkpointer = ocp.training.Checkpointer(files.absolute(directory))
  with checkpointer:
    return _load(checkpointer, directory, step, {name: abstract})[name]


def load_common(
  directory, step: int, abstract, *, ema: bool = True
) -> tuple[dict, list[dict]]:
  """The parameters that another model has in common with this one.

  Those are taken whose name and shape agree; no others are read.

  Args:
    directory: the other run's checkpoints.
    step: which one.
    abstract: this model's parameters: shapes, dtypes and shardings.
    ema: the average, or the raw parameters.

  Returns:
    (taken, left): name -> array, laid out as `abstract` says, and for every
    other parameter of the two models {'name', 'there', 'here'}, its shape in
    each, None where it has none.

  Raises:
    UserError: the checkpoint is damaged, or nothing is in common.
  """
  part = 'ema_params' if ema else 'params'
  checkpointer = ocp.training.Checkpointer(files.absolute(directory))
  with checkpointer:
    stored, sums = _metadata(checkpointer, directory, step, 'init_step')
    _has_raw(directory, step, stored, [part])
    there, here = (
      {name: shape for name, (shape, _) in _shapes(tree).items()}
      for tree in (stored.get(part, {}), abstract)
    )
    left = [
      {'name': name, 'there': there.get(name), 'here': here.get(name)}
      for name in sorted(there.keys() | here.keys())
      if there.get(name) != here.get(name)
    ]
    wanted = {
      name: leaf
      for name, leaf in _named(abstract).items()
      if there.get(name) == here[name]
    }
    if not wanted:
      raise UserError(
        f'checkpoint {step} in {directory} has no parameter of this name and '
        'shape in common with the config: begin from a run of a similar model'
      )
    chosen = jax.tree.structure(stored[part]).unflatten(
      wanted.get(name, ...) for name in models.names(stored[part])
    )
    loaded = _read(
      checkpointer, directory, step, stored, sums, {part: chosen}, 'init_step'
    )
  return {
    name: leaf for name, leaf in _named(loaded[part]).items() if name in wanted
  }, left


def _load(checkpointer, directory, step, abstract: dict) -> dict:
  stored, sums = _metadata(checkpointer, directory, step)
  _has_raw(directory, step, stored, abstract)
  parts = {name: stored.get(name, {}) for name in abstract}
  difference = _first_difference(_shapes(parts), _shapes(abstract))
  if difference:
    raise UserError(
      f'checkpoint {step} in {directory} holds another model: {difference}'
    )
  return _read(checkpointer, directory, step, stored, sums, abstract)


def _has_raw(directory, step, stored, wanted) -> None:
  if 'params' in wanted and 'params' not in stored and 'ema_params' in stored:
    raise UserError(
      f'checkpoint {step} in {directory} has averaged parameters only, as it '
      'was converted: take those, without --noema or --noinit_ema'
    )


def _metadata(checkpointer, directory, step, flag='step') -> tuple[dict, dict]:
  """Shapes and dtypes of what was stored, and its checksums."""
  with _reading(directory, step, flag):
    metadata = checkpointer.metadata(step)
    stored = metadata.metadata
    if stored is None:
      raise ValueError('its metadata cannot be read')
    sums = (metadata.custom_metadata or {}).get(SUMS)
    if not isinstance(sums, dict):
      raise ValueError('it has no checksums')
    return stored.get('state', stored), sums


def _read(checkpointer, directory, step, stored, sums, chosen, flag='step'):
  """The chosen parts; leaves that are `...`, and all else, are not read."""
  skipped = jax.tree.map(lambda _: ..., stored)
  with _reading(directory, step, flag):
    loaded = checkpointer.load(step, {**skipped, **chosen})
  read = {
    name: leaf for name, leaf in _named(loaded).items() if leaf is not ...
  }
  for name, found in checksum.of(read).items():
    if found != sums.get(name):
      damage = ValueError(f'{name} is not what was saved')
      raise UserError(_unreadable(directory, step, damage, flag))
  return loaded


@contextlib.contextmanager
def _reading(directory, step, flag) -> Iterator[None]:
  """Tells in one line what Orbax has against a checkpoint."""
  try:
    yield
  except Exception as e:
    _hush_tasks()
    raise UserError(_unreadable(directory, step, e, flag)) from e


@contextlib.contextmanager
def _writing(step) -> Iterator[None]:
  """Tells in one line what the system has against a save."""
  try:
    yield
  except (OSError, ValueError) as e:
    # TensorStore's errors are ValueErrors, with the system's number in them.
    code = re.search(r"os_error_code='(\d+)'", str(e))
    if not (code or isinstance(e, OSError) or 'gs://' in str(e)):
      raise
    reason = os.strerror(int(code[1])) if code else e.strerror or str(e)
    _hush_tasks()
    raise UserError(f'checkpoint {step} cannot be written ({reason})') from e


def _hush_tasks() -> None:
  """asyncio's word on the others of many tasks, of which one has failed."""
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)


def _named(tree) -> dict:
  return dict(zip(models.names(tree), jax.tree.leaves(tree), strict=True))


def _shapes(tree) -> dict:
  return {
    name: (tuple(leaf.shape), jnp.dtype(leaf.dtype))
    for name, leaf in _named(tree).items()
  }


def _first_difference(stored: dict, wanted: dict) -> str:
  for name in sorted(stored.keys() | wanted.keys()):
    if stored.get(name) != wanted.get(name):
      told = [
        f'{shape[0]} {shape[1]}' if shape else 'nothing'
        for shape in (stored.get(name), wanted.get(name))
      ]
      return f'{name} is {told[0]} there, {told[1]} here'
  return ''


def _unreadable(directory, step, error, flag) -> str:
  while error.__cause__:  # Orbax tells the reason last
    error = error.__cause__
  if isinstance(error, MemoryError | PermissionError):
    raise error  # nothing is wrong with the checkpoint
  reason = (str(error) or type(error).__name__).splitlines()[0]
  others = [s for s in steps(directory) if s != step]
  remedy = (
    f'move {directory}/{step} away to go on from {others[-1]}, or take '
    f'another by --{flag} ({", ".join(map(str, others))})'
    if others
    else 'there is no other'
  )
  return f'checkpoint {step} is unreadable ({reason[:120]}): {remedy}'
