"""convert: what others trained comes in, and goes out the same, bit by bit."""

import functools
import hashlib
import json
import shutil
import struct

import binaries
import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny
from folders_of_diffusers import DESCRIBED, WEIGHTS, folder_of, tiny_folder
from parity import pipelines, unet

from diffusion_jax import load, models, runs
from diffusion_jax.configs import digits
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import diffusers, official, settings, unets


def convert(*arguments):
  return binaries.run('convert', *arguments)


@pytest.mark.parametrize('value', [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
  tensors = dict(diffusers.to_tensors(unet.weights_of(unet.TINY)))
  name = next(name for name in tensors if name.startswith('mid_block'))
  tensors[name] = np.array(tensors[name])
  tensors[name].flat[3] = value
  folder_of('tiny', tmp_path / 'theirs', tensors)
  result = convert(f'--from={tmp_path}/theirs', f'--to={tmp_path}/run')
  assert 'the weights net/mid' in result.message
  assert 'are not finite' in result.message
  assert not (tmp_path / 'run').exists()


def converted(path, target, *arguments):
  result = convert(f'--from={path}', f'--to={target}', *arguments)
  assert result.code == 0, result.err
  return target


def sha256(path):
  return hashlib.sha256(path.read_bytes()).hexdigest()


def abstract_of(config):
  data = config['data']
  shape = (data['image_size'], data['image_size'], data['channels'])
  condition = config['conditioning']
  doors = {'label': condition.get('num_classes')}
  model = models.create(
    image_shape=shape,
    doors=doors if condition['name'] == 'label' else None,
    **config['model'],
  )
  return jax.eval_shape(model.init, jax.random.key(0))


# --- round trips -------------------------------------------------------------


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(
      name, marks=[pytest.mark.slow] * (name in ('cifar10', 'celebahq'))
    )
    for name in DESCRIBED
  ],
)
def test_a_round_trip_gives_the_same_bits(tmp_path, name):
  """The published sizes and unusual ones: settings, and each tensor."""
  there = DESCRIBED[name]
  tensors = pipelines.random_tensors(there['tensors'])
  folder_of(name, tmp_path, tensors)
  found = diffusers.read(tmp_path)
  params = diffusers.to_params(found.tensors, abstract_of(found.config), 'it')
  back = diffusers.to_tensors(params)
  assert back.keys() == tensors.keys()
  for key in tensors:
    assert back[key].dtype == np.float32
    np.testing.assert_array_equal(back[key], tensors[key])
  for part, ours in (
    ('unet', unets.unet_of(found.config)),
    ('scheduler', settings.scheduler_of(found.config)),
  ):
    assert ours.items() <= there[part].items()
    kept = {k: v for k, v in there[part].items() if k not in ours}
    # What we do not write is what diffusers takes for granted.
    assert kept.keys() <= {
      '_diffusers_version', 'num_train_timesteps', 'dynamic_thresholding_ratio',
      'sample_max_value', 'steps_offset', 'timestep_spacing',
    }  # fmt: skip


@pytest.mark.slow
def test_the_binary_brings_in_and_out_the_same_file(tmp_path):
  folder = tiny_folder(tmp_path / 'folder')
  run = converted(folder, tmp_path / 'run', '--step=7')
  facts = json.loads((run / 'converted.json').read_text())
  assert facts['sha256'] == sha256(folder / WEIGHTS)
  back = converted(run, tmp_path / 'back')
  assert sha256(back / WEIGHTS) == sha256(folder / WEIGHTS)
  # What a cut has left is no run, and the same command writes it anew.
  (run / 'config.json').unlink()
  assert load(converted(folder, run, '--step=8')).step == 8
  index = json.loads((back / 'model_index.json').read_text())
  assert index.items() <= DESCRIBED['tiny']['index'].items()


@pytest.fixture(scope='module')
def ours(tmp_path_factory):
  run = tmp_path_factory.mktemp('runs') / 'run'
  tiny.train(run, **tiny.UNET)
  return run


@pytest.mark.slow
def test_a_run_of_ours_goes_out_and_comes_in(ours, tmp_path):
  run = ours
  out = converted(run, tmp_path / 'out')
  again = converted(out, tmp_path / 'again', '--config=digits', '--step=30')
  before, after = load(run), load(again)
  assert before.weights_sha256 == after.weights_sha256
  assert before.plan() == after.plan()
  assert before.config['model'] == after.config['model']
  raw = converted(run, tmp_path / 'raw', '--noema', '--step=20')
  tensors = safetensors.numpy.load_file(raw / WEIGHTS)
  params = load(run, step=20, ema=False).params['net']
  for key, value in diffusers.to_tensors(params).items():
    np.testing.assert_array_equal(tensors[key], value)


def test_old_names_in_an_old_folder(tmp_path):
  """As google/ddpm-cifar10-32 was published: at the top, other names."""
  old = {v: k for k, v in diffusers._OLD.items()}
  new = diffusers.to_tensors(unet.weights_of(unet.TINY))

  def named_of_old(name):
    for theirs, before in old.items():
      name = name.replace(f'.{theirs}.', f'.{before}.')
    return name

  tensors = {named_of_old(name): array for name, array in new.items()}
  assert 'mid_block.attentions.0.proj_attn.weight' in tensors
  assert 'mid_block.attentions.0.query.bias' in tensors
  path = folder_of('tiny', tmp_path, tensors, flat=True)
  found = diffusers.read(path)
  params = diffusers.to_params(found.tensors, abstract_of(found.config), 'it')
  back = diffusers.to_tensors(params)
  for name, array in new.items():
    np.testing.assert_array_equal(back[name], array)


def test_settings_of_the_scheduler_come_along(tmp_path):
  folder = tiny_folder(
    tmp_path / 'folder', variance_type='fixed_small', clip_sample=False,
    prediction_type='v_prediction', beta_end=0.01, num_train_timesteps=500,
  )  # fmt: skip
  trained = load(converted(folder, tmp_path / 'run'))
  assert trained.prediction == 'v'
  assert trained.schedule.num_timesteps == 500
  np.testing.assert_allclose(trained.schedule.betas[-1], 0.01)
  plan = trained.plan()
  assert (plan.options['variance'], plan.clip) == ('fixedsmall', False)
  assert trained.plan(clip=True).clip


# --- the same images ---------------------------------------------------------


@pytest.fixture(scope='module')
def came_in(tmp_path_factory):
  """What it predicts -> the run that the network's folder becomes."""
  where = tmp_path_factory.mktemp('came_in')

  @functools.cache
  def run(prediction):
    folder = tiny_folder(where / prediction, prediction_type=prediction)
    return load(converted(folder, where / f'{prediction}_run'))

  return run


@pytest.mark.optimized
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name != 'ddim_v_noclip_20'))
    for name in pipelines.DRAWS
  ],
)
def test_the_same_noise_gives_the_images_of_the_pipelines(came_in, name):
  settings = pipelines.DRAWS[name].scheduler
  trained = came_in(settings.get('prediction_type', 'epsilon'))
  golden = pipelines.drawn_golden(name)
  ours = pipelines.drawn_ours(name, trained)
  assert golden.std() > 0.1
  assert np.abs(ours - golden).max() < pipelines.TOLERANCE


@pytest.mark.optimized
@pytest.mark.parity
@pytest.mark.parametrize('name', pipelines.DRAWS)
def test_diffusers_draws_the_same_of_what_we_write(tmp_path, name):
  pipelines.save_live(
    unet.TINY, pipelines.DRAWS[name].scheduler, tmp_path / 'a'
  )
  run = converted(tmp_path / 'a', tmp_path / 'run')
  back = converted(run, tmp_path / 'back')
  assert sha256(tmp_path / 'a' / WEIGHTS) == sha256(back / WEIGHTS)
  theirs = pipelines.run_live(name, back)
  np.testing.assert_array_equal(
    theirs, pipelines.run_live(name, tmp_path / 'a')
  )
  ours = pipelines.drawn_ours(name, load(run))
  assert np.abs(ours - theirs).max() < pipelines.TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize('name', pipelines.FOLDERS)
def test_diffusers_own_folders_are_as_described(tmp_path, name):
  there = pipelines.described_live(pipelines.FOLDERS[name], tmp_path)
  assert there == DESCRIBED[name]


@pytest.mark.parity
def test_a_folder_with_pickled_weights(tmp_path):
  import torch

  folder = tiny_folder(tmp_path / 'folder')
  tensors = safetensors.numpy.load_file(folder / WEIGHTS)
  (folder / WEIGHTS).unlink()
  torch.save(
    {name: torch.from_numpy(array) for name, array in tensors.items()},
    folder / 'unet' / 'diffusion_pytorch_model.bin',
  )
  back = converted(converted(folder, tmp_path / 'a'), tmp_path / 'b')
  for name, array in safetensors.numpy.load_file(back / WEIGHTS).items():
    np.testing.assert_array_equal(array, tensors[name])


# --- a workdir ---------------------------------------------------------------


@pytest.mark.slow
def test_what_came_in_is_sampled_judged_and_begun_with(ours, tmp_path):
  folder = converted(ours, tmp_path / 'folder')
  known = converted(folder, tmp_path / 'known', '--config=digits')
  few = ['--num_samples=12', '--sampler=ddim', '--num_steps=3']
  judged = binaries.run(
    'evaluate', f'--workdir={known}', *few, '--features=pixels', '--json'
  )
  assert judged.code == 0, judged.err
  assert json.loads(judged.out)['protocol']['data'] == 'digits'

  unknown = converted(folder, tmp_path / 'unknown')
  drawn = binaries.run('sample', f'--workdir={unknown}', *few)
  assert drawn.code == 0, drawn.err
  for arguments, must in (
    (['evaluate', *few, '--features=pixels'], 'give --reference'),
    (['evaluate', '--metrics=bpd'], 'convert the weights again with --config'),
    (['sample', *few, '--noema'], 'averaged parameters only'),
  ):
    result = binaries.run(*arguments, f'--workdir={unknown}')
    assert result.code == 2
    assert must in result.err.splitlines()[-1]
  result = binaries.run('train', *tiny.flags(unknown, **tiny.UNET))
  assert result.code == 2
  assert f'--init_from={unknown}' in result.err
  result = binaries.run(
    'train', *tiny.flags(tmp_path / 'on', num_steps=2, **tiny.UNET),
    f'--init_from={unknown}',
  )  # fmt: skip
  assert result.code == 0, result.err
  assert 'starting from the averaged parameters' in result.err


# --- mistakes ----------------------------------------------------------------


def spoil(folder, how):
  """Damages the weights."""
  path = folder / WEIGHTS
  content = path.read_bytes()
  (length,) = struct.unpack('<Q', content[:8])
  header = json.loads(content[8 : 8 + length])
  name = 'conv_in.weight'
  tensors = safetensors.numpy.load(content)
  if how == 'cut':
    path.write_bytes(content[:-100])
  elif how == 'header':
    path.write_bytes(struct.pack('<Q', 2**60) + content[8:])
  elif how == 'shape':
    header[name]['shape'][0] = 10**12
    told = json.dumps(header).encode()
    path.write_bytes(
      struct.pack('<Q', len(told)) + told + content[8 + length :]
    )
  elif how == 'float8':
    # As bytes they are of the right size.
    small = {key: x.astype(np.uint8) for key, x in tensors.items()}
    content = safetensors.numpy.save(small)
    (length,) = struct.unpack('<Q', content[:8])
    told = content[8 : 8 + length].replace(b'"U8"', b'"F8_E4M3"')
    data = content[8 + length :]
    path.write_bytes(struct.pack('<Q', len(told)) + told + data)
  elif how == 'both':
    old = 'mid_block.attentions.0.query.bias'
    tensors[old] = tensors['mid_block.attentions.0.to_q.bias']
  elif how == 'missing':
    del tensors[name]
  elif how == 'extra':
    tensors['class_embedding.weight'] = np.zeros(3, np.float32)
  elif how == 'other':
    tensors[name] = tensors[name][:6]
  elif how == 'integers':
    tensors[name] = tensors[name].astype(np.int64)
  if how in ('missing', 'extra', 'other', 'integers', 'both'):
    safetensors.numpy.save_file(tensors, path)


@pytest.mark.parametrize(
  ('how', 'must'),
  [
    ('cut', 'not a complete safetensors file'),
    ('header', 'not a complete safetensors file'),
    ('shape', 'not a complete safetensors file'),
    ('missing', '1 tensors missing (conv_in.weight)'),
    ('extra', 'unexpected (class_embedding.weight)'),
    ('other', 'conv_in.weight has the shape [6, 1, 3, 3]'),
    ('integers', 'conv_in.weight is int64'),
    ('float8', 'has the dtype F8_E4M3'),
    ('both', 'attentions.0.query.bias also exists under its current name'),
  ],
)
def test_damaged_weights_are_named(tmp_path, how, must):
  folder = tiny_folder(tmp_path / 'folder')
  spoil(folder, how)
  result = convert(f'--from={folder}', f'--to={tmp_path}/run')
  assert (result.code, result.out) == (2, '')
  (line,) = result.err.splitlines()
  assert must in line
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('changes', 'must'),
  [
    ({'norm_eps': -1}, 'norm_eps is -1'),
    ({'downsample_padding': 2}, 'downsample_padding is 2, but must be 1 or 0'),
    ({'time_embedding_type': 'fourier'}, 'time_embedding_type is "fourier"'),
    ({'num_class_embeds': 10}, '1 tensors missing (class_embedding.weight)'),
    ({'num_class_embeds': 1}, 'num_class_embeds is 1: at least 2'),
    ({'attention_head_dim': 8}, 'model.head_channels=8 does not divide 36'),
    (
      {'resnet_time_scale_shift': 'scale_shift'},
      'attn_norm_num_groups is null, but must be 6',
    ),
    ({'downsample_type': 'resnet'}, 'some levels by conv and others by resnet'),
    ({'out_channels': 2}, 'conv_out.bias has the shape [1]'),
    ({'out_channels': 3}, 'out_channels is 3, but must be 1 or 2'),
    ({'in_channels': 4, 'out_channels': 4}, 'data.channels=4'),
    ({'block_out_channels': [12, 30, 36]}, 'multiples of the first'),
    ({'down_block_types': ['KDownBlock2D'] * 3}, 'down_block_types is "KDown'),
    ({'up_block_types': ['UpBlock2D'] * 3}, 'up_block_types is'),
    ({'sample_size': [16, 32]}, 'sample_size is [16, 32]: a whole number'),
    ({'sample_size': 18}, 'must be a multiple of 4'),
    ({'sample_size': None}, 'sample_size is null'),
    ({'layers_per_block': 10**5}, 'do not belong together'),
    ({'layers_per_block': float('inf')}, 'layers_per_block is Infinity'),
    ({'num_train_timesteps': float('nan')}, 'num_train_timesteps is NaN'),
    ({'attention_head_dim': '8'}, 'attention_head_dim is "8"'),
    ({'block_out_channels': [12, 36.5, 36]}, 'block_out_channels is 36.5'),
    ({'down_block_types': [['x']] * 3}, 'down_block_types is ["x"]'),
    (
      {'up_block_types': 'UpBlock2D'},
      'up_block_types is "UpBlock2D": must be a list',
    ),
    ({'norm_num_groups': 5}, 'model.num_groups=5 does not divide'),
    ({'beta_schedule': 'laplace'}, 'beta_schedule is "laplace"'),
    (
      {'variance_type': 'learned_range'},
      'sample.variance=learned needs a network that learns it',
    ),
    ({'prediction_type': ['epsilon']}, 'prediction_type is'),
    ({'beta_start': 2}, 'process.beta_start=2.0'),
    ({'rescale_betas_zero_snr': True}, 'process.zero_snr'),
  ],
)
def test_another_network_is_named(tmp_path, changes, must):
  folder = tiny_folder(tmp_path / 'folder', **changes)
  result = convert(f'--from={folder}', f'--to={tmp_path}/run')
  assert (result.code, result.out) == (2, '')
  (line,) = result.err.splitlines()
  assert must in line
  assert not (tmp_path / 'run').exists()


def test_what_cannot_be_converted_is_told(tmp_path):
  folder = tiny_folder(tmp_path / 'folder')
  (tmp_path / 'empty').mkdir()
  other = shutil.copytree(folder, tmp_path / 'other')
  settings = json.loads((other / 'unet/config.json').read_text())
  settings['_class_name'] = 'UNet2DConditionModel'
  (other / 'unet/config.json').write_text(json.dumps(settings))
  flow = shutil.copytree(folder, tmp_path / 'flow')
  (flow / 'scheduler/scheduler_config.json').write_text(
    '{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}'
  )
  latent = shutil.copytree(folder, tmp_path / 'latent')
  (latent / 'model_index.json').write_text('{"_class_name": "LDMPipeline"}')
  broken = shutil.copytree(folder, tmp_path / 'broken')
  (broken / 'unet/config.json').write_text('{"_class_name": ')
  bare = shutil.copytree(folder, tmp_path / 'bare')
  (bare / WEIGHTS).unlink()
  (tmp_path / 'model.ckpt-3.index').write_bytes(b'')
  lost = tmp_path / 'lost'  # a run without its checkpoints
  runs.write_config(lost, digits.get_config())
  runs.note_start(lost, {'step': 20})
  full = tmp_path / 'full'
  full.mkdir()
  (full / 'photo.png').write_bytes(b'')
  target = f'--to={tmp_path}/new'
  for arguments, must in (
    ([f'--from={tmp_path}/nothing', target], 'neither the workdir of a run'),
    ([f'--from={tmp_path}/empty', target], 'neither the workdir of a run'),
    ([f'--from={other}', target], '_class_name is "'),
    ([f'--from={flow}', target], '_class_name is "FlowMatch'),
    ([f'--from={latent}', target], 'an LDMPipeline without its vqvae/'),
    ([f'--from={broken}', target], 'cannot be read'),
    ([f'--from={bare}', target], 'has no weights'),
    ([f'--from={folder}', f'--to={folder}'], 'is not empty'),
    ([f'--from={folder}', f'--to={full}'], 'in the way: photo.png'),
    ([f'--from={lost}', target], 'the run had reached step 20'),
    ([f'--from={folder}', f'--to={folder}/in'], 'is inside --from'),
    ([f'--from={folder}', target, '--config=cifar10'], 'images of 32x32x3'),
    ([f'--from={folder}', target, '--step=-1'], '--step'),
    ([f'--from={tmp_path}/model.ckpt-3', target], 'give --config=cifar10'),
    ([f'--from={folder}'], '--to is missing'),
  ):
    result = convert(*arguments)
    assert (result.code, result.out) == (2, ''), arguments
    (line,) = result.err.splitlines()
    assert must in line
    assert not (tmp_path / 'new').exists()


def test_a_network_that_diffusers_has_not_is_told():
  config = {
    'data': {'image_size': 16, 'channels': 1},
    'conditioning': {'name': 'none'}, 'loss': {'variance': 'fixed'},
    'model': {
      'name': 'unet', 'style': 'ddpm', 'details': {}, 'time_scale': 1.0,
      'channels': 8, 'multipliers': [1, 2], 'num_blocks': 1,
      'attention_resolutions': [16], 'num_heads': 2, 'head_channels': 0,
      'num_groups': 4, 'dropout': 0.0,
    },
  }  # fmt: skip
  with pytest.raises(UserError, match='num_heads=2'):
    unets.unet_of(config)
  config['model'] |= {'num_heads': 1, 'multipliers': [2, 4]}
  with pytest.raises(UserError, match=r'multipliers=\[2, 4\]'):
    unets.unet_of(config)
  for changes, must in (
    (
      {'style': 'ddpmpp'},
      'style=ddpmpp: a UNet2DModel has no up_attention=last',
    ),
    ({'details': {'sinusoid': 'fourier'}}, 'has no sinusoid=fourier'),
    ({'time_scale': 2.0}, 'time_scale=2.0'),
    ({'name': 'dit'}, 'name=dit: only a unet'),
  ):
    with pytest.raises(UserError, match=must):
      unets.unet_of({**config, 'model': {**config['model'], **changes}})


@pytest.mark.parametrize(
  ('changes', 'theirs'),
  [
    ({'process.schedule': 'cosine'}, {'beta_schedule': 'squaredcos_cap_v2'}),
    ({'process.schedule': 'quadratic'}, {'beta_schedule': 'scaled_linear'}),
    ({'process.zero_snr': True}, {'rescale_betas_zero_snr': True}),
    ({'loss.variance': 'learned'}, {'variance_type': 'learned_range'}),
    ({'process.schedule': 'edm'}, 'process.schedule=edm'),
    ({'process.shift': 2.0}, r'process.shift=2.0'),
    (
      {'loss.prediction': 'flow'},
      'loss.prediction=flow: .* only has eps, x0, v',
    ),
  ],
)
def test_schedulers_of_other_processes(changes, theirs):
  config = digits.get_config()
  config.update_from_flattened_dict(changes)
  if isinstance(theirs, str):
    with pytest.raises(UserError, match=theirs):
      settings.scheduler_of(config)
    return
  found = settings.scheduler_of(config)
  assert found.items() >= theirs.items()
  back = settings.process_of(found, 'it')
  for key, value in changes.items():
    group, name = key.split('.')
    known = {'quadratic': 'scaled_linear'}.get(value, value)
    if key == 'loss.variance':  # the network says so, see below
      group = 'sample'
    assert back[group][name] == known


def test_a_learned_variance_comes_in_and_goes_out(tmp_path):
  """Twice the outputs, and the scheduler's variance_type."""
  changes = {'out_channels': 6, 'variance_type': 'learned_range'}
  shapes = DESCRIBED['adm']['tensors']
  twice = {
    n: [6, *s[1:]] for n, s in shapes.items() if n.startswith('conv_out')
  }
  tensors = pipelines.random_tensors(shapes | twice)
  found = diffusers.read(folder_of('adm', tmp_path, tensors, **changes))
  assert found.config['loss'] == {'variance': 'learned', 'prediction': 'eps'}
  assert found.config['sample']['variance'] == 'learned'
  assert unets.unet_of(found.config)['out_channels'] == 6
  assert found.notes == [
    'the last of 4 class embeddings is used as that of no label'
  ]


# --- DDPM's own --------------------------------------------------------------


def official_shapes(size, channels, multipliers, num_blocks, attends):
  """Names and shapes of DDPM's variables, as its code builds the network.

  Followed from the scopes of the authors' own code (names are facts), with
  nothing taken from ours: {name: shape}.
  """
  there = {}

  def linear(name, inputs, outputs, *window):
    there[f'{name}/W'] = (*window, inputs, outputs)
    there[f'{name}/b'] = (outputs,)

  def norm(name, width):
    there[f'{name}/gamma'] = there[f'{name}/beta'] = (width,)

  def block(name, inputs, outputs):
    norm(f'{name}/norm1', inputs)
    linear(f'{name}/conv1', inputs, outputs, 3, 3)
    linear(f'{name}/temb_proj', 4 * channels, outputs)
    norm(f'{name}/norm2', outputs)
    linear(f'{name}/conv2', outputs, outputs, 3, 3)
    if inputs != outputs:
      linear(f'{name}/nin_shortcut', inputs, outputs)

  def attention(name, width):
    norm(f'{name}/norm', width)
    for part in ('q', 'k', 'v', 'proj_out'):
      linear(f'{name}/{part}', width, width)

  linear('temb/dense0', channels, 4 * channels)
  linear('temb/dense1', 4 * channels, 4 * channels)
  linear('conv_in', 3, channels, 3, 3)
  skips, width, last = [channels], channels, len(multipliers) - 1
  for level, multiplier in enumerate(multipliers):
    for i in range(num_blocks):
      block(f'down_{level}/block_{i}', width, channels * multiplier)
      width = channels * multiplier
      if size // 2**level in attends:
        attention(f'down_{level}/attn_{i}', width)
      skips.append(width)
    if level != last:
      linear(f'down_{level}/downsample/conv', width, width, 3, 3)
      skips.append(width)
  block('mid/block_1', width, width)
  attention('mid/attn_1', width)
  block('mid/block_2', width, width)
  for level in reversed(range(last + 1)):
    for i in range(num_blocks + 1):
      inputs = width + skips.pop()
      width = channels * multipliers[level]
      block(f'up_{level}/block_{i}', inputs, width)
      if size // 2**level in attends:
        attention(f'up_{level}/attn_{i}', width)
    if level != 0:
      linear(f'up_{level}/upsample/conv', width, width, 3, 3)
  norm('norm_out', width)
  linear('conv_out', width, 3, 3, 3)
  return there


@pytest.mark.parametrize(
  ('size', 'multipliers', 'count'),
  [(32, (1, 2, 2, 2), 35_746_307), (256, (1, 1, 2, 2, 4, 4), 113_673_219)],
)
def test_each_variable_of_ddpm_has_its_place(size, multipliers, count):
  shapes = official_shapes(size, 128, multipliers, 2, (16,))
  assert sum(map(np.prod, shapes.values())) == count
  model = models.create(
    'unet', (size, size, 3), channels=128, multipliers=multipliers,
    num_blocks=2, attention_resolutions=(16,),
  )  # fmt: skip
  abstract = jax.eval_shape(model.init, jax.random.key(0))
  # One number is enough to tell an array from the others.
  tensors = {
    name: np.broadcast_to(np.float32(i), shape)
    for i, (name, shape) in enumerate(shapes.items())
  }
  params = models.named(official.to_params(tensors, abstract, 'it'))
  numbers = list(shapes)
  placed = {name: numbers[int(x.flat[0])] for name, x in params.items()}
  assert len(set(placed.values())) == len(shapes)
  # The first on the way up is the deepest, here and there.
  deepest = len(multipliers) - 1
  assert placed['up/0/blocks/2/conv1/kernel'] == f'up_{deepest}/block_2/conv1/W'
  assert placed['middle_attention/out/kernel'] == 'mid/attn_1/proj_out/W'
  assert placed['time2/bias'] == 'temb/dense1/b'


def test_a_checkpoint_asks_for_tensorflow(tmp_path, monkeypatch):
  (tmp_path / 'model.ckpt-3.index').write_bytes(b'')
  monkeypatch.setattr(official.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"'diffusion_jax\[prepare\]'"):
    official.read(tmp_path / 'model.ckpt-3')


# CIFAR-10's config, made small.
SMALL = {
  'model.channels': 8,
  'model.num_groups': 4,
  'model.num_blocks': 1,
}


@pytest.mark.prepare
def test_a_checkpoint_of_tensorflow_becomes_a_run(tmp_path):
  """With the names of DDPM's, random values, and Adam's moments beside them."""
  import tensorflow

  v1 = tensorflow.compat.v1
  shapes = official_shapes(32, 8, (1, 2, 2, 2), 1, (16,))
  rng = np.random.default_rng(0)
  kept = {}
  with tensorflow.Graph().as_default(), v1.Session() as session:
    for name, shape in shapes.items():
      for suffix in ('', '/ExponentialMovingAverage', '/Adam', '/Adam_1'):
        value = rng.standard_normal(shape).astype(np.float32)
        kept[name + suffix] = value
        v1.get_variable(f'model/{name}{suffix}', initializer=value)
    v1.get_variable('global_step', initializer=np.int64(790_000))
    session.run(v1.global_variables_initializer())
    saver = v1.train.Saver()
    prefix = saver.save(session, str(tmp_path / 'model.ckpt'), 790_000)
  assert prefix.endswith('model.ckpt-790000')

  config = [f'--config.{key}={value}' for key, value in SMALL.items()]
  arguments = [f'--from={prefix}', '--config=cifar10', *config]
  run = converted(prefix, tmp_path / 'run', *arguments[1:])
  for ema, suffix in ((True, '/ExponentialMovingAverage'), (False, '')):
    trained = load(run, ema=ema)
    assert trained.step == 790_000
    params = models.named(trained.params['net'])
    for ours, theirs in (
      ('up/0/blocks/1/shortcut/kernel', 'up_3/block_1/nin_shortcut/W'),
      ('down/1/attentions/0/key/kernel', 'down_1/attn_0/k/W'),
      ('middle1/norm2/scale', 'mid/block_1/norm2/gamma'),
      ('conv_in/kernel', 'conv_in/W'),
      ('time1/kernel', 'temb/dense0/W'),
    ):
      np.testing.assert_array_equal(params[ours], kept[theirs + suffix])
  assert load(run).sample(2, num_steps=2).shape == (2, 32, 32, 3)

  wrong = convert(*arguments[:-1], f'--to={tmp_path}/other')
  assert wrong.code == 2
  assert 'tensors missing' in wrong.err
  with open(f'{prefix}.index', 'r+b') as file:
    file.truncate(100)
  damaged = convert(*arguments, f'--to={tmp_path}/other')
  assert damaged.code == 2
  assert 'is damaged' in damaged.err
  assert not (tmp_path / 'other').exists()
