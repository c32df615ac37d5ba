"""Checkpoints: the only file that knows Orbax.

A checkpoint holds the whole `TrainState`, with a checksum of each of its
arrays, and can be restored on any mesh. What a restore would silently accept
(another dtype, flipped bits) or answer with pages (another tree, a damaged
file) is told in one line, and so is what keeps a save from being written.
"""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from absl import logging as absl
from orbax.checkpoint import v1 as ocp

from diffusion_jax import models
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checksum, held
from diffusion_jax.training.state import TrainState

SUMS = 'checksums'  # the key, in Orbax's metadata of a step
WHOLE = 'commit_success.txt'  # Orbax's last word on a step in a bucket


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
    keep, save = (
      ocp.training.preservation_policies,
      ocp.training.save_decision_policies,
    )
    kept = [keep.LatestN(keep_last), held.Policy(self.directory)]
    if keep_every:
      kept += [keep.EveryNSteps(keep_every)]
    self._checkpointer = ocp.training.Checkpointer(
      self.directory,
      save_decision_policy=save.FixedIntervalPolicy(1),  # the loop decides
      preservation_policy=keep.AnyPreservationPolicy(kept),
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
    stored = _Stored(self._checkpointer, self.directory, step)
    return TrainState(**stored.load(abstract._asdict()))


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
  part = 'ema_params' if ema else 'params'
  with _stored(directory, step) as stored:
    return stored.load({part: abstract})[part]


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
  with _stored(directory, step, 'init_step') as stored:
    stored.has([part])
    there, here = (
      {name: tuple(leaf.shape) for name, leaf in _named(tree).items()}
      for tree in (stored.tree.get(part, {}), abstract)
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
        f'{stored} has no parameter of this name and shape in common with the '
        'config: begin from a run of a similar model'
      )
    chosen = jax.tree.structure(stored.tree[part]).unflatten(
      wanted.get(name, ...) for name in there
    )
    loaded = _named(stored.read({part: chosen})[part])
  return {name: loaded[name] for name in loaded if name in wanted}, left


@contextlib.contextmanager
def _stored(directory, step, flag='step') -> Iterator['_Stored']:
  with ocp.training.Checkpointer(files.absolute(directory)) as checkpointer:
    yield _Stored(checkpointer, directory, step, flag)


class _Stored:
  """A checkpoint on disk: `tree` is the shapes and dtypes of what it holds.

  Args:
    checkpointer: Orbax's, of the directory.
    directory: the checkpoints'.
    step: which one.
    flag: by which another would be chosen, for the messages.

  Raises:
    UserError: it is damaged.
  """

  def __init__(self, checkpointer, directory, step, flag='step'):
    self._checkpointer = checkpointer
    self._directory, self._step, self._flag = directory, step, flag
    with self._reading():
      metadata = checkpointer.metadata(step)
      if metadata.metadata is None:
        raise ValueError('its metadata cannot be read')
      self.tree = metadata.metadata.get('state', metadata.metadata)
      self._sums = (metadata.custom_metadata or {}).get(SUMS)
      if not isinstance(self._sums, dict):
        raise ValueError('it has no checksums')

  def __str__(self):
    return f'checkpoint {self._step} in {self._directory}'

  def has(self, parts) -> None:
    """Raises UserError where raw parameters are wanted and were never there."""
    missing = 'params' in parts and 'params' not in self.tree
    if missing and 'ema_params' in self.tree:
      raise UserError(
        f'{self} has averaged parameters only, as it was converted: take '
        'those, without --noema or --noinit_ema'
      )

  def load(self, abstract: dict) -> dict:
    """The parts of `abstract`, which must be as they are there."""
    self.has(abstract)
    stored = {name: self.tree.get(name, {}) for name in abstract}
    difference = _first_difference(stored, abstract)
    if difference:
      raise UserError(f'{self} holds another model: {difference}')
    return self.read(abstract)

  def read(self, chosen: dict) -> dict:
    """The chosen parts; leaves that are `...`, and all else, are not read."""
    skipped = jax.tree.map(lambda _: ..., self.tree)
    with self._reading():
      loaded = self._checkpointer.load(self._step, {**skipped, **chosen})
      read = {k: leaf for k, leaf in _named(loaded).items() if leaf is not ...}
      for name, found in checksum.of(read).items():
        if found != self._sums.get(name):
          raise ValueError(f'{name} is not what was saved')
    return loaded

  @contextlib.contextmanager
  def _reading(self) -> Iterator[None]:
    """Reports in one line what is wrong with the checkpoint."""
    try:
      yield
    except Exception as e:
      _hush_tasks()
      raise UserError(
        _unreadable(self._directory, self._step, e, self._flag)
      ) from e


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


def _first_difference(stored: dict, wanted: dict) -> str:
  there, here = (
    {
      name: f'{tuple(leaf.shape)} {jnp.dtype(leaf.dtype)}'
      for name, leaf in _named(tree).items()
    }
    for tree in (stored, wanted)
  )
  for name in sorted(there.keys() | here.keys()):
    found = [shapes.get(name, 'nothing') for shapes in (there, here)]
    if found[0] != found[1]:
      return f'{name} is {found[0]} there, {found[1]} here'
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
