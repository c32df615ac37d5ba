"""ControlNets: the network, its folders, and what it adds to a U-Net."""

import jax
import numpy as np
import pytest
import tiny
from folders_of_diffusers import network_folder
from parity import conditional, unet
from parity import control as parity
from PIL import Image

from diffusion_jax import models
from diffusion_jax.cli import config_files
from diffusion_jax.conditioning import conditioner
from diffusion_jax.configs import default
from diffusion_jax.models import control
from diffusion_jax.runs import controlled, draw
from diffusion_jax.runs.trained import Trained
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding
from diffusion_jax.weights import control as weights

SHAPE = (8, 8, 3)  # of a run in pixels, so that no picture is halved
WIDTH = 6  # of tokens
PICTURE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(SHAPE)


def settings(**changes) -> dict:
  own = {
    'in_channels': 3, weights.WIDTHS: [4], 'block_out_channels': [4],
    'down_block_types': ['CrossAttnDownBlock2D'],
  }  # fmt: skip
  return {**parity.settings('sd1'), **own, **changes}


def config_of(**changes) -> dict:
  """Of a run that the ControlNet of `settings` is for."""
  options, _ = weights.network_of(settings(), 'settings', 3)
  config = config_files.load('configs/digits.py')
  with config.ignore_type(), config.unlocked():
    config.conditioning = default.text()
    config.update_from_flattened_dict({
      **{f'model.{k}': x for k, x in options.items() if k != 'widths'},
      'model.details': dict(options['details']), 'data.image_size': 8,
      'data.channels': 3, 'conditioning.width': WIDTH,
      'conditioning.num_heads': 2, **changes,
    })  # fmt: skip
  return config.to_dict()


@pytest.fixture(scope='module')
def written():
  """Random parameters, of which none are zero."""
  options, doors = weights.network_of(settings(), 'settings', 3)
  net = control.create(image_shape=SHAPE, doors=doors, **options)
  return unet.random_params(net)


@pytest.fixture(scope='module')
def folder(written, tmp_path_factory):
  path = tmp_path_factory.mktemp('folder') / 'control'
  return network_folder(path, settings(), parity.tensors(written, False))


def test_a_folder_is_read(folder, written, tmp_path):
  found = controlled.read(folder, PICTURE, 0.5, config_of())
  part = dict(found.params)
  assert part.pop('scale') == 0.5
  np.testing.assert_array_equal(
    part.pop('picture'), np.float32(PICTURE / 255)[None]
  )
  jax.tree.map(np.testing.assert_array_equal, part, written)
  assert found.facts.keys() == {'sha256', 'picture_sha256', 'scale'}
  # A file, and one of another size but the same proportions.
  Image.fromarray(PICTURE).save(tmp_path / 'picture.png')
  again = controlled.read(folder, tmp_path / 'picture.png', 0.5, config_of())
  assert again.facts == found.facts
  assert again.control is found.control
  large = np.full((16, 16), 51, np.uint8)
  again = controlled.read(folder, large, 0.5, config_of())
  np.testing.assert_array_equal(again.params['picture'], np.float32(0.2))
  assert again.params['picture'].shape == (1, *SHAPE)
  # Of images of another size.
  again = controlled.read(folder, PICTURE[:, :4], 1, config_of(), '16x8')
  assert again.params['picture'].shape == (1, 16, 8, 3)


def test_zeros_add_nothing(folder):
  config, mesh = config_of(), sharding.make_mesh(devices=jax.devices()[:1])
  options = {k: x for k, x in config['model'].items() if k != 'name'}
  model = models.create('unet', SHAPE, {'tokens': WIDTH}, **options)
  tokens = unet.normal('tokens', (1, 3, WIDTH))
  made = tiny.recipe(model, SHAPE)._replace(
    conditioner=conditioner.Conditioner(
      lambda params, rows, keys: {'tokens': tokens}, {'tokens': WIDTH}, 0.1
    )
  )
  params = {'net': sharding.placed(unet.random_params(model), mesh)}
  plain = Trained(
    folder, config, 0, True, made, params, mesh, draw.compiled(made, mesh)
  )
  xt = unet.normal('xt', (2, *SHAPE))
  wanted = plain.denoise(xt, 500).eps

  none = plain.with_control(folder, PICTURE, 0.0)
  np.testing.assert_array_equal(none.denoise(xt, 500).eps, wanted)
  steered = plain.with_control(folder, PICTURE)
  assert np.abs(steered.denoise(xt, 500).eps - wanted).max() > 0.01
  other = plain.with_control(folder, PICTURE[::-1])
  difference = other.denoise(xt, 500).eps - steered.denoise(xt, 500).eps
  assert np.abs(difference).max() > 1e-3
  # New ones begin with convolutions of zeros.
  found = controlled.read(folder, PICTURE, 1.0, config)
  new = jax.device_get(found.control.init(jax.random.key(0)))
  new = controlled.applied(
    plain, found._replace(params={**found.params, **new})
  )
  np.testing.assert_array_equal(new.denoise(xt, 500).eps, wanted)

  assert none.compiled is steered.compiled is other.compiled is new.compiled
  assert [one['scale'] for one in none.about_changes['control']] == [0.0]
  hashes = {one.weights_sha256 for one in (plain, none, steered, other)}
  assert len(hashes) == 4
  assert plain.about_changes == {}


def test_a_picture_is_for_one_size(written):
  options, doors = weights.network_of(settings(), 'settings', 3)
  net = control.create(image_shape=SHAPE, doors=doors, **options)
  given = {**written, 'picture': np.zeros((1, *SHAPE), 'f4')}
  with pytest.raises(UserError, match=r'8x8.*16x8.*image_size'):
    jax.eval_shape(lambda x: control.hints([net], [x], (16, 8)), given)


@pytest.mark.parametrize(
  ('changes', 'told'),
  [
    ({'controlnet_conditioning_channel_order': 'bgr'}, 'must be "rgb"'),
    ({'global_pool_conditions': True}, 'global_pool_conditions is true'),
    ({'conditioning_channels': 1}, 'conditioning_channels is 1'),
    ({'mid_block_type': None}, 'mid_block_type is null'),
    ({'_class_name': 'ControlNetUnionModel'}, '_class_name'),
    ({'num_control_type': 6}, 'num_control_type is 6, which is not known'),
    ({'in_channels': 1}, 'in_channels is 1, but the run diffuses 3'),
    ({weights.WIDTHS: 4}, 'must be a list'),
    ({'down_block_types': 'DownBlock2D'}, 'down_block_types'),
  ],
  ids=str,
)
def test_other_networks_are_refused(changes, told):
  with pytest.raises(UserError, match=told) as error:
    weights.network_of(settings(**changes), 'config.json', 3)
  assert '\n' not in str(error.value)


def test_mistakes_are_one_line(folder, written, tmp_path):
  text = tmp_path / 'text.png'
  text.write_text('no picture')
  less = parity.tensors(written, False)
  del less['controlnet_down_blocks.1.bias']
  less = network_folder(tmp_path / 'less', settings(), less)
  for path, picture, scale, changes, told in (
    (folder, PICTURE, float('nan'), {}, 'not a finite number'),
    (folder, PICTURE[:4], 1, {}, '8 wide and 4 high.*same proportions'),
    (folder, PICTURE / 255, 1, {}, 'float64'),
    (folder, tmp_path / 'none.png', 1, {}, 'not a file'),
    (folder, text, 1, {}, 'cannot be read'),
    (tmp_path / 'none', PICTURE, 1, {}, 'cannot be read'),
    (less, PICTURE, 1, {}, '1 tensors missing.*controlnet_down_blocks.1.bias'),
    (folder, PICTURE, 1, {'model.channels': 8}, 'this run has channels=8'),
    (folder, PICTURE, 1, {'conditioning.width': 8}, 'tokens of 6, this run'),
    (folder, PICTURE, 1, {'model.name': 'dit'}, 'for a U-Net'),
  ):
    with pytest.raises(UserError, match=told) as error:
      controlled.read(path, picture, scale, config_of(**changes))
    assert '\n' not in str(error.value)


@pytest.mark.parity
@pytest.mark.parametrize('name', parity.NAMES)
def test_equals_diffusers(name):
  maps, answer = parity.live(name)
  found = parity.residuals(name)
  assert len(found) == len(maps)
  for one, other in zip(found, maps, strict=True):
    assert conditional.error(one, other) < 1e-4
  steered = parity.steered(name, found)
  assert conditional.error(steered, answer) < 1e-4
  assert conditional.error(conditional.ours(name), answer) > 0.01


@pytest.mark.parity
def test_names_and_shapes_of_the_published_network():
  import diffusers
  import torch

  with torch.device('meta'):
    theirs = diffusers.ControlNetModel(cross_attention_dim=768)
  told = dict(theirs.config)
  told['_class_name'] = weights.CLASS
  told = {k: list(x) if isinstance(x, tuple) else x for k, x in told.items()}
  options, doors = weights.network_of(told, 'config.json', 4)
  net = control.create(image_shape=(64, 64, 4), doors=doors, **options)
  abstract = jax.eval_shape(net.init, jax.random.key(0))
  ours = {
    weights.name_of(name): x.size for name, x in models.named(abstract).items()
  }
  state = theirs.state_dict()
  assert ours == {name: x.numel() for name, x in state.items()}
  assert models.count(abstract) == 361_279_120
