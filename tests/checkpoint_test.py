"""Checkpoints: what is saved comes back, on any mesh; damage is told."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny

from diffusion_jax.errors import UserError
from diffusion_jax.training import checkpoint, optim, sharding, state

NETWORK, OPTIMIZER = tiny.model(), optim.create(1e-3, 5, 1.0)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """(folder, state) of a run with checkpoints at 1, 2, 4, 6 and 7.

  Six and seven are the last two, the others multiples of 2; the odd ones went.
  """
  folder = tmp_path_factory.mktemp('run') / 'checkpoints'
  made = state.create(jax.random.key(0), NETWORK, OPTIMIZER, tiny.one_device())
  with checkpoint.Checkpoints(folder, keep_last=2, keep_every=2) as kept:
    for step in range(1, 8):
      kept.save(step, made._replace(step=made.step + step))
      kept.wait()
  return folder, jax.device_get(made)


@pytest.fixture
def folder(saved, tmp_path):
  """A copy, to be damaged."""
  shutil.copytree(saved[0], tmp_path / 'checkpoints')
  return tmp_path / 'checkpoints'


def restore(folder, step, mesh=None, network=NETWORK, optimizer=OPTIMIZER):
  mesh = mesh or tiny.one_device()
  abstract = state.abstract_state(network, optimizer, mesh)
  with checkpoint.Checkpoints(folder) as kept:
    return kept.restore(step, abstract)


def test_the_last_and_every_nth_are_kept(saved):
  assert checkpoint.steps(saved[0]) == [2, 4, 6, 7]


@pytest.mark.parametrize('sizes', [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_every_bit_comes_back_on_any_mesh(saved, sizes):
  folder, made = saved
  count = sizes[0] * sizes[1] * sizes[2]
  mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:count])
  back = restore(folder, 4, mesh)
  assert isinstance(back, state.TrainState)
  assert back.step == 4
  jax.tree.map(
    np.testing.assert_array_equal,
    made._replace(step=0),
    jax.device_get(back)._replace(step=0),
  )
  assert back.step.sharding.mesh.shape['fsdp'] == sizes[1]


@pytest.mark.parametrize('ema', [True, False])
def test_parameters_come_without_the_optimiser(saved, ema):
  folder, made = saved
  mesh = tiny.one_device()
  shapes = state.abstract_state(NETWORK, OPTIMIZER, mesh).params
  params = checkpoint.load_params(folder, 6, shapes, ema=ema)
  wanted = made.ema_params if ema else made.params
  jax.tree.map(np.testing.assert_array_equal, wanted, jax.device_get(params))


def one_line(error, *must):
  text = str(error.value)
  assert '\n' not in text
  for word in must:
    assert word in text, text


def test_another_model_is_named_not_loaded(saved):
  wider = tiny.model(channels=16)
  with pytest.raises(UserError) as error:
    restore(saved[0], 7, network=wider)
  one_line(error, 'checkpoint 7', 'another model', 'conv_in')
  with pytest.raises(UserError) as error:
    restore(saved[0], 7, optimizer=optim.create(1e-3, 5, clip_norm=0.0))
  one_line(error, 'checkpoint 7', 'opt_state')


def test_a_truncated_checkpoint_is_named_with_what_to_do(folder):
  files = [p for p in (folder / '7').rglob('*') if p.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  with pytest.raises(UserError) as error:
    restore(folder, 7)
  one_line(error, 'checkpoint 7 is unreadable', '6', '--step')
  assert restore(folder, 6).step == 6


def test_an_empty_folder_is_no_checkpoint_in_silence(folder):
  (folder / '9').mkdir()
  with pytest.raises(UserError) as error:
    restore(folder, 9)
  one_line(error, 'checkpoint 9', 'unreadable', 'from 7')


def test_what_a_kill_leaves_is_ignored_and_cleaned(folder):
  torn = folder / '8.orbax-checkpoint-tmp'
  shutil.copytree(folder / '7', torn)
  assert checkpoint.steps(folder) == [2, 4, 6, 7]
  restore(folder, 7)
  assert not torn.exists()


def test_the_step_that_is_asked_for_must_be_there(saved, tmp_path):
  assert checkpoint.find_step(saved[0], None) == 7
  assert checkpoint.find_step(saved[0], 4) == 4
  with pytest.raises(UserError) as error:
    checkpoint.find_step(saved[0], 5)
  one_line(error, '--step=5', '2, 4, 6, 7')
  with pytest.raises(UserError) as error:
    checkpoint.find_step(tmp_path / 'none', None)
  one_line(error, 'no checkpoint')
  assert not (tmp_path / 'none').exists()


def test_reading_writes_nothing(saved):
  """Sampling from a folder that cannot be written must work."""
  before = sorted(str(p) for p in saved[0].rglob('*'))
  shapes = state.abstract_state(NETWORK, OPTIMIZER, tiny.one_device()).params
  checkpoint.load_params(saved[0], 7, shapes)
  assert sorted(str(p) for p in saved[0].rglob('*')) == before
  assert json.loads((saved[0] / '7' / '_CHECKPOINT_METADATA').read_text())
