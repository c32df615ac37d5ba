"""The training loop."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.data import images
from diffusion_jax.system import distributed, errors
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, metrics
from diffusion_jax.training.state import TrainState


class Every(NamedTuple):
  """Intervals in steps; 0 = never."""

  log: int = 100
  eval: int = 0
  sample: int = 0
  checkpoint: int = 0


def due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


# Dispatches that may be made before the oldest of them has finished. More gain
# no speed, and what is shown would be ahead of what is done.
AHEAD = 2
# Of several processes one that stops has done AHEAD + 1 steps fewer than the
# others, at most, and all stop one step later.
EARLY = AHEAD + 2

# For images that cannot be read.
REMEDY = (
  '(the same command then needs --accept_data; preflight --all_images finds '
  'all such images; data.skip_broken=True leaves them out)'
)

# Metrics that must be finite in every step, if present.
WATCHED = ('loss', 'grad_norm', 'param_norm', 'heldout_loss')


class Diverged(Exception):
  """A metric is not finite; `good` is the newest step known to be good."""

  def __init__(self, name: str, value, step: int):
    super().__init__(f'{name} is {value} at step {step}')
    # Step k starts from the parameters of step k - 1, so a bad loss or gradient
    # means that those are bad.
    blames_before = name in ('loss', 'grad_norm')
    self.good = step - 2 if blames_before else step - 1


class Together(UserError):
  """An error that all processes raise at the same step."""


class Rows:
  """Passes metrics to the writer, one dispatch late.

  The row of step k has the loss of the k-th update, counted from 1, and the
  held-out values of the parameters after it.

  The values stay on the device until the next step has been dispatched, so that
  the host does not block on the current step. The loss of every step is
  checked, whether it is logged or not.
  """

  def __init__(self, writer: metrics.Writer, examples_per_step: int):
    self._writer = writer
    self._examples = examples_per_step
    self.finished = 0  # the newest step known to have finished
    self._waiting = []  # (steps, whether to log, values on the device)
    self._then = None  # when the last logged step was found finished
    self._counted = 0

  def add(self, steps: range, values: dict, log: bool) -> None:
    """Adds the steps of a dispatch.

    Args:
      steps: the steps.
      values: metrics on the device: of one step scalars, of several [steps];
        a scalar among those is of the last step.
      log: whether the last step is to be written.
    """
    self._waiting.append((steps, log, values))

  def wait(self) -> None:
    """Waits until at most AHEAD dispatches are unfinished; at first for all.

    The first step shows whether the batch fits into memory.
    """
    ahead = AHEAD if self.finished else 0
    done = self._waiting[: len(self._waiting) - ahead]
    if done:
      steps, _, values = done[-1]
      self.finished = steps[-1]
      jax.block_until_ready(values)

  def flush(self, keep: int) -> dict:
    """Writes all but the last `keep` dispatches; returns the last row written.

    Without a row to write, values are fetched only every 100 dispatches.

    Raises:
      Diverged: a watched metric is not finite.
    """
    ready = self._waiting[: len(self._waiting) - keep]
    row = {}
    if keep and len(ready) < 100 and not any(log for _, log, _ in ready):
      return row
    self._waiting = self._waiting[len(ready) :]
    fetched = jax.device_get([values for *_, values in ready])
    for (steps, log, _), stacked in zip(ready, fetched, strict=True):
      for step in steps:
        self.finished = step
        values = metrics.divided(_of_step(stacked, step, steps))
        for name in WATCHED:
          if not np.isfinite(values.get(name, 0)):
            raise Diverged(name, values[name], step)
        self._counted += self._examples
      if log:
        row = {**values, **self._rate()}
        self._writer.write(steps[-1], row)
    return row

  def _rate(self) -> dict:
    now, then = time.monotonic(), self._then
    rate = (
      {} if then is None else {'images_per_sec': self._counted / (now - then)}
    )
    self._then, self._counted = now, 0
    return rate


def _of_step(stacked: dict, step: int, steps: range) -> dict:
  """One step's metrics, from those of a dispatch on the host."""
  index = step - steps[0]
  return {
    name: jax.tree.map(lambda x: x[index] if np.ndim(x) else x, value)
    for name, value in stacked.items()
    if step == steps[-1] or np.ndim(jax.tree.leaves(value)[0])
  }


def train(
  state: TrainState,
  *,
  step_fn: Callable[[TrainState, Any], tuple[TrainState, dict]],
  batches: Iterator,
  num_steps: int,
  batch_size: int,
  every: Every,
  checkpoints: checkpoint.Checkpoints,
  writer: metrics.Writer,
  per_dispatch: int = 1,
  eval_fn: Callable[[TrainState], dict] | None = None,
  sample_fn: Callable[[TrainState, int], None] | None = None,
  on_step: Callable[[int, dict], None] = lambda finished, row: None,
  stop: Callable[[int], bool] = lambda step: False,
  met: Callable[[], Exception | None] = lambda: None,
) -> TrainState:
  """Trains from the state's step to num_steps, or until told to stop.

  Args:
    state: the initial state; donated to the first step.
    step_fn: the jitted training step, or several.
    batches: what step_fn takes, from the state's step on.
    num_steps: the step to train to.
    batch_size: images per step, over all devices.
    every: the intervals of logging, evaluation, sampling and checkpoints.
    checkpoints: where the state is saved, also at the end.
    writer: the metrics writer.
    per_dispatch: steps of a call of step_fn, which ends at a multiple of it.
    eval_fn: state -> values for the row; its errors are `Together`.
    sample_fn: (state, step) -> None, draws a grid of samples.
    on_step: called after each dispatch with (newest finished step, newest row).
    stop: step -> whether to stop; called after each dispatch.
    met: returns the error for which this process had all stop, or None.

  Raises:
    UserError: training cannot go on; it names the checkpoint to resume from.
  """
  start = done = int(state.step)
  rows = Rows(writer, batch_size)
  try:
    while done < num_steps:
      first, step = done + 1, done + per_dispatch - done % per_dispatch
      state, values = step_fn(state, next(batches))
      done = step
      evaluate = eval_fn is not None and due(step, every.eval)
      log = due(step, every.log) or evaluate
      rows.add(range(first, step + 1), values, log)
      if evaluate:  # after adding: the step is made, even if this fails
        values.update(eval_fn(state))
      last = stop(step) or step == num_steps
      save = last or due(step, every.checkpoint)
      draw = sample_fn is not None and due(step, every.sample)
      # One dispatch late, except before saving or sampling: a diverged state
      # must not be saved, and a restart drops only rows after its checkpoint.
      row = rows.flush(keep=0 if save or draw else 1)
      rows.wait()
      on_step(rows.finished, row)
      if draw:  # before the checkpoint, or a kill in between loses the grid
        sample_fn(state, step)
      if save:
        writer.flush()
        checkpoints.save(step, state)
      if last:
        break
    checkpoints.wait()
    _tell_all(met(), checkpoints.directory)
  except Diverged as e:
    writer.flush()
    checkpoints.wait()
    raise UserError(_diverged(e, checkpoints.directory)) from e
  except Exception as e:
    if not (reason := _reason(e, checkpoints.directory)):
      raise
    with contextlib.suppress(UserError, Diverged):
      _keep(e, start, done, state, rows, writer, checkpoints)
    reason = f'{reason}; {checkpoint.newest(checkpoints.directory)}'
    raise UserError(f'training stopped at step {first}: {reason}') from e
  return state


def read_together(batches: Iterator) -> Any:
  """The next batch, or None after the last.

  Raises:
    UserError: `Together`, if a process cannot read its rows.
  """

  def read():
    try:
      return next(batches, None)
    except images.Broken as e:
      raise UserError(f'{e} {REMEDY}') from e

  try:
    return distributed.everywhere(read)
  except UserError as e:
    raise Together(str(e)) from e


def _tell_all(error: Exception | None, directory) -> None:
  """Raises a UserError in all processes if there is an error in any of them."""
  for reason in distributed.gather(error and _reason(error, directory)):
    if reason:
      raise UserError(reason) from error


def _keep(error, start, step, state, rows, writer, checkpoints) -> None:
  """Saves the steps that were done before an error, such as a broken image.

  A step that fails uses up the state. A step whose own save has failed is not
  saved again: the rest of it may still be being written to the same place.

  Several processes can only save together. They have stopped together before,
  see `Signals.warn`, or raise the same error.
  """
  with contextlib.suppress(UserError):  # an earlier save that failed
    checkpoints.wait()  # so that the message names a complete checkpoint
  if step in (start, checkpoints.begun):
    return
  if isinstance(error, RuntimeError) or int(state.step) != step:
    return
  if jax.process_count() > 1 and not isinstance(error, Together):
    return
  rows.flush(keep=0)
  writer.flush()
  checkpoints.save(step, state)
  checkpoints.wait()


def _diverged(error: Diverged, directory) -> str:
  """Says which checkpoint to resume from, and what to change."""
  kept = checkpoint.steps(directory)
  good = [step for step in kept if step <= error.good]
  newest = f'checkpoint {good[-1]} is good' if good else 'no checkpoint is good'
  suspect = ''.join(
    f', move {directory}/{step} away' for step in kept if step > error.good
  )
  return (
    f'training stopped: {error}; {newest}{suspect}; train with a lower '
    'optim.lr or optim.clip_norm in a new workdir, or check the data'
  )


def _reason(error: Exception, checkpoints) -> str:
  """Why training cannot go on; '' for a bug."""
  if told := errors.out_of_memory(error):
    return f'{told}: {errors.FIT}'
  if isinstance(error, OSError) and error.strerror:
    # Unlike open(), a failed write names no file; all are in the workdir.
    return f'{error.strerror}: {error.filename or checkpoints.parent}'
  if isinstance(error, images.Broken):
    return f'{error} {REMEDY}'
  return str(error) if isinstance(error, OSError | UserError) else ''
