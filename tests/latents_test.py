"""Runs in the latents of a frozen autoencoder."""

import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from diffusion_jax import conditioning, data, load, runs
from diffusion_jax.codecs import latents as codec
from diffusion_jax.conditioning import Conditioner
from diffusion_jax.configs import default
from diffusion_jax.data import latents as cache
from diffusion_jax.data import pipeline
from diffusion_jax.process import noise
from diffusion_jax.runs import (
  draw,
  encoding,
  frozen,
  kept_parts,
  preparation,
  programs,
  recipe,
  validation,
)
from diffusion_jax.samplers import plan
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, checksum, sharding

SHAPE, COUNT, BATCH = (8, 8, 3), 20, 8
CODER = {
  'name': 'autoencoder', 'channels': 4, 'multipliers': [1, 2], 'num_blocks': 1,
  'latent_channels': 2, 'num_groups': 2, 'attention': False,
  'attention_resolutions': [], 'quant_conv': True, 'hybrid': 0,
  'regulariser': 'kl', 'codes': 16, 'code_channels': 0, 'levels': [5, 3],
  'decoder': True, 'dtype': 'float32',
}  # fmt: skip


def images() -> np.ndarray:
  """Smooth ones: latents then differ more between than within channels."""
  rng = np.random.default_rng(0)
  rough = rng.integers(0, 256, (COUNT, 2, 2, 3), np.uint8)
  return rough.repeat(4, axis=1).repeat(4, axis=2)


def autoencoder(folder, seed=0, size=8, **options) -> Path:
  """The run of an autoencoder with random weights."""
  config = default.get_config()
  config.codec = ConfigDict({**CODER, **options})
  config.data.image_size = size
  files.make(folder)
  runs.write_config(folder, config)
  coder = codec.coder_of((size, size, 3), config.codec.to_dict())
  params = coder.init(jax.random.key(seed))
  checkpoint.save_params(folder / 'checkpoints', 7, {'codec': params})
  return folder


def config_of(tmp_path, folder, **changes) -> ConfigDict:
  """The config of a tiny run in its latents."""
  np.savez(tmp_path / 'images.npz', images=images())
  config = default.get_config()
  config.codec = default.latents()
  config.update_from_flattened_dict({
    'codec.path': str(folder), 'data.name': 'arrays',
    'data.path': str(tmp_path / 'images.npz'), 'data.image_size': 8,
    'data.heldout_every': 5, 'sample.clip': False, 'batch_size': BATCH,
    'sample.num_steps': 2, 'sample.num_images': 4, 'optim.warmup_steps': 0,
    'optim.lr': 1e-2, 'model.name': 'dense', 'model.channels': 8,
    'model.num_groups': 2, 'model.multipliers': (1,),
    'model.attention_resolutions': (),
    'ema.decay': 0.5, **changes,
  })  # fmt: skip
  return config


class Run:
  """A run in latents, in this process."""

  def __init__(self, config, workdir):
    self.config, self.mesh = config, tiny.one_device()
    frozen.complete(config, workdir)
    splits, self.parts = preparation.prepare(
      config, self.mesh, workdir, data.splits(config.data)
    )
    self.made, self.source = recipe.create(config, self.parts), splits[0]
    self.program = programs.create(config, self.mesh, self.made)

  def write(self, workdir):
    runs.write_config(workdir, self.config)
    kept_parts.write(workdir, self.parts)
    return self

  def train(self, steps=3) -> list[float]:
    batches = pipeline.batches(
      self.source, batch_size=BATCH, seed=0, flip=True, end_step=steps,
      sharding=sharding.batch_sharding(self.mesh),
    )  # fmt: skip
    losses, self.state = [], self.program.create_state(self.mesh)
    for batch in batches:
      self.state, found = self.program.step_fn(
        self.state, self.program.frozen, batch
      )
      losses.append(float(found['loss']))
    return losses


@pytest.mark.slow
def test_pictures_can_be_channels_of_the_size_of_the_latents(
  tmp_path, monkeypatch
):
  """By a conditioner of one's own; in another size they are refused."""

  def small(num_classes, drop, side=4):
    def condition(params, rows, keys):
      if 'image' not in rows:
        return {'channels': jnp.zeros((1, 1, 1, 3))}
      x = rows['image'].reshape(-1, side, 8 // side, side, 8 // side, 3)
      return {'channels': x.mean((2, 4)) / 127.5 - 1}

    return Conditioner(condition, {'channels': 3})

  names = {'small': small, 'large': functools.partial(small, side=8)}
  for name, create in names.items():
    monkeypatch.setitem(conditioning.CONDITIONERS, name, create)
  unet = {
    'model.name': 'unet', 'model.channels': 4, 'model.num_blocks': 1,
    'codec.scale': 1.0,
  }  # fmt: skip
  folder = autoencoder(tmp_path / 'ae')
  config = config_of(tmp_path, folder, **unet)
  config.conditioning.name = 'small'
  program = Run(config, None).program
  rows = {'image': jax.ShapeDtypeStruct((BATCH, *SHAPE), np.uint8)}
  state = program.abstract
  kernel = state.params['net']['conv_in']['kernel']
  assert kernel.shape[-2] == 2 + 3
  after, _ = jax.eval_shape(program.step_fn, state, program.frozen, rows)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  params = {**program.frozen, **state.params}
  indices = jax.ShapeDtypeStruct((4,), np.uint32)
  of_four = {'image': jax.ShapeDtypeStruct((4, *SHAPE), np.uint8)}
  for given in ({}, of_four):
    drawn, _ = jax.eval_shape(program.draw_fn, params, indices, given)
    assert drawn.shape == (4, *SHAPE)

  config.conditioning.name = 'large'
  program = Run(config, None).program
  with pytest.raises(UserError, match=r'is of 8x8, but .* of 4x4'):
    jax.eval_shape(program.step_fn, state, program.frozen, rows)


@pytest.mark.parametrize(
  'regulariser', ['kl', 'vq', pytest.param('fsq', marks=pytest.mark.slow)]
)
def test_latents_have_unit_variance_and_come_back(tmp_path, regulariser):
  """Those of codes before they are codes; the decoder sees codes."""
  folder = autoencoder(tmp_path / 'ae', regulariser=regulariser)
  run = Run(config_of(tmp_path, folder), None)
  own, coder = run.made.codec, encoding.coder_of(run.config)
  params = run.parts.params
  part = jax.device_get(params['codec'])
  rows = {'image': jnp.asarray(images()[np.arange(COUNT) % 5 != 4])}
  keys = jax.random.split(jax.random.key(0), len(rows['image']))

  @jax.jit
  def all_of(params, rows, keys):
    x0 = own.encode(params, rows, keys)
    z = codec.sample(coder, codec.moments_of(coder, params, rows), keys)
    snapped = coder.snap(params['codec'], z)
    data = coder.decode(params['codec'], snapped)
    return x0, z, snapped, data, own.decode(params, x0, keys)

  x0, z, snapped, there, got = jax.device_get(all_of(params, rows, keys))
  assert x0.shape == (16, 4, 4, 2) == (16, *own.shape)
  # Over the posterior, of which this is one sample for each number.
  np.testing.assert_allclose(x0.mean((0, 1, 2)), 0, atol=0.2)
  np.testing.assert_allclose(x0.std((0, 1, 2)), 1, atol=0.2)
  assert '16 training images' in run.parts.facts['codec']['scaled_by']
  np.testing.assert_allclose(x0 * part['scale'] + part['shift'], z, atol=1e-5)
  assert (np.abs(snapped - z).max() > 1e-3) == (regulariser != 'kl')
  want = np.clip((there + 1) * 127.5, 0, 255)
  np.testing.assert_allclose(got, want, atol=2e-3)


def test_a_diffusion_autoencoder_decodes_by_its_own_network(tmp_path):
  folder = tmp_path / 'ae'
  config = default.get_config()
  config.codec = ConfigDict({**CODER, 'regulariser': 'norm', 'decoder': False})
  config.loss = default.dito()
  config.loss.decode_steps = 2
  config.process.schedule = 'flow'
  config.data.image_size = 8
  config.model.update({
    'channels': 4, 'multipliers': (1,), 'num_blocks': 1, 'num_groups': 2,
    'attention_resolutions': (),
  })  # fmt: skip
  files.make(folder)
  runs.write_config(folder, config)
  theirs = recipe.create(runs.read_config(folder))
  trained = jax.jit(theirs.init)(jax.random.key(0))
  checkpoint.save_params(folder / 'checkpoints', 7, trained)

  run = Run(config_of(tmp_path, folder), None)
  params = run.parts.params
  assert params['codec'].keys() == {'encoder', 'net', 'shift', 'scale'}
  rows = {'image': jnp.asarray(images()[:4])}
  keys = jax.random.split(jax.random.key(1), 4)

  @jax.jit
  def both(params, trained, rows, keys):
    x0 = run.made.codec.encode(params, rows, keys)
    z = theirs.codec.encode(trained, rows, keys)
    return (
      run.made.codec.decode(params, x0, keys),
      theirs.codec.decode(trained, z, keys),
    )

  got, want = both(params, trained, rows, keys)
  np.testing.assert_allclose(got, want, atol=0.05)
  assert np.ptp(want) > 50


def write_cache(run, output) -> int:
  """Encodes the data of a run."""
  splits = data.splits(run.config.data)
  return encoding.write(run.config, splits, run.parts, run.mesh, output)


def test_the_copy_is_enough_and_cached_latents_train_alike(tmp_path):
  folder, workdir = autoencoder(tmp_path / 'ae'), tmp_path / 'run'
  run = Run(config_of(tmp_path, folder), workdir).write(workdir)
  before = checksum.of(run.program.frozen)
  losses = run.train()
  assert checksum.of(run.program.frozen) == before
  assert run.state.params.keys() == {'net'}
  assert write_cache(run, tmp_path / 'cache') == 2

  checkpoint.save_params(workdir / 'checkpoints', 3, run.state.params)
  shutil.move(folder, tmp_path / 'moved')
  again = Run(config_of(tmp_path, folder), workdir)
  assert again.parts.facts['codec']['from'] == str(folder)
  assert checksum.of(again.parts.params) == before
  assert write_cache(again, tmp_path / 'cache') == 0

  # The folder of the autoencoder has moved: nothing is encoded anew.
  changes = {'codec.cache': str(tmp_path / 'cache')}
  cached = Run(config_of(tmp_path, folder, **changes), workdir)
  assert cached.source[0].keys() == {'moments', 'label'}
  np.testing.assert_allclose(cached.train(), losses, rtol=3e-6)
  fresh = Run(config_of(tmp_path, tmp_path / 'moved', **changes), None)
  for name in ('shift', 'scale'):
    np.testing.assert_allclose(
      *(one.parts.params['codec'][name] for one in (fresh, run)), rtol=1e-5
    )


def test_an_interrupted_encoding_goes_on_and_mends_what_is_damaged(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(cache, 'PER_FILE', 6)
  folder, output = autoencoder(tmp_path / 'ae'), tmp_path / 'cache'
  config = config_of(tmp_path, folder)
  frozen.complete(config)
  mesh = tiny.one_device()
  given = config, data.splits(config.data), frozen.load(config, mesh), mesh
  assert encoding.write(*given, output) == 4  # 16 and 4 images
  names = sorted(str(x.relative_to(output)) for x in output.rglob('*.npy'))
  assert names[1] == 'train/000000000-000000005.npy'
  kept = {name: (output / name).read_bytes() for name in names}
  (output / names[0]).unlink()
  (output / names[2]).write_bytes(kept[names[2]][:-4] + b'abcd')
  with pytest.raises(UserError, match='cannot be read'):
    opened(config, output, given[2])
  assert encoding.write(*given, output) == 2
  assert {name: (output / name).read_bytes() for name in names} == kept
  train = opened(config, output, given[2])
  assert len(train) == 16
  assert train[13]['moments'].shape == (2, 4, 4, 4)


def opened(config, output, parts):
  """Cached training latents, after the held-out ones."""
  train, heldout = data.splits(config.data)
  given = {'weights': encoding.fingerprint(parts.params), 'origin': 'here'}
  cache.opened(output, 'test', heldout, flip=False, **given)
  return cache.opened(output, 'train', train, flip=True, **given)


def test_mistakes_take_one_line(tmp_path):
  folder = autoencoder(tmp_path / 'ae')
  own, mesh = config_of(tmp_path, folder), tiny.one_device()

  def prepare(config, workdir):
    frozen.complete(config, workdir)
    return preparation.prepare(config, mesh, workdir, data.splits(config.data))

  def told(config, workdir=None) -> str:
    with pytest.raises(UserError) as error:
      prepare(config, workdir)
    assert '\n' not in str(error.value)
    return str(error.value)

  pixels = tmp_path / 'pixels'
  pixels.mkdir()
  runs.write_config(pixels, default.get_config())
  large = autoencoder(tmp_path / 'large', size=16)
  other = autoencoder(tmp_path / 'other', seed=1)
  for path, words in (
    ('', ['codec.path is empty', "codec.name='autoencoder'"]),
    (tmp_path / 'none', ['codec.path=', 'holds no run']),
    (pixels, ["codec.name='pixels'", "give one with codec.name='autoencoder'"]),
    (large, ['images of 16x16x3', 'data are 8x8x3', 'data.image_size']),
  ):
    line = told(config_of(tmp_path, path))
    assert all(word in line for word in words), line
  assert 'codec.step=5' in told(
    config_of(tmp_path, folder, **{'codec.step': 5})
  )

  # The run of `own`, which may begin anew until it is trained for a step.
  workdir = tmp_path / 'run'
  _, parts = prepare(own, None)
  files.make(workdir)
  runs.write_config(workdir, own)
  kept_parts.write(workdir, parts)
  _, again = prepare(
    config_of(tmp_path, folder, **{'codec.scale': 2.0}), workdir
  )
  np.testing.assert_array_equal(again.params['codec']['scale'], 2)
  checkpoint.save_params(workdir / 'checkpoints', 1, {'net': {'a': np.ones(2)}})
  line = told(config_of(tmp_path, other), workdir)
  assert 'was trained in the latents of' in line
  assert 'new workdir' in line
  moved = shutil.copytree(folder, tmp_path / 'moved')
  same = config_of(tmp_path, moved)
  frozen.complete(same, workdir)
  assert (
    frozen.load(same, mesh, workdir).facts
    == frozen.load(own, mesh, workdir).facts
  )

  assert 'codec.scale=2.0: codec.path=' in told(
    config_of(tmp_path, workdir, **{'codec.scale': 2.0})
  )

  # Latents of others.
  output = tmp_path / 'cache'
  assert 'holds no latents' in told(
    config_of(tmp_path, folder, **{'codec.cache': str(output)})
  )
  own.data.flip = False
  encoding.write(own, data.splits(own.data), parts, mesh, output)
  given = {'codec.cache': str(output)}
  assert 'no mirrored latents' in told(config_of(tmp_path, folder, **given))
  assert 'of other weights' in told(config_of(tmp_path, other, **given))
  given |= {'data.heldout_every': 4}
  assert 'other images' in told(config_of(tmp_path, folder, **given))
  (workdir / 'parts' / 'codec.safetensors').write_bytes(b'')
  assert 'not what was saved' in told(config_of(tmp_path, folder), workdir)
  (workdir / 'parts' / 'codec.json').write_text('{')
  assert 'unreadable' in told(config_of(tmp_path, folder), workdir)
  (workdir / 'parts' / 'codec.json').unlink()
  assert 'codec.json is missing' in told(config_of(tmp_path, folder), workdir)
  with pytest.raises(UserError, match=r'codec\.json is missing: copy'):
    load(workdir)


def test_what_latents_do_not_have_is_refused(tmp_path):
  config = config_of(tmp_path, autoencoder(tmp_path / 'ae'))
  frozen.complete(config)
  assert validation.check_network(config) == []
  for change, words in (
    ({'sample.clip': True}, 'sample.clip=True: latents have no bound'),
    ({'data.augment': 0.1, 'codec.cache': 'a'}, 'set data.augment=0.0'),
    ({'codec.scale': -1.0}, 'codec.scale=-1.0'),
    ({'codec.decode_rows': 0}, 'codec.decode_rows=0'),
    # The network is of maps of 4x4.
    ({'model.multipliers': (1,) * 4}, 'the size of the latents=4: 4 model.'),
  ):
    other = ConfigDict(config.to_dict())
    other.update_from_flattened_dict(change)
    assert words in ' '.join(validation.check_network(other)), change
  with pytest.raises(UserError, match='no bound to clip to'):
    plan.for_run(runs.to_plain(config), clip=True)


def test_a_choice_by_a_flag_lacks_keys(tmp_path):
  config = config_of(tmp_path, tmp_path)
  config.codec = ConfigDict({'name': 'latents'})
  frozen.complete(config)
  assert 'codec.path' in validation.check_network(config)[0]


def test_samples_are_decoded_in_groups(tmp_path):
  """On a mesh, too; in the order of the samples, and the same as at once."""
  coder = codec.coder_of(SHAPE, CODER)
  part = coder.init(jax.random.key(0))
  part |= {'shift': jnp.ones(2), 'scale': jnp.full(2, 2.0)}
  x0 = jax.random.normal(jax.random.key(1), (8, *coder.shape))
  keys = jax.random.split(jax.random.key(2), 8)
  found = {}
  for rows, sizes in ((1, (1, 1, 1)), (8, (1, 1, 1)), (2, (2, 1, 1))):
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: sizes[0]])
    made = codec.create(SHAPE, coder, decode_rows=rows)
    fn = jax.jit(lambda p, x, k: draw.in_groups(made, p, x, k, mesh))  # noqa: B023
    given = {'codec': part}, *sharding.put_batch((x0, keys), mesh)
    found[rows] = np.asarray(fn(*given))
    text = fn.lower(*given).as_text()
    assert ('stablehlo.while' in text) == (rows < 8)
  np.testing.assert_allclose(found[1], found[8], atol=1e-3)
  np.testing.assert_allclose(found[2], found[8], atol=1e-3)
  assert np.ptp(found[8]) > 1


def test_each_device_decodes_its_own_samples(monkeypatch):
  """Where parameters are split over the devices, too.

  XLA then splits the decoder's channels, if it is left the choice, and all
  images are on every device.
  """
  monkeypatch.setattr(sharding, 'SMALL', 1)
  coder = codec.coder_of(SHAPE, CODER | {'channels': 16, 'num_groups': 8})
  part = coder.init(jax.random.key(0))
  part |= {'shift': jnp.ones(2), 'scale': jnp.full(2, 2.0)}
  mesh = sharding.make_mesh(1, 8, 1, devices=jax.devices()[:8])
  params = sharding.abstract({'codec': part}, mesh)
  made = codec.create(SHAPE, coder)

  @jax.jit
  def draw_fn(params, indices):
    first, later = draw.sample_keys(0, indices)
    x = noise.normal(first, coder.shape, jnp.float32)
    x, _ = jax.lax.scan(lambda x, _: (x / 2, None), x, length=3)
    return draw.in_groups(made, params, x, later, mesh)

  indices = sharding.padded_indices(8, mesh)
  text = draw_fn.lower(params, indices).compile().as_text()
  assert 'f32[1,8,8,' in text
  assert 'f32[8,8,8,' not in text
