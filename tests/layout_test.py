"""The layout binary: its numbers are those of arrays that lie so."""

import json

import binaries
import jax
import numpy as np
import pytest

from configs import digits
from diffusion_jax import models
from diffusion_jax.runs import recipe
from diffusion_jax.training import optim, sharding, state

DIGITS = '--config=configs/digits.py'
CIFAR10 = '--config=configs/cifar10.py'


def layout(*arguments) -> dict:
  """On a machine with one device."""
  result = binaries.run('layout', *arguments, '--json')
  assert result.code == 0, result.err
  return json.loads(result.out)


def on_a_device(tree) -> int:
  return sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  'sizes',
  [
    (2, 2, 2),
    *(pytest.param(s, marks=pytest.mark.slow) for s in ((1, 8, 1), (8, 1, 1))),
  ],
)
def test_it_says_what_arrays_do(sizes):
  config = digits.get_config()
  abstract = state.abstract_state(
    recipe.create(config).init,
    optim.create(**config.optim),
    sharding.make_mesh(*sizes),
  )
  real = jax.tree.map(
    lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), abstract
  )
  told = layout(
    DIGITS, '--num_devices=8', f'--config.mesh.fsdp={sizes[1]}',
    f'--config.mesh.tensor={sizes[2]}',
  )  # fmt: skip
  assert tuple(told['mesh'].values()) == sizes

  names, arrays = models.names(real.params), jax.tree.leaves(real.params)
  assert [row['name'] for row in told['parameters']] == names
  for row, array in zip(told['parameters'], arrays, strict=True):
    assert tuple(row['shape']) == array.shape
    shard = array.addressable_shards[0].data
    parts = [told['mesh'].get(axis, 1) for axis in row['split']]
    assert [n // k for n, k in zip(row['shape'], parts, strict=True)] == list(
      shard.shape
    )
    assert row['device_bytes'] == shard.nbytes
  for name, tree in (
    ('parameters', real.params),
    ('EMA', real.ema_params),
    ('optimiser', real.opt_state),
    ('state', real),
  ):
    total = sum(a.nbytes for a in jax.tree.leaves(tree))
    assert told['bytes'][name] == {'total': total, 'device': on_a_device(tree)}


def test_fsdp_divides_the_papers_network():
  """An eighth of the 35.7 million parameters, four times, within 5%."""
  told = layout(CIFAR10, '--config.mesh.fsdp=8')
  assert told['mesh'] == {'data': 1, 'fsdp': 8, 'tensor': 1}
  count = sum(int(np.prod(row['shape'])) for row in told['parameters'])
  assert count == 35_746_307
  total, device = told['bytes']['state'].values()
  assert total == 4 * 4 * count + 3 * 4  # and three counters of steps
  small = [row for row in told['parameters'] if not any(row['split'])]
  whole = 4 * sum(row['device_bytes'] for row in small)
  assert device == pytest.approx((total - whole) / 8 + whole, rel=1e-5)
  assert device == pytest.approx(total / 8, rel=0.05)


def test_the_table_reads_well():
  result = binaries.run(
    *('layout', CIFAR10, '--config.mesh.fsdp=4', '--config.mesh.tensor=2'),
    '--all',
  )
  assert result.code == 0, result.err
  lines = result.out.splitlines()
  assert max(map(len, lines)) <= 80
  assert 'data 1 x fsdp 4 x tensor 2 = 8 devices' in lines
  (row,) = (line.split() for line in lines if 'down/1/blocks/0/conv1/k' in line)
  assert ' '.join(row[1:]) == '3 3 128 256 - - fsdp tensor 147,456'


def test_without_an_average_there_is_no_row_of_it():
  result = binaries.run('layout', CIFAR10, '--config.ema.decay=0')
  assert result.code == 0, result.err
  assert 'EMA' not in result.out
  assert 'optimiser' in result.out


def test_without_all_it_prints_the_summary():
  result = binaries.run('layout', CIFAR10, '--config.mesh.fsdp=4',
                        '--num_devices=4')  # fmt: skip
  head, *lines, last = result.out.splitlines()
  assert head == 'data 1 x fsdp 4 x tensor 1 = 4 devices'
  assert [line.split()[0] for line in lines] == [
    'bytes', 'parameters', 'EMA', 'optimiser', 'state',
  ]  # fmt: skip
  assert last.endswith('split; --all lists them')


@pytest.mark.parametrize(
  ('arguments', 'must'),
  [
    ((DIGITS, '--num_devices=6'), ['batch_size=64', '6 x 1 = 6']),
    ((DIGITS, '--num_devices=8', '--config.mesh.fsdp=3'), ['fsdp=3', '8']),
    ((DIGITS, '--num_devices=0'), ['num_devices']),
    ((DIGITS, '--config.model.num_groups=5'), ['model.num_groups=5']),
    ((), ['--config']),
  ],
)
def test_mistakes_are_answered_in_one_line(arguments, must):
  message = binaries.run('layout', *arguments).message
  for word in must:
    assert word in message
