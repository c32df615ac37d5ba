"""convert: diffusers' pipelines in latents come in as runs, and go out."""

import hashlib
import json
from unittest import mock

import binaries
import jax
import numpy as np
import pytest
import safetensors.numpy
from folders_of_diffusers import FILE, autoencoder_folder, network_folder
from parity import autoencoders as parity
from parity import pipelines as pipelines_of_pixels
from parity import unet

from diffusion_jax import load, models, samplers
from diffusion_jax.codecs import pixels
from diffusion_jax.configs import default
from diffusion_jax.models import bottleneck
from diffusion_jax.runs import frozen
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding
from diffusion_jax.weights import pipelines, unets
from diffusion_jax.weights.diffusers import to_tensors

# As that of CompVis/ldm-celebahq-256, narrow.
UNET = {
  '_class_name': 'UNet2DModel',
  'sample_size': 4,
  'in_channels': 2,
  'out_channels': 2,
  'attention_head_dim': 4,
  'block_out_channels': [4, 8],
  'down_block_types': ['DownBlock2D', 'AttnDownBlock2D'],
  'up_block_types': ['AttnUpBlock2D', 'UpBlock2D'],
  'layers_per_block': 1,
  'norm_num_groups': 2,
  'norm_eps': 1e-5,
  'downsample_padding': 1,
  'flip_sin_to_cos': True,
  'freq_shift': 0,
}
SCHEDULER = {
  '_class_name': 'DDIMScheduler',
  'beta_start': 0.0015,
  'beta_end': 0.0195,
  'beta_schedule': 'scaled_linear',
  'clip_sample': False,
  'num_train_timesteps': 1000,
}


def net_tensors():
  parts = unets.network_of(UNET, 'unet')
  net = models.create(image_shape=(4, 4, 2), **parts['model'])
  return to_tensors(unet.random_params(net))


def pipeline(path, scaling_factor=0.25, **scheduler):
  """The folder of an LDMPipeline as diffusers writes it, of random weights."""
  network_folder(path / 'unet', UNET, net_tensors())
  autoencoder_folder('vq', path / 'vqvae', scaling_factor=scaling_factor)
  (path / 'scheduler').mkdir()
  (path / 'scheduler' / 'scheduler_config.json').write_text(
    json.dumps({**SCHEDULER, **scheduler})
  )
  index = {
    '_class_name': 'LDMPipeline',
    'scheduler': ['diffusers', 'DDIMScheduler'],
    'unet': ['diffusers', 'UNet2DModel'],
    'vqvae': ['diffusers', 'VQModel'],
  }
  (path / 'model_index.json').write_text(json.dumps(index))
  return path


def converted(source, target):
  result = binaries.run('convert', f'--from={source}', f'--to={target}')
  assert result.code == 0, result.err
  return target


def sha256(path):
  return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_pipeline_is_imported_with_its_autoencoder(tmp_path):
  run = converted(pipeline(tmp_path / 'theirs'), tmp_path / 'run')
  config = json.loads((run / 'config.json').read_text())
  assert config['data']['image_size'] == 8
  assert config['codec']['coder']['codes'] == 12
  assert config['process']['schedule'] == 'scaled_linear'
  part = safetensors.numpy.load_file(run / 'parts' / 'codec.safetensors')
  want = models.named(parity.create('vq')[1])
  assert part.keys() == {*want, 'shift', 'scale'}
  np.testing.assert_array_equal(part.pop('scale'), [4, 4])
  np.testing.assert_array_equal(part.pop('shift'), [0, 0])
  for name, leaf in want.items():
    np.testing.assert_array_equal(part[name], leaf)


@pytest.mark.slow
def test_a_pipeline_is_a_run_in_latents(tmp_path):
  """Without the folder: the run holds its autoencoder."""
  source = pipeline(tmp_path / 'theirs')
  run = converted(source, tmp_path / 'run')
  source.rename(tmp_path / 'moved')
  trained = load(run)
  assert trained.recipe.codec.shape == (4, 4, 2)
  assert trained.config['codec']['name'] == 'latents'
  assert trained.config['data']['image_size'] == 8
  assert not trained.plan().clip
  part = trained.params['codec']
  np.testing.assert_array_equal(part['scale'], 4)
  np.testing.assert_array_equal(part['shift'], 0)
  # Decoding divides by scaling_factor, snaps to the codebook and decodes.
  coder, params = parity.create('vq')
  x0 = unet.normal('latents', (2, 4, 4, 2))
  keys = jax.random.split(jax.random.key(0), 2)

  def both(given, params):
    mine = trained.recipe.codec.decode(given, x0, keys)
    want = coder.decode(params, coder.snap(params, x0 / 0.25))
    return mine, pixels.from_float(want)

  mine, want = jax.jit(both)(trained.params, params)
  np.testing.assert_allclose(mine, want, atol=1e-2)
  assert np.std(want) > 1
  back = converted(run, tmp_path / 'back')
  for name in ('unet', 'vqvae'):
    theirs = tmp_path / 'moved' / name
    assert sha256(back / name / FILE) == sha256(theirs / FILE)
    mine, want = (
      json.loads((at / 'config.json').read_text())
      for at in (back / name, theirs)
    )
    assert {**mine, **want} == mine
  index = json.loads((back / 'model_index.json').read_text())
  assert index['_class_name'] == 'LDMPipeline'
  assert index['vqvae'] == ['diffusers', 'VQModel']


def test_an_imported_autoencoder_is_one_to_diffuse_in(tmp_path):
  """As a run or as the folder itself, with its scale, at other sizes."""
  source = autoencoder_folder('vq', tmp_path / 'theirs', scaling_factor=0.5)
  _, params = parity.create('vq')
  run = converted(source, tmp_path / 'run')
  for path in (run, source):
    config = default.get_config()
    config.data.image_size, config.data.channels = 16, 1
    config.codec = default.latents()
    config.codec.path = str(path)
    frozen.complete(config)
    found = frozen.load(config.to_dict(), sharding.make_mesh())
    part = dict(found.params['codec'])
    np.testing.assert_array_equal(part.pop('scale'), [2, 2])
    np.testing.assert_array_equal(part.pop('shift'), [0, 0])
    jax.tree.map(np.testing.assert_array_equal, part, params)
    assert found.facts['codec']['scaled_by']
    assert found.facts['codec']['from'] == str(path)


def test_a_pipeline_that_clips_its_latents_is_refused(tmp_path):
  source = pipeline(tmp_path / 'theirs', clip_sample=True)
  result = binaries.run('convert', f'--from={source}', f'--to={tmp_path}/run')
  assert result.code == 2
  assert 'sample.clip' in result.message
  assert not (tmp_path / 'run').exists()


def test_a_shift_and_a_scale_become_part_of_the_convolutions():
  coder, params = parity.create('kl')
  shift = np.array([[[[0.5, -1, 0, 2]]]], np.float32)
  scale = np.array([[[[1, 2, 0.5, 3]]]], np.float32)
  part = {**params, 'shift': shift.ravel(), 'scale': scale.ravel()}
  options = {'regulariser': 'kl', 'quant_conv': True}
  changed, factor = pipelines.unscaled(part, options)
  assert factor == 1
  assert changed.keys() == params.keys()
  images, z = parity.images('kl'), unet.normal('z', (2, *coder.shape))

  def answers(params, changed):
    before = bottleneck.posterior(coder.encode(params, images))
    after = bottleneck.posterior(coder.encode(changed, images))
    unscaled = z * scale + shift
    return (
      before,
      after,
      coder.decode(params, unscaled),
      coder.decode(changed, z),
    )

  before, after, want, got = jax.device_get(jax.jit(answers)(params, changed))
  np.testing.assert_allclose(got, want, atol=1e-4)
  np.testing.assert_allclose(
    after.mean, (before.mean - shift) / scale, atol=1e-5
  )
  deviations = [np.exp(x.log_variance / 2) for x in (before, after)]
  np.testing.assert_allclose(deviations[1], deviations[0] / scale, rtol=1e-4)


def test_one_scale_is_the_scaling_factor_and_others_need_convolutions():
  _, params = parity.create('vq')
  part = {**params, 'shift': np.zeros(2), 'scale': np.full(2, 4.0)}
  same, factor = pipelines.unscaled(part, {'regulariser': 'vq'})
  assert factor == 0.25
  assert same == params
  part['scale'] = np.array([1.0, 2.0])
  with pytest.raises(UserError, match=r'--config\.codec\.scale') as error:
    pipelines.unscaled(part, {'regulariser': 'vq'})
  assert '\n' not in str(error.value)


@pytest.mark.parity
def test_images_of_a_pipeline_are_diffusers(tmp_path):
  """20 steps of DDIM, of the folder that we write, from the same noise."""
  import diffusers
  import torch

  run = converted(pipeline(tmp_path / 'theirs'), tmp_path / 'run')
  theirs = diffusers.LDMPipeline.from_pretrained(
    converted(run, tmp_path / 'back')
  )
  theirs.scheduler = diffusers.DDIMScheduler.from_config(
    theirs.scheduler.config
  )
  theirs.set_progress_bar_config(disable=True)
  x = unet.normal('noise', (2, 4, 4, 2))
  module = f'{type(theirs).__module__}.randn_tensor'
  given = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
  with mock.patch(module, return_value=given):
    wanted = theirs(2, num_inference_steps=20, output_type='np').images

  trained = load(run)
  sampler = samplers.create('ddim', eta=0.0)
  keys = jax.random.split(jax.random.key(0), 2)  # of no use
  x0 = samplers.solve(
    sampler, trained.denoise, trained.schedule, pipelines_of_pixels.grid(20),
    x, keys,
  )  # fmt: skip
  found = trained.recipe.codec.decode(trained.params, x0, keys) / 255
  assert wanted.std() > 0.01
  np.testing.assert_allclose(found, wanted, atol=1e-3)
