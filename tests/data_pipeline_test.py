"""The stream of batches: it depends on the seed and the position alone."""

import os
import subprocess
import sys

import binaries
import jax
import numpy as np
import pytest
from imagesets import all_images, numbered
from jax.sharding import NamedSharding

from diffusion_jax import data
from diffusion_jax.data import pipeline
from diffusion_jax.system.errors import UserError


def labels_of(dataset, num_batches, start=0):
  return np.concatenate(
    [dataset[k]['label'] for k in range(start, start + num_batches)]
  )


def is_flipped(batch):
  """Whether the marked column of `numbered` is on the right: bool [B]."""
  return batch['image'][:, 0, -1, 0] == 255


@pytest.mark.parametrize('num_images', [1, 2, 10, 64, 100])
def test_each_epoch_visits_each_image_once_in_an_order_of_its_own(num_images):
  # Batches that straddle the epochs, and some that hold several.
  dataset = pipeline.stream(
    numbered(num_images), batch_size=16, seed=3, flip=False
  )
  epochs = labels_of(dataset, num_images)[: 16 * num_images]
  epochs = epochs.reshape(16, num_images)
  for epoch in epochs:
    assert sorted(epoch) == list(range(num_images))
  if num_images >= 10:
    assert len({tuple(epoch) for epoch in epochs}) == 16


def test_the_seed_chooses_order_and_flips():
  source = numbered(100)
  first, second = (
    pipeline.stream(source, batch_size=100, seed=seed, flip=True)[0]
    for seed in (0, 1)
  )
  assert (first['label'] != second['label']).any()
  assert (is_flipped(first) != is_flipped(second)).any()
  again = pipeline.stream(source, batch_size=100, seed=0, flip=True)[0]
  np.testing.assert_array_equal(first['image'], again['image'])


def test_the_next_seed_is_not_the_next_epoch():
  source = numbered(50)
  epochs = pipeline.stream(source, batch_size=50, seed=0, flip=False)
  other = pipeline.stream(source, batch_size=50, seed=1, flip=False)
  assert (epochs[1]['label'] != other[0]['label']).any()


@pytest.mark.parametrize('num_processes', [2, 4])
def test_processes_share_the_stream_of_one(num_processes):
  kwargs = {'batch_size': 8, 'seed': 5, 'flip': True}
  whole = pipeline.stream(numbered(30), **kwargs)
  local = 8 // num_processes
  parts = [
    pipeline.stream(
      numbered(30), rows=slice(p * local, (p + 1) * local), **kwargs
    )
    for p in range(num_processes)
  ]
  for k in range(10):
    for name in ('image', 'label'):
      np.testing.assert_array_equal(
        whole[k][name], np.concatenate([part[k][name] for part in parts])
      )


def test_rows_may_lie_anywhere():
  kwargs = {'batch_size': 8, 'seed': 5, 'flip': True}
  rows = np.array([1, 2, 6])
  whole = pipeline.stream(numbered(30), **kwargs)[4]
  part = pipeline.stream(numbered(30), rows=rows, **kwargs)[4]
  np.testing.assert_array_equal(part['image'], whole['image'][rows])


def test_the_order_does_not_depend_on_the_batch_size():
  small = pipeline.stream(numbered(30), batch_size=4, seed=0, flip=True)
  large = pipeline.stream(numbered(30), batch_size=12, seed=0, flip=True)
  np.testing.assert_array_equal(
    np.concatenate([small[k]['image'] for k in range(6)]),
    np.concatenate([large[k]['image'] for k in range(2)]),
  )


def test_a_flip_belongs_to_the_position():
  dataset = pipeline.stream(numbered(10), batch_size=1000, seed=0, flip=True)
  batches = [dataset[k] for k in range(4)]
  flips = np.concatenate([is_flipped(batch) for batch in batches])
  assert abs(flips.mean() - 0.5) < 0.04  # five standard deviations
  # Neither the image nor the position before decides.
  labels = np.concatenate([batch['label'] for batch in batches])
  for label in range(10):
    assert abs(flips[labels == label].mean() - 0.5) < 0.13
  assert abs((flips[1:] == flips[:-1]).mean() - 0.5) < 0.04
  # A flipped image is its mirror, and no image is flipped unless asked.
  plain = pipeline.stream(numbered(10), batch_size=1000, seed=0, flip=False)[0]
  mirrored = plain['image'][:, :, ::-1]
  chosen = is_flipped(batches[0])
  np.testing.assert_array_equal(
    batches[0]['image'],
    np.where(chosen[:, None, None, None], mirrored, plain['image']),
  )
  assert not is_flipped(plain).any()


def test_the_source_is_left_as_it_was():
  source = numbered(10)
  before = all_images(source)
  pipeline.stream(source, batch_size=64, seed=0, flip=True)[0]
  np.testing.assert_array_equal(all_images(source), before)


def test_threads_and_restarts_change_nothing():
  sharding = NamedSharding(jax.make_mesh((1,), ('data',)), jax.P('data'))

  def run(num_batches, **kwargs):
    batches = pipeline.batches(
      numbered(30),
      batch_size=8,
      seed=1,
      flip=True,
      sharding=sharding,
      **kwargs,
    )
    taken = [next(batches) for _ in range(num_batches)]
    batches.close()
    return [{k: np.asarray(x) for k, x in batch.items()} for batch in taken]

  whole = run(9, num_threads=0)
  for num_threads in (1, 4, None):
    for start in (0, 5):
      part = run(9 - start, num_threads=num_threads, start_step=start)
      for a, b in zip(whole[start:], part, strict=True):
        np.testing.assert_array_equal(a['image'], b['image'])
        np.testing.assert_array_equal(a['label'], b['label'])


def test_batches_are_global_arrays():
  sharding = NamedSharding(jax.make_mesh((1,), ('data',)), jax.P(('data',)))
  batch = next(
    pipeline.batches(
      data.create('digits', image_size=8, channels=1),
      batch_size=16,
      seed=0,
      flip=False,
      sharding=sharding,
    )
  )
  assert batch['image'].shape == (16, 8, 8, 1)
  assert batch['image'].dtype == np.uint8
  assert batch['label'].shape == (16,)
  assert batch['label'].dtype == np.int32
  assert batch['image'].sharding.is_equivalent_to(sharding, 4)


def test_eight_devices_hold_the_rows_of_one():
  """In a process of its own, for the number of devices is set at the start."""
  script = """
import jax
jax.config.update('jax_num_cpu_devices', 8)
import numpy as np
from jax.sharding import NamedSharding
from diffusion_jax import data
from diffusion_jax.data import pipeline
from diffusion_jax.system.errors import UserError

source = data.create('digits', image_size=8, channels=1)
kwargs = dict(batch_size=16, seed=0, flip=True)
whole = pipeline.stream(source, **kwargs)[3]
axes = ('data', 'fsdp', 'tensor')
for shape, spec in [
  ((8, 1, 1), jax.P(('data', 'fsdp'))),
  ((2, 2, 2), jax.P(('data', 'fsdp'))),
  ((1, 1, 8), jax.P(('data', 'fsdp'))),
  ((8, 1, 1), jax.P()),
]:
  sharding = NamedSharding(jax.make_mesh(shape, axes), spec)
  batches = pipeline.batches(source, sharding=sharding, start_step=3, **kwargs)
  with jax.transfer_guard('disallow'):
    batch = next(batches)
  batches.close()
  assert batch['image'].sharding == sharding
  for name, x in batch.items():
    np.testing.assert_array_equal(jax.device_get(x), whole[name])

mesh = jax.make_mesh((4, 2, 1), axes)
sharding = NamedSharding(mesh, jax.P(('data', 'fsdp')))
try:
  pipeline.local_rows(sharding, 63)
except UserError as error:
  assert '63' in str(error) and '8' in str(error), error
else:
  raise SystemExit('63 was accepted')
"""
  subprocess.run(
    [sys.executable, '-c', script],
    cwd=binaries.ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    check=True,
  )


@pytest.mark.parametrize(
  ('kwargs', 'must_name'),
  [
    ({'batch_size': 0}, 'batch_size is 0'),
    ({'seed': -1}, 'seed is -1'),
    ({'start_step': -2}, 'start_step is -2'),
  ],
)
def test_a_bad_number_is_answered_in_one_line(kwargs, must_name):
  sharding = NamedSharding(jax.make_mesh((1,), ('data',)), jax.P('data'))
  defaults = {'batch_size': 8, 'seed': 0, 'flip': False, 'sharding': sharding}
  with pytest.raises(UserError, match=must_name):
    pipeline.batches(numbered(4), **(defaults | kwargs))


# --- held-out images ---------------------------------------------------------


@pytest.mark.parametrize(
  ('num_examples', 'counted'), [(0, 10), (3, 3), (8, 8), (99, 10)]
)
def test_heldout_is_one_pass_in_order(num_examples, counted):
  pairs = list(
    pipeline.heldout(numbered(10), batch_size=4, num_examples=num_examples)
  )
  assert len(pairs) == -(-counted // 4)
  labels = np.concatenate([batch['label'] for batch, _ in pairs])
  weights = np.concatenate([weight for _, weight in pairs])
  assert all(len(batch['image']) == 4 for batch, _ in pairs)
  assert weights.dtype == np.float32
  assert weights.tolist() == [1] * counted + [0] * (len(weights) - counted)
  assert labels[:counted].tolist() == list(range(counted))


def test_processes_share_the_heldout_images():
  whole = pipeline.heldout(numbered(10), batch_size=4)
  parts = [
    pipeline.heldout(numbered(10), batch_size=4, rows=rows)
    for rows in (slice(0, 2), slice(2, 4))
  ]
  for (batch, weight), *pieces in zip(whole, *parts, strict=True):
    np.testing.assert_array_equal(
      batch['label'], np.concatenate([piece['label'] for piece, _ in pieces])
    )
    np.testing.assert_array_equal(
      weight, np.concatenate([w for _, w in pieces])
    )
