"""Guidance: laws that are known, in float64, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import samplers
from diffusion_jax.cli import guiding
from diffusion_jax.configs import default
from diffusion_jax.guidance import classifier, guided
from diffusion_jax.process import gaussian, schedules
from diffusion_jax.process.gaussian import Denoised
from diffusion_jax.samplers import guided as options
from diffusion_jax.samplers import levels
from diffusion_jax.samplers import plan as plans
from diffusion_jax.samplers.solve import solve
from diffusion_jax.system.errors import UserError

# As in a paper's table: from the data to 148 times their deviation.
SCHEDULE = schedules.linear(1000)
W, MEAN = 3.0, 1.0
START = np.linspace(-150, 150, 7)  # x / alpha
TRAINED = {'name': 'label', 'drop': 0.1}


def normal(mean, deviation):
  """The denoiser of data N(mean, deviation^2); the mean may be [B, 1]."""

  def denoise(xt, t):
    alpha, sigma = gaussian.alpha_sigma(SCHEDULE, t, xt)
    v, s2 = deviation**2, (sigma / alpha) ** 2
    x0 = (v * xt / alpha + s2 * mean) / (v + s2)
    return Denoised(x0, (xt - alpha * x0) / sigma)

  return denoise


def grid(num_steps, first=999.0, last=0.0):
  """Even in lambda; not to clean data."""
  lam = levels.of(SCHEDULE, [first, last]).lam
  times = SCHEDULE.host_t_of_logsnr(2 * np.linspace(*lam, num_steps + 1))
  return [first, *times[1:-1].tolist(), last]


def level(t):
  """sigma / alpha."""
  return float(np.exp(-levels.of(SCHEDULE, t).lam))


def carried(denoiser, y, times, sampler='ddim'):
  """x / alpha along a grid, from y [N] at its first time."""
  first, last = levels.of(SCHEDULE, [times[0], times[-1]]).alpha
  x = jnp.asarray(y, jnp.float64)[:, None] * first
  keys = jax.random.split(jax.random.key(0), len(x))
  made = samplers.create(sampler)
  return np.asarray(
    solve(made, denoiser, SCHEDULE, times, x, keys)[:, 0] / last
  )


def pair_of(c, u):
  return guided.by_guide(c, u)


def doubled(mean):
  """c of this mean and u of mean 0, in one call of twice as many rows."""

  def both(xt, t):
    assert len(xt) == 2 * len(START)
    means = jnp.asarray([mean, 0.0])[jnp.arange(len(xt)) % 2, None]
    return normal(means, 0.5)(xt, t)

  return guided.classifier_free(both)


LAWS = {
  # Of equal deviations, only the mean moves, to w m (1 - what is left of x).
  'equal deviations': (
    lambda: doubled(MEAN),
    lambda y, a, b: (
      W * MEAN + (y - W * MEAN) * np.sqrt((0.25 + b**2) / (0.25 + a**2))
    ),
  ),
  # A deviation s_c^w s_u^(1-w), not that of p(c)^w p(u)^(1-w).
  'equal means': (
    lambda: pair_of(normal(0, 0.5), normal(0, 1.0)),
    lambda y, a, b: (
      y
      * ((0.25 + b**2) / (0.25 + a**2)) ** (W / 2)
      * ((1 + b**2) / (1 + a**2)) ** ((1 - W) / 2)
    ),
  ),
}


@pytest.mark.parametrize('law', LAWS)
def test_guided_laws_to_their_order(x64, law):
  make, exact = LAWS[law]
  denoiser = guided.always(make(), guided.towards(W))
  want = exact(START, level(999), level(0))
  for sampler, order in (('ddim', 1), ('heun', 2)):
    off = [
      np.abs(carried(denoiser, START, grid(n), sampler) - want).max()
      for n in (100, 200)
    ]
    np.testing.assert_allclose(np.log2(off[0] / off[1]), order, atol=0.15)
  fine = carried(denoiser, START, grid(1000), 'heun')
  np.testing.assert_allclose(fine, want, rtol=0.01, atol=0.01 * MEAN)


def test_an_interval_in_three_solves_that_end_at_its_borders(x64):
  """x - w m shrinks inside, x - m outside, for sigma in (.3, 2]."""
  low, high = SCHEDULE.host_t_of_logsnr(-2 * np.log([0.3, 2.0]))
  pair, c = doubled(MEAN), normal(MEAN, 0.5)
  inside = guided.always(pair, guided.towards(W))
  y, want = START, START
  for denoiser, mean, first, last in (
    (c, MEAN, 999.0, high), (inside, W * MEAN, high, low), (c, MEAN, low, 0.0)
  ):  # fmt: skip
    y = carried(denoiser, y, grid(1000, first, last), 'heun')
    a, b = level(first), level(last)
    shrinks = np.sqrt((0.25 + b**2) / (0.25 + a**2))
    want = mean + (want - mean) * shrinks
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
  # In one solve, up to the steps at the borders.
  how = {'guidance_interval': [-2 * np.log(2.0), -2 * np.log(0.3)]}
  above, to = options.times_of(SCHEDULE, how)
  one = guided.within(pair, guided.towards(W), c, above, to)
  np.testing.assert_allclose(
    carried(one, START, grid(1000)), want, rtol=0.01, atol=0.01
  )


def test_each_example_has_its_own_time_in_an_interval():
  """Only the examples inside are guided, and all alike as with one time."""
  pair, combine = doubled(MEAN), guided.towards(W)
  c, x = normal(MEAN, 0.5), jnp.asarray(START, jnp.float32)[:, None]
  one = guided.within(pair, combine, c, 100, 500)
  t = jnp.array([0, 100, 101, 300, 500, 501, 999])
  together, c, always = (
    f(x, t).x0 for f in (one, c, guided.always(pair, combine))
  )
  inside = np.array([0, 0, 1, 1, 1, 0, 0])[:, None]
  np.testing.assert_allclose(together, np.where(inside, always, c), rtol=1e-6)
  # One time for all takes the same way.
  np.testing.assert_allclose(one(x, 100).x0[1], c[1], rtol=1e-6)
  np.testing.assert_allclose(one(x, 101).x0[2], always[2], rtol=1e-6)


def test_the_ends_of_the_weight_and_a_learned_variance():
  """w = 1 is c, w = 0 is u; what c says of the variance stays."""

  c, u = (normal(mean, 0.5)(jnp.ones((3, 2)), 400) for mean in (1.0, -1.0))
  for weight, want in ((1.0, c), (0.0, u)):
    got = guided.towards(weight)(c, u, None, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got,
                 want)  # fmt: skip
  third = guided.towards(2.0)(c, u, None, None)
  np.testing.assert_allclose(third.x0, 2 * c.x0 - u.x0, rtol=1e-6)
  # xt = alpha x0 + sigma eps goes on holding.
  alpha, sigma = SCHEDULE.alpha(400), SCHEDULE.sigma(400)
  np.testing.assert_allclose(alpha * third.x0 + sigma * third.eps, 1, rtol=1e-5)


def test_a_guide_of_another_schedule_is_asked_at_the_same_level(x64):
  other = schedules.linear(250, 4e-4, 0.08)

  def denoise(xt, t):
    alpha, sigma = gaussian.alpha_sigma(other, t, xt)
    s2 = (sigma / alpha) ** 2
    x0 = 0.25 * xt / alpha / (0.25 + s2)
    return Denoised(x0, (xt - alpha * x0) / sigma)

  at = guided.at_level(denoise, other, SCHEDULE)
  x = jnp.asarray(START)[:, None]
  for t in (40, 300, 950):
    want = normal(0.0, 0.5)(x, t)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9),
                 at(x, jnp.asarray(t)), want)  # fmt: skip
  # Of an equal schedule, whole times stay whole.
  same = guided.same_level(schedules.linear(250, 4e-4, 0.08), other)
  assert same(7, np.float32) == 7


# --- rescaling ---------------------------------------------------------------

# rescale_noise_cfg(guided, c, 0.7) of diffusers 0.42.1.
PUBLISHED = (
  *(-0.93291914, -1.67752874, -0.82625496, 0.05478453, -3.54543972),
  *(-0.33363541, -1.89988971, -1.11663461),
)


def predictions():
  rng = np.random.default_rng(0)
  c, g = rng.normal(size=(2, 2, 2, 2, 1)).astype(np.float32)
  return c, 3 * g


@pytest.mark.parametrize('kind', ['eps', 'v', 'x0'])
def test_rescaling_is_of_the_prediction(kind):
  """As diffusers has it, whatever the network predicts."""
  (c, g), t = predictions(), jnp.array([100, 600])
  xt = jnp.asarray(np.random.default_rng(1).normal(size=c.shape), jnp.float32)

  def of(F):
    return gaussian.from_prediction(SCHEDULE, jnp.asarray(F), xt, t, kind)

  rescale = guided.rescaling(SCHEDULE, kind, 0.7)
  got = rescale(of(g), of(c), xt, t)
  want = of(np.reshape(PUBLISHED, c.shape))
  np.testing.assert_allclose(got.x0, want.x0, rtol=2e-5, atol=2e-5)
  np.testing.assert_allclose(got.eps, want.eps, rtol=2e-5, atol=2e-5)


@pytest.mark.parity
def test_rescaling_is_that_of_diffusers():
  import torch
  from diffusers.guiders import guider_utils as published

  c, g = map(torch.tensor, predictions())
  got = published.rescale_noise_cfg(g, c, 0.7).numpy().ravel()
  np.testing.assert_allclose(got, PUBLISHED, rtol=1e-6)


# --- plans -------------------------------------------------------------------


def chosen(conditioning=TRAINED, guide=None, default=1.0, **given):
  return options.chosen(conditioning, guide or {}, default, **given)


def planned(guidance, sampler='ddim', **how):
  return plans.create(
    SCHEDULE, sampler=sampler, num_steps=10, guidance=guidance, **how
  )


def test_a_guided_evaluation_has_two_rows():
  assert planned({}).rows == 10
  assert planned(chosen(guidance=0.0)).rows == 10
  plan = planned(chosen(guidance=2.0))
  assert (plan.evaluations, plan.rows) == (10, 20)
  assert plan.cost() == '10 steps, 20 rows of the network'
  heun = planned(chosen(guidance=2.0, guidance_rescale=0.5), 'heun')
  assert (heun.evaluations, heun.rows) == (19, 38)
  # Of 999, 888, 777, ..., 0, whole times between these two log-SNRs.
  logsnr = 2 * levels.of(SCHEDULE, [777, 555]).lam
  low, high = logsnr + np.array([-1e-3, 1e-3])
  inside = planned(chosen(guidance=2.0, guidance_interval=(low, high)))
  assert inside.rows == 13
  assert planned(
    chosen(guidance=2.0, guidance_interval=(logsnr[0], logsnr[1] - 1e-6))
  ).rows == 12  # fmt: skip


def test_a_plan_says_its_guidance_and_no_more():
  assert 'guidance' not in planned({}).protocol()
  how = chosen(guidance=2.0, guidance_interval='-3/3', guidance_rescale=0.0)
  assert how == {'guidance': 2.0, 'guidance_interval': [-3.0, 3.0]}
  told = planned(how, condition={'label': [3]}).protocol()
  assert told.items() >= {**how, 'label': [3]}.items()
  assert chosen(default=2.0) == {'guidance': 2.0}
  assert chosen({'name': 'none'}, default=2.0) == {}


NONE = {'name': 'none', 'drop': 0.1}


@pytest.mark.parametrize(
  ('given', 'said'),
  [
    ({'conditioning': NONE, 'guidance': 2.0}, 'the run has no condition'),
    ({'conditioning': {'name': 'label', 'drop': 0}, 'guidance': 2.0},
     'trained with conditioning.drop=0'),
    ({'guidance': 2.0, 'guidance_interval': '3,1'}, 'with LO below HI'),
    ({'guidance': 2.0, 'guidance_interval': '1'}, 'give LO,HI in log-SNR'),
    ({'guidance': 2.0, 'guidance_rescale': 1.5}, 'from 0 (off) to 1'),
    ({'guidance': np.nan}, 'a finite number'),
    ({'guidance_interval': '1,3'}, 'has no effect with guidance=1'),
    ({'guide': {'guide': 'run@5'}}, 'guide=run@5 has no effect'),
    ({'classifier_scale': 2.0}, 'no effect without a classifier'),
  ],
)  # fmt: skip
def test_guidance_that_cannot_be_is_one_line(given, said):
  with pytest.raises(UserError) as error:
    chosen(**given)
  assert said in str(error.value)
  assert '\n' not in str(error.value)


def test_an_interval_without_an_evaluation_is_one_line():
  with pytest.raises(UserError, match='no evaluation of this grid is inside'):
    planned(chosen(guidance=2.0, guidance_interval=(20, 30)))


# --- by a classifier ---------------------------------------------------------


def test_a_classifier_makes_the_class_of_a_mixture(x64):
  """Of two equal normals, with exact log p(y | xt) and scale 1."""
  ends = np.array([-MEAN, MEAN])

  def likelihoods(xt, t):
    alpha, sigma = gaussian.alpha_sigma(SCHEDULE, t, xt)
    variance = alpha**2 * 0.25 + sigma**2
    return -((xt - alpha * ends[None]) ** 2) / (2 * variance)

  def log_probability(xt, t):
    return jax.nn.log_softmax(likelihoods(xt, t))[:, 1]

  def mixture(xt, t):
    weights = jax.nn.softmax(likelihoods(xt, t))
    x0 = sum(
      weights[:, k : k + 1] * normal(float(ends[k]), 0.5)(xt, t).x0
      for k in (0, 1)
    )
    alpha, sigma = gaussian.alpha_sigma(SCHEDULE, t, xt)
    return Denoised(x0, (xt - alpha * x0) / sigma)

  guide = classifier.by_classifier(mixture, log_probability, SCHEDULE, 1.0)
  x = jnp.linspace(-2.0, 2.0, 5)[:, None]
  for t in (50, 500, 950):
    got, want = jax.jit(guide)(x, t), normal(MEAN, 0.5)(x, t)
    np.testing.assert_allclose(got.x0, want.x0, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.eps, want.eps, rtol=1e-6, atol=1e-6)


def test_pure_noise_tells_a_classifier_nothing():
  """alpha is 0 there, and x0 + sigma^2 / alpha slope would be infinite."""
  flow = schedules.flow(10)

  def zero(xt, t):
    return Denoised(0 * xt, xt)

  guide = classifier.by_classifier(zero, lambda x, t: x.sum(1), flow, 2.0)
  x = jnp.ones((2, 3))
  found = guide(x, jnp.array([9, 5]))
  assert np.isfinite(found.x0).all()
  np.testing.assert_array_equal(found.x0[0], 0)
  np.testing.assert_array_equal(found.eps[0], 1)
  assert np.all(found.x0[1] > 0)


def test_a_name_of_samples_that_only_a_classifier_guides():
  how = {
    'classifier_scale': 2.0, 'classifier': 'judge@60',
    'classifier_sha256': 'ab' * 32,
  }  # fmt: skip
  plan = plans.create(
    SCHEDULE, sampler='ddim', num_steps=2, condition={'label': [3]},
    guidance=how,
  )  # fmt: skip
  assert guiding.name(plan) == ['label3', 'classifierabababab', 'scale2']


def test_plans_that_the_network_cannot_follow_are_one_line():
  config = default.get_config().to_dict()
  with pytest.raises(UserError, match=r'needs a network that was trained with'):
    plans.for_run(config, variance='learned')
  config['loss']['name'] = 'classification'
  with pytest.raises(UserError, match='give it as --classifier'):
    plans.for_run(config, sampler='ddim')
