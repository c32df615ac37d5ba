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
from diffusion_jax.models import NET
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checksum, held
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.stored import (
  FROZEN,
  SUMS,
  Stored,
  hush_tasks,
  steps,
)


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
    frozen: name -> parameters of the parts that are not trained. They are not
      saved; their checksums are, and a checkpoint is only restored with the
      same ones.
    origins: name -> where a frozen part comes from, for people.
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
        step, tree, custom_metadata={SUMS: sums, FROZEN: self._frozen}
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
      UserError: the checkpoint is damaged, holds another model, or was trained
        with other frozen parts.
    """
    stored = Stored(self._checkpointer, self.directory, step)
    stored.trained_with(self._frozen)
    return TrainState(**stored.load(abstract._asdict()))


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
    prefix = ''
    if stored.is_before_parts({part: abstract}):
      prefix, abstract = f'{NET}/', abstract[NET]
    there, here = (
      {name: tuple(leaf.shape) for name, leaf in models.named(tree).items()}
      for tree in (stored.tree.get(part, {}), abstract)
    )
    left = [
      {'name': name, 'there': there.get(name), 'here': here.get(name)}
      for name in sorted(there.keys() | here.keys())
      if there.get(name) != here.get(name)
    ]
    wanted = {
      name: leaf
      for name, leaf in models.named(abstract).items()
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
    loaded = models.named(stored.read({part: chosen})[part])
  for row in left:
    row['name'] = prefix + row['name']
  return {prefix + name: loaded[name] for name in wanted}, left


@contextlib.contextmanager
def _stored(directory, step, flag='step') -> Iterator[Stored]:
  with ocp.training.Checkpointer(files.absolute(directory)) as checkpointer:
    yield Stored(checkpointer, directory, step, flag)


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
    hush_tasks()
    raise UserError(f'checkpoint {step} cannot be written ({reason})') from e
