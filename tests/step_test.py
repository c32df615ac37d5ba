"""The training step: keys, loss, optimiser, average."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from diffusion_jax import models
from diffusion_jax.codecs import pixels
from diffusion_jax.objectives import denoising
from diffusion_jax.objectives.objective import branch
from diffusion_jax.process import noise, schedules
from diffusion_jax.runs import draw
from diffusion_jax.training import metrics, optim, state, step

SCHEDULE = schedules.linear(1000)


LR, WARMUP, CLIP, EMA = 1e-2, 2, 0.01, 0.75


class Trained(NamedTuple):
  """A few steps, with the states on the host."""

  network: models.Model
  states: list
  metrics: list
  batch: dict


@pytest.fixture(scope='module')
def mesh():
  return tiny.one_device()


@pytest.fixture(scope='module')
def trained(mesh):
  network = tiny.dense(dropout=0.0)
  last, step_fn, batch = tiny.run(
    mesh, lr=LR, warmup=WARMUP, clip=CLIP, ema=EMA, network=network
  )
  states, metrics = [copy(last)], []
  for _ in range(4):
    last, values = step_fn(last, batch)
    states.append(copy(last))
    metrics.append(copy(values))
  return Trained(network, states, metrics, batch)


def copy(tree):
  """The donated state's values stay, on the host."""
  return jax.tree.map(np.array, tree)


def test_images_become_minus_one_to_one():
  got = pixels.to_float(jnp.array([0, 51, 127, 128, 255], jnp.uint8))
  np.testing.assert_allclose(
    got, np.array([0, 51, 127, 128, 255]) / 127.5 - 1, atol=1e-7
  )
  assert got[0] == -1
  assert got[-1] == 1


def test_keys_depend_on_step_and_row_alone():
  key = jax.random.key(3)
  few = step.example_keys(key, 7, 4)
  many = step.example_keys(key, 7, 16)
  data = jax.random.key_data
  np.testing.assert_array_equal(data(few), data(many)[:4])
  everything = np.concatenate(
    [data(step.example_keys(key, k, 64)) for k in range(20)]
  )
  assert len(np.unique(everything, axis=0)) == len(everything)


def test_training_and_samples_share_no_key():
  """Of one seed: initial values, steps, held-out images, samples.

  split and fold_in of one key give the same children, so that families under
  one root would meet. All keys that are drawn from, of a small run, differ.
  """
  root = jax.random.fold_in(jax.random.key(0), 0)
  init, steps, heldout = jax.random.split(root, 3)
  families = [jax.random.split(init, 50)]
  for keys in (
    *(step.example_keys(steps, k, 8) for k in range(20)),
    jax.vmap(lambda i: jax.random.fold_in(heldout, i))(jnp.arange(20)),
  ):
    families.append(jax.vmap(lambda key: jax.random.split(key, 3))(keys))
  first, later = draw.sample_keys(0, jnp.arange(20, dtype=jnp.uint32))
  families += [first, jax.vmap(lambda k: jax.random.split(k, 50))(later)]
  data = [jax.random.key_data(keys).reshape(-1, 2) for keys in families]
  everything = np.concatenate(data)
  assert len(np.unique(everything, axis=0)) == len(everything)


def test_times_are_uniform_over_all_steps():
  """Each of 10 bins of 10,000 draws holds 1000 within 5 standard deviations."""
  keys = step.example_keys(jax.random.key(0), 0, 10_000)
  t = denoising.uniform_times(branch(keys, 't'), 1000)
  eps = noise.normal(branch(keys, 'eps'), (3,))
  counts = np.bincount(np.asarray(t) // 100, minlength=10)
  assert t.min() >= 0
  assert t.max() <= 999
  assert np.all(np.abs(counts - 1000) < 5 * np.sqrt(1000 * 0.9))
  assert abs(eps.mean()) < 5 / np.sqrt(30_000)
  assert abs(eps.var() - 1) < 5 * np.sqrt(2 / 30_000)


def test_warm_up_is_linear_from_exactly_zero():
  rate = optim.learning_rate(2e-4, 5000)
  assert rate(0) == 0
  np.testing.assert_allclose(rate(2500), 1e-4, rtol=1e-6)
  np.testing.assert_allclose([rate(5000), rate(800_000)], 2e-4, rtol=1e-6)
  assert optim.learning_rate(2e-4, 0)(0) == 2e-4


def test_the_first_step_moves_nothing_the_second_does(trained):
  """Warm-up starts at 0: the parameters stay, the moments do not."""
  first, second, third = trained.states[:3]
  jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
  rates = [m['learning_rate'] for m in trained.metrics]
  np.testing.assert_allclose(rates, [0, LR / 2, LR, LR], rtol=1e-6)
  moved = jax.tree.map(lambda a, b: a - b, second.params, third.params)
  assert optax.global_norm(moved) > 0
  assert [int(s.step) for s in trained.states] == [0, 1, 2, 3, 4]


def test_ema_starts_as_a_copy_and_has_no_ramp(trained):
  expected = trained.states[0].params
  jax.tree.map(
    np.testing.assert_array_equal, expected, trained.states[0].ema_params
  )
  for after in trained.states[1:]:
    expected = jax.tree.map(
      lambda ema, new: EMA * ema + (1 - EMA) * new, expected, after.params
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-8),
      expected,
      after.ema_params,
    )


def test_steps_by_hand(trained):
  """Loss, clipping and Adam of two steps, written out in NumPy.

  Only the network and its gradient are the code's own; they are compared with
  an independent implementation elsewhere.
  """
  x0 = np.asarray(trained.batch['image']) / 127.5 - 1
  alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))

  @jax.jit
  def loss_and_grads(params, xt, t, eps):
    return jax.value_and_grad(
      lambda p: jnp.mean((trained.network.apply(p['net'], xt, t) - eps) ** 2)
    )(params)

  params = trained.states[0].params
  mu = nu = jax.tree.map(np.zeros_like, params)
  for k in range(2):
    keys = step.example_keys(jax.random.key(1), k, len(x0))
    t = denoising.uniform_times(branch(keys, 't'), 1000)
    eps = noise.normal(branch(keys, 'eps'), tiny.SHAPE)
    a = alpha_bar[t][:, None, None, None]
    xt = (np.sqrt(a) * x0 + np.sqrt(1 - a) * eps).astype(np.float32)
    loss, grads = copy(loss_and_grads(params, xt, t, eps))
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
    assert norm > CLIP  # so that the clipping is seen
    np.testing.assert_allclose(trained.metrics[k]['loss'], loss, rtol=1e-5)
    np.testing.assert_allclose(trained.metrics[k]['grad_norm'], norm, rtol=1e-4)

    grads = jax.tree.map(lambda g, n=norm: g * CLIP / n, grads)
    mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mu, grads)
    nu = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, nu, grads)
    adam = trained.states[k + 1].opt_state[1][0]
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-8),
      mu,
      adam.mu,
    )
    rate, power = LR * k / WARMUP, k + 1

    def update(p, m, v, rate=rate, power=power):
      m, v = m / (1 - 0.9**power), v / (1 - 0.999**power)
      return p - rate * m / (np.sqrt(v) + 1e-8)

    params = jax.tree.map(update, params, mu, nu)

    def clear(m, got, want, k=k):
      # Where the gradient is rounding noise, so is the sign of Adam's step.
      seen = np.abs(m) > 1e-4 * CLIP
      np.testing.assert_allclose(got[seen], want[seen], atol=LR * 5e-3)

    jax.tree.map(clear, mu, trained.states[k + 1].params, params)


@pytest.fixture(scope='module')
def heldout_fn(mesh):
  return jax.jit(
    functools.partial(
      step.heldout_loss,
      key=jax.random.key(5),
      objective=tiny.recipe(tiny.dense(dropout=0.5)).objective,
      mesh=mesh,
    )
  )


def test_held_out_loss_does_not_depend_on_the_batches(trained, heldout_fn):
  """16 images at once, in fours, or padded: one value. And no dropout."""
  params = trained.states[-1].params
  pictures = tiny.images(16)['image']

  def total(batch_size):
    value = 0.0
    for first in range(0, 16, batch_size):
      rows = np.arange(first, first + batch_size)
      weight = (rows < 16).astype(np.float32)
      batch = {'image': pictures[np.minimum(rows, 15)]}
      value += heldout_fn(params, {}, batch, weight, first)
    return value

  np.testing.assert_allclose(total(6), total(16), rtol=1e-5)
  np.testing.assert_allclose(total(24), total(16), rtol=1e-5)


def test_dropout_is_on_in_training_alone(trained, mesh, heldout_fn):
  """The same weights and noise: dropped in the step, not for held-out loss."""
  start, step_fn, batch = tiny.run(mesh, network=tiny.dense(dropout=0.5))
  _, dropped = step_fn(start, batch)
  assert abs(dropped['loss'] - trained.metrics[0]['loss']) > 1e-3
  params, weight = trained.states[-1].params, np.ones(tiny.BATCH, np.float32)
  never = functools.partial(
    step.heldout_loss,
    key=jax.random.key(5),
    objective=tiny.recipe(trained.network).objective,
    mesh=mesh,
  )
  np.testing.assert_allclose(
    heldout_fn(params, {}, trained.batch, weight, 0),
    jax.jit(never)(params, {}, trained.batch, weight, 0),
    rtol=1e-6,
  )


def test_quarters_add_up_to_the_loss():
  t = jnp.array([0, 249, 250, 499, 500, 999])
  values = jnp.array([1.0, 3.0, 5.0, 7.0, 9.0, 11.0])

  def quarters(values, t):
    found = jax.device_get(denoising.by_quarter(values, t, 1000))
    return metrics.divided({'loss': np.float32(6), **found})

  expected = {'loss': 6, 'loss_q1': 2, 'loss_q2': 6, 'loss_q3': 9}
  assert quarters(values, t) == {**expected, 'loss_q4': 11}
  with jax.debug_nans(True):  # an empty quarter is left out, not NaN
    assert quarters(values[:5], t[:5]) == expected
    assert quarters(values[:1], t[:1]) == {'loss': 6, 'loss_q1': 1}


def test_quarters_are_bitwise_the_means_on_the_device():
  values = jax.random.uniform(jax.random.key(0), (64,))
  t = jnp.arange(64) * 15
  found = metrics.divided(
    jax.device_get(jax.jit(denoising.by_quarter)(values, t, 1000))
  )
  means = jax.jit(lambda q: jnp.mean(values, where=4 * t // 1000 == q))
  assert [found[f'loss_q{q + 1}'] for q in range(4)] == list(
    map(means, range(4))
  )


def test_the_state_carries_no_key_and_shares_no_buffer(mesh):
  start, _, _ = tiny.run(mesh, network=tiny.dense())
  leaves = jax.tree.leaves(start)
  assert not any(jnp.issubdtype(a.dtype, jax.dtypes.prng_key) for a in leaves)
  places = [a.unsafe_buffer_pointer() for a in leaves]
  assert len(set(places)) == len(places)
  assert isinstance(start, state.TrainState)
  assert start.extras == {}
