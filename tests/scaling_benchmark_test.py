"""benchmarks/: scaling.py, input_pipeline.py and checkpoint.py.

No test asserts a time.
"""

import checkpoint as checkpoint_benchmark
import input_pipeline
import jax
import pytest
import scaling
import tiny
from PIL import Image

from diffusion_jax import data, models, runs
from diffusion_jax.configs import digits
from diffusion_jax.planning import slices
from diffusion_jax.system.errors import UserError


def config(**changes):
  found = digits.get_config()
  found.update_from_flattened_dict(
    {
      'batch_size': 8,
      'model.channels': 8,
      'model.num_groups': 4,
      'model.dropout': 0.1,
      **changes,
    }
  )
  return found


def test_points_change_one_value_at_a_time_in_ascending_order():
  found = scaling.points(
    config(), {'batch': [4, 2], 'width': [12], 'resolution': [16]}, [2, 1]
  )
  assert [(one.axis, one.value, one.devices) for one in found] == [
    ('batch', 2, 1), ('batch', 4, 1), ('width', 12, 1), ('resolution', 16, 1),
    ('devices', 1, 1), ('devices', 2, 2),
  ]  # fmt: skip
  plain = runs.flatten(config().to_dict())
  different = [
    {k for k, v in runs.flatten(one.config.to_dict()).items() if v != plain[k]}
    for one in found
  ]
  assert different == [
    {'batch_size'}, {'batch_size'}, {'model.channels'},
    # Maps of 16 and 8 pixels have none of 4.
    {'data.image_size', 'model.attention_resolutions'},
    set(), set(),
  ]  # fmt: skip


def test_groups_divide_the_width():
  one = scaling.changed(config(), 'width', 6)
  assert one.model.num_groups == 2


def test_slices_take_the_place_of_devices():
  given = [slices.parse('v5e:2x2'), slices.parse('v5e:2x4')]
  found = scaling.points(config(), {'batch': [4]}, given)
  assert [(one.axis, one.value, one.devices.name) for one in found] == [
    ('batch', 4, 'v5e:2x2'),
    ('devices', 4, 'v5e:2x2'),
    ('devices', 8, 'v5e:2x4'),
  ]


@pytest.mark.parametrize(
  ('values', 'devices', 'told'),
  [
    ({'resolution': [7]}, [], 'resolution 7: data.image_size=7'),
    ({}, [3], 'devices 3: batch_size=8 is not a multiple'),
    ({'width': [5]}, [], 'width 5: model.channels=5'),
  ],
)
def test_mistakes_are_one_line(values, devices, told):
  with pytest.raises(UserError) as e:
    scaling.points(config(), values, devices)
  assert told in str(e.value)
  assert '\n' not in str(e.value)


def row(flops, seconds, devices=1, maps=1.0, memory=1.0, **more):
  return {
    'axis': 'batch', 'flops': flops, 'seconds': {'median': seconds},
    'activations': maps, 'temporaries': memory, 'devices': devices, **more,
  }  # fmt: skip


def test_exponents_compare_with_the_row_before():
  first = row(1.0, 1.0)
  other = row(9.0, 9.0) | {'axis': 'width'}
  assert scaling.exponents([], first) == {
    'time_exponent': None, 'memory_exponent': None,
  }  # fmt: skip
  assert scaling.exponents(
    [first, other], row(4.0, 8.0, maps=2.0, memory=2.0)
  ) == {'time_exponent': pytest.approx(1.5), 'memory_exponent': 1}


def test_real_devices_share_the_work_and_simulated_ones_the_cores():
  first, second = row(1.0, 1.0), row(1.0, 1.0, devices=2, memory=0.5)
  assert scaling.exponents([first], second) == {
    'time_exponent': None, 'memory_exponent': 1,
  }  # fmt: skip
  named = {'topology': 'v5e:2x2'}
  found = scaling.exponents([first | named], second | named)
  assert found['time_exponent'] == 0  # no faster with twice the chips


@pytest.mark.slow
def test_a_point_is_measured_and_drawn(tmp_path):
  points = scaling.points(config(), {}, [1, 2])
  rows = []
  for point in points:
    found = scaling.measured(point, count=1)
    rows.append(found | scaling.exponents(rows, found))
    assert len(list(scaling._cells(rows[-1]))) == len(scaling.HEADS)
  assert rows[0]['flops'] == rows[1]['flops']
  assert rows[1]['temporaries'] < rows[0]['temporaries']
  path = tmp_path / 'plot.png'
  scaling.plot(rows, path)
  assert Image.open(path).size == (360, 660)


def test_the_loader_is_measured_without_the_step():
  one = config()
  source, _ = data.splits(one.data)
  found = input_pipeline.measured(source, one, 2, 0.01, consumes=2.0)
  assert found['ratio'] == found['loader']['median'] / 2
  assert 'step' not in found
  result = {
    **found, 'device': 'cpu', 'cpu': 'x', 'cpu_cores': 1, 'load_before': 0,
    'versions': {'jax': '0'}, 'date': '', 'data': '',
  }  # fmt: skip
  *_, last = input_pipeline._shown(result)
  assert last.endswith('at least 3 times')
  *_, last = input_pipeline._shown(result | {'ratio': 2.9})
  assert last.endswith('less than 3 times')


@pytest.mark.slow
def test_a_checkpoint_is_saved_and_restored(tmp_path):
  found = checkpoint_benchmark.measured(config(), tmp_path, 2)
  for name in checkpoint_benchmark.ROWS:
    assert found[name]['q1'] > 0
  assert found['saved']['median'] >= found['held']['median']
  model = models.create(image_shape=tiny.SHAPE, **config().model.to_dict())
  params = models.count(jax.eval_shape(model.init, jax.random.key(0)))
  # Parameters, their average and two moments; counters are a few bytes.
  assert 0 <= found['state_bytes'] - 16 * params < 100
  assert not list(tmp_path.iterdir())
