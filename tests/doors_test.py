"""The doors are real: other inhabitants than pixels, eps and no condition.

A codec of vectors with a frozen part, a condition of labels, a network with a
door for them, a parametrisation of another scale and label, and an objective
that sums over the batch, all in one recipe, through the programs that train
DDPM: on eight devices, in microbatches, resumed, and drawn from.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from diffusion_jax import codecs, conditioning, models, objectives
from diffusion_jax.codecs import Codec
from diffusion_jax.conditioning import Conditioner
from diffusion_jax.objectives import denoising
from diffusion_jax.objectives.objective import Aux, branch
from diffusion_jax.process import gaussian, schedules
from diffusion_jax.process.gaussian import Denoised, Parametrisation
from diffusion_jax.runs import programs, recipe
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, sharding

CLASSES = 3
BATCH = 16
STEPS = 6

# Rectified flow: the network sees xt / (alpha + sigma), the label is the share
# of noise, and it gives eps - x0.
FLOW = Parametrisation(
  denoised=lambda F, xt, alpha, sigma: Denoised(
    (xt - sigma * F) / (alpha + sigma), (xt + alpha * F) / (alpha + sigma)
  ),
  target=lambda x0, eps, alpha, sigma: eps - x0,
  scale=lambda alpha, sigma: 1 / (alpha + sigma),
  label=lambda schedule, t: (
    schedule.sigma(t) / (schedule.alpha(t) + schedule.sigma(t))
  ),
)


def vectors() -> Codec:
  """Rows of 6 numbers, rotated by a frozen part into 4, with a little noise."""

  def encode(params, rows, keys):
    jitter = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)
    return rows['vector'] @ params['codec']['rotation'] + 0.01 * jitter

  def decode(params, x0, keys):
    del keys
    return x0 @ params['codec']['rotation'].T

  return Codec(encode, decode, shape=(4,))


def labels(rate=0.25) -> Conditioner:
  return conditioning.create('label', num_classes=CLASSES, drop=rate)


def network() -> models.Model:
  """A layer of 32 with an embedding of the label, and dropout."""

  def init(key):
    first, second, third = jax.random.split(key, 3)
    return {
      'in': {'kernel': jax.random.normal(first, (5, 512)) / 2},
      'label': {'embedding': jax.random.normal(second, (CLASSES + 1, 512))},
      'out': {'kernel': jax.random.normal(third, (512, 4)) / 512},
    }

  def apply(params, xt, t, keys=None, cond=None):
    time = jnp.broadcast_to(t, xt.shape[:1])[:, None].astype(xt.dtype)
    hidden = jnp.concatenate([xt, time], axis=1) @ params['in']['kernel']
    hidden = jnp.tanh(hidden + params['label']['embedding'][cond['label']])
    if keys is not None:
      hidden *= jax.vmap(lambda k: jax.random.bernoulli(k, 0.9, (512,)))(keys)
    return hidden @ params['out']['kernel']

  return models.Model(init, apply, doors=('label',))


def counting(network_fn, codec, conditioner, schedule, prediction):
  """Denoising that counts labels over the run, and weighs rows by the count.

  So a loss depends on the sums of all rows of the steps before.
  """
  plain = denoising.create(network_fn, codec, conditioner, schedule, prediction)

  def loss(params, extras, rows, keys):
    values, aux = plain.loss(params, extras, rows, keys)
    seen = jax.nn.one_hot(rows['label'], CLASSES)
    weight = 1 / (1 + extras['count'][rows['label']])
    sums = {'count': seen.sum(0)}
    return weight * values, Aux({**aux.by_row, 'weight': weight}, sums)

  def metrics(values, by_row, sums):
    return {
      **plain.metrics(values, by_row, sums),
      'largest_weight': by_row['weight'].max(),
      'rows': sums['count'].sum(),
    }

  return plain._replace(
    loss=loss,
    metrics=metrics,
    extras={'count': jnp.zeros(CLASSES)},
    update=lambda extras, aux: {'count': extras['count'] + aux.sums['count']},
  )


@pytest.fixture(autouse=True)
def flow(monkeypatch):
  monkeypatch.setitem(gaussian.PARAMETRISATIONS, 'flow', FLOW)


def make(rotation=None) -> recipe.Recipe:
  if rotation is None:
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 4)))[0]
  codec, conditioner, net = vectors(), labels(), network()
  schedule = schedules.linear(100)
  return recipe.Recipe(
    parts={'net': net},
    frozen={'codec': {'rotation': jnp.asarray(rotation, jnp.float32)}},
    origins={'codec': 'runs/rotation, step 7'},
    codec=codec,
    conditioner=conditioner,
    schedule=schedule,
    prediction='flow',
    objective=counting(
      models.network_fn(net), codec, conditioner, schedule, 'flow'
    ),
  )


def config(microbatches):
  return {
    'seed': 3,
    'microbatches': microbatches,
    'ema': {'decay': 0.9},
    'optim': {'lr': 1e-2, 'warmup_steps': 2, 'clip_norm': 1.0},
    'sample': {
      'sampler': 'ddim', 'grid': 'uniform', 'num_steps': 5, 'clip': True,
    },
  }  # fmt: skip


def batch_of(step, mesh):
  """Vectors near a corner of their class."""
  rng = np.random.default_rng(step)
  label = rng.integers(0, CLASSES, BATCH, dtype=np.int32)
  vector = 3 * np.eye(6)[label] + 0.1 * rng.normal(size=(BATCH, 6))
  return sharding.put_batch(
    {'vector': vector.astype(np.float32), 'label': label}, mesh
  )


class Run:
  """A few steps of training on a mesh."""

  def __init__(self, sizes=(1, 1, 1), microbatches=1, made=None):
    count = int(np.prod(sizes))
    self.mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:count])
    self.made = made or make()
    self.programs = programs.create(config(microbatches), self.mesh, self.made)
    self.frozen = jax.device_put(
      self.programs.frozen, sharding.replicated(self.mesh)
    )
    self.state = self.programs.create_state(self.mesh)
    self.metrics = []

  def train(self, until=STEPS):
    for step in range(int(self.state.step), until):
      self.state, metrics = self.programs.step_fn(
        self.state, self.frozen, batch_of(step, self.mesh)
      )
      self.metrics.append(jax.device_get(metrics))
    return self

  @property
  def params(self):
    return {**self.frozen, **self.state.ema_params}

  def checkpoints(self, folder):
    return checkpoint.Checkpoints(
      folder, frozen=self.frozen, origins=self.made.origins
    )


@functools.cache
def alone():
  return Run().train()


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize(
  ('sizes', 'microbatches'),
  [
    ((2, 2, 2), 4),
    ((1, 1, 1), 8),
    *(
      pytest.param(*one, marks=pytest.mark.slow)
      for one in (((8, 1, 1), 1), ((1, 8, 1), 2))
    ),
  ],
)
def test_the_curve_is_the_same_on_any_mesh_in_any_pieces(sizes, microbatches):
  got, want = Run(sizes, microbatches).train(), alone()
  for a, b in zip(got.metrics, want.metrics, strict=True):
    for name in ('loss', 'grad_norm', 'param_norm', 'largest_weight', 'rows'):
      close(a[name], b[name])
  close(got.state.extras['count'], want.state.extras['count'])
  assert want.state.extras['count'].sum() == STEPS * BATCH
  # Weights fall with the count: sums of the steps before reach the loss.
  weights = [metrics['largest_weight'] for metrics in want.metrics]
  assert weights[0] == 1
  assert sorted(weights, reverse=True) == weights
  assert weights[-1] < 0.2


def test_it_learns_and_the_frozen_part_stays():
  made = make()
  before = checkpoint_sums(made.frozen)
  run = Run(made=made).train(until=60)

  def heldout(now):
    batch, weight = batch_of(1000, run.mesh), jnp.ones(BATCH)
    params = {**run.frozen, **now}
    return run.programs.loss_fn(params, run.state.extras, batch, weight, 0)

  begun = Run(made=made).state
  assert heldout(run.state.params) < 0.9 * heldout(begun.params)
  assert run.state.params.keys() == {'net'}
  assert checkpoint_sums(run.frozen) == before
  names = models.names(run.state.opt_state)
  assert not any('codec' in name for name in names)


def checkpoint_sums(tree):
  from diffusion_jax.training import checksum

  return checksum.of(tree)


def test_it_resumes_bitwise_with_its_extras(tmp_path):
  half = Run().train(until=3)
  with half.checkpoints(tmp_path) as kept:
    kept.save(3, half.state)
  again = Run()
  with again.checkpoints(tmp_path) as kept:
    again.state = kept.restore(3, again.programs.abstract)
  again.train()
  jax.tree.map(np.testing.assert_array_equal, again.state, alone().state)


def test_another_frozen_part_is_refused_in_one_line(tmp_path):
  run = Run()
  with run.checkpoints(tmp_path) as kept:
    kept.save(0, run.state)
  other = Run(made=make(np.eye(6, 4))._replace(origins={'codec': 'runs/eye'}))
  with (
    other.checkpoints(tmp_path) as kept,
    pytest.raises(UserError, match='frozen codec') as error,
  ):
    kept.restore(0, other.programs.abstract)
  for word in ('runs/rotation, step 7', 'runs/eye', 'new workdir'):
    assert word in str(error.value)
  assert '\n' not in str(error.value)
  plain = checkpoint.Checkpoints(tmp_path)
  with plain, pytest.raises(UserError, match='is now missing'):
    plain.restore(0, run.programs.abstract)


def test_a_dropped_condition_changes_its_own_row_only():
  """The label of a row that keeps it is seen; of one that drops it, is not."""
  made = make()
  params = {**made.frozen, **made.init(jax.random.key(0))}
  rows = jax.device_get(batch_of(0, tiny.one_device()))
  keys = jax.random.split(jax.random.key(1), BATCH)
  dropped = jax.vmap(lambda key: jax.random.bernoulli(key, 0.25))(
    branch(keys, 'condition')
  )
  assert 0 < dropped.sum() < BATCH
  objective = denoising.create(
    models.network_fn(made.parts['net']), made.codec, made.conditioner,
    made.schedule, 'flow',
  )  # fmt: skip
  values, _ = objective.loss(params, {}, rows, keys)
  for row in range(BATCH):
    label = rows['label'].copy()
    label[row] = (label[row] + 1) % CLASSES
    other, _ = objective.loss(params, {}, {**rows, 'label': label}, keys)
    changed = np.flatnonzero(np.asarray(values != other))
    assert changed.tolist() == ([] if dropped[row] else [row])


def test_samples_are_of_their_labels_and_decoded():
  """Float data of the codec's shape; nothing is clipped; labels matter."""
  run = alone()
  indices = np.arange(8, dtype=np.uint32)
  null, zero, one = (
    np.asarray(
      run.programs.draw_fn(run.params, indices, {'label': np.full(8, label)})[0]
    )
    for label in (CLASSES, 0, 1)
  )
  assert null.shape == (8, 6)
  assert null.dtype == np.float32
  rotation = np.asarray(run.frozen['codec']['rotation'])
  np.testing.assert_allclose(null @ rotation @ rotation.T, null, atol=1e-5)
  assert np.abs(zero - one).max() > 1e-3
  assert np.abs(zero - null).max() > 1e-3
  mesh = Run((8, 1, 1))
  turns, _ = mesh.programs.draw_fn(
    {**mesh.frozen, **jax.device_get(run.state.ema_params)},
    sharding.put_batch(indices, mesh.mesh),
  )
  # Without a wish, labels come in turn.
  np.testing.assert_allclose(turns[::CLASSES], zero[::CLASSES], atol=1e-5)
  np.testing.assert_allclose(turns[1::CLASSES], one[1::CLASSES], atol=1e-5)


@pytest.mark.parametrize('kind', gaussian.PARAMETRISATIONS | {'flow': FLOW})
def test_a_parametrisation_is_closed(kind):
  """(x0, eps) -> target -> (x0, eps), and xt = alpha x0 + sigma eps."""
  schedule = schedules.linear(100)
  x0, eps = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
  t = jnp.array([0, 10, 40, 70, 99])
  xt = gaussian.q_sample(schedule, x0, t, eps)
  target = gaussian.to_target(schedule, x0, eps, t, kind)
  found = gaussian.from_prediction(schedule, target, xt, t, kind)
  np.testing.assert_allclose(found.x0, x0, atol=2e-3)
  np.testing.assert_allclose(found.eps, eps, atol=2e-3)
  back = gaussian.q_sample(schedule, found.x0, t, found.eps)
  np.testing.assert_allclose(back, xt, atol=1e-5)


def test_the_network_gets_its_scale_and_label():
  schedule, xt, t = schedules.linear(100), jnp.ones((2, 4)), jnp.array([0, 99])
  seen = gaussian.predict(lambda x, label: (x, label), schedule, xt, t, 'flow')
  alpha, sigma = schedule.alpha(t), schedule.sigma(t)
  np.testing.assert_allclose(seen[0][:, 0], 1 / (alpha + sigma), rtol=1e-6)
  np.testing.assert_allclose(seen[1], sigma / (alpha + sigma), rtol=1e-6)


def test_a_network_without_the_door_is_refused_in_one_line():
  with pytest.raises(UserError) as error:
    models.create('unet', tiny.SHAPE, doors={'smell': CLASSES})
  told = str(error.value)
  assert 'has smell, but model.name=unet takes label' in told
  assert '\n' not in told


@pytest.mark.parametrize(
  ('create', 'must'),
  [
    (lambda: codecs.create('wavelets', (8, 8, 1)), "codec.name='wavelets'"),
    (lambda: conditioning.create('smell'), "conditioning.name='smell'"),
    (lambda: objectives.create('hope'), "loss.name='hope'"),
  ],
)
def test_an_unknown_name_lists_those_there_are(create, must):
  with pytest.raises(UserError, match=must) as error:
    create()
  assert 'one of ' in str(error.value)


def test_pictures_need_not_be_square():
  """16x8 images: the U-Net gives their shape, and so do samples."""
  shape = (16, 8, 1)
  unet = models.create(
    'unet', shape, channels=8, multipliers=(1, 2), num_blocks=1,
    attention_resolutions=(4,), num_groups=4,
  )  # fmt: skip
  images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
  params = jax.eval_shape(unet.init, jax.random.key(0))
  out = jax.eval_shape(unet.apply, params, images, jnp.zeros(2))
  assert out.shape == (2, *shape)

  made = tiny.recipe(tiny.dense(shape=shape), shape, schedules.linear(100))
  mesh = tiny.one_device()
  program = programs.create(config(1), mesh, made)
  state = program.create_state(mesh)
  images = np.random.default_rng(0).integers(0, 256, (8, *shape), np.uint8)
  batch = sharding.put_batch({'image': images}, mesh)
  state, metrics = program.step_fn(state, {}, batch)
  assert np.isfinite(metrics['loss'])
  drawn, _ = program.draw_fn(state.ema_params, np.arange(2, dtype=np.uint32))
  assert drawn.shape == (2, *shape)
  assert drawn.dtype == np.uint8


def test_parts_have_initial_values_of_their_own():
  """Another part leaves the network's initial values alone."""
  made = make()
  one = made.init(jax.random.key(0))
  two = made._replace(parts={**made.parts, 'text': network()}).init(
    jax.random.key(0)
  )
  jax.tree.map(np.testing.assert_array_equal, one['net'], two['net'])
  assert optax.global_norm(
    jax.tree.map(jnp.subtract, two['net'], two['text'])
  ) > 1  # fmt: skip
