"""The library: `diffusion_jax.load`, as the README shows it."""

import dataclasses
import json
import re

import binaries
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

import diffusion_jax
from diffusion_jax import samplers
from diffusion_jax.codecs import pixels
from diffusion_jax.guidance import clipping
from diffusion_jax.process import gaussian
from diffusion_jax.runs import draw, trajectories
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, sharding


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Where runs/digits is a tiny run."""
  folder = tmp_path_factory.mktemp('library')
  tiny.trained(folder / 'runs' / 'digits')
  return folder


@pytest.fixture(scope='module')
def trained(folder):
  return diffusion_jax.load(folder / 'runs' / 'digits')


def test_it_prints_in_one_line(trained):
  text = repr(trained)
  assert '\n' not in text
  assert len(text) < 200 + len(str(trained.workdir))
  for word in ('step=30', 'ema=True', '1,104 parameters', '(8, 8, 1)'):
    assert word in text


@pytest.mark.parametrize(
  ('mistake', 'must'),
  [
    (lambda t: diffusion_jax.load('/nothing'), 'workdir=/nothing holds no run'),
    (lambda t: t.at(11), 'step=11: there is no such checkpoint'),
    (lambda t: t.sample(sampler='dpm++'), 'did you mean dpmpp_2m?'),
    (lambda t: t.sample(num_samples=0), 'num_samples=0'),
    (
      lambda t: t.sample(sampler='predictor_corrector', corrector_steps=0),
      'use sampler=ancestral',
    ),
  ],
)
def test_mistakes_in_python_name_arguments_and_no_flags(trained, mistake, must):
  with pytest.raises(UserError) as error:
    mistake(trained)
  assert must in str(error.value)
  assert '--' not in str(error.value)


def test_the_readmes_lines_run(folder, monkeypatch):
  text = (binaries.ROOT / 'README.md').read_text()
  (block,) = re.findall(r'```python\n(from.*?)```', text, re.S)
  monkeypatch.chdir(folder)
  scope = {}
  exec(block, scope)
  assert scope['images'].shape == (16, 8, 8, 1)
  assert scope['varied'].shape == (16, 1, 8, 8, 1)
  assert Image.open(folder / 'digits.png').size[0] > 4 * 64
  assert len(block.strip().splitlines()) <= 12


@pytest.mark.slow
def test_the_lines_of_samplers_md_run(folder, monkeypatch):
  text = (binaries.ROOT / 'docs' / 'samplers.md').read_text()
  blocks = re.findall(r'```python\n(.*?)```', text, re.S)
  adaptive, inversion = (b for b in blocks if 'samplers' in b.split('\n')[2])
  monkeypatch.chdir(folder)
  scope = {}
  exec(adaptive, scope)
  assert scope['images'].shape == scope['x0'].shape == (16, 8, 8, 1)
  exec(inversion, scope)
  assert scope['noise'].shape == (4, 8, 8, 1)


def test_it_says_what_it_is(trained):
  assert trained.step == 30
  assert trained.image_shape == (8, 8, 1)
  assert trained.schedule.num_timesteps == 1000
  assert trained.prediction == 'eps'
  assert trained.ema


def test_samples_are_those_of_the_binary(trained, folder, tmp_path):
  result = binaries.run(
    'sample', f'--workdir={folder / "runs" / "digits"}', '--num_samples=6',
    '--sampler=ddim', '--num_steps=4', '--eta=0.3', '--seed=7',
    f'--output={tmp_path}',
  )  # fmt: skip
  assert result.code == 0, result.err
  drawn = np.load(tmp_path / 'samples.npz')['arr_0']
  images = trained.sample(6, sampler='ddim', num_steps=4, eta=0.3, seed=7)
  difference = np.abs(images.astype(int) - drawn)
  assert difference.max() <= 1
  assert images.std() > 20


def test_a_sample_has_an_address(trained):
  how = {'sampler': 'ddim', 'num_steps': 3}
  many = trained.sample(12, batch_size=5, **how).astype(int)
  some = trained.sample(4, first=6, **how)
  assert np.abs(many[6:10] - some).max() <= 1
  assert np.abs(many[:4] - some).max() > 1


def test_float_samples_are_those_that_were_not_rounded(trained):
  # Times so late that most pixels are neither black nor white.
  how = {'sampler': 'ddim', 'grid': '20,10', 'seed': 4}
  images = trained.sample(7, batch_size=5, **how)
  floats = trained.sample(7, batch_size=5, dtype='float32', **how)
  assert images.dtype == np.uint8
  assert floats.dtype == np.float32
  assert np.mean(floats != np.round(floats)) > 0.5
  np.testing.assert_array_equal(np.round(floats), images)


def test_the_default_is_the_papers_sampler(trained):
  plan = trained.plan(num_steps=10)
  assert plan.sampler == 'ancestral'
  assert plan.options == {'variance': 'fixedlarge'}
  config = {**trained.config, 'sample': {'variance': 'fixedsmall'}}
  other = samplers.plan.for_run(config)
  assert other.options == {'variance': 'fixedsmall'}
  assert other.num_steps == 1000


def test_the_denoiser_is_the_networks_prediction(trained):
  xt = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
  for t in (400, jnp.array([999, 0, 300])):
    got = trained.denoise(xt, t)
    eps = jax.jit(trained.model.apply)(
      trained.params['net'], xt, jnp.broadcast_to(jnp.asarray(t), (3,))
    )
    np.testing.assert_allclose(got.eps, eps, atol=1e-5)
    again = gaussian.q_sample(trained.schedule, got.x0, t, got.eps)
    np.testing.assert_allclose(again, xt, atol=1e-4)


def test_the_denoiser_goes_into_solve_and_guidance(trained):
  """Composed by hand, as `sample` composes it."""
  plan = trained.plan(sampler='ddim', num_steps=4)
  first, later = draw.sample_keys(0, jnp.arange(3, dtype=jnp.uint32))
  x = jnp.stack([jax.random.normal(key, (8, 8, 1)) for key in first])
  clipped = clipping.clip_x0(trained.denoise, trained.schedule)
  out = samplers.solve(
    plan.create(), clipped, trained.schedule, plan.grid, x, later
  )
  images = trained.sample(3, sampler='ddim', num_steps=4)
  assert (
    np.abs(np.asarray(pixels.to_uint8(out)).astype(int) - images).max() <= 1
  )


def test_weights_by_step_and_kind(folder, trained):
  workdir = folder / 'runs' / 'digits'
  raw = diffusion_jax.load(workdir, ema=False)
  early = diffusion_jax.load(workdir, step=10)
  assert early.step == 10
  hashes = {t.weights_sha256 for t in (trained, raw, early)}
  assert len(hashes) == 3


@pytest.mark.slow
def test_checkpoint_after_checkpoint_compiles_once(folder, trained):
  how = {'sampler': 'ddim', 'num_steps': 3, 'seed': 11}
  xt = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
  plan, last = trained.plan(**how), trained
  trained.denoise(xt, 7)
  denoisers = trained.compiled.denoise._cache_size()
  drawn = {30: trained.sample(5, **how)}
  for step in (10, 20):
    last = last.at(step)
    drawn[step] = last.sample(5, **how)
    last.denoise(xt, 7)
    assert last.step == step
    assert last.compiled is trained.compiled
    loaded = diffusion_jax.load(folder / 'runs' / 'digits', step)
    assert last.weights_sha256 == loaded.weights_sha256
    apart = drawn[step].astype(int) - loaded.sample(5, **how)
    assert np.abs(apart).max() <= 1
  assert np.abs(drawn[10].astype(int) - drawn[20]).max() > 1
  compiled = trained.compiled.drawer(json.dumps(plan), frames=(), dtype=None)
  assert compiled._cache_size() == 1
  assert trained.compiled.denoise._cache_size() == denoisers
  # The first is as it was, and the newest is the default.
  assert trained.step == last.at().step == 30
  np.testing.assert_array_equal(trained.sample(5, **how), drawn[30])
  assert last.at().weights_sha256 == trained.weights_sha256
  with pytest.raises(UserError, match='there are 10, 20, 25, 30'):
    trained.at(7)


@pytest.mark.parametrize(
  ('part', 'value'),
  [
    ('ema_params', np.nan),
    pytest.param('params', np.inf, marks=pytest.mark.slow),
  ],
)
def test_a_checkpoint_that_is_not_finite_is_refused(
  folder, tmp_path, part, value
):
  """By whatever loads it, with the first bad parameter's name."""
  tiny.trained(tmp_path / 'run')
  directory = tmp_path / 'run' / 'checkpoints'
  own = trained_params(folder, 30)
  bad = jax.tree.map(np.copy, own)
  bad['net']['out']['kernel'].flat[5] = value
  given = {'ema_params': own, 'params': own, part: bad}
  checkpoint.save_params(directory, 31, given['ema_params'], given['params'])
  told = 'checkpoint 31 in .* not finite, the first is net/out/kernel: use'
  ema = part == 'ema_params'
  with pytest.raises(UserError, match=told):
    diffusion_jax.load(tmp_path / 'run', ema=ema)
  diffusion_jax.load(tmp_path / 'run', ema=not ema)
  diffusion_jax.load(tmp_path / 'run', 30, ema=ema)  # another checkpoint
  # Fine-tuning would start from them.
  shapes = jax.eval_shape(lambda: own)
  abstract = sharding.abstract(shapes, tiny.one_device())
  with pytest.raises(UserError, match=told):
    checkpoint.load_common(directory, 31, abstract, ema=ema)


def trained_params(folder, step):
  params = diffusion_jax.load(folder / 'runs' / 'digits', step).params
  return jax.tree.map(np.array, params)


@pytest.mark.parametrize(
  ('sampler', 'dtype'),
  [
    ('adaptive', 'uint8'),
    pytest.param('ddim', 'float32', marks=pytest.mark.slow),
    pytest.param('ddim', 'uint8', marks=pytest.mark.slow),
    pytest.param('adaptive', 'float32', marks=pytest.mark.slow),
  ],
)
def test_samples_that_are_not_finite_are_refused(trained, dtype, sampler):
  """Finite weights that overflow: the pixels would be black or white."""
  huge = jax.tree.map(lambda x: x * 1e30, trained.params)
  wild = dataclasses.replace(trained, params=huge)
  how = {'sampler': sampler, 'clip': False}
  how |= {} if sampler == 'adaptive' else {'num_steps': 2}
  with pytest.raises(UserError, match='pixels that are not finite: use'):
    wild.sample(2, dtype=dtype, **how)
  draw_fn = wild.drawer(wild.plan(**how), dtype=dtype)
  with pytest.raises(UserError, match='pixels that are not finite: use'):
    draw_fn(np.arange(2))


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_trajectories_that_are_not_finite_are_refused(trained, value):
  x0 = np.zeros((2, *trained.image_shape), np.float32)
  trajectories.to_images(trained, x0)
  x0[1, 2, 3] = value
  with pytest.raises(UserError, match='pixels that are not finite: use'):
    trajectories.to_images(trained, x0)


def test_any_mesh(folder, trained):
  mesh = sharding.make_mesh(2, 2, 2)
  other = diffusion_jax.load(folder / 'runs' / 'digits', mesh=mesh)
  assert other.weights_sha256 == trained.weights_sha256
  how = {'sampler': 'ddim', 'num_steps': 3}
  difference = other.sample(5, **how).astype(int) - trained.sample(5, **how)
  assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(
  ('batch_size', 'devices'),
  [
    (7, 8),
    *(pytest.param(size, 1, marks=pytest.mark.slow) for size in (1, 7, 64)),
  ],
)
def test_batch_and_mesh_change_no_sample(folder, trained, devices, batch_size):
  """50 steps of DDIM: the noise bit by bit, pixels by 1 in under 0.1%."""
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  one = diffusion_jax.load(folder / 'runs' / 'digits', mesh=mesh)
  count = 64 if batch_size > 1 else 4

  @jax.jit
  def noise(indices):
    first, later = draw.sample_keys(0, indices)
    return jax.vmap(lambda key: jax.random.normal(key, (8, 8, 1)))(
      jnp.concatenate([first, later])
    )

  def noise_of(indices):
    padded = sharding.padded_indices(indices, one.mesh)
    first, later = np.split(np.asarray(noise(padded)), 2)
    return np.stack([first, later], 1)[: len(indices)]

  got = np.concatenate(
    [
      noise_of(np.arange(at, min(at + batch_size, count)))
      for at in range(0, count, batch_size)
    ]
  )
  alone = np.concatenate([noise_of(np.array([i])) for i in range(4)])
  np.testing.assert_array_equal(got[:4], alone)

  how = {'sampler': 'ddim', 'num_steps': 50}
  images = one.sample(count, batch_size=batch_size, **how).astype(int)
  expected = trained.sample(64, **how)[:count]
  difference = np.abs(images - expected)
  assert difference.max() <= 1
  assert np.mean(difference > 0) < 1e-3


@pytest.mark.parametrize(
  ('call', 'said'),
  [
    (lambda t: t.sample(0), 'num_samples=0'),
    (lambda t: t.sample(1, first=-1), 'first=-1'),
    (lambda t: t.sample(2, first=2**32 - 1), 'is at most 2'),
    (lambda t: t.sample(1, batch_size=0), 'batch_size=0'),
    (lambda t: t.sample(1, sampler='magic'), 'magic'),
    (lambda t: t.sample(1, sampler='ddim', eta=2.0), 'eta=2.0'),
    (lambda t: t.sample(1, num_steps=5000), '5000'),
    (lambda t: t.sample(1, seed=-1), 'seed=-1'),
    (lambda t: t.sample(1, order=2), 'order=2'),
    (lambda t: t.sample(1, dtype='int8'), "dtype='int8': one of uint8"),
  ],
)
def test_mistakes_are_one_line(trained, call, said):
  with pytest.raises(UserError, match=said) as error:
    call(trained)
  assert '\n' not in str(error.value)


def test_a_dtype_of_numpy(trained):
  how = {'sampler': 'ddim', 'num_steps': 2}
  np.testing.assert_array_equal(
    trained.sample(2, dtype=np.uint8, **how), trained.sample(2, **how)
  )
  floats = trained.sample(2, dtype=np.dtype('float32'), **how)
  assert floats.dtype == np.float32


def test_a_folder_inside_a_run_is_not_the_run(folder):
  run = folder / 'runs' / 'digits'
  for inner in ('checkpoints', 'checkpoints/30'):
    with pytest.raises(UserError, match=f'give {run}, which does'):
      diffusion_jax.load(run / inner)


def test_no_run(tmp_path):
  with pytest.raises(UserError, match='train first'):
    diffusion_jax.load(tmp_path)
