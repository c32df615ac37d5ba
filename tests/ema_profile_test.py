"""--ema_profile, from training to samples and cards."""

import json

import binaries
import jax
import numpy as np
import pytest
import tiny

import diffusion_jax

pytestmark = pytest.mark.slow

FEW = ('--num_samples=4', '--sampler=ddim', '--num_steps=2')


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """Checkpoints of steps 10, 20 and 30, with two profiles."""
  folder = tmp_path_factory.mktemp('profiles') / 'run'
  averages = {'ema.profiles': '(0.05,0.1)', 'ema.decays': '(0.5,)'}
  tiny.train(folder, **averages, **tiny.UNET)
  return folder


def test_the_library_loads_any_average(workdir):
  kept = diffusion_jax.load(workdir, ema_profile=0.05)
  near = diffusion_jax.load(workdir, ema_profile='0.0500001')
  other = diffusion_jax.load(workdir, ema_profile='decay:0.5')
  assert kept.average == {'ema_profile': '0.05'}
  assert near.average['ema_error'] < 1e-4
  first, second, third = (
    np.concatenate([np.ravel(x) for x in jax.tree.leaves(trained.params)])
    for trained in (kept, near, other)
  )
  np.testing.assert_allclose(first, second, atol=1e-5)
  assert np.abs(first - third).max() > 1e-4
  assert kept.using('decay:0.5').weights_sha256 == other.weights_sha256
  assert kept.at(20).average == kept.average


def test_samples_say_which_average_they_are_of(workdir):
  result = binaries.run(
    'sample', f'--workdir={workdir}', *FEW, '--ema_profile=0.08', '--json'
  )
  assert result.code == 0, result.err
  assert 'reconstructed from 8' in result.err
  output = json.loads(result.out)['output']
  assert output.endswith('_ema0.08')
  with open(f'{output}/store.json') as file:
    assert '"ema_profile": "0.08"' in file.read()


def test_a_sweep_takes_averages(workdir):
  result = binaries.run(
    'evaluate', f'--workdir={workdir}', '--num_samples=20', '--json',
    '--sweep=ddim:ema_profile=0.05,ddim:ema_profile=0.08,'
    'ddim:ema_profile=decay/0.5,ddim',
    '--sweep_evaluations=2', '--features=pixels', '--metrics=fid',
  )  # fmt: skip
  assert result.code == 0, result.err
  cells = json.loads(result.out)['cells']
  assert len({cell['value'] for cell in cells}) == 4
  card = json.loads(
    (workdir / 'evaluations' / cells[1]['card']).read_text()
  )['subject']  # fmt: skip
  assert card['ema_profile'] == '0.08'
  assert card['ema_averages'] == 8


def test_an_average_is_exported(workdir, tmp_path):
  result = binaries.run(
    'convert', f'--from={workdir}', f'--to={tmp_path / "unet"}',
    '--ema_profile=0.1',
  )  # fmt: skip
  assert result.code == 0, result.err
  assert 'averaged (0.1)' in result.out


def test_raw_weights_have_no_profile(workdir):
  result = binaries.run(
    'sample', f'--workdir={workdir}', *FEW, '--ema_profile=0.1', '--noema'
  )
  assert result.code == 2
  assert result.err.count('\n') == 1
  assert '--noema' in result.err
