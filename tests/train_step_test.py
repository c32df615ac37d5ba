"""benchmarks/train_step.py: its rows, its clock, and what both sides do.

No test asserts a time.
"""

import json

import jax
import numpy as np
import ours_step
import pytest
import rounds
import step_rows
import tiny

from diffusion_jax import models
from diffusion_jax.configs import digits
from diffusion_jax.models import layers
from diffusion_jax.runs import to_plain
from diffusion_jax.system.errors import UserError


def config(**changes):
  found = digits.get_config()
  found.update_from_flattened_dict(
    {
      'batch_size': 4,
      'model.channels': 8,
      'model.num_groups': 4,
      'model.multipliers': (1,),
      'model.attention_resolutions': (8,),
      'model.dropout': 0.1,
      'optim.warmup_steps': 0,
      **changes,
    }
  )
  return found


class Left:
  """A clock by which so many more rounds fit."""

  def __init__(self, times):
    self.times, self.left = times, times

  def fits(self, seconds):
    self.times -= 1
    return self.times >= 0


def test_rounds_alternate_and_every_second_one_is_reversed():
  order = []
  calls = {name: lambda name=name: order.append(name) for name in 'abc'}
  found = rounds.alternating(calls, 3)
  assert ''.join(order) == 'abccbaabc'
  assert {name: len(seconds) for name, seconds in found.items()} == {
    'a': 3, 'b': 3, 'c': 3,
  }  # fmt: skip


@pytest.mark.parametrize(('left', 'done'), [(0, 1), (1, 2), (9, 4)])
def test_the_clock_ends_the_rounds_after_at_least_one(left, done):
  found = rounds.alternating({'a': lambda: None}, 4, Left(left))
  assert len(found['a']) == done


def test_without_minutes_everything_fits():
  assert rounds.Clock(None).fits(1e9)
  assert not rounds.Clock(1).fits(61)


def test_quartiles():
  values = [5.0, 1.0, 2.0, 3.0, 4.0]
  assert rounds.quartiles(values) == {'median': 3, 'q1': 2, 'q3': 4}
  assert (
    rounds.spread(rounds.quartiles(values), 1e3) == '3,000 (2,000 to 4,000)'
  )


@pytest.mark.parametrize('given', [[], ['0'], ['1', 'x'], ['-1'], ['1.5']])
def test_sizes_are_whole_numbers(given):
  with pytest.raises(UserError, match=r'--batch=.*: whole numbers from 1 on'):
    rounds.numbers('batch', given)


def test_rows_are_kept_as_they_end(tmp_path, capsys):
  path = tmp_path / 'new' / 'rows.json'
  table = rounds.Table(('a', 'b'), (3, 5), path, {'cpu': 'x'})
  for n in (1, 2):
    table.add({'n': n}, [(f'{n}', '10')])
    kept = json.loads(path.read_text())
    assert kept == {'cpu': 'x', 'rows': [{'n': i + 1} for i in range(n)]}
  assert capsys.readouterr().out == 'a        b\n1       10\n2       10\n'


def test_places_are_all_sizes_dtypes_and_programs():
  found = step_rows.places(
    config(), ['2', '4'], ['float32', 'bfloat16'], ['forward', 'step']
  )
  assert [(one.batch_size, one.model.dtype, what) for what, one in found] == [
    (size, dtype, what)
    for size in (2, 4)
    for dtype in ('float32', 'bfloat16')
    for what in ('forward', 'step')
  ]


def test_each_measure_can_be_left_out():
  found = step_rows.places(config(), plain=['none', 'norm', 'all'])
  assert [one.model.plain for _, one in found] == [
    (), ('norm',), layers.MEASURES,
  ]  # fmt: skip
  labels = [
    step_rows._plain({'plain': list(one.model.plain)}) for _, one in found
  ]
  assert labels == ['', 'norm plain', 'all plain']


def test_flops_are_those_of_the_plain_network():
  """Whatever is executed: measures that save products count as speed."""
  counts = {
    ours_step.flops_per_image(one, 'forward')
    for _, one in step_rows.places(config(), plain=['none', 'all'])
  }
  assert len(counts) == 1


@pytest.mark.parametrize(
  ('given', 'told'),
  [
    ({'plain': ['nrm']}, '--plain=nrm: one or more of none, all, norm'),
    ({'batch': ['2', '0']}, '--batch=2,0: whole numbers from 1 on'),
    ({'dtype': ['float16']}, '--dtype=float16: one or more of float32, bfloat'),
    ({'what': ['backward']}, '--what=backward: one or more of step, forward'),
    ({'config': config(**{'model.num_groups': 3})}, 'num_groups=3 does not'),
    ({'config': config(microbatches=3)}, 'batch_size=4 is not a multiple'),
  ],
)
def test_mistakes_are_one_line(given, told):
  with pytest.raises(UserError) as e:
    step_rows.places(**{'config': config(), **given})
  assert told in str(e.value)
  assert '\n' not in str(e.value)


def test_a_row_begins_if_one_of_its_size_ended_in_time():
  rows = [{'row_seconds': 50.0, 'batch': 8}, {'row_seconds': 10, 'batch': 16}]
  clock = rounds.Clock(1)
  assert step_rows.fits(clock, rows, 4)
  assert not step_rows.fits(clock, rows, 16)
  assert step_rows.fits(rounds.Clock(None), rows, 10**6)
  assert step_rows.fits(clock, [], 10**6)


@pytest.mark.slow
def test_flops_count_an_image_once():
  """Whatever the batch, its pieces and the rate of dropout are."""
  plain = config(batch_size=1, **{'model.dropout': 0.0})
  pieces = config(batch_size=8, microbatches=2)
  for what in ours_step.WHAT:
    expected = ours_step.flops_per_image(plain, what)
    assert ours_step.flops_per_image(pieces, what) == expected
  # Forward once, and nearly twice as much backward.
  ratio = ours_step.flops_per_image(plain, 'step') / ours_step.flops_per_image(
    plain, 'forward'
  )
  assert 2.8 < ratio < 3


@pytest.mark.slow
def test_a_row_of_ours():
  one, rates = config(), {'float32': 1e9}
  now = [ours_step.state(one, ours_step.mesh())]
  row = step_rows.measured(
    'step', one, now, rates, rounds.Clock(None), count=2, secs=0
  )
  side = row['sides']['ours']
  assert (row['batch'], row['dtype'], row['rounds']) == (4, 'float32', 2)
  assert int(now[0].step) == 2 + 2  # the first one, one to time it, two rounds
  median = side['seconds']['median']
  assert side['images_per_sec'] == pytest.approx(4 / median)
  assert side['utilisation'] == pytest.approx(
    row['flops_per_image'] * 4 / median / 1e9
  )
  # The parameters, their average and Adam's moments, four bytes each.
  assert side['bytes'] > 16 * models.count(now[0].params)
  ((*cells,),) = step_rows.lines(row)
  assert len(cells) == len(step_rows.HEADS) == len(step_rows.WIDTHS)
  assert step_rows.last([row]).startswith('best: ')
  row['ratio'] = {'median': 0.5, 'q1': 0.4, 'q3': 0.6}
  assert step_rows.last([row]) == (
    'time of ours / diffusers: 0.5000 (0.4000 to 0.6000) for step, batch 4, '
    'float32'
  )


def test_without_rows_the_last_line_says_so():
  assert step_rows.last([]) == 'nothing was measured'


def test_the_matrix_rate_is_that_of_the_dtype():
  assert ours_step.matrix_rate('bfloat16', 64, 2) > 0


@pytest.mark.parity
def test_theirs_does_the_same_step():
  """From the same parameters, images, times and noise, over two updates."""
  import torch
  import unet2d_step

  from diffusion_jax.objectives import denoising
  from diffusion_jax.objectives.objective import branch
  from diffusion_jax.process import noise
  from diffusion_jax.runs import programs
  from diffusion_jax.training import sharding, step
  from diffusion_jax.weights import diffusers as folders

  one = config(**{
    'model.dropout': 0.0, 'optim.warmup_steps': 4, 'optim.clip_norm': 0.01,
  })  # fmt: skip
  over = ours_step.mesh()
  program = programs.create(one, over)
  now = tiny.random_state(program.abstract)
  params = jax.device_get(now.params[models.NET])
  theirs = unet2d_step.create(to_plain(one), params)
  theirs.network.train()
  images = ours_step.images(one)
  batch = sharding.put_batch({'image': images}, over)
  root = jax.random.fold_in(jax.random.key(one.seed), 0)
  _, key, _ = jax.random.split(root, 3)
  for at in range(2):
    keys = step.example_keys(key, at, len(images))
    t = denoising.uniform_times(branch(keys, 't'), 1000)
    eps = noise.normal(branch(keys, 'eps'), images.shape[1:])
    now, values = program.step_fn(now, program.frozen, batch)
    loss = unet2d_step.loss(
      theirs,
      torch.from_numpy(images),
      torch.tensor(np.asarray(t), dtype=torch.long),
      torch.tensor(np.asarray(eps)).permute(0, 3, 1, 2),
    )
    assert values['loss'] == pytest.approx(loss.item(), rel=1e-4)
    rate = theirs.optimizer.param_groups[0]['lr']
    assert values['learning_rate'] == pytest.approx(rate)
    unet2d_step.update(theirs, loss)
  names = [name for name, _ in theirs.network.named_parameters()]
  for tree, found in (
    (now.params, list(theirs.network.parameters())),
    (now.ema_params, theirs.averages),
  ):
    expected = folders.to_tensors(jax.device_get(tree[models.NET]))
    before = folders.to_tensors(params)
    for name, value in zip(names, found, strict=True):
      moved = expected[name] - before[name]
      theirs_moved = value.detach().numpy() - before[name]
      # The gradient of a key's bias is zero but for rounding.
      most = 0.05 * np.abs(moved).max() + 1e-3 * one.optim.lr
      assert np.abs(moved - theirs_moved).max() <= most, name
