"""The loop and the metrics file, with a step that costs nothing."""

import errno
import itertools
import json
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest

from diffusion_jax.data import images
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, loop, metrics


class State(NamedTuple):
  step: int
  params: dict


class Kept:
  """Stands in for Checkpoints; notes what was saved and what was written."""

  def __init__(self, workdir):
    self.directory = workdir / 'checkpoints'
    self.file = workdir / 'metrics.jsonl'
    self.saved, self.begun = {}, 0

  def save(self, step, state):
    self.begun = step
    self.saved[step] = (state.step, len(metrics.read(self.file)))
    (self.directory / str(step)).mkdir(parents=True)

  def wait(self):
    pass


def steps(loss_of):
  def step_fn(state, batch):
    loss = np.float32(loss_of(state.step))
    values = {'loss': loss, 'grad_norm': np.float32(1)}
    return State(state.step + 1, state.params), values

  return step_fn


def train(workdir, start=0, num_steps=20, loss_of=lambda k: 1 / (k + 1), **kw):
  kept = Kept(workdir)
  writer = metrics.Writer(workdir, start)
  rows = []
  loop.train(
    State(start, {}),
    step_fn=steps(loss_of),
    batches=kw.pop('batches', itertools.repeat(None)),
    num_steps=num_steps,
    batch_size=4,
    every=kw.pop('every', loop.Every(log=1)),
    checkpoints=kept,
    writer=writer,
    on_step=lambda finished, row: rows.append(row),
    **kw,
  )
  writer.close()
  return kept, rows


def lines(workdir):
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_each_step_is_written_once_and_counted_from_one(tmp_path):
  _, rows = train(tmp_path)
  written = lines(tmp_path)
  assert [row['step'] for row in written] == list(range(1, 21))
  np.testing.assert_allclose(
    [row['loss'] for row in written], [1 / k for k in range(1, 21)]
  )
  assert len(rows) == 20


def test_log_every_skips_rows_not_steps(tmp_path):
  seen = []
  kept, _ = train(
    tmp_path,
    every=loop.Every(log=5, eval=4, sample=7, checkpoint=6),
    eval_fn=lambda state: {'heldout_loss': np.float32(state.step)},
    sample_fn=lambda state, step: seen.append((state.step, step)),
  )
  rows = {row['step']: row for row in lines(tmp_path)}
  assert sorted(rows) == [4, 5, 8, 10, 12, 15, 16, 20]
  # Held-out values are of the parameters after the update.
  assert {k: r['heldout_loss'] for k, r in rows.items() if k % 4 == 0} == {
    4: 4, 8: 8, 12: 12, 16: 16, 20: 20,
  }  # fmt: skip
  assert seen == [(7, 7), (14, 14)]
  assert {k: v[0] for k, v in kept.saved.items()} == {6: 6, 12: 12, 18: 18,
                                                      20: 20}  # fmt: skip


def test_rows_are_on_disk_before_the_checkpoint(tmp_path):
  """Or a kill between the two would lose a row for ever."""
  kept, _ = train(tmp_path, every=loop.Every(log=1, checkpoint=5))
  assert {step: count for step, (_, count) in kept.saved.items()} == {
    5: 5, 10: 10, 15: 15, 20: 20,
  }  # fmt: skip


def test_metrics_are_fetched_one_step_late(tmp_path):
  """While step k is being dispatched, row k - 1 is not asked for yet."""
  order = []

  class Value:
    def __init__(self, step):
      self.step = step

    def __array__(self, dtype=None, copy=None):
      order.append(('fetched', self.step))
      return np.float32(1)

  def step_fn(state, batch):
    order.append(('dispatched', state.step))
    value = Value(state.step)
    return State(state.step + 1, {}), {'loss': value, 'grad_norm': 1.0}

  writer = metrics.Writer(tmp_path, 0)
  loop.train(
    State(0, {}), step_fn=step_fn, batches=itertools.repeat(None),
    num_steps=5, batch_size=1, every=loop.Every(log=1),
    checkpoints=Kept(tmp_path), writer=writer,
  )  # fmt: skip
  for step in range(4):
    fetched = order.index(('fetched', step))
    assert order.index(('dispatched', step + 1)) < fetched


@pytest.mark.parametrize('log', [1, 7, 0])
def test_only_finished_steps_are_counted(tmp_path, log):
  """At most AHEAD are dispatched before, and none before the first ends."""
  finished, counted = [], []

  class Value(float):
    def __new__(cls, step):
      value = super().__new__(cls, 1.0)
      value.step = step
      return value

    def block_until_ready(self):
      finished.append(self.step)
      return self

  def step_fn(state, batch):
    step = state.step + 1
    return State(step, {}), {'loss': Value(step), 'grad_norm': 1.0}

  def on_step(step, row):
    counted.append(step)
    # What is fetched for a row has finished, too, and so has the last step.
    assert step == max(finished) or log or step == 9

  loop.train(
    State(0, {}), step_fn=step_fn, batches=itertools.repeat(None),
    num_steps=9, batch_size=1, every=loop.Every(log=log),
    checkpoints=Kept(tmp_path), writer=metrics.Writer(tmp_path, 0),
    on_step=on_step,
  )  # fmt: skip
  assert counted[0] == 1
  for step, known in enumerate(counted, 1):
    assert step - loop.AHEAD <= known <= step


@pytest.mark.parametrize('log', [1, 7, 0])
@pytest.mark.parametrize('broken', [float('nan'), float('inf')])
def test_a_broken_loss_stops_the_run_and_keeps_what_is_good(
  tmp_path, log, broken
):
  every = loop.Every(log=log, checkpoint=5)
  with pytest.raises(UserError) as error:
    train(tmp_path, loss_of=lambda k: broken if k >= 12 else 1, every=every)
  text = str(error.value)
  assert '\n' not in text
  assert f'loss is {broken} at step 13' in text
  assert 'checkpoint 10 is good;' in text
  assert checkpoint.steps(tmp_path / 'checkpoints') == [5, 10]


def test_a_gradient_that_is_not_finite_stops_it_too(tmp_path):
  def step_fn(state, batch):
    norm = np.float32('inf' if state.step == 3 else 1)
    return State(state.step + 1, {}), {'loss': 1.0, 'grad_norm': norm}

  with pytest.raises(UserError, match='grad_norm is inf at step 4; no che'):
    loop.train(
      State(0, {}), step_fn=step_fn, batches=itertools.repeat(None),
      num_steps=9, batch_size=1, every=loop.Every(log=0),
      checkpoints=Kept(tmp_path), writer=metrics.Writer(tmp_path, 0),
    )  # fmt: skip


def test_a_checkpoint_that_the_next_step_accuses_is_not_called_good(tmp_path):
  """The loss of step 11 is that of checkpoint 10: five is the last good."""
  with pytest.raises(UserError) as error:
    train(
      tmp_path,
      loss_of=lambda k: float('nan') if k >= 10 else 1,
      every=loop.Every(log=1, checkpoint=5),
    )
  text = str(error.value)
  assert 'at step 11' in text
  assert 'checkpoint 5 is good, move' in text
  assert 'checkpoints/10 away' in text


@pytest.mark.parametrize('name', ['param_norm', 'heldout_loss'])
def test_broken_parameters_are_never_saved(tmp_path, name):
  """They belong to the state after the update, which is about to be saved."""

  def step_fn(state, batch):
    value = np.float32('nan' if state.step == 9 else 1)
    return State(state.step + 1, {}), {
      'loss': np.float32(1), 'grad_norm': np.float32(1), name: value,
    }  # fmt: skip

  with pytest.raises(UserError, match=f'{name} is nan at step 10') as error:
    loop.train(
      State(0, {}), step_fn=step_fn, batches=itertools.repeat(None),
      num_steps=20, batch_size=1, every=loop.Every(log=4, checkpoint=5),
      checkpoints=Kept(tmp_path), writer=metrics.Writer(tmp_path, 0),
    )  # fmt: skip
  assert 'checkpoint 5 is good;' in str(error.value)
  assert checkpoint.steps(tmp_path / 'checkpoints') == [5]


def test_it_stops_where_it_must_and_saves(tmp_path):
  asked = []

  def stop(step):
    asked.append(step)
    return step == 7

  every = loop.Every(log=3, checkpoint=5)
  kept, _ = train(tmp_path, start=2, every=every, stop=stop)
  assert asked == [3, 4, 5, 6, 7]
  assert {step: at for step, (at, _) in kept.saved.items()} == {5: 5, 7: 7}
  assert [row['step'] for row in lines(tmp_path)] == [3, 6]


@pytest.mark.parametrize('last', [5, 20])
def test_to_stop_where_it_saves_anyway_saves_once(tmp_path, last):
  every = loop.Every(checkpoint=last)
  kept, _ = train(tmp_path, every=every, stop=lambda step: step == last)
  assert list(kept.saved) == [last]


@pytest.mark.parametrize(
  ('error', 'must'),
  [
    (OSError(28, 'No space left on device'), 'No space left on device: {dir};'),
    (OSError(2, 'No such file', 'a.png'), 'No such file: a.png;'),
    (UserError('image a.png cannot be read'), 'image a.png cannot be read;'),
  ],
)
def test_what_cannot_be_read_or_written_names_the_whole_one(
  tmp_path, error, must
):
  def batches():
    yield from [None] * 12
    raise error

  every = loop.Every(log=1, checkpoint=5)
  with pytest.raises(UserError) as told:
    train(tmp_path, batches=batches(), every=every)
  assert str(told.value) == (
    f'training stopped at step 13: {must.format(dir=tmp_path)} checkpoint 12 '
    'is complete; the same command resumes from it'
  )


def test_what_is_done_before_a_broken_image_is_saved_once(tmp_path):
  def batches(count):
    yield from [None] * count
    raise images.Broken('image a.png cannot be read')

  for count, saved in ((12, [5, 10, 12]), (10, [5, 10]), (0, [])):
    workdir = tmp_path / str(count)
    workdir.mkdir()
    with pytest.raises(UserError) as told:
      train(workdir, batches=batches(count), every=loop.Every(checkpoint=5))
    assert checkpoint.steps(workdir / 'checkpoints') == saved
    for part in ('a.png', '--accept_data', 'preflight --all_images',
                 'data.skip_broken=True'):  # fmt: skip
      assert part in str(told.value)


def test_the_step_before_a_broken_held_out_image_is_saved(tmp_path):
  def held_out(state):
    if state.step == 6:
      loop.read_together(broken())
    return {'heldout_loss': np.float32(1)}

  def broken():
    raise images.Broken('image a.png cannot be read')
    yield

  every = loop.Every(log=1, eval=2, checkpoint=5)
  with pytest.raises(UserError) as told:
    train(tmp_path, eval_fn=held_out, every=every)
  assert str(told.value).startswith('training stopped at step 6: image a.png ')
  assert 'data.skip_broken=True' in str(told.value)
  assert checkpoint.steps(tmp_path / 'checkpoints') == [5, 6]
  assert [row['step'] for row in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_save_that_fails_is_told_after_the_last_step_too(tmp_path):
  class Failing(Kept):
    def save(self, step, state):
      self.begun = step

    def wait(self):
      raise UserError('checkpoint 3 cannot be written (No space)')

  with pytest.raises(UserError) as told:
    loop.train(
      State(0, {}), step_fn=steps(lambda k: 1.0),
      batches=itertools.repeat(None), num_steps=3, batch_size=1,
      every=loop.Every(), checkpoints=Failing(tmp_path),
      writer=metrics.Writer(tmp_path, 0),
    )  # fmt: skip
  assert str(told.value) == (
    'training stopped at step 3: checkpoint 3 cannot be written (No space); '
    'there is no checkpoint yet'
  )


@pytest.mark.parametrize('broken', [False, True])
def test_what_is_done_after_a_save_that_fails_is_saved(tmp_path, broken):
  """Checkpoint 5 fails in its thread, which is seen later; step 7 is live."""

  class FailsOnce(Kept):
    failing = False

    def save(self, step, state):
      self.wait()
      self.failing = step == 5
      super().save(step, state)
      if self.failing:
        (self.directory / '5').rmdir()

    def wait(self):
      if self.failing:
        self.failing = False
        raise UserError('checkpoint 5 cannot be written (No space)')

  def batches():
    yield from [None] * 7
    raise images.Broken('image a.png cannot be read')

  kept, writer = FailsOnce(tmp_path), metrics.Writer(tmp_path, 0)
  with pytest.raises(UserError) as told:
    loop.train(
      State(0, {}), step_fn=steps(lambda k: 1.0), batches=batches(),
      num_steps=9 if broken else 7, batch_size=1,
      every=loop.Every(log=1, checkpoint=5), checkpoints=kept, writer=writer,
    )  # fmt: skip
  writer.close()
  reason = 'image a.png' if broken else 'checkpoint 5 cannot be written'
  assert reason in str(told.value)
  assert 'checkpoint 7 is complete' in str(told.value)
  assert checkpoint.steps(kept.directory) == [7]
  assert [row['step'] for row in lines(tmp_path)] == list(range(1, 8))


def test_a_restart_cuts_later_rows_and_mends_a_torn_one(tmp_path):
  train(tmp_path, num_steps=10)
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text() + '{"step": 11, "lo')  # a kill in mid-line
  assert [row['step'] for row in metrics.read(path)] == list(range(1, 11))
  train(tmp_path, start=6, num_steps=12)
  assert [row['step'] for row in lines(tmp_path)] == list(range(1, 13))


def test_nan_of_nothing_is_left_out(tmp_path):
  writer = metrics.Writer(tmp_path, 0)
  writer.write(1, {'loss': 1.0, 'loss_q1': float('nan'), 'loss_q2': 2.0})
  writer.close()
  assert lines(tmp_path) == [{'step': 1, 'loss': 1.0, 'loss_q2': 2.0}]


def test_tensorboard_has_the_same_numbers(tmp_path):
  """Read back by the format's own framing: length, crc, event, crc."""
  import struct

  from tensorboardX.proto.event_pb2 import Event

  train(tmp_path, num_steps=3)
  (path,) = tmp_path.glob('events*')
  found = []
  with path.open('rb') as file:
    while head := file.read(12):
      event = Event.FromString(file.read(struct.unpack('<Q', head[:8])[0]))
      file.read(4)
      found += [
        (value.tag, event.step, value.simple_value)
        for value in event.summary.value
      ]
  for row in lines(tmp_path):
    assert ('loss', row['step'], np.float32(row['loss'])) in found


FULL = jax.errors.JaxRuntimeError(
  'RESOURCE_EXHAUSTED: Out of memory while trying to allocate 98765 bytes.\n'
  'BufferAssignment OOM Debugging.'
)


@pytest.mark.parametrize(
  ('error', 'kept', 'must'),
  [
    (FULL, 5, 'out of memory (allocate 98765 bytes)'),
    (MemoryError('Unable to allocate 3.4 GiB for an array'), 7,
     'out of memory of the host (Unable to allocate 3.4 GiB'),
    (OSError(errno.ENOMEM, 'Cannot allocate memory'), 7, 'out of memory'),
  ],
)  # fmt: skip
def test_no_memory_is_one_line_and_names_what_is_kept(
  tmp_path, error, kept, must
):
  def loss_of(step):
    if step == 7:
      raise error
    return 1.0

  with pytest.raises(UserError) as raised:
    train(tmp_path, loss_of=loss_of, every=loop.Every(log=1, checkpoint=5))
  told = str(raised.value)
  assert told.startswith('training stopped at step 8: ' + must)
  for word in ('microbatches', 'batch_size', '--largest_batch'):
    assert word in told
  assert f'; checkpoint {kept} is complete' in told
  assert '\n' not in told


def test_a_bug_in_a_step_stays_one(tmp_path):
  with pytest.raises(ZeroDivisionError):
    train(tmp_path, loss_of=lambda step: 1 / 0)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['train', 'sample'])
def test_what_writes_events_is_imported_when_it_is_used(name):
  """It takes a second, and several where PyTorch is installed."""
  told = f'import sys, diffusion_jax.{name}; print(*sys.modules)'
  names = subprocess.check_output([sys.executable, '-c', told], text=True)
  assert 'diffusion_jax.training.metrics' in names.split()
  assert 'tensorboardX' not in names.split()
