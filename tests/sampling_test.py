"""What the flags of the sampling binaries ask for, and the store they fill."""

import json

import binaries
import numpy as np
import pytest
import tiny
from absl import flags
from absl.testing import flagsaver

from diffusion_jax import samplers
from diffusion_jax.cli import drawing
from diffusion_jax.runs import store
from diffusion_jax.system import numerics
from diffusion_jax.system.errors import UserError

# Times so late that most pixels are neither black nor white.
HOW = ('--sampler=ddim', '--grid=20,10', '--seed=5', '--batch_size=4')
NAME = 'step30_ddim2_20-10_seed5'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return tiny.trained(tmp_path_factory.mktemp('runs') / 'digits')


@pytest.fixture(autouse=True)
def parsed(run):
  # A binary has --num_samples of its own, which names no store.
  with flagsaver.flagsaver():
    flags.FLAGS(['test', f'--workdir={run}', *HOW])
    yield


def fill(num_samples, *dtype):
  """(how many were drawn, the store's folder)."""
  trained, plan, output = drawing.chosen(*dtype)
  drawn = drawing.fill(trained, plan, output, num_samples, *dtype)
  return drawn, output


@pytest.mark.slow
def test_a_float_store_is_the_uint8_one_unrounded(run):
  assert fill(9) == (9, run / 'samples' / NAME)
  output = run / 'samples' / f'{NAME}_float'
  assert fill(6, 'float32') == (6, output)
  stamps = {path: path.stat().st_mtime_ns for *_, path in store.parts(output)}
  assert fill(9, 'float32') == (3, output)
  assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
  floats = store.load(output, 9)
  images = store.load(run / 'samples' / NAME, 9)
  assert floats.dtype == np.float32
  assert images.dtype == np.uint8
  assert np.mean(floats != np.round(floats)) > 0.5
  np.testing.assert_array_equal(np.round(floats), images)


def test_a_uint8_store_says_what_it_always_said(run):
  told = []
  for dtype in ((), ('float32',)):
    _, output = fill(1, *dtype)
    told.append(json.loads((output / 'store.json').read_text()))
  plain, unrounded = told
  assert list(plain) == [
    'step', 'ema', 'weights_sha256', 'model', 'process', 'loss', 'image_shape',
    'sampler', 'eta', 'clip', 'seed', 'grid', 'numerics',
  ]  # fmt: skip
  assert unrounded == {**plain, 'dtype': 'float32'}


@pytest.mark.slow
def test_a_store_that_grows_under_another_jax_says_so(tmp_path, capsys):
  flags.FLAGS.output = str(tmp_path / 'mine')
  fill(1)
  assert 'rounding: jax' not in capsys.readouterr().err
  place = tmp_path / 'mine' / 'store.json'
  told = json.loads(place.read_text())
  assert told['numerics'] == numerics.describe()
  told['numerics']['jax'] = '0.1.2'
  place.write_text(json.dumps(told))
  fill(2)
  assert 'rounding: jax is' in (line := capsys.readouterr().err)
  assert '(was 0.1.2)' in line
  fill(2)  # nothing is drawn
  assert not capsys.readouterr().err


def test_one_folder_takes_one_dtype(tmp_path):
  flags.FLAGS.output = str(tmp_path / 'mine')
  assert fill(2, 'float32') == (2, tmp_path / 'mine')
  with pytest.raises(UserError, match='dtype=float32, not uint8'):
    fill(2)


def test_a_long_name_says_it_too(run):
  flags.FLAGS.grid = ','.join(map(str, range(900, 0, -9)))
  names = [drawing.chosen(*dtype)[2].name for dtype in ((), ('float32',))]
  assert names[1] == f'{names[0]}_float'


def test_the_list_of_samplers_needs_no_run():
  for binary in ('sample', 'evaluate'):
    ended = binaries.run(binary, '--sampler=list')
    assert ended.code == 0
    head, *rows = ended.out.splitlines()
    assert head.split() == [
      'sampler', 'order', 'evaluations', 'noise', 'what', 'arXiv', 'options',
    ]  # fmt: skip
    assert [row.split()[0] for row in rows] == list(samplers.SAMPLERS)
    assert 'order=3|2|1 variant=bh2|bh1' in ended.out


def test_what_a_sampler_costs_is_told_and_kept(run, capsys):
  """Three steps of Heun's are five evaluations; its store says so."""
  flags.FLAGS.sampler, flags.FLAGS.grid = 'heun', '20,10,5'
  flags.FLAGS.churn = 0.5
  _, output = fill(1)
  assert output.name == 'step30_heun3_churn0.5_20-10-5_seed5'
  assert '3 steps, 5 evaluations' in capsys.readouterr().err
  told = json.loads((output / 'store.json').read_text())
  assert told['evaluations'] == 5
  assert told['churn'] == 0.5
  assert told['grid'] == [20, 10, 5, -1]
  assert np.isfinite(store.load(output, 1)).all()


def test_a_grid_with_entries_of_its_own(run, capsys):
  flags.FLAGS.sampler, flags.FLAGS.grid = 'ddim', 'ddim_quadratic'
  flags.FLAGS.num_steps = 50
  _, plan, output = drawing.chosen()
  assert plan.num_steps == 49
  assert output.name == 'step30_ddim49_ddim_quadratic_seed5'
  flags.FLAGS.num_steps = 2
  flags.FLAGS.grid = 'ddim_uniform'
  _, plan, _ = drawing.chosen()
  assert plan.grid == [500, 0, -1]
