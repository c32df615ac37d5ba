"""Images of other sizes than those that a network was trained on."""

import json

import binaries
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from latents_test import CODER
from ml_collections import ConfigDict
from PIL import Image

import diffusion_jax
from diffusion_jax import models, runs
from diffusion_jax.cli import config_files
from diffusion_jax.configs import default
from diffusion_jax.models import layers
from diffusion_jax.reporting import pictures
from diffusion_jax.runs import addresses, recipe, sizes
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint

# The middle attends, and the second of two levels.
UNET = {
  'model.channels': 8, 'model.multipliers': (1, 2), 'model.num_blocks': 1,
  'model.num_groups': 4, 'model.attention_resolutions': (4,),
}  # fmt: skip
HOW = {'sampler': 'ddim', 'grid': '400,200', 'clip': False}


class Filter(nnx.Module):
  """A convolution, which compiles in no time."""

  DOORS = ()

  def __init__(self, image_shape, *, doors, out_channels, rngs, **kwargs):
    self.layer = layers.conv(
      image_shape[-1], out_channels, dtype=jnp.float32, rngs=rngs
    )

  def __call__(self, xt, t, keys=None, cond=None):
    return self.layer(xt)


models.MODELS['filter'] = Filter


def plain(config, **changes) -> dict:
  """A config of the digits, as read from a run."""
  with config.ignore_type(), config.unlocked():
    config.update_from_flattened_dict(changes)
  return runs.to_plain(config)


def digits(**changes) -> dict:
  return plain(config_files.load('configs/digits.py'), **{**UNET, **changes})


def write(folder, config):
  """A run with random weights."""
  folder.mkdir()
  config = ConfigDict(config)
  runs.write_config(folder, config)
  shapes = jax.eval_shape(recipe.create(config).init, jax.random.key(0))
  params = tiny.random_arrays(shapes)
  checkpoint.save_params(folder / 'checkpoints', 7, params)
  return folder


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('sizes') / 'run'
  return write(folder, digits(**{'model.name': 'filter'}))


@pytest.fixture(scope='module')
def trained(workdir):
  return diffusion_jax.load(workdir)


def test_the_same_levels_attend():
  config = digits()
  for sides, at in (((16, 24), 8), ((12, 6), 3), ((2, 2), 1)):
    made = sizes.config_for(config, sides)
    assert made['model']['attention_resolutions'] == [at]
    assert runs.image_shape(made['data']) == (*sides, 1)
    changed = {'data.image_size', 'model.attention_resolutions'}
    assert runs.changes(config, made).keys() == changed
  assert digits() == config


def test_the_network_is_the_same_function(tmp_path):
  """A network of convolutions takes maps of any size as it is."""
  trained = diffusion_jax.load(write(tmp_path / 'run', digits()))
  x = np.random.default_rng(0).standard_normal((2, 16, 24, 1)).astype('float32')
  want = trained.denoise(x, 400)
  sized = trained.sized('16x24')
  got = sized.denoise(x, 400)
  assert sized.image_shape == sized.codec.shape == (16, 24, 1)
  np.testing.assert_allclose(got.x0, want.x0, atol=1e-5)
  assert np.std(want.eps) > 0.01
  assert trained.sized((16, 24)).compiled is sized.compiled
  assert trained.sized(8) is trained.sized(None) is trained


def test_a_sample_has_its_own_noise(trained):
  how = {**HOW, 'image_size': (16, 24)}
  images = trained.sample(3, **how)
  assert images.shape == (3, 16, 24, 1)
  again = trained.sample(2, first=1, **how)
  assert np.abs(images[1:].astype(int) - again).max() <= 1
  plan = trained.plan(**how)
  assert plan.image_size == (16, 24)
  drawn = np.asarray(trained.drawer(plan)(np.arange(3)))
  assert np.abs(images.astype(int) - drawn[:3]).max() <= 1
  assert trained.plan(**HOW, image_size=8) == trained.plan(**HOW)


def test_a_guide_draws_the_same_size(trained):
  how = {**HOW, 'image_size': 16, 'guidance': 2.0}
  own = trained.guided_by(trained).sample(1, **how)  # u = c
  alone = trained.sample(1, **HOW, image_size=16)
  assert np.abs(own.astype(int) - alone).max() <= 1


def test_the_store_and_its_pictures_know_the_size(workdir, capsys, tmp_path):
  how = [
    f'--workdir={workdir}', '--sampler=ddim', '--grid=400,200', '--noclip',
    '--batch_size=2', '--num_samples=2',
  ]  # fmt: skip
  more = '--png', '--image_size=16x24', '--interpolate=1', '--trajectory=1'
  binaries.here('sample', *how, *more)
  with Image.open(
    next((workdir / 'samples').rglob('interpolation.png'))
  ) as way:
    assert way.size == (3 * 96 + 4 * 8, 64 + 2 * 8 + 18)
  (output,) = (workdir / 'samples').glob('*size16x24*')
  facts = json.loads((output / 'store.json').read_text())
  assert facts['image_shape'] == [16, 24, 1]
  assert facts['model'] == runs.read_config(workdir)['model']
  assert np.load(output / 'samples.npz')['arr_0'].shape == (2, 16, 24, 1)
  path = output / 'png/000001.png'
  assert pictures.read(path).shape == (16, 24, 1)
  assert addresses.read(path).how['image_size'] == [16, 24]
  capsys.readouterr()
  binaries.here('sample', f'--like={path}', f'--output={tmp_path}', '--json')
  assert json.loads(capsys.readouterr().out)['largest_difference'] <= 1
  with pytest.raises(UserError, match='multiples of 2: use 10x8'):
    binaries.here('sample', *how, '--image_size=11x8')
  # The own size is no other one.
  binaries.here('sample', *how, '--image_size=8')
  binaries.here('sample', *how)
  assert len([*(workdir / 'samples').iterdir()]) == 2


MISTAKES = [
  (asked, 'give pixels, such as 48, or HEIGHTxWIDTH')
  for asked in ('', 'x', '8x', '8x8x8', '-8', '1e3', '²', 0, -8, 2**20, (8,),
                (8, 8, 8), (8, 0), 8.0, True, [True, 8], {8: 8}, b'88')
] + [
  (9, 'image_size=9x9: the network halves images 1 times'),
  ((16, 1), 'both sides must be multiples of 2: use 16x2'),
]  # fmt: skip


@pytest.mark.parametrize(('asked', 'told'), MISTAKES)
def test_a_wrong_size_is_one_line(trained, asked, told):
  with pytest.raises(UserError) as error:
    trained.plan(**HOW, image_size=asked)
  assert told in str(error.value)
  assert '\n' not in str(error.value)


def test_networks_that_know_their_size_are_refused():
  other = digits(**{'model.name': 'dit', 'model.patch_size': 2})
  with pytest.raises(UserError, match='the positions of 8x8 images alone'):
    sizes.check(other, (16, 16))
  other = digits(**{'model.name': 'dense', 'model.attention_resolutions': ()})
  told = r'hidden/kernel of \(257, 8\), and was trained with \(65, 8\)'
  with pytest.raises(UserError, match=told):
    sizes.check(other, (16, 16))


def test_the_errors_of_a_calibration_are_of_its_own_size(trained):
  for network, size in ((trained, 16), (trained.sized(16), None)):
    with pytest.raises(UserError, match='without another size than 8x8'):
      network.plan(sampler='analytic_ddim', num_steps=2, image_size=size)


# --- latents -----------------------------------------------------------------


def latents(**changes):
  config = default.get_config()
  config.codec = default.latents()
  coder = {**CODER, 'attention_resolutions': [4]}
  with config.ignore_type(), config.unlocked():
    config.codec.coder = ConfigDict(coder)
  return plain(config, **{
    **UNET, 'data.image_size': 8, 'sample.clip': False, **changes,
  })  # fmt: skip


def test_latents_and_their_decoder(tmp_path):
  config = latents()
  made = recipe.create(config)
  other = sizes.config_for(config, (16, 24))
  assert other['codec']['coder']['attention_resolutions'] == [8]
  assert other['model']['attention_resolutions'] == [8]  # of 4x4 to 8x12
  found = sizes.recipe_for(other, made)
  assert found.codec.shape == (8, 12, 2)
  params = tiny.random_arrays(made.frozen)
  x0 = np.random.default_rng(0).standard_normal((2, 8, 12, 2))
  x0, keys = x0.astype('float32'), jax.random.split(jax.random.key(0), 2)
  got = found.codec.decode(params, x0, keys)
  assert got.shape == (2, 16, 24, 3)
  assert np.std(got) > 10
  np.testing.assert_allclose(
    got, made.codec.decode(params, x0, keys), atol=1e-2
  )
  # Two halvings, one by each network.
  with pytest.raises(UserError, match=r'2 times.* multiples of 4: use 12x16'):
    sizes.config_for(config, (14, 16))


def test_a_decoder_by_diffusion_moves_its_levels_too():
  own = latents()
  decoding = {name: digits()[name] for name in ('model', 'process', 'loss')}
  decoding['loss'] = {**decoding['loss'], 'decode_steps': 2}
  own['codec']['decoding'] = decoding
  own['codec']['coder']['decoder'] = False
  made = sizes.config_for(own, (16, 24))
  assert made['codec']['decoding']['model']['attention_resolutions'] == [8]
  sizes.check(own, (16, 24))
  decoding['model']['name'] = 'dit'
  with pytest.raises(UserError, match='knows the positions'):
    sizes.config_for(own, (16, 24))
