"""The U-Nets of Stable Diffusion: the network, its settings and its folders."""

import json
import sys

import binaries
import jax
import numpy as np
import pytest
import safetensors.numpy
from folders_of_diffusers import FILE, network_folder
from parity import conditional as parity

from diffusion_jax import models
from diffusion_jax.models import transformer
from diffusion_jax.process import schedules
from diffusion_jax.samplers import plan
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import (
  conditional,
  diffusers,
  settings,
  shards,
  stable_diffusion,
)

CASES = pytest.mark.parametrize('name', parity.CASES)
REFERENCE = binaries.ROOT.parent / 'shared' / 'reference'
PUBLISHED = {
  'sd1_unet': (
    859_520_964,
    {'cross_attention_dim': 768, 'sample_size': 64},
  ),
  'sd1_inpaint_unet': (
    859_535_364,
    {'cross_attention_dim': 768, 'sample_size': 64, 'in_channels': 9},
  ),
  'sd2_unet': (
    865_910_724,
    {
      'cross_attention_dim': 1024, 'sample_size': 96,
      'attention_head_dim': [5, 10, 20, 20], 'use_linear_projection': True,
      'upcast_attention': True,
    },
  ),
  'sdxl_unet': (
    2_567_463_684,
    {
      'cross_attention_dim': 2048, 'sample_size': 128,
      'attention_head_dim': [5, 10, 20], 'use_linear_projection': True,
      'upcast_attention': None, 'num_attention_heads': None,
      'block_out_channels': [320, 640, 1280],
      'down_block_types': ['DownBlock2D', *['CrossAttnDownBlock2D'] * 2],
      'up_block_types': [*['CrossAttnUpBlock2D'] * 2, 'UpBlock2D'],
      'transformer_layers_per_block': [1, 2, 10],
      'addition_embed_type': 'text_time', 'addition_time_embed_dim': 256,
      'projection_class_embeddings_input_dim': 2816,
    },
  ),
}  # fmt: skip


def of_class(settings):
  return {'_class_name': conditional.CLASS, **settings}


# The network.


@pytest.mark.parametrize(
  'name',
  ['sd2', 'sdxl', *(pytest.param(n, marks=pytest.mark.slow)
                    for n in ('sd1', 'inpainting'))],
)  # fmt: skip
def test_equals_golden(name):
  assert parity.error(parity.ours(name), parity.golden(name)) < 1e-4


@pytest.mark.parity
@CASES
def test_equals_diffusers(name):
  assert parity.error(parity.ours(name), parity.live(name)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
  'change',
  [
    ('EPSILON', 1e-5),
    ('EPSILON_LAYER', 1e-6),
    ('approximate', True),
  ],
  ids=str,
)
def test_a_wrong_detail_is_seen(change, monkeypatch):
  """Where no details are wrong, errors are below 1e-5."""
  name, value = change
  if name == 'approximate':
    right = jax.nn.gelu
    monkeypatch.setattr(
      transformer.jax.nn, 'gelu', lambda x, approximate: right(x)
    )
  else:
    monkeypatch.setattr(transformer, name, value)
  parity.create.cache_clear()
  wrong = parity.error(parity.ours('sd1'), parity.golden('sd1'))
  parity.create.cache_clear()
  assert wrong > 2e-5


@pytest.mark.slow
@pytest.mark.parametrize('name', PUBLISHED)
def test_names_and_shapes_of_the_published_networks(name, monkeypatch):
  count, settings = PUBLISHED[name]
  parts = conditional.network_of(of_class(settings), name)
  options = {k: v for k, v in parts['model'].items() if k != 'name'}
  size = parts['data']['image_size']
  model = models.create('unet', (size, size, 4), parts['doors'], **options)
  params = jax.eval_shape(model.init, jax.random.key(0))
  assert models.count(params) == count
  if not REFERENCE.is_dir():
    pytest.skip('the list of names is not there')
  monkeypatch.setattr(sys, 'path', [*sys.path, str(REFERENCE)])
  import shapes

  # Arrays of the shape that take no memory.
  empty = jax.tree.map(
    lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params
  )
  monkeypatch.setattr(np, 'ascontiguousarray', np.asarray)
  found = stable_diffusion.to_tensors(empty, settings)
  assert {k: v.shape for k, v in found.items()} == shapes.MODELS[name]()


def test_a_network_without_tokens_has_transformers_too():
  model = models.create(
    'unet', (4, 4, 1), channels=4, multipliers=(1,), num_blocks=1,
    transformer_depths=(1, 0), num_groups=2, style='diffusers', dropout=0.0,
  )  # fmt: skip
  params = jax.eval_shape(model.init, jax.random.key(0))
  out = jax.eval_shape(model.apply, params, np.ones((2, 4, 4, 1)), np.ones(2))
  assert out.shape == (2, 4, 4, 1)
  names = models.names(params)
  assert 'down/0/attentions/0/blocks/0/attention/query/kernel' in names
  assert not any('cross' in n or 'middle_attention' in n for n in names)


# Settings.


@pytest.mark.parametrize('settings', [
  *(settings for _, settings in PUBLISHED.values()),
  *(settings for settings, _ in parity.CASES.values()),
])  # fmt: skip
def test_settings_return_as_they_were_or_mean_the_same(settings):
  theirs = of_class({**settings, '_diffusers_version': '0.6.0'})
  parts = conditional.network_of(theirs, 'a folder')
  again = json.loads(json.dumps(parts))
  kept = conditional.unet_of(again, parts['doors'], theirs)
  assert kept == theirs
  # Those of another epsilon, so that all of them are written anew.
  made = conditional.unet_of(again, parts['doors'], {**theirs, 'norm_eps': 0.5})
  assert conditional.network_of(made, 'a folder') == parts
  if settings in [one for _, one in PUBLISHED.values()]:
    assert {k: made[k] for k in settings} == settings


def test_settings_of_another_size_are_written_anew():
  theirs = of_class(parity.CASES['sd2'][0]) | {'_diffusers_version': '1'}
  parts = conditional.network_of(theirs, 'a folder')
  parts['data']['image_size'] = (8, 16)
  made = conditional.unet_of(parts, parts['doors'], theirs)
  assert made['sample_size'] == [8, 16]
  same = ('use_linear_projection', 'upcast_attention', '_diffusers_version')
  assert all(made[name] == theirs[name] for name in same)


@pytest.mark.parametrize(
  ('change', 'told'),
  [
    ({'a_new_idea': 3}, 'a_new_idea is 3, which is not known'),
    ({'time_cond_proj_dim': 256}, 'time_cond_proj_dim is 256'),
    ({'encoder_hid_dim': 8}, 'encoder_hid_dim is 8'),
    ({'only_cross_attention': [True, False]}, 'only_cross_attention is'),
    ({'class_embed_type': 'timestep'}, 'class_embed_type is "timestep"'),
    ({'num_class_embeds': 5}, 'num_class_embeds is 5'),
    ({'mid_block_type': None}, 'mid_block_type is null'),
    ({'down_block_types': ['AttnDownBlock2D', 'DownBlock2D']}, 'AttnDownBlock'),
    ({'transformer_layers_per_block': [[1], [2]]}, 'layers_per_block is [1]'),
    ({'transformer_layers_per_block': [1]}, 'one for each of 2 levels'),
    ({'attention_head_dim': 3}, 'attention_head_dim is 3'),
    ({'attention_head_dim': [1, 8]}, 'the same at all levels'),
    ({'cross_attention_dim': [6, 7]}, 'must be the same at all levels'),
    ({'sample_size': None}, 'sample_size is null'),
    ({'in_channels': 3}, 'in_channels is 3, but out_channels 4'),
    ({'addition_embed_type': 'image'}, 'addition_embed_type is "image"'),
    (
      {
        'addition_embed_type': 'text_time', 'addition_time_embed_dim': 8,
        'projection_class_embeddings_input_dim': 48,
      },
      'more than 6 x 8',
    ),
    ({'_class_name': 'UNet3DConditionModel'}, '_class_name'),
  ],
)  # fmt: skip
def test_other_networks_are_refused_in_one_line(change, told):
  theirs = of_class(parity.CASES['sd1'][0]) | change
  with pytest.raises(UserError) as error:
    conditional.network_of(theirs, 'unet/config.json')
  assert told in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('change', 'told'),
  [
    ({'style': 'ddpmpp'}, 'up_attention=last'),
    ({'style': 'adm'}, 'resampling=block'),
    ({'transformer_depths': ()}, 'a depth for each level'),
    ({'transformer_depths': (1, 2, 1)}, 'the depth of the last level'),
    ({'time_scale': 2.0}, 'model.time_scale=2.0'),
    ({'name': 'dit'}, 'only a unet'),
  ],
)
def test_what_diffusers_cannot_have_is_not_written(change, told):
  parts = conditional.network_of(of_class(parity.CASES['sd1'][0]), '')
  parts['model'] |= change
  with pytest.raises(UserError) as error:
    conditional.unet_of(parts, parts['doors'])
  assert told in str(error.value)
  with pytest.raises(UserError, match='needs tokens'):
    conditional.unet_of({**parts, 'model': {
      **parts['model'], 'name': 'unet', 'style': 'diffusers', 'time_scale': 1.0,
    }}, {'label': 3})  # fmt: skip


# Schedulers.

OF_STABLE = {
  'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'scaled_linear',
  'steps_offset': 1, 'clip_sample': False,
}  # fmt: skip
PNDM = {'_class_name': 'PNDMScheduler', 'skip_prk_steps': True}
EULER = {'_class_name': 'EulerDiscreteScheduler', 'timestep_spacing': 'leading'}


def test_the_process_of_stable_diffusion():
  parts = settings.process_of({**OF_STABLE, **PNDM}, 'a file')
  schedule = schedules.create(**parts['process'])
  alpha_bar = np.exp(schedule.host([0, 1, 499, 981, 999])[0])
  wanted = [0.99915, 0.99829603, 0.27766965, 0.00577550, 0.00466010]
  np.testing.assert_allclose(alpha_bar, wanted, atol=5e-9)
  assert parts['loss']['prediction'] == 'eps'
  assert not parts['sample']['clip']
  clip = {'DDPMScheduler', 'DDIMScheduler'}  # by default; others cannot
  for kind in settings.SCHEDULERS:
    parts = settings.process_of({'_class_name': kind}, 'a file')
    assert parts['sample']['clip'] == (kind in clip), kind


@pytest.mark.parametrize(
  ('given', 'wanted'),
  [
    (PNDM, ('plms', 'stable_diffusion')),
    ({**PNDM, 'set_alpha_to_one': True}, ('plms', 'sdxl')),
    ({'_class_name': 'DDIMScheduler'}, ('ddim', 'sdxl')),
    (
      {'_class_name': 'DDIMScheduler', 'set_alpha_to_one': False},
      ('ddim', 'stable_diffusion'),
    ),
    (EULER, ('euler', 'sdxl')),
  ],
)
def test_a_scheduler_names_sampler_and_grid(given, wanted):
  found, notes = settings.sampling_of({**OF_STABLE, **given}, 'a file')
  assert notes == []
  assert (found['sampler'], found['grid']) == wanted
  schedule = schedules.scaled_linear(1000, 0.00085, 0.012)
  made = plan.create(schedule, num_steps=50, clip=False, **found)
  end = {'stable_diffusion': [0, 'end'], 'sdxl': [-1]}[wanted[1]]
  assert made.protocol()['grid'] == [*range(981, 0, -20), *end]
  assert made.evaluations == 50 + (wanted[0] == 'plms')


@pytest.mark.parametrize(
  ('given', 'told'),
  [
    ({'_class_name': 'DDPMScheduler'}, '_class_name is "DDPMScheduler"'),
    ({**PNDM, 'timestep_spacing': 'trailing'}, 'timestep_spacing is "t'),
    ({**PNDM, 'skip_prk_steps': False}, 'skip_prk_steps is false'),
    ({**EULER, 'use_karras_sigmas': True}, 'use_karras_sigmas is true'),
  ],
)  # fmt: skip
def test_other_ways_of_sampling_are_told_in_one_line(given, told):
  _, (note,) = settings.sampling_of({**OF_STABLE, **given}, 'a file')
  assert told in note
  assert '\n' not in note


# Folders.


def folder_of(name, path, dtype='f4'):
  tensors = stable_diffusion.to_tensors(
    parity.create(name)[1], parity.settings(name)
  )
  tensors = {k: v.astype(dtype) for k, v in tensors.items()}
  return network_folder(path, parity.settings(name), tensors), tensors


def params_of(read, name):
  _, like, parts = parity.create(name)
  assert read.config | {'doors': read.doors} == parts
  return diffusers.to_params(read.tensors, like, 'the folder')


@pytest.mark.parametrize(
  ('name', 'variant', 'largest'),
  [
    ('sd1', '', shards.LARGEST),
    ('sdxl', 'fp16', 2000),
    pytest.param('sd1', 'fp16', shards.LARGEST, marks=pytest.mark.slow),
    pytest.param('inpainting', '', 2000, marks=pytest.mark.slow),
  ],
)
def test_folders_return_bitwise(name, variant, largest, tmp_path):
  dtype = stable_diffusion.VARIANTS[variant]
  path, tensors = folder_of(name, tmp_path / 'theirs' / 'unet', dtype)
  assert stable_diffusion.is_folder(path)
  read = stable_diffusion.read(path.parent)
  params = params_of(read, name)
  ours = tmp_path / 'ours'
  stable_diffusion.write(
    ours, read.config, read.doors, params, read.kept, variant, largest
  )
  assert json.loads((ours / 'config.json').read_text()) == read.kept
  again = stable_diffusion.read(ours)
  assert again.tensors.keys() == tensors.keys()
  for key, array in tensors.items():
    assert again.tensors[key].dtype == dtype
    np.testing.assert_array_equal(again.tensors[key], array)
  files = sorted(file.name for file in ours.iterdir())
  if largest == shards.LARGEST:
    assert files[1] == f'diffusion_pytorch_model{".fp16" * bool(variant)}' + (
      '.safetensors'
    )
  else:
    assert len(files) > 5
    assert max(f.stat().st_size for f in ours.glob('*.safetensors')) < 9000
  # Over the same names, not beside others, which would be read first.
  before = {file: (ours / file).read_bytes() for file in files}
  for other in {shards.LARGEST, 2000} - {largest}:
    with pytest.raises(UserError, match=r'holds other weights \(diffusion'):
      stable_diffusion.write(
        ours, read.config, read.doors, params, read.kept, variant, other
      )
  stable_diffusion.write(
    ours, read.config, read.doors, params, read.kept, variant, largest
  )
  assert before == {f.name: f.read_bytes() for f in ours.iterdir()}
  # Byte for byte.
  stable_diffusion.write(
    tmp_path / 'twice', again.config, again.doors, params_of(again, name),
    again.kept, variant, largest,
  )  # fmt: skip
  for file in files:
    assert (tmp_path / 'twice' / file).read_bytes() == (
      ours / file
    ).read_bytes()


def test_weights_of_another_depth_are_refused(tmp_path):
  path, tensors = folder_of('sdxl', tmp_path / 'unet')
  lacking = {k: v for k, v in tensors.items() if 'blocks.2' not in k}
  safetensors.numpy.save_file(lacking, path / FILE)
  with pytest.raises(UserError, match=r'tensors missing .*blocks\.2'):
    params_of(stable_diffusion.read(path), 'sdxl')


def test_numbers_too_large_for_float16_are_refused(tmp_path):
  parts = conditional.network_of(parity.settings('sd1'), '')
  params = jax.tree.map(np.copy, parity.create('sd1')[1])
  params['conv_in']['bias'][0] = 1e5
  with pytest.raises(UserError, match=r'conv_in.bias has the number 1e\+05'):
    stable_diffusion.write(
      tmp_path / 'unet', parts, parts['doors'], params, variant='fp16'
    )
  assert not (tmp_path / 'unet').exists()


@pytest.mark.parity
@pytest.mark.parametrize('name', ['sd1', 'sdxl'])
@pytest.mark.parametrize('variant', [None, 'fp16'])
def test_diffusers_loads_what_is_written_and_we_what_it_writes(
  name, variant, tmp_path
):
  import diffusers as theirs
  import torch

  parts = conditional.network_of(parity.settings(name), '')
  stable_diffusion.write(
    tmp_path / 'ours', parts, parts['doors'], parity.create(name)[1],
    parity.settings(name), variant or '', largest=4000,
  )  # fmt: skip
  kind = torch.float16 if variant else torch.float32
  network = theirs.UNet2DConditionModel.from_pretrained(
    tmp_path / 'ours', variant=variant, torch_dtype=kind
  )
  network.save_pretrained(tmp_path / 'theirs', variant=variant)
  read = stable_diffusion.read(tmp_path / 'theirs')
  stable_diffusion.write(
    tmp_path / 'again', read.config, read.doors, params_of(read, name),
    read.kept, variant or '',
  )  # fmt: skip
  for file in (tmp_path / 'theirs').iterdir():
    again = tmp_path / 'again' / file.name
    if file.suffix == '.json':
      assert json.loads(again.read_text()) == json.loads(file.read_text())
    else:
      one, two = map(safetensors.numpy.load_file, (again, file))
      assert one.keys() == two.keys()
      for key in one:
        np.testing.assert_array_equal(one[key], two[key])
