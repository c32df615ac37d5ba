"""benchmarks/latent.py, with tiny networks. No test asserts a time."""

import types

import latent
import latent_cost
import latents_test
import pytest

from diffusion_jax.runs import frozen

pytestmark = pytest.mark.slow


@pytest.fixture
def configs(tmp_path, monkeypatch):
  monkeypatch.setattr(latent, 'FLAGS', types.SimpleNamespace(scale=1.0))
  folder = latents_test.autoencoder(tmp_path / 'ae')
  ldm = latents_test.config_of(tmp_path, folder)
  frozen.complete(ldm)
  wide = ldm.copy_and_resolve_references()
  wide.codec = {'name': 'pixels'}
  return {'ldm': ldm, 'wide': wide, 'deep': wide}


def test_training_in_pixels_is_as_long_as_both_others(configs, monkeypatch):
  times = {'autoencoder': 2.0, 'ldm': 1.0, 'wide': 4.0, 'deep': 5.0}
  monkeypatch.setattr(latent, '_step', lambda config: lambda: None)
  monkeypatch.setattr(
    latent.rounds,
    'alternating',
    lambda calls, _: {k: [times[k]] for k in calls},
  )
  monkeypatch.setattr(
    latent.runs, 'read_config', lambda workdir: {'num_steps': 300}
  )
  monkeypatch.setattr(latent, '_autoencoder', lambda: 'ae')
  configs['ldm'].num_steps = 400
  found = latent.plan(configs)
  assert found['seconds'] == 1000
  assert found['steps'] == {
    'autoencoder': 300, 'ldm': 400, 'wide': 250, 'wide, first': 75,
    'deep': 200, 'deep, first': 60,
  }  # fmt: skip


def test_shapes_in_pixels_are_those_of_the_config(monkeypatch):
  given = types.SimpleNamespace(data=['name=arrays', 'path=emoji.npz'])
  monkeypatch.setattr(latent, 'FLAGS', given)
  configs = {name: latent._config(name) for name in latent.SHAPES}
  assert configs['wide'].model.channels > configs['deep'].model.channels
  assert {config.data.path for config in configs.values()} == {'emoji.npz'}


def test_a_step_of_each_kind_runs(configs):
  for config in (configs['ldm'], configs['wide']):
    latent._step(config)()


def test_cost_is_of_the_whole_sampler(configs, monkeypatch):
  monkeypatch.setattr(latent_cost, 'SIZES', (8,))
  found = latent_cost.measured(configs, num_steps=10, batch=4)
  (pixels,), (latents,) = found['pixels'], found['latents']
  for row in (pixels, latents):
    assert row['size'] == 8
    assert min(row['seconds_per_image'], row['peak_bytes']) > 0
  # The dense network has 2 products of 8 x (8 * 8 * 3), ten times.
  assert pixels['flops_per_image'] == 10 * 2 * 8 * (2 * 192 + 1)
  decoder = latents['flops_per_image'] - 10 * 2 * 8 * (2 * 32 + 1)
  assert decoder > 0
