"""Ten minutes of one GPU: its clock, its files, its parts, and a rehearsal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import binaries
import numpy as np
import pytest
import rounds
import safetensors.numpy
import ten_bench
import ten_files
import ten_parts
import ten_train
from PIL import Image

from diffusion_jax.configs import digits
from diffusion_jax.models import layers
from diffusion_jax.reproduction import stages
from diffusion_jax.system.errors import UserError

ROOT = binaries.ROOT
SHARED = ROOT.parent / 'shared' / 'data'
INCEPTION = SHARED / 'inception' / 'inception_2015_12_05_to_mixed_7.npz'


def noise(count, size=8, seed=0):
  shape = (count, size, size, 3)
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# --- the clock ----------------------------------------------------------------


@pytest.mark.parametrize('start_up', [5.0, 60.0])
@pytest.mark.parametrize('rate', [0.4, 35.0])
@pytest.mark.parametrize('count', [1, 10])
def test_the_decay_is_a_share_of_the_steps_and_ends_in_time(
  start_up, rate, count
):
  """Both parts by a clock that moves by a second."""
  begin, end, now = 100.0, 400.0, 100.0 + start_up
  while not ten_train.over(begin, 100.0 + start_up, now, end):
    now += 1.0
  constant = int((now - begin - start_up) * rate)
  left = end - now - ten_train.SAVING - start_up
  steps = ten_train.decaying(left, rate, count)
  assert steps % count == 0
  assert now + ten_train.SAVING + start_up + steps / rate <= end
  share = steps / (steps + constant)
  # A dispatch, two seconds, and what is left because the speed may fall.
  slack = (count + 2 * rate + 2) / (steps + constant) + 1 - ten_train.SLACK
  assert abs(share - ten_train.DECAY) <= slack


def test_no_time_means_no_decay():
  assert ten_train.decaying(-3.0, 35.0, 10) == 0
  assert ten_train.decaying(1.0, 5.0, 10) == 0
  # The first steps came too late for anything else.
  assert ten_train.over(0.0, 90.0, 90.0, 100.0)


def test_the_rate_is_that_of_the_newer_rows():
  rates = [1.0, 2.0, 100.0, 101.0, 99.0]
  rows = [{'step': 0}, *({'images_per_sec': x} for x in rates)]
  assert ten_train.rate_of(rows) == 100.0
  assert ten_train.rate_of([]) == 0.0


# --- the parts ----------------------------------------------------------------


def record(tmp_path):
  return ten_parts.Record(tmp_path, 'x', {'about': ['here']})


def test_a_part_that_fails_does_not_stop_the_next(tmp_path):
  kept = record(tmp_path)

  def fails(found):
    raise stages.Failed('it ended', 'error: no space left\n')

  kept.part('first', fails, 1.0)
  assert 'no space left' in (tmp_path / 'x.txt').read_text()
  kept.part('bug', lambda found: 1 / 0, 1.0, due=False)
  kept.part('second', lambda found: kept.result.update(value=3), 1.0)
  found = json.loads((tmp_path / 'x.json').read_text())
  assert found['value'] == 3
  parts = found['parts']
  assert [part['how'] for part in parts] == ['failed', 'failed', 'done']
  assert parts[0]['why'] == 'no space left'
  assert parts[1]['why'] == 'ZeroDivisionError: division by zero'
  assert kept.failed


def test_without_time_nothing_is_started(tmp_path):
  kept, began = record(tmp_path), []
  kept.part('spare', began.append, 0.0, due=False)
  assert not began
  assert kept.result['parts'][0]['how'] == 'left out'
  assert not kept.failed
  kept.part('due', began.append, -1.0)
  assert not began
  assert kept.failed


def test_a_part_is_stopped_by_the_clock(tmp_path):
  kept = record(tmp_path)

  def sleeps(found):
    assert ten_parts.run(['-c', 'import time; time.sleep(600)'], 0.3) is None
    found['how'] = ten_parts.CUT

  kept.part('sleep', sleeps, 1.0)
  assert kept.result['parts'][0]['how'] == 'cut'


def test_the_benchmarks_in_order():
  names = [name for name, _, _ in ten_bench.parts()]
  assert names[:4] == [
    'all measures', 'beside compiled PyTorch', 'profile', 'no measure',
  ]  # fmt: skip
  assert {*ten_bench.LARGEST} <= {*layers.MEASURES}
  flags = {name: more for name, more, _ in ten_bench.parts()}
  assert flags['no measure'] == [f'--config.model.plain={layers.MEASURES!r}']
  assert flags['all but norm'] == ["--config.model.plain=('norm',)"]


def fake_benchmark(seconds):
  """In place of `ten_parts.run`: writes what the benchmark would write."""
  side = {
    'seconds': {'median': 0.02, 'q1': 0.01, 'q3': 0.03},
    'images_per_sec': 12800.0, 'utilisation': 0.4, 'bytes': 2**30,
    'compile_seconds': 30.0,
  }  # fmt: skip

  def run(command, left, parse):
    assert left <= seconds
    if '--vs=diffusers' in command:
      raise stages.Failed('exit code 2', 'error: torch is not installed')
    path = next(x for x in command if str(x).startswith('--json=')).split('=')[
      1
    ]
    kept = {'rows': [{'sides': {'ours': side}}], 'matrix_rate': {'bfloat16': 1}}
    Path(path).write_text(json.dumps(kept))
    return parse('machine\nheads\nours\nten operations\nlast\n')

  return run


def test_benchmarks_are_kept_as_they_end(tmp_path, monkeypatch):
  monkeypatch.setattr(ten_parts, 'run', fake_benchmark(200))
  kept = record(tmp_path)
  clock = rounds.Clock(200 / 60)
  ten_bench.carry_out(kept, tmp_path / 'config.py', tmp_path, clock, False)
  found = json.loads((tmp_path / 'x.json').read_text())
  ended = {part['name']: part['how'] for part in found['parts']}
  assert ended.pop('beside compiled PyTorch') == 'failed'
  assert {*ended.values()} == {'done'}
  assert [row['name'] for row in found['rows']] == [*ended]
  assert all(row['matrix_rate'] == {'bfloat16': 1} for row in found['rows'])
  text = (tmp_path / 'x.txt').read_text()
  assert text.count('ten operations') == 1
  assert 'torch is not installed' in text
  assert kept.failed


def test_benchmarks_that_cannot_end_are_left_out(tmp_path, monkeypatch):
  monkeypatch.setattr(ten_parts, 'run', fake_benchmark(10))
  kept = record(tmp_path)
  clock = rounds.Clock(10 / 60)
  ten_bench.carry_out(kept, tmp_path / 'config.py', tmp_path, clock, False)
  how = [part['how'] for part in kept.result['parts']]
  assert how == ['done', *['left out'] * (len(how) - 1)]
  assert kept.failed


class FakeTraining:
  """A run of 2 steps/s that takes 20 s to start, on a clock of its own."""

  def __init__(self):
    self.now, self.step, self.rows, self.commands = 1000.0, 0, [], []

  def run(self, command, left, watch=lambda: None):
    self.commands.append(command)
    end = self.now + left
    last = next(x for x in command if str(x).startswith('--config.num_steps='))
    last = int(last.split('=')[1])
    self.now += 20.0
    while self.now < end and self.step < last:
      self.step += 2
      self.now += 1.0
      self.rows.append({'step': self.step, 'images_per_sec': 8.0, 'loss': 1.0})
      watch()
    return {'step': last} if self.step >= last else None


def test_the_speed_of_the_first_part_fixes_the_steps_of_the_second(
  tmp_path, monkeypatch
):
  fake, kept = FakeTraining(), record(tmp_path)
  monkeypatch.setattr(ten_parts, 'run', fake.run)
  monkeypatch.setattr(ten_train, '_rows', lambda asked: fake.rows)
  monkeypatch.setattr(ten_train, '_steps', lambda asked: fake.step)
  monkeypatch.setattr(ten_train.time, 'monotonic', lambda: fake.now)
  config = digits.get_config()
  config.batch_size, config.steps_per_dispatch = 4, 1
  asked = ten_train.Asked(
    tmp_path, tmp_path, tmp_path, tmp_path / 'config.py', config,
    {'train': 100, 'test': 0}, 0.55, 8, 2, 2,
  )  # fmt: skip
  ten_train.train(kept, asked, ['--config=x'], rounds.Clock(10), 300.0)
  assert fake.now <= 1300.0
  assert [part['how'] for part in kept.result['parts']] == ['done', 'done']
  at, steps = (
    kept.result['rate'][f'{what}_steps'] for what in ('constant', 'decaying')
  )
  assert fake.step == at + steps
  assert steps / fake.step == pytest.approx(ten_train.DECAY, abs=0.02)
  assert f'--config.optim.decay_from={at}' in fake.commands[1]
  assert f'--config.optim.decay_steps={at + steps}' in fake.commands[1]
  assert f'{at + steps:,} steps of 4 images' in kept.summary()


# --- the files ----------------------------------------------------------------


@pytest.mark.parametrize('count', [1, 100, 230])
def test_sheets_give_their_images_back(tmp_path, count):
  given = {'train': noise(count), 'test': noise(7, seed=1)}
  ten_files.write_sheets(tmp_path, given)
  index = ten_files.read_index(tmp_path)
  assert index == {'size': 8, 'train': count, 'test': 7}
  with np.load(ten_files.unpacked(tmp_path, tmp_path)) as found:
    np.testing.assert_array_equal(found['train_images'], given['train'])
    np.testing.assert_array_equal(found['test_images'], given['test'])


def test_sheets_may_be_png(tmp_path):
  images = noise(100)
  ten_files.write_sheets(tmp_path, {'train': images})
  sheet = tmp_path / 'train_0000.webp'
  Image.open(sheet).save(tmp_path / 'train_0000.png')
  sheet.unlink()
  found = ten_files.read_sheets(tmp_path, 'train', 100)
  np.testing.assert_array_equal(found, images)


def test_arrays_in_place_of_sheets(tmp_path):
  np.savez(tmp_path / 'images.npz', train_images=noise(5))
  assert ten_files.read_index(tmp_path) == {'size': 8, 'train': 5, 'test': 0}
  assert ten_files.unpacked(tmp_path, Path('/none')) == tmp_path / 'images.npz'


def test_mistakes_in_the_files(tmp_path):
  with pytest.raises(UserError, match=r'neither images.json nor images.npz'):
    ten_files.read_index(tmp_path)
  ten_files.write_sheets(tmp_path, {'train': noise(230)})
  (tmp_path / 'train_0001.webp').unlink()
  with pytest.raises(UserError, match='lacks 1 sheets'):
    ten_files.read_index(tmp_path)
  (tmp_path / 'images.npz').write_bytes(b'PK')
  with pytest.raises(UserError, match=r'images.npz cannot be read'):
    ten_files.read_index(tmp_path)


def test_inception_in_float16(tmp_path):
  w = np.float32([1.0, 1e-3, 0.1])
  np.savez(tmp_path / 'a.npz', **{'conv/w': w})
  ten_files.halve(tmp_path / 'a.npz', tmp_path / 'b.npz')
  ten_files.doubled(tmp_path / 'b.npz', tmp_path / 'c.npz')
  with np.load(tmp_path / 'c.npz') as found:
    assert found['conv/w'].dtype == np.float32
    np.testing.assert_allclose(found['conv/w'], w, rtol=2**-11)


def params():
  rng = np.random.default_rng(0)
  return {
    'conv.kernel': rng.standard_normal((3, 3, 64, 64)).astype('f4'),
    'conv.bias': rng.standard_normal(64).astype('f4'),
  }


def test_whole_numbers_with_scales_are_near(tmp_path):
  given = params()
  found = ten_files.packed(given, 'int8')
  assert found['conv.kernel'].dtype == np.int8
  scale = found['conv.kernel.scale']
  assert scale.shape == (64,)
  error = np.abs(found['conv.kernel'] * scale - given['conv.kernel'])
  assert (error <= 0.501 * scale).all()
  np.testing.assert_allclose(found['conv.bias'], given['conv.bias'], rtol=1e-3)


@pytest.mark.parametrize(
  ('count', 'room', 'told'),
  [
    (2, 10**6, 'in float16, in parts: 1'),
    (2, 180_000, 'in int8, in parts: 1'),
    (2, 10_000, 'do not fit'),
    (0, 10**6, 'do not fit'),
  ],
)
def test_weights_in_as_many_digits_as_fit(tmp_path, count, room, told):
  assert told in ten_files.write_weights(tmp_path, params(), count, room)
  written = [*tmp_path.iterdir()]
  assert sum(path.stat().st_size for path in written) <= room
  assert len(written) == ('do not' not in told)
  if written:
    assert 'conv.kernel' in safetensors.numpy.load_file(written[0])


def test_parts_hold_all_arrays_in_order():
  arrays = {str(i): np.zeros(n, np.int8) for i, n in enumerate((5, 4, 3, 9, 1))}
  parts = ten_files.in_parts(arrays, 9)
  assert [[*part] for part in parts] == [['0', '1'], ['2'], ['3'], ['4']]


def test_compiled_programs_travel(tmp_path):
  (tmp_path / 'cache').mkdir()
  (tmp_path / 'cache' / 'jit_x-cache').write_bytes(b'program')
  assert 'MiB' in ten_files.write_compiled(tmp_path, tmp_path / 'cache', 10**6)
  ten_files.read_compiled(tmp_path, tmp_path / 'again')
  assert (tmp_path / 'again' / 'jit_x-cache').read_bytes() == b'program'
  (tmp_path / 'compiled.tar.gz').unlink()
  assert 'do not fit' in ten_files.write_compiled(
    tmp_path, tmp_path / 'cache', 10
  )
  assert not (tmp_path / 'compiled.tar.gz').exists()


# --- the command --------------------------------------------------------------


def call(*arguments, **environment):
  return subprocess.run(
    ['bash', str(ROOT / 'launch' / 'ten_minutes.sh'), *map(str, arguments)],
    capture_output=True, text=True, check=False,
    env={**os.environ, 'PYTHON': sys.executable, **environment},
  )  # fmt: skip


def test_a_machine_that_lacks_a_package_is_told_so_in_one_line(tmp_path):
  (tmp_path / 'tensorboardX.py').write_text('import of_no_one')
  result = call('a', tmp_path, tmp_path / 'out', PYTHONPATH=str(tmp_path))
  assert result.returncode == 2
  assert result.stderr == (
    f"error: {sys.executable}: ModuleNotFoundError: No module named 'of_no_one'"
    ': install this project with pip, name another Python as PYTHON=..., or '
    'put the wheel into FILES/wheels\n'
  )
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  ('arguments', 'must'),
  [
    ([], 'is not pack, a or b; see --help'),
    (['a', 'files'], 'OUTPUT is missing'),
    (['pack', 'data.npz', '--images=3'], 'INCEPTION is missing'),
  ],
)
def test_mistakes_before_python(arguments, must):
  result = call(*arguments)
  assert result.returncode == 2
  assert must in result.stderr
  assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def folder(tmp_path):
  path = tmp_path / 'files'
  path.mkdir()
  ten_files.write_sheets(path, {'train': noise(3, size=32)})
  (path / 'inception.npz').write_bytes(b'')
  return path


@pytest.mark.slow
@pytest.mark.parametrize(
  ('arguments', 'must'),
  [
    (['--minutes=1'], 's are left, and one checkpoint needs 120'),
    (['--config.data.image_size=64'], 'has images of 32x32 pixels'),
    (['--config.model.num_groups=3'], 'num_groups'),
    ([], 'JAX sees no GPU on this machine'),
  ],
)
def test_mistakes_before_anything_starts(folder, tmp_path, arguments, must):
  result = call('b', folder, tmp_path / 'out', *arguments, JAX_PLATFORMS='cpu')
  assert result.returncode == 2
  assert must in result.stderr
  assert len(result.stderr.splitlines()) == 1
  assert [path.name for path in tmp_path.iterdir()] == ['files']


@pytest.mark.slow
@pytest.mark.skipif(
  not INCEPTION.exists(), reason=f'{SHARED} has no Inception weights'
)
def test_both_calls_rehearsed(tmp_path, monkeypatch):
  """Packed files, both calls on a CPU with few samples, and what is left."""
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'compiled'))
  data, files = tmp_path / 'data.npz', tmp_path / 'files'
  np.savez(
    data, train_images=noise(40, size=32), test_images=noise(8, 32, seed=1)
  )
  packed = call('pack', data, INCEPTION, files, '--images=32', '--statistics')
  assert packed.returncode == 0, packed.stderr
  assert {path.name for path in files.iterdir()} == {
    'train_0000.webp', 'images.json', 'inception.npz',
    'train_statistics.npz', 'test_statistics.npz',
  }  # fmt: skip
  small = ['--config.model.channels=8', '--config.model.num_groups=4',
           '--config.batch_size=4', '--rehearse']  # fmt: skip
  output = tmp_path / 'out'
  first = call('a', files, output, *small, '--minutes=2')
  found = json.loads((output / 'a.json').read_text())
  rows = {row['name'] for row in found['rows']}
  assert 'all measures' in rows, first.stderr
  assert (output / 'a.txt').read_text().strip() == first.stdout.strip()
  few = ('--num_samples=8', '--ode_steps=3', '--ancestral_steps=4')
  many = ('--minutes=9', '--train_share=0.3')  # it ends when all is done
  second = call('b', files, output, *small, *few, *many)
  found = json.loads((output / 'b.json').read_text())
  # Where other work slows the machine down, the decay is cut.
  ended = {part['name']: part['how'] for part in found['parts']}
  assert ended.pop('training, decaying rate') in ('done', 'cut'), second.stderr
  assert {*ended.values()} == {'done'}, second.stderr
  rates = [row['learning_rate'] for row in found['training']]
  assert max(rates) == pytest.approx(5e-4)
  assert rates[-1] < 4e-4
  cards = found['cards'].values()
  assert [card['protocol']['num_samples'] for card in cards] == [8, 8]
  assert found['heldout']['count'] == 8
  assert Image.open(output / 'curves.png').width > 1000
  assert Image.open(output / 'grid.png').width > 300
  assert [*output.glob('weights_float16_1_of_1.safetensors')]
  left = [x for x in output.iterdir() if not x.name.startswith('a.')]
  assert len(left) <= 8
  assert max(path.stat().st_size for path in left) <= 16 * 2**20
