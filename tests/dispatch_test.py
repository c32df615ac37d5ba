"""Several steps in a dispatch, and the images on the devices: same numbers."""

import functools
import itertools
import json
from typing import NamedTuple

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from diffusion_jax.configs import digits
from diffusion_jax.data import pipeline, resident, sources
from diffusion_jax.objectives.objective import Mean
from diffusion_jax.runs import validation
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import loop, metrics, sharding, step


def source(count=20):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (count, *tiny.SHAPE), dtype=np.uint8)
  return sources.create(
    'random', count, tiny.SHAPE, 10, lambda i: (images[i], i % 10)
  )


def ordered(mesh, **kwargs):
  return {
    'batch_size': tiny.BATCH, 'seed': 3, 'flip': True,
    'sharding': sharding.batch_sharding(mesh), **kwargs,
  }  # fmt: skip


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


# --- batches ----------------------------------------------------------------


def test_a_stack_has_the_batches_of_its_steps_from_any_step_on():
  mesh = sharding.make_mesh(2, 2, 2)
  take = functools.partial(pipeline.batches, source(), **ordered(mesh))
  single = list(take(end_step=12))
  for start, sizes in ((0, [4, 4, 4]), (5, [3, 4])):
    stacks = list(take(start_step=start, end_step=12, stacked=4))
    assert [len(stack['label']) for stack in stacks] == sizes
    assert stacks[0]['image'].sharding.spec == jax.P(None, ('data', 'fsdp'))
    unstacked = [
      jax.tree.map(lambda x, i=i: x[i], stack)
      for stack in stacks
      for i in range(len(stack['label']))
    ]
    equal(unstacked, single[start:])


@pytest.mark.parametrize('flip', [False, True])
def test_the_devices_take_the_rows_that_the_loader_reads(flip):
  mesh = sharding.make_mesh(2, 2, 2)
  how = ordered(mesh, flip=flip, end_step=9)
  images = resident.place(resident.read(source()), mesh)
  assert images['image'].is_fully_replicated
  orders = pipeline.batches(
    source(), **how, start_step=1, stacked=3, read=False
  )
  take = jax.jit(resident.take)
  taken = [
    take(images, jax.tree.map(lambda x, i=i: x[i], order))
    for order in orders
    for i in range(len(order['index']))
  ]
  equal(taken, list(pipeline.batches(source(), **how, start_step=1)))
  assert taken[0]['image'].dtype == np.uint8


def test_too_many_images_for_the_devices_are_refused(monkeypatch):
  resident.check(source())
  monkeypatch.setattr(resident, '_memory', lambda device: 20 * (64 + 4))
  with pytest.raises(
    UserError, match=r'data.on_device=True: 20 images .* False'
  ):
    resident.check(source())


# --- steps ------------------------------------------------------------------


@pytest.mark.parametrize(
  ('make', 'sizes', 'microbatches'),
  [
    (tiny.dense, (2, 2, 2), 2),
    pytest.param(tiny.model, (1, 1, 1), 1, marks=pytest.mark.slow),
    pytest.param(tiny.model, (2, 2, 2), 2, marks=pytest.mark.slow),
  ],
)
def test_several_steps_train_the_same_as_single_ones(make, sizes, microbatches):
  devices = jax.devices()[: np.prod(sizes)]
  mesh = sharding.make_mesh(*sizes, devices=devices)
  abstract, step_fn = tiny.program(
    mesh, network=make(), microbatches=microbatches
  )
  several = jax.jit(
    functools.partial(
      step.train_steps,
      step_fn=lambda state, _, batch: step_fn(state, batch),
      mesh=mesh,
    ),
    donate_argnums=0,
    out_shardings=(
      jax.tree.map(lambda leaf: leaf.sharding, abstract), None,
    ),
  )  # fmt: skip
  images = resident.place(resident.read(source()), mesh)
  how = ordered(mesh, end_step=6)
  state, single = tiny.random_state(abstract), []
  for batch in pipeline.batches(source(), **how):
    state, values = step_fn(state, batch)
    single.append(values)
  want, end = jax.tree.map(lambda *x: np.stack(x), *single), state

  def check(batches, images=None):
    state, got = tiny.random_state(abstract), []
    for batch in batches:
      state, values = several(state, {}, batch, images)
      got.append(values)
    got = jax.tree.map(lambda *x: np.concatenate(x), *got)
    for name in ('loss', 'grad_norm', 'param_norm', 'learning_rate'):
      np.testing.assert_allclose(got[name], want[name], rtol=3e-6)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
      state.params, end.params,
    )  # fmt: skip
    assert int(state.step) == 6

  check(pipeline.batches(source(), **how, stacked=3))
  check(pipeline.batches(source(), **how, stacked=3, read=False), images)


# --- loop -------------------------------------------------------------------


class State(NamedTuple):
  step: int


class Kept:
  def __init__(self, folder):
    self.directory, self.steps, self.begun = folder, [], 0

  def save(self, step, state):
    assert state.step == step
    self.steps.append(step)

  def wait(self):
    pass


def run(folder, start=0, end=24, bad=None, **how):
  """A loop of four steps a dispatch; returns (rows, steps saved)."""
  kept, writer = Kept(folder / 'checkpoints'), metrics.Writer(folder, start)

  def step_fn(state, batch):
    count = 4 - state.step % 4
    taken = state.step + 1 + np.arange(count, dtype=np.float32)
    values = {
      'loss': np.where(taken == bad, np.nan, taken),
      'grad_norm': np.ones(count),
      'loss_early': Mean(2 * taken, np.ones(count)),
    }
    return State(state.step + count), values

  try:
    loop.train(
      State(start), step_fn=step_fn, batches=itertools.repeat(None),
      num_steps=end, batch_size=2, per_dispatch=4, checkpoints=kept,
      writer=writer, every=how.pop('every', loop.Every(log=4)), **how,
    )  # fmt: skip
  finally:
    writer.close()
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return {row['step']: row for row in map(json.loads, lines)}, kept.steps


def test_rows_have_the_values_of_their_own_step(tmp_path):
  rows, saved = run(
    tmp_path,
    every=loop.Every(log=8, eval=12, checkpoint=12),
    eval_fn=lambda state: {'heldout_loss': np.float32(state.step)},
  )
  assert {k: (row['loss'], row['loss_early']) for k, row in rows.items()} == {
    k: (k, 2 * k) for k in (8, 12, 16, 24)
  }
  assert {k: row.get('heldout_loss') for k, row in rows.items()} == {
    8: None, 12: 12, 16: None, 24: 24,
  }  # fmt: skip
  assert saved == [12, 24]


def test_a_start_between_dispatches_goes_on_to_the_next(tmp_path):
  rows, _ = run(tmp_path, start=6)
  assert sorted(rows) == [8, 12, 16, 20, 24]


def test_every_step_is_checked_and_named(tmp_path):
  with pytest.raises(UserError, match='loss is nan at step 10'):
    run(tmp_path, bad=10, every=loop.Every(log=12))


def test_signals_are_seen_between_dispatches(tmp_path):
  asked = []
  _, saved = run(tmp_path, stop=lambda at: asked.append(at) or at >= 7)
  assert asked == [4, 8]
  assert saved == [8]


# --- config -----------------------------------------------------------------


@pytest.mark.parametrize(
  ('values', 'words'),
  [
    ({'steps_per_dispatch': 8}, 'checkpoint_every=500: use 4'),
    ({'steps_per_dispatch': 7, 'eval_every': 0}, 'num_steps=3000: use 1'),
    ({'steps_per_dispatch': 0}, 'steps_per_dispatch=0: at least 1'),
    ({'steps_per_dispatch': 25, 'log_every': 0}, ''),
  ],
)
def test_a_dispatch_divides_the_intervals(values, words):
  config = ConfigDict(digits.get_config())
  config.update_from_flattened_dict(values)
  found = validation.check(config, range(1))
  assert words in found[0] if words else not found


@pytest.mark.slow
def test_runs_agree_and_resume_exactly(tmp_path):
  plain = {'log_every': 5, 'sample_every': 0, 'num_steps': 30}
  fast = {**plain, 'steps_per_dispatch': 5, 'data.on_device': True}
  tiny.train(tmp_path / 'plain', **plain)
  tiny.train(tmp_path / 'fast', **fast)
  tiny.train(tmp_path / 'parts', **fast | {'num_steps': 15})
  tiny.train(tmp_path / 'parts', **fast)
  want, got, parts = (
    tiny.losses(tmp_path / name) for name in ('plain', 'fast', 'parts')
  )
  assert want.keys() == got.keys()
  np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=3e-6)
  assert parts == got
  equal(*(tiny.final_state(tmp_path / name) for name in ('fast', 'parts')))
