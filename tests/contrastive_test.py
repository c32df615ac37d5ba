"""Pairs of encoders: the loss in closed form, jitter, runs, and mistakes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from text_condition_test import BATCH, Run, config_of

import diffusion_jax
from diffusion_jax import models
from diffusion_jax.configs import default
from diffusion_jax.data import jitter
from diffusion_jax.models import layers
from diffusion_jax.objectives import contrastive
from diffusion_jax.runs import guided, validation
from diffusion_jax.system.errors import UserError


class Flat(nnx.Module):
  """A layer of all pixels in place of the encoder, which takes long."""

  DOORS = ()

  def __init__(self, image_shape, *, doors, out_channels, rngs, **kwargs):
    inputs = int(np.prod(image_shape))
    self.out = layers.linear(inputs, out_channels, rngs=rngs)

  def __call__(self, xt, t, keys=None, cond=None):
    return self.out(xt.reshape(len(xt), -1))


ENCODER = models.MODELS['encoder']


@pytest.fixture(scope='module', autouse=True)
def flat():
  models.MODELS['encoder'] = Flat
  yield
  models.MODELS['encoder'] = ENCODER


SMALL = {
  'model.name': 'encoder', 'model.channels': 4, 'model.multipliers': (1,),
  'model.num_blocks': 1, 'model.attention_resolutions': (),
  'model.num_groups': 2, 'model.dropout': 0.1, 'loss.embedding': 3,
  'loss.shift': 1.0, 'loss.scale': 0.1, 'loss.noise': 8.0,
  'conditioning.drop': 0.0, 'data.flip': False, 'sample_every': 0,
}  # fmt: skip


def pair_config(folder, **changes):
  config = config_of(folder)
  with config.ignore_type(), config.unlocked():
    config.loss = default.contrastive()
    config.update_from_flattened_dict({**SMALL, **changes})
  return config


COMPARED = jax.jit(contrastive.compared)


def unit(count, dim, seed):
  x = np.random.default_rng(seed).normal(size=(count, dim))
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def keys_of(count):
  return jax.vmap(jax.random.key)(jnp.arange(count))


# --- the loss ----------------------------------------------------------------


def values_of(sharpness, a, b, texts):
  """The definition, pair by pair, in float64."""
  values = []
  for i in range(len(a)):
    row = [k for k in range(len(a)) if k == i or texts[k] != texts[i]]
    forth = np.exp(sharpness * a[i] @ b[row].T)
    back = np.exp(sharpness * a[row] @ b[i])
    own = row.index(i)
    values.append(
      -(np.log(forth[own] / forth.sum()) + np.log(back[own] / back.sum())) / 2
    )
  return np.array(values)


def test_the_loss_is_that_of_both_directions():
  a, b = unit(5, 4, 0), unit(5, 4, 1)
  tokens = np.array([[1, 2], [1, 3], [1, 2], [4, 2], [1, 2]])
  want = values_of(7.0, a, b, [*map(tuple, tokens)])
  got, right = COMPARED(7.0, *map(jnp.float32, (a, b)), tokens)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  cosines = a @ b.T
  for i in range(5):
    others = [k for k in range(5) if tuple(tokens[k]) != tuple(tokens[i])]
    assert right[i] == (cosines[i, i] > cosines[i, others].max())


def test_pairs_that_are_all_alike_have_no_loss():
  a = jnp.float32(unit(3, 4, 2))
  tokens = np.ones((3, 2), int)
  value, slope = jax.value_and_grad(
    lambda x: COMPARED(5.0, x, a, tokens)[0].sum()
  )(a)
  assert value == 0
  np.testing.assert_array_equal(slope, 0)


def test_equal_vectors_are_as_good_as_chance():
  same = jnp.ones((6, 1))
  got, _ = COMPARED(9.0, same, same, np.arange(6)[:, None])
  np.testing.assert_allclose(got, math.log(6), rtol=1e-6)


def test_the_temperature_stays_within_its_bounds():
  made = contrastive.create(None, None, {'eos': 1}, coldest=0.05)
  for log, want in ((-9.0, 0.05), (3.0, 1.0), (math.log(0.2), 0.2)):
    params = {'image': 1, 'temperature': {'log': jnp.float32(log)}}
    got = made.write(params, {})
    assert got['image'] == 1
    assert math.exp(got['temperature']['log']) == pytest.approx(want, rel=1e-5)


def test_two_vectors_are_pulled_together():
  """By hand: the gradient of the loss of two pairs, as a difference."""
  a, b = unit(2, 3, 3), unit(2, 3, 4)
  texts, step = [0, 1], 1e-5

  def mean(x):
    return values_of(4.0, x, b, texts).mean()

  slope = jax.grad(
    lambda x: COMPARED(4.0, x, jnp.float32(b), np.array([[0], [1]]))[0].mean()
  )(jnp.float32(a))
  for place in np.ndindex(a.shape):
    moved = np.zeros_like(a)
    moved[place] = step
    want = (mean(a + moved) - mean(a - moved)) / (2 * step)
    assert abs(slope[place] - want) < 1e-4


def test_pictures_are_pooled_before_they_are_encoded():
  model = models.Model(None, lambda params, x, t: params * x)
  x = np.arange(2 * 4 * 6 * 1.0).reshape(2, 4, 6, 1).astype(np.float32)
  got = contrastive.pooled(model, 2).apply(3.0, x, None)
  want = [
    [3 * x[0, i : i + 2, j : j + 2].mean() for j in (0, 2, 4)] for i in (0, 2)
  ]
  assert got.shape == (2, 2, 3, 1)
  np.testing.assert_allclose(got[0, ..., 0], want)
  assert contrastive.pooled(model, 1) is model


# --- jitter ------------------------------------------------------------------


def test_whole_moves_are_exact_and_end_as_the_edge():
  x = np.random.default_rng(0).uniform(-1, 1, (1, 5, 6, 2)).astype(np.float32)
  one = jnp.ones(1)
  for axis in (0, 1):
    got = np.moveaxis(jitter.resampled(x, axis, 2 * one, one), 1 + axis, 1)
    rows = np.moveaxis(x, 1 + axis, 1)
    np.testing.assert_allclose(got[:, 2:], rows[:, :-2], atol=1e-6)
    np.testing.assert_allclose(
      got[:, :2], np.repeat(rows[:, :1], 2, 1), atol=1e-6
    )


def test_a_ramp_is_scaled_about_its_centre():
  ramp = np.linspace(-1, 1, 9, dtype=np.float32)[None, None, :, None] * np.ones(
    (1, 2, 9, 1), np.float32
  )
  got = jitter.resampled(ramp, 1, jnp.zeros(1), jnp.array([1.25]))
  np.testing.assert_allclose(got, ramp / 1.25, atol=1e-6)


def test_jitter_depends_on_the_key_only_and_stays_in_its_range():
  x = jnp.zeros((64, 9, 9, 1)).at[:, 4, 4].set(1)
  keys = keys_of(64)
  apply = jax.jit(jitter.apply, static_argnums=(2, 3))
  got = apply(x, keys, 2.0, 0.1, 0.0)
  turned = apply(x, keys[::-1], 2.0, 0.1, 0.0)
  np.testing.assert_allclose(turned[::-1], got, atol=1e-6)
  mass = np.asarray(got)
  mass = mass / mass.sum((1, 2), keepdims=True)
  place = np.arange(9) - 4
  for axis in (1, 2):
    centre = (mass[..., 0].sum(3 - axis) * place).sum(1)
    assert np.abs(centre).max() <= 2.0 + 1e-5
    assert np.abs(centre).max() > 1.5
    assert abs(np.mean(centre)) < 4 * 2 / math.sqrt(3 * 64)
  noised = apply(jnp.zeros((4, 50, 50, 1)), keys[:4], 0.0, 0.0, 8.0)
  assert np.std(noised) * 127.5 == pytest.approx(8, rel=0.05)
  assert not np.allclose(noised[0], noised[1])


# --- runs --------------------------------------------------------------------


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('pairs')


@pytest.fixture(scope='module')
def whole(folder):
  """A run of four steps and its losses."""
  run = Run(folder, folder / 'run', make=pair_config)
  losses = run.train()
  return run.write(), losses


def test_the_loss_is_over_the_whole_batch_on_any_mesh(folder, whole):
  run = Run(folder, folder / 'other', (2, 2, 2), make=pair_config)
  np.testing.assert_allclose(run.train(), whole[1], rtol=3e-6)


def test_a_run_resumes_exactly(folder, whole, tmp_path):
  first = Run(folder, tmp_path / 'run', make=pair_config)
  losses = first.train(2)
  first.write()
  again = Run(folder, tmp_path / 'run', make=pair_config).restore()
  losses += again.train()
  np.testing.assert_allclose(losses, whole[1], rtol=3e-6)
  jax.tree.map(
    np.testing.assert_array_equal, again.state.params, whole[0].state.params
  )


def moved(run, folder):
  """How far each parameter has moved in a run, at most."""
  begun = Run(folder, folder / 'new', make=pair_config).state.params
  assert begun.keys() == {'image', 'text', 'temperature'}
  assert math.exp(begun['temperature']['log']) == pytest.approx(0.07)
  far = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()), begun, run.state.params
  )
  return models.named(far)


def test_all_parts_are_trained(whole, folder):
  for name, by in moved(whole[0], folder).items():
    # Adam moves what has a gradient by 0.01 a step; the bias of keys has none.
    assert by > 1e-4 or name.endswith('key/bias'), name


@pytest.mark.slow
def test_a_run_with_the_encoder_of_pictures(folder, tmp_path, monkeypatch):
  monkeypatch.setitem(models.MODELS, 'encoder', ENCODER)
  run = Run(folder, tmp_path / 'run', make=pair_config)
  losses = run.train()
  for name, by in moved(run, folder).items():
    assert by > 1e-4 or name.endswith('key/bias'), name
  other = Run(folder, tmp_path / 'other', (2, 2, 2), make=pair_config)
  np.testing.assert_allclose(other.train(), losses, rtol=3e-6)


def test_a_held_out_loss_is_of_plain_pictures(whole):
  run, _ = whole
  made, params = run.made.objective, run.state.params
  rows = {
    'image': np.stack([run.splits[0][i]['image'] for i in range(BATCH)]),
    'tokens': run.splits[0].encode_fn(['red', 'a blue square'] * 4),
  }
  index = jnp.arange(BATCH)
  heldout = jax.jit(made.heldout)
  got = heldout(params, {}, rows, keys_of(BATCH), index)
  again = heldout(params, {}, rows, keys_of(BATCH)[::-1], index)
  np.testing.assert_array_equal(got, again)
  x = rows['image'] / np.float32(127.5) - 1
  parts, ids = run.made.parts, run.config.conditioning.ids
  a = jax.jit(lambda p: contrastive.seen(parts['image'], p, x))(params['image'])
  b = jax.jit(
    lambda p: contrastive.read(parts['text'], p, rows['tokens'], ids)
  )(params['text'])
  np.testing.assert_allclose(np.square(a).sum(1), 1, rtol=1e-5)
  np.testing.assert_allclose(np.square(b).sum(1), 1, rtol=1e-5)
  sharpness = math.exp(-params['temperature']['log'])
  want = values_of(sharpness, *(np.float64(x) for x in (a, b)), [0, 1] * 4)
  np.testing.assert_allclose(got, want, rtol=1e-4)


def test_padding_changes_no_caption(whole):
  run, _ = whole
  words, params = run.made.parts['text'], run.state.params['text']
  ids = run.config.conditioning.ids
  tokens = np.asarray(run.splits[0].encode_fn(['red']))
  other = np.where(tokens == ids['pad'], 7, tokens)
  assert (tokens != other).any()
  read = jax.jit(lambda t: contrastive.read(words, params, t, ids))
  np.testing.assert_allclose(read(tokens), read(other), atol=1e-6)


def test_a_step_of_adam_lowers_the_loss(whole):
  """Of one batch without jitter, over many steps: it can be learned."""
  run, _ = whole
  made, params = run.made.objective, run.made.init(jax.random.key(3))
  texts = ['red', 'blue', 'green', 'a red square']
  images = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 3), np.uint8)
  rows = {'image': images, 'tokens': run.splits[0].encode_fn(texts)}
  optimizer = optax.adam(0.01)

  @jax.jit
  def step(params, moments):
    value, slope = jax.value_and_grad(
      lambda p: made.heldout(p, {}, rows, None, None).mean()
    )(params)
    updates, moments = optimizer.update(slope, moments)
    return made.write(optax.apply_updates(params, updates), {}), moments, value

  moments, values = optimizer.init(params), []
  for _ in range(60):
    params, moments, value = step(params, moments)
    values.append(float(value))
  assert values[-1] < 0.1 * values[0]


# --- mistakes ----------------------------------------------------------------

MISTAKES = [
  ('microbatches', 2, 'must be 1'),
  ('model.name', 'unet', "model.name='unet'"),
  ('conditioning.drop', 0.1, 'no caption is dropped'),
  ('sample_every', 5, 'no samples are drawn'),
  ('data.augment', 0.1, 'data.augment=0.1'),
  ('batch_size', 1, 'at least 2'),
  ('loss.temperature', 0.001, r'from loss.coldest=0.01 to 1'),
  ('loss.coldest', 0.0, 'above 0, at most 1'),
  ('loss.scale', 1.0, r'in \[0, 1\)'),
  ('loss.noise', -1.0, '0 or more'),
  ('loss.embedding', 0, 'at least 1'),
  ('loss.pool', 3, 'a divisor of data.image_size=4'),
]


@pytest.mark.parametrize(('key', 'value', 'told'), MISTAKES)
def test_a_mistake_is_one_line(folder, key, value, told):
  config = pair_config(folder, **{key: value})
  wrong = validation.check(config, jax.devices()[:1])
  assert wrong
  with pytest.raises(UserError, match=told):
    raise UserError(wrong[0])
  assert '\n' not in wrong[0]


def test_a_run_without_captions_is_refused(folder):
  config = pair_config(folder)
  with config.unlocked():
    config.conditioning = default.get_config().conditioning
  wrong = validation.check(config, jax.devices()[:1])
  assert "conditioning.name='none'" in wrong[0]


def test_a_pair_draws_and_guides_nothing(whole):
  trained = diffusion_jax.load(whole[0].workdir)
  with pytest.raises(UserError, match='give it as --text_judge'):
    trained.sample(1, sampler='ddim', num_steps=1)
  with pytest.raises(UserError, match='draws no samples'):
    trained.denoise(np.zeros((1, 4, 4, 3), np.float32), 3)
  with pytest.raises(UserError, match=r'loss\.name=contrastive'):
    guided.check(config_of(whole[0].workdir.parent), trained.config, 'x')
