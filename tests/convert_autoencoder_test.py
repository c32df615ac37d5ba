"""convert: diffusers' autoencoders come in, and go out the same, bit by bit."""

import hashlib
import json

import binaries
import jax
import numpy as np
import pytest
from folders_of_diffusers import FILE, autoencoder_folder
from parity import autoencoders as parity

from diffusion_jax.models import autoencoder
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import autoencoders, coders, diffusers

SD = {
  'sample_size': 512,
  'block_out_channels': [128, 256, 512, 512],
  'down_block_types': ['DownEncoderBlock2D'] * 4,
  'up_block_types': ['UpDecoderBlock2D'] * 4,
  'layers_per_block': 2,
}
# name -> (settings, shift, scale); the scale is 1 / scaling_factor.
CONVENTIONS = {
  'Stable Diffusion': (SD, 0, 1 / 0.18215),
  'SDXL': (
    SD | {'scaling_factor': 0.13025, 'sample_size': 1024},
    0,
    1 / 0.13025,
  ),
  'upscaler': (SD | {'scaling_factor': 0.08333}, 0, 1 / 0.08333),
  'SD3': (
    SD
    | {
      'latent_channels': 16,
      'scaling_factor': 1.5305,
      'shift_factor': 0.0609,
      'use_quant_conv': False,
      'use_post_quant_conv': False,
    },
    0.0609,
    1 / 1.5305,
  ),
  'Flux': (
    SD
    | {
      'latent_channels': 16,
      'scaling_factor': 0.3611,
      'shift_factor': 0.1159,
      'use_quant_conv': False,
      'use_post_quant_conv': False,
    },
    0.1159,
    1 / 0.3611,
  ),
  'by channel': (
    SD
    | {
      'scaling_factor': 0.5,
      'latents_mean': [1.0, 2.0, 3.0, 4.0],
      'latents_std': [1.0, 2.0, 3.0, 4.0],
    },
    [1, 2, 3, 4],
    [2, 4, 6, 8],
  ),
}


def abstract_of(found):
  """The shapes of our parameters of a folder."""
  options = {k: v for k, v in found.config['codec'].items() if k != 'name'}
  data = found.config['data']
  shape = (data['image_size'],) * 2 + (data['channels'],)
  made = autoencoder.create(shape, **options)
  return jax.eval_shape(made.init, jax.random.key(0))


def sha256(path):
  return hashlib.sha256(path.read_bytes()).hexdigest()


# --- settings ----------------------------------------------------------------


@pytest.mark.parametrize('name', CONVENTIONS)
def test_conventions_of_scale(name):
  settings, shift, scale = CONVENTIONS[name]
  settings = {'_class_name': coders.KL, **settings}
  kept = {**coders.KEPT_OF[coders.KL]}
  kept |= {key: settings[key] for key in kept if key in settings}
  found = coders.scaling(kept, settings.get('latent_channels', 4), name)
  np.testing.assert_allclose(found[0], np.broadcast_to(shift, len(found[0])))
  np.testing.assert_allclose(found[1], np.broadcast_to(scale, len(found[1])))
  config = coders.network_of(settings, name)
  back = coders.settings_of(config, kept)
  assert {**back, **settings} == back


@pytest.mark.parametrize('name', parity.CASES)
def test_settings_survive_a_round_trip(name):
  settings = parity.settings(name)
  back = coders.settings_of(coders.network_of(settings, name), {})
  scaling = ('scaling_factor', 'shift_factor')
  plain = {k: v for k, v in settings.items() if k not in scaling}
  assert {**back, **plain} == back
  again = coders.network_of(json.loads(json.dumps(back)), name)
  assert again == coders.network_of(settings, name)


@pytest.mark.parametrize(
  ('name', 'changes', 'told'),
  [
    ('vq', {'norm_type': 'spatial'}, 'norm_type is "spatial"'),
    ('vq', {'act_fn': 'relu'}, 'act_fn is "relu"'),
    ('kl', {'_class_name': 'AutoencoderTiny'}, '_class_name'),
    ('kl', {'block_out_channels': [4, 6, 8]}, 'multiples of the first'),
    ('kl', {'up_block_types': ['UpDecoderBlock2D'] * 3}, 'must attend at'),
    ('kl', {'up_block_types': ['UpDecoderBlock2D']}, 'one per level'),
    ('kl', {'sample_size': 18}, 'a multiple of 4'),
    ('kl', {'out_channels': 1}, 'out_channels is 1'),
    ('kl', {'use_quant_conv': False}, 'use_post_quant_conv is true'),
    ('kl', {'latent_channels': 'x'}, 'latent_channels is "x"'),
  ],
)
def test_other_networks_are_refused_in_one_line(name, changes, told):
  with pytest.raises(UserError) as error:
    coders.network_of({**parity.settings(name), **changes}, 'config.json')
  assert told in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('kept', 'told'),
  [
    ({'scaling_factor': 0}, 'must be above 0'),
    ({'scaling_factor': 'x'}, 'scaling_factor is "x"'),
    ({'scaling_factor': 1, 'latents_mean': [0.0]}, 'latents_mean'),
  ],
)
def test_scales_that_are_none_are_refused(kept, told):
  with pytest.raises(UserError, match=told):
    coders.scaling(kept, 4, 'config.json')


@pytest.mark.parametrize(
  ('changes', 'told'),
  [
    ({'regulariser': 'fsq'}, 'codec.regulariser=fsq'),
    ({'hybrid': 2}, 'codec.hybrid=2'),
    ({'regulariser': 'vq', 'quant_conv': False}, 'codec.quant_conv=False'),
  ],
)
def test_autoencoders_that_diffusers_lacks_are_not_written(changes, told):
  config = coders.network_of(parity.settings('kl'), 'config.json')
  config['codec'] |= {'codes': 8, 'code_channels': 0, **changes}
  with pytest.raises(UserError, match=told):
    coders.settings_of(config, {})


# --- weights -----------------------------------------------------------------


@pytest.mark.parametrize('name', ['kl', 'vq', 'plain'])
def test_a_round_trip_gives_the_same_bits(tmp_path, name):
  """Also under attention's old names, and with 1x1 convolutions in it."""
  _, params = parity.create(name)
  tensors = diffusers.to_tensors(params)
  theirs = {}
  for key, array in tensors.items():
    for old, new in (
      ('query', 'to_q'), ('key', 'to_k'), ('value', 'to_v'),
      ('proj_attn', 'to_out.0'),
    ):  # fmt: skip
      if f'.{new}.' in key:
        key = key.replace(new, old)
        array = array[:, :, None, None] if array.ndim == 2 else array
    theirs[key] = array
  assert theirs.keys() != tensors.keys()
  found = autoencoders.read(
    autoencoder_folder(name, tmp_path / 'folder', theirs)
  )
  abstract = abstract_of(found)
  ours = diffusers.to_params(found.tensors, abstract, 'it')
  jax.tree.map(np.testing.assert_array_equal, ours, params)
  back = diffusers.to_tensors(ours)
  assert back.keys() == tensors.keys()
  for key, array in tensors.items():
    np.testing.assert_array_equal(back[key], array)


def test_weights_are_not_written_beside_others(tmp_path):
  """Those would be read in place of the new ones."""
  (tmp_path / 'diffusion_pytorch_model.fp16.safetensors').write_bytes(b'')
  config = coders.network_of(parity.settings('kl'), 'config.json')
  with pytest.raises(UserError, match='holds other weights'):
    autoencoders.write(tmp_path, config, parity.create('kl')[1])
  assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_the_binary_brings_in_and_out_the_same_folder(tmp_path):
  source = autoencoder_folder('vq', tmp_path / 'theirs', scaling_factor=0.25)
  result = binaries.run(
    'convert', f'--from={source}', f'--to={tmp_path}/run', '--step=7'
  )
  assert result.code == 0, result.err
  facts = json.loads((tmp_path / 'run' / 'converted.json').read_text())
  assert facts['sha256'] == sha256(source / FILE)
  assert facts['shift'] == [0, 0]
  assert facts['scale'] == [4, 4]
  config = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert config['codec']['name'] == 'autoencoder'
  assert config['data']['image_size'] == 8
  result = binaries.run(
    'convert', f'--from={tmp_path}/run', f'--to={tmp_path}/back'
  )
  assert result.code == 0, result.err
  assert 'as a VQModel' in result.out
  back = tmp_path / 'back'
  assert sha256(back / FILE) == sha256(source / FILE)
  settings = json.loads((back / 'config.json').read_text())
  assert settings | parity.settings('vq') | {'scaling_factor': 0.25} == settings
  # What we wrote comes back byte for byte.
  found = autoencoders.read(back)
  params = diffusers.to_params(found.tensors, abstract_of(found), 'it')
  autoencoders.write(tmp_path / 'again', found.config, params, found.kept)
  for name in ('config.json', FILE):
    again = tmp_path / 'again' / name
    assert again.read_bytes() == (back / name).read_bytes()


def test_another_size_of_images_keeps_the_levels_that_attend(tmp_path):
  folder = autoencoder_folder('kl', tmp_path / 'folder')
  assert autoencoders.read(folder).config['codec']['attention_resolutions'] == [
    8
  ]
  found = autoencoders.read(folder, (32, 64)).config
  assert found['codec']['attention_resolutions'] == [16]
  assert found['data']['image_size'] == (32, 64)
  with pytest.raises(UserError, match='a multiple of 4'):
    autoencoders.read(folder, 30)


def test_weights_without_an_autoencoder_are_refused(tmp_path):
  tensors = dict(diffusers.to_tensors(parity.create('vq')[1]))
  tensors.pop('quantize.embedding.weight')
  source = autoencoder_folder('vq', tmp_path / 'theirs', tensors)
  result = binaries.run('convert', f'--from={source}', f'--to={tmp_path}/run')
  assert result.code == 2
  assert '1 tensors missing (quantize.embedding.weight)' in result.message
  assert not (tmp_path / 'run').exists()
