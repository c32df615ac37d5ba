"""What objectives learn, on data whose best denoiser is known.

Vectors are drawn from a Gaussian or from the mixture of mixture.py, a small
network is trained on them by each objective, and its estimate of x0 is compared
with E[x0 | xt].
"""

import functools

import jax
import jax.numpy as jnp
import mixture
import numpy as np
import optax
import pytest

from diffusion_jax.codecs import Codec
from diffusion_jax.conditioning import none
from diffusion_jax.objectives import denoising
from diffusion_jax.process import gaussian, schedules

pytestmark = pytest.mark.optimized

LOGSNRS = np.linspace(-4, 4, 9)
DRAWS = 4096
BATCH = 512
STD = 0.5  # of the Gaussian
WIDTH = 64
T = 200

# The ends of the network's label, to scale it to [-1, 1].
ENDS = {'edm': (np.log(0.002) / 4, np.log(80) / 4), 'flow': (0, 1)}


def of_gaussian(x, alpha, sigma):
  return alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x


def of_mixture(x, alpha, sigma):
  return mixture.x0(x, alpha, sigma, np)


def draw_gaussian(key, count):
  return STD * jax.random.normal(key, (count, 1))


def draw_mixture(key, count):
  which, noise = jax.random.split(key)
  k = jax.random.choice(
    which, len(mixture.MEANS), (count, 1), p=jnp.asarray(mixture.WEIGHTS)
  )
  std = jnp.sqrt(jnp.asarray(mixture.VARIANCES))
  return jnp.asarray(mixture.MEANS)[k] + std[k] * jax.random.normal(
    noise, (count, 1)
  )


DATA = {
  'gaussian': (draw_gaussian, of_gaussian),
  'mixture': (draw_mixture, of_mixture),
}
CODEC = Codec(
  lambda params, rows, keys: rows['x0'], lambda params, x0, keys: x0, (1,)
)


def network(prediction, outputs=1, count=T):
  """(init, apply) of two hidden layers, with the label and its sines."""
  low, high = ENDS.get(prediction, (0, count - 1))

  def init(key):
    sizes = [(9, WIDTH), (WIDTH, WIDTH), (WIDTH, outputs)]
    keys = jax.random.split(key, 3)
    return [
      (jax.random.normal(key, size) / np.sqrt(size[0]), jnp.zeros(size[1]))
      for key, size in zip(keys, sizes, strict=True)
    ]

  def apply(params, xt, label, cond, keys):
    label = jnp.broadcast_to(label, xt.shape[:1])[:, None].astype(xt.dtype)
    u = 2 * (label - low) / (high - low) - 1
    waves = jnp.array([[0.5, 1.0, 2.0]]) * np.pi * u
    x = jnp.concatenate(
      [xt, jnp.tanh(xt), u, jnp.sin(waves), jnp.cos(waves)], 1
    )
    for W, b in params[:-1]:
      x = jax.nn.silu(x @ W + b[None])
    W, b = params[-1]
    return x @ W + b[None]

  return init, apply


def trained(schedule, data, steps, outputs=1, **options):
  """A denoiser, trained by Adam with a rate that falls to 0."""
  draw_fn, _ = DATA[data]
  prediction = options['prediction']
  init, apply = network(prediction, outputs, schedule.num_timesteps)
  objective = denoising.create(apply, CODEC, none(), schedule, **options)
  optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

  def step(carry, i):
    params, opt_state, extras = carry
    key = jax.random.fold_in(jax.random.key(0), i)
    keys = jax.random.split(jax.random.fold_in(key, 1), BATCH)
    rows = {'x0': draw_fn(key, BATCH)}
    if objective.whole:
      rows |= objective.whole(keys)

    def mean(params):
      values, aux = objective.loss(params, extras, rows, keys)
      return values.mean(), aux

    grads, aux = jax.grad(mean, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    params = optax.apply_updates(params, updates)
    return (params, opt_state, objective.update(extras, aux)), None

  @jax.jit
  def run():
    params = init(jax.random.key(1))
    start = (params, optimizer.init(params), objective.extras)
    return jax.lax.scan(step, start, jnp.arange(steps))[0][0]

  params = run()

  def network_fn(xt, label):
    return apply(params, xt, label, {}, None)

  return gaussian.denoiser(network_fn, schedule, prediction)


def share(denoise, schedule, data):
  """The squared distance to E[x0 | xt], of that mean's variance."""
  draw_fn, exact = DATA[data]
  off = spread = 0.0
  for i, logsnr in enumerate(LOGSNRS):
    one, two = jax.random.split(jax.random.key(100 + i))
    eps = np.asarray(jax.random.normal(two, (DRAWS, 1)), np.float64)
    alpha = np.sqrt(1 / (1 + np.exp(-logsnr)))
    sigma = np.sqrt(1 / (1 + np.exp(logsnr)))
    xt = alpha * np.asarray(draw_fn(one, DRAWS), np.float64) + sigma * eps
    t = schedule.host_t_of_logsnr(logsnr)
    found = denoise(jnp.asarray(xt, jnp.float32), jnp.float32(t)).x0
    mean = exact(xt, alpha, sigma)
    off += np.mean((np.asarray(found) - mean) ** 2)
    spread += mean.var()
  return off / spread


OBJECTIVES = {
  'ddpm': ('linear', {'prediction': 'eps'}),
  'x0': ('cosine', {'prediction': 'x0'}),
  'v': ('cosine', {'prediction': 'v', 'law': 'stratified'}),
  'edm': ('edm', {'prediction': 'edm', 'law': 'lognormal'}),
  'flow': ('flow', {'prediction': 'flow', 'law': 'logitnormal'}),
  'flow_uniform': ('flow', {'prediction': 'flow'}),
  'importance': ('linear', {'prediction': 'eps', 'law': 'importance'}),
  'min_snr': ('linear', {'prediction': 'eps', 'weight': 'min_snr'}),
  'p2': ('cosine', {'prediction': 'v', 'weight': 'p2'}),
  'sigmoid': ('cosine', {'prediction': 'v', 'weight': 'sigmoid'}),
  'truncated': ('cosine', {'prediction': 'x0', 'weight': 'truncated_snr'}),
  'bound': (
    'cosine', {'prediction': 'v', 'weight': 'bound', 'law': 'importance'}
  ),
  'huber': ('cosine', {'prediction': 'v', 'huber': 1.0}),
  'zero_snr': ('zero_snr', {'prediction': 'v'}),
}  # fmt: skip


@functools.cache
def schedule_of(name):
  zero = {'schedule': 'linear', 'zero_snr': True, 'beta_end': 0.1}
  options = zero if name == 'zero_snr' else {'schedule': name}
  if name == 'linear':  # as noisy at its end as with 1000 steps
    options |= {'beta_start': 1e-4 * 1000 / T, 'beta_end': 0.02 * 1000 / T}
  return schedules.create(num_timesteps=T, **options)


def test_a_flow_learns_the_posterior_mean_of_a_mixture():
  schedule = schedule_of('flow')
  options = OBJECTIVES['flow'][1]
  none_yet = gaussian.denoiser(lambda xt, u: 0 * xt, schedule, 'flow')
  assert share(none_yet, schedule, 'mixture') > 0.05
  denoise = trained(schedule, 'mixture', 300, **options)
  assert share(denoise, schedule, 'mixture') < 0.05


@pytest.mark.slow
@pytest.mark.parametrize('data', DATA)
@pytest.mark.parametrize('name', OBJECTIVES)
def test_an_objective_learns_the_posterior_mean(name, data):
  schedule, options = OBJECTIVES[name]
  schedule = schedule_of(schedule)
  denoise = trained(schedule, data, 1500, **options)
  found = share(denoise, schedule, data)
  print(f'{name} {data}: {found:.2%}')
  assert found < 0.05


@pytest.mark.slow
@pytest.mark.parametrize('weight', ['simple', 'bound'])
def test_the_learned_variance_is_the_best_one(weight):
  """N(0, s^2): v + c0^2 Var(x0 | xt), the same for all xt.

  On a schedule of ten steps, where neither fixed variance is near it.
  """
  schedule = schedules.cosine(10)
  denoise = trained(
    schedule, 'gaussian', 4000, 2, prediction='v', variance='learned',
    weight=weight, law='stratified', variance_weight=0.1,
  )  # fmt: skip
  t = np.arange(1, 9)
  log_alpha_bar, sigma2 = schedule.host(t)
  c0, _, small = gaussian.posterior_coefficients(schedule, t, t - 1)
  alpha2 = np.exp(log_alpha_bar)
  rest = STD**2 * sigma2 / (alpha2 * STD**2 + sigma2)
  best = small + c0**2 * rest
  spread = gaussian.log_spread(schedule, t, t - 1)
  fixed = np.minimum(
    abs(small / best - 1), abs(small * np.exp(spread) / best - 1)
  )
  assert (fixed > 0.1).sum() >= 3
  for i, time in enumerate(t):
    one, two = jax.random.split(jax.random.key(int(time)))
    xt = np.sqrt(alpha2[i]) * draw_gaussian(one, DRAWS) + np.sqrt(
      sigma2[i]
    ) * jax.random.normal(two, (DRAWS, 1))
    fraction = np.asarray(denoise(xt, int(time)).fraction, np.float64)
    learned = np.mean(small[i] * np.exp(fraction * spread[i]))
    print(f't={time}: {learned / best[i]:.3f}')
    assert abs(learned / best[i] - 1) < 0.1
