"""Saves and restores checkpoints with Orbax.

A checkpoint holds the whole `TrainState`, with a checksum of each of its
arrays, and can be restored on any mesh. Errors that Orbax would silently accept
(another dtype, flipped bits) or report in pages of output (another tree, a
damaged file) become one-line errors, and so do failed saves.
"""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging as absl
from orbax.checkpoint import v1 as ocp

from diffusion_jax import models
from diffusion_jax.system import distributed, files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checksum, held, saved
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.stored import (
  FROZEN,
  SUMS,
  Damaged,
  Stored,
  hush,
  steps,
)


def _hush() -> None:
  """Silences output of Orbax's threads about errors that it also raises.

  Orbax logs them at level ERROR. When one of several reads or writes fails, it
  also closes its event loop, and TensorStore then prints a traceback for each
  of the others.
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
  """The checkpoints of a run, in `directory`, one folder per step.

  Old checkpoints are deleted once a new one is complete, except held ones, see
  `held.hold`.

  Args:
    directory: the folder of the checkpoints; created if needed.
    keep_last: how many of the newest checkpoints to keep.
    keep_every: checkpoints at multiples of this many steps are never deleted;
      0 = none.
    frozen: name -> parameters of the parts that are not trained. Only their
      checksums are saved, and a checkpoint can only be restored with the same
      parameters.
    origins: name -> where a frozen part comes from, for messages.
  """

  def __init__(
    self,
    directory,
    keep_last: int = 3,
    keep_every: int = 0,
    frozen: dict | None = None,
    origins: dict | None = None,
  ):
    self.directory = files.absolute(directory)
    self._frozen = {
      name: {'from': (origins or {})[name], SUMS: checksum.of(part)}
      for name, part in (frozen or {}).items()
    }
    self.begun = 0  # the newest step whose save has begun, if it failed or not
    self._saving = None  # (step, Orbax's future)
    keep = ocp.training.preservation_policies
    save = ocp.training.save_decision_policies
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
      # Errors here have been reported by wait(), or by the exception raised.
      with contextlib.suppress(Exception):
        self._checkpointer.close()

  def save(self, step: int, state: TrainState) -> None:
    """Starts a save; returns once the state may be donated.

    Raises:
      UserError: this checkpoint, or the previous one, cannot be written.
    """
    self.wait()
    tree = state.entries
    sums = checksum.of(tree)  # of what the devices hold, before any copy
    self.begun = step
    with _writing(step):
      saving = self._checkpointer.save_async(
        step, tree, custom_metadata={SUMS: sums, FROZEN: self._frozen}
      )
    self._saving = step, saving

  def wait(self) -> None:
    """Waits until the last save is complete on disk.

    Raises:
      UserError: the checkpoint cannot be written; raised once.
    """
    if self._saving is not None:
      (step, saving), self._saving = self._saving, None
      with _writing(step):
        saving.result()
      saved.note(self.directory, step)

  def restore(self, step: int, abstract: TrainState) -> TrainState:
    """Restores the state at `step`, with the shardings of `abstract`.

    Raises:
      UserError: the checkpoint is damaged, holds another model, or was trained
        with other frozen parts.
    """
    stored = Stored(self._checkpointer, self.directory, step, flag='')
    stored.trained_with(self._frozen)
    wanted = abstract.entries
    if abstract.ema_params:
      return TrainState.of(stored.load(wanted))
    del wanted['ema_params']  # older runs have one all the same
    return TrainState.of({**stored.load(wanted), 'ema_params': {}})

  def restore_newest(self, abstract: TrainState) -> TrainState | None:
    """Restores the newest whole checkpoint; None if there is no checkpoint.

    Damaged newer ones are renamed to STEP.damaged, with a word, so that the
    steps after the whole one can be saved again. Call it in all processes.

    Raises:
      UserError: all checkpoints are damaged, or as for `restore`.
    """
    step, state, damaged = _newest_whole(
      self.directory,
      steps(self.directory),
      lambda at: self.restore(at, abstract),
    )
    if damaged:
      distributed.on_first(lambda: self._set_aside(damaged, step))
      self._checkpointer.reload()
    return state

  def _set_aside(self, damaged: list[tuple[int, str, str]], whole: int) -> None:
    for step, what, told in damaged:
      path = self.directory / str(step)
      if files.in_bucket(path):  # which cannot rename
        raise UserError(told)
      count = len(list(self.directory.glob(f'{step}.damaged*')))
      place = path.rename(f'{path}.damaged{count or ""}')
      terminal.say(
        f'{what}: it is now {place.name}, and the run goes on from checkpoint '
        f'{whole}'
      )


def newest(directory) -> str:
  """Says from which checkpoint a run can resume, for messages."""
  there = steps(directory)
  if not there:
    return 'there is no checkpoint yet'
  return f'checkpoint {there[-1]} is complete; the same command resumes from it'


def find_step(directory, step: int | None, flag: str = '--step') -> int:
  """Returns `step` if it has a checkpoint; by default the newest step.

  Args:
    directory: the folder of the checkpoints.
    step: the step; None = the newest.
    flag: the flag or argument that gave the step, for the message.

  Raises:
    UserError: there is no such checkpoint; the message lists the existing ones.
  """
  there = steps(directory)
  if not there:
    saved.check(directory)
    raise UserError(
      f'{directory} holds no checkpoint: train first, at least to the first '
      'multiple of checkpoint_every'
    )
  if step is None:
    return there[-1]
  if step not in there:
    raise UserError(
      f'{flag}={step}: there is no such checkpoint in {directory}; there are '
      f'{", ".join(map(str, there))}'
    )
  return step


def read_newest(
  directory, read: Callable[[int], Any], at_most: int | None = None
) -> Any:
  """Reads the newest checkpoint; if it is damaged, an older one, with a word.

  Call it in all processes.

  Args:
    directory: the folder of the checkpoints.
    read: step -> what is read of it; raises what `load_params` raises.
    at_most: the step to begin with; by default the newest.

  Raises:
    UserError: there is no checkpoint, or all are damaged.
  """

  def find():
    newest_there = find_step(directory, None)
    first = newest_there if at_most is None else at_most
    return [step for step in steps(directory) if step <= first]

  there = distributed.on_first(find)
  step, found, damaged = _newest_whole(directory, there, read)
  for _, what, _ in damaged:
    terminal.say(f'{what}: checkpoint {step} is used in its place')
  return found


def _newest_whole(directory, there, read) -> tuple[int, Any, list]:
  """(step, what is read of it, [(step, what is wrong, message)] of newer ones).

  The step is None if there is no checkpoint.
  """
  damaged = []
  for step in reversed(there):
    found = wrong = None
    try:
      found = read(step)
    except Damaged as e:
      wrong = [e.what, str(e)]
    if told := next(filter(None, distributed.gather(wrong)), None):
      damaged.append((step, *told))
      continue
    return step, found, damaged
  if damaged:
    more = f'; so are {len(damaged) - 1} older ones' * (len(damaged) > 1)
    raise UserError(
      f'{damaged[0][1]}{more}: copy a checkpoint from a backup to {directory}, '
      'or train in a new workdir'
    )
  return None, None, []


def save_params(directory, step: int, ema_params, params=None) -> None:
  """Writes a checkpoint of parameters only; training cannot resume from it.

  Args:
    directory: the folder of the checkpoints; created if needed.
    step: the training step of the parameters.
    ema_params: the averaged parameters, a nested dict of arrays.
    params: the raw parameters, or None if they are not available.

  Raises:
    UserError: the checkpoint cannot be written.
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


def load_params(directory, step: int, abstract, *, ema: bool | str = True):
  """Loads the parameters only, without the optimiser's state.

  Args:
    directory: the folder of the checkpoints.
    step: the step of the checkpoint.
    abstract: the parameters' shapes, dtypes and shardings.
    ema: whether to load the averaged or the raw parameters; or the name of a
      further average.

  Raises:
    UserError: the checkpoint is damaged, holds another model, or has
      parameters that are not finite.
  """
  with _stored(directory, step) as stored:
    part = stored.part(ema)
    params = stored.load({part: abstract})[part]
    _check_finite(params, stored)
    return params


def _check_finite(params, stored: Stored) -> None:
  if name := models.not_finite(params):
    raise UserError(
      f'{stored} has parameters that are not finite, the first is {name}: use '
      'another checkpoint'
    )


def load_common(
  directory, step: int, abstract, *, ema: bool = True
) -> tuple[dict, list[dict]]:
  """Loads the parameters that a checkpoint has in common with another model.

  Parameters with the same name and shape are loaded; the others are not read.

  Args:
    directory: the folder of the checkpoints.
    step: the step of the checkpoint.
    abstract: the other model's parameters: shapes, dtypes and shardings.
    ema: whether to load the averaged or the raw parameters.

  Returns:
    (taken, left). `taken` maps name -> array, with the shardings of `abstract`.
    `left` has a dict {'name', 'there', 'here'} for every other parameter of the
    two: its shape in the checkpoint and in the model, None if missing.

  Raises:
    UserError: the checkpoint is damaged, there is no common parameter, or one
      is not finite.
  """
  with _stored(directory, step, 'init_step') as stored:
    part = stored.part(ema)
    stored.has([part])
    prefix = ''
    if stored.is_before_parts({part: abstract}):
      prefix, abstract = f'{models.NET}/', abstract[models.NET]
    tree = stored.tree.get(part, {})
    left = models.differences(tree, abstract, lambda leaf: tuple(leaf.shape))
    wanted = models.named(abstract)
    for row in left:
      wanted.pop(row['name'], None)
    if not wanted:
      raise UserError(
        f'{stored} has no parameter of the same name and shape as the '
        "config's model: start from a run of a similar model"
      )
    chosen = jax.tree.structure(tree).unflatten(
      wanted.get(name, ...) for name in models.names(tree)
    )
    loaded = models.named(stored.read({part: chosen})[part])
    _check_finite({name: loaded[name] for name in wanted}, stored)
  for row in left:
    row['name'] = prefix + row['name']
  return {prefix + name: loaded[name] for name in wanted}, left


@contextlib.contextmanager
def _stored(directory, step, flag='step') -> Iterator[Stored]:
  with ocp.training.Checkpointer(files.absolute(directory)) as checkpointer:
    yield Stored(checkpointer, directory, step, flag)


@contextlib.contextmanager
def _writing(step) -> Iterator[None]:
  """Reports in one line why the system refused a save."""
  try:
    yield
  except (OSError, ValueError) as e:
    # TensorStore's errors are ValueErrors that contain the errno.
    code = re.search(r"os_error_code='(\d+)'", str(e))
    if not (code or isinstance(e, OSError) or 'gs://' in str(e)):
      raise
    reason = os.strerror(int(code[1])) if code else e.strerror or str(e)
    hush()
    raise UserError(f'checkpoint {step} cannot be written ({reason})') from e
