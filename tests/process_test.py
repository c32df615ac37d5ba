"""The schedule and the Gaussian process, against closed forms in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.guidance import clipping
from diffusion_jax.objectives import denoising
from diffusion_jax.process import gaussian, schedules
from diffusion_jax.system.errors import UserError

T = 1000


@pytest.fixture(scope='module')
def schedule():
  return schedules.linear(T)


# --- the schedule -----------------------------------------------------------


def test_constants_of_the_paper(schedule):
  """arXiv 2006.11239, section 4, and what follows from it."""
  assert schedule.num_timesteps == T
  assert schedule.betas[0] == 1e-4
  assert schedule.betas[-1] == 0.02
  np.testing.assert_allclose(
    np.exp(schedule.log_alpha_bar[-1]), 4.0358e-5, rtol=2e-5
  )
  np.testing.assert_allclose(
    np.exp(0.5 * schedule.log_alpha_bar[-1]), 0.00635, rtol=1e-3
  )
  t = np.arange(1, T)
  large = gaussian.step_variance(schedule, t, t - 1, 'fixedlarge')
  small = gaussian.step_variance(schedule, t, t - 1, 'fixedsmall')
  np.testing.assert_allclose(small[0], 5.453e-5, rtol=1e-4)
  np.testing.assert_allclose(large, schedule.betas[1:], rtol=1e-12)
  assert np.all(small < large)


def test_tables_against_the_plain_product(schedule):
  """The definition, alpha_bar_t = prod (1 - beta), without logarithms."""
  alpha_bar = np.cumprod(1.0 - np.linspace(1e-4, 0.02, T))
  np.testing.assert_allclose(
    np.exp(schedule.log_alpha_bar), alpha_bar, rtol=1e-12
  )
  before = np.concatenate([[1.0], alpha_bar[:-1]])
  posterior = schedule.betas * (1 - before) / (1 - alpha_bar)
  t = np.arange(1, T)
  small = gaussian.step_variance(schedule, t, t - 1, 'fixedsmall')
  np.testing.assert_allclose(small, posterior[1:], rtol=1e-9)


def test_float32_keeps_sigma_at_the_first_step(schedule):
  """From a float32 alpha_bar it would be off by 8e-5, from its log by 1e-7."""
  exact = np.sqrt(-np.expm1(schedule.log_alpha_bar))
  got = np.asarray(schedule.sigma(jnp.arange(T)), np.float64)
  np.testing.assert_allclose(got, exact, rtol=5e-7)
  rounded = np.exp(schedule.log_alpha_bar).astype(np.float32)
  assert abs(np.sqrt(1 - rounded[0]) / exact[0] - 1) > 1e-5


def test_alpha_falls_and_logsnr_falls_strictly(schedule, x64):
  t = jnp.linspace(-1.0, T - 1.0, 7001)
  assert jnp.all(jnp.diff(schedule.alpha(t, t.dtype)) < 0)
  assert jnp.all(jnp.diff(schedule.logsnr(t[1:], t.dtype)) < 0)
  alpha, sigma = schedule.alpha(t, t.dtype), schedule.sigma(t, t.dtype)
  np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-14)
  np.testing.assert_allclose(
    schedule.logsnr(t[1:], t.dtype), 2 * jnp.log(alpha / sigma)[1:], rtol=1e-10
  )


def test_time_runs_from_clean_minus_one(schedule, x64):
  assert schedule.alpha(-1, jnp.float64) == 1
  assert schedule.sigma(-1.0, jnp.float64) == 0
  assert schedule.logsnr(-1.0, jnp.float64) == jnp.inf
  np.testing.assert_allclose(
    schedule.sigma(0, jnp.float64) ** 2, 1e-4, rtol=1e-12
  )


def test_fractional_times_interpolate_log_alpha_bar(schedule, x64):
  whole = jnp.arange(-1, T)
  np.testing.assert_allclose(
    schedule.log_alpha_bar_at(whole * 1.0, jnp.float64),
    schedule.log_alpha_bar_at(whole, jnp.float64),
    rtol=1e-14,
  )
  between = schedule.log_alpha_bar_at(whole[:-1] + 0.25, jnp.float64)
  table = np.concatenate([[0.0], schedule.log_alpha_bar])
  np.testing.assert_allclose(
    between, 0.75 * table[:-1] + 0.25 * table[1:], rtol=1e-12
  )
  host, variance = schedule.host(whole[:-1] + 0.25)
  np.testing.assert_allclose(host, between, rtol=1e-12)
  np.testing.assert_allclose(variance, 1 - np.exp(host), rtol=1e-10)


def test_t_of_logsnr_is_the_inverse(schedule, x64):
  t = jnp.linspace(-0.99, T - 1.0, 3001)
  again = schedule.t_of_logsnr(schedule.logsnr(t, t.dtype), t.dtype)
  np.testing.assert_allclose(again, t, atol=1e-8)
  assert schedule.t_of_logsnr(jnp.inf, t.dtype) == -1
  host = schedule.host_t_of_logsnr(np.asarray(schedule.logsnr(t, t.dtype)))
  assert host.dtype == np.float64
  np.testing.assert_allclose(host, t, atol=1e-8)


@pytest.mark.parametrize('betas', [[0.1, 1.0], [0.0, 0.1], [[0.1]]])
def test_betas_outside_of_zero_and_one_are_refused(betas):
  with pytest.raises(UserError, match='between 0 and 1'):
    schedules.from_betas(betas)


def test_unknown_names_are_answered_with_the_known():
  with pytest.raises(UserError, match='linear'):
    schedules.create(schedule='lineal')
  with pytest.raises(UserError, match='fixedlarge'):
    gaussian.step_variance(schedules.linear(9), 1, 0, 'large')


# --- q -----------------------------------------------------------------------


def test_q_sample_is_the_chain_of_single_steps(schedule, x64):
  """t + 1 single steps of eq. 2, as moments: mean and variance of eq. 4."""
  mean, variance = 1.0, 0.0
  for t, beta in enumerate(schedule.betas):
    mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    if t in (0, 1, 17, 500, 999):
      np.testing.assert_allclose(
        schedule.alpha(t, jnp.float64), mean, rtol=1e-11
      )
      np.testing.assert_allclose(
        schedule.sigma(t, jnp.float64) ** 2, variance, rtol=1e-11
      )


def test_q_sample_adds_up_per_example(schedule, x64):
  x0, eps = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 1))
  t = jnp.array([0, 400, 999])
  xt = gaussian.q_sample(schedule, jnp.asarray(x0), t, jnp.asarray(eps))
  for i in range(3):
    a = np.exp(schedule.log_alpha_bar[t[i]])
    np.testing.assert_allclose(
      xt[i], np.sqrt(a) * x0[i] + np.sqrt(1 - a) * eps[i], rtol=1e-10
    )


@pytest.mark.parametrize(
  ('t', 's'), [(1, 0), (2, 1), (500, 499), (999, 998), (999, 0), (600, 37.5)]
)
def test_posterior_is_gaussian_conditioning(schedule, t, s):
  """q(xs | xt, x0) by conditioning the joint normal of (xs, xt) given x0.

  xs = a_s x0 + ..., and xt = r xs + noise of variance 1 - r^2, r = a_t / a_s.
  """
  a_t, a_s = (np.exp(0.5 * schedule.host(time)[0]) for time in (t, s))
  r = a_t / a_s
  covariance = np.array([[1 - a_s**2, 0.0], [0.0, 0.0]])
  covariance[0, 1] = covariance[1, 0] = r * covariance[0, 0]
  covariance[1, 1] = r**2 * covariance[0, 0] + 1 - r**2
  gain = covariance[0, 1] / covariance[1, 1]
  c0, ct, variance = gaussian.posterior_coefficients(schedule, t, s)
  np.testing.assert_allclose(ct, gain, rtol=1e-9)
  np.testing.assert_allclose(c0, a_s - gain * a_t, rtol=1e-8)
  np.testing.assert_allclose(
    variance, covariance[0, 0] - gain * covariance[0, 1], rtol=1e-8
  )


def test_posterior_of_clean_data_is_x0(schedule):
  c0, ct, variance = gaussian.posterior_coefficients(schedule, 5, -1)
  assert (c0, ct, variance) == (1, 0, 0)


def test_posteriors_chain_back_to_the_marginal(schedule):
  """Ancestral steps with the true x0 leave q(xs | x0) what it is, exactly."""
  x0, mean, variance = 0.7, 0.0, 1.0
  t = T - 1
  mean, variance = np.exp(0.5 * schedule.host(t)[0]) * x0, schedule.host(t)[1]
  for s in (998, 700, 433, 100, 7, 0):
    c0, ct, added = gaussian.posterior_coefficients(schedule, t, s)
    mean, variance = c0 * x0 + ct * mean, ct**2 * variance + added
    log_s, var_s = schedule.host(s)
    np.testing.assert_allclose(mean, np.exp(0.5 * log_s) * x0, rtol=1e-10)
    np.testing.assert_allclose(variance, var_s, rtol=1e-10)
    t = s


def test_long_steps_add_the_variance_between(schedule):
  t, s = 700, 200
  product = np.prod(1 - schedule.betas[s + 1 : t + 1])
  np.testing.assert_allclose(
    gaussian.step_variance(schedule, t, s, 'fixedlarge'),
    1 - product,
    rtol=1e-11,
  )
  assert gaussian.step_variance(
    schedule, t, s, 'fixedsmall'
  ) < gaussian.step_variance(schedule, t, s, 'fixedlarge')


# --- the prediction algebra ---------------------------------------------------


@pytest.mark.parametrize(
  ('first', 'second'), itertools.product(gaussian.PARAMETRISATIONS, repeat=2)
)
def test_conversions_go_round(schedule, x64, first, second):
  """target -> (x0, eps) -> another target -> (x0, eps): where it began."""
  x0, eps = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 3, 3, 2)))
  t = jnp.array([0, 1, 300, 998, 999])
  xt = gaussian.q_sample(schedule, x0, t, eps)
  target = gaussian.to_target(schedule, x0, eps, t, first)
  there = gaussian.from_prediction(schedule, target, xt, t, first)
  target = gaussian.to_target(schedule, there.x0, there.eps, t, second)
  back = gaussian.from_prediction(schedule, target, xt, t, second)
  np.testing.assert_allclose(back.x0, x0, atol=1e-9)
  np.testing.assert_allclose(back.eps, eps, atol=1e-9)


def test_v_is_the_velocity_of_the_rotation(schedule, x64):
  """arXiv 2202.00512, appendix D: d xt / d phi with alpha = cos phi."""
  x0, eps, t = jnp.array([[0.3]]), jnp.array([[-1.2]]), jnp.array([431])
  phi = jnp.arctan2(schedule.sigma(t, x0.dtype), schedule.alpha(t, x0.dtype))
  _, velocity = jax.jvp(
    lambda phi: jnp.cos(phi)[:, None] * x0 + jnp.sin(phi)[:, None] * eps,
    (phi,),
    (jnp.ones_like(phi),),
  )
  v = gaussian.to_target(schedule, x0, eps, t, 'v')
  np.testing.assert_allclose(v, velocity, rtol=1e-12)


def test_unknown_prediction_is_named(schedule):
  x = jnp.zeros((1, 2))
  with pytest.raises(UserError, match="'noise'"):
    gaussian.to_target(schedule, x, x, jnp.array([0]), 'noise')


# --- denoisers, clipping, loss ------------------------------------------------


def test_denoiser_shows_the_network_no_negative_time(schedule):
  seen = []

  def predict(xt, t):
    seen.append(np.asarray(t))
    return jnp.zeros_like(xt)

  denoise = gaussian.denoiser(predict, schedule, 'x0')
  denoise(jnp.ones((3, 2)), -1.0)
  np.testing.assert_array_equal(seen[0], [0, 0, 0])


@pytest.mark.parametrize('clip', [True, False])
def test_clean_data_has_no_noise(schedule, clip):
  """At t = -1 sigma is 0, and eps is 0 whatever x0 the network says."""
  xt = jnp.array([[0.5, -0.25], [1.0, -1.0]])
  denoise = gaussian.denoiser(lambda xt, t: xt + 1, schedule, 'x0')
  if clip:
    denoise = clipping.clip_x0(denoise, schedule)
  x0, eps, _ = denoise(xt, jnp.array([-1.0, 5.0]))
  assert np.isfinite(x0).all()
  np.testing.assert_array_equal(eps[0], 0)
  assert np.isfinite(eps).all()
  assert np.any(eps[1] != 0)


@pytest.mark.parametrize('t', [0, 10, 400, 999])
def test_clipping_keeps_xt(schedule, x64, t):
  """xt = alpha x0 + sigma eps, clipped or not; and x0 is in [-1, 1]."""
  xt = jnp.asarray(np.random.default_rng(2).normal(size=(4, 6)) * 2)
  denoise = clipping.clip_x0(
    gaussian.denoiser(lambda x, t: 3 * x, schedule, 'x0'), schedule
  )
  x0, eps, _ = denoise(xt, t)
  assert jnp.abs(x0).max() <= 1
  assert jnp.any(x0 != 3 * xt)
  alpha, sigma = schedule.alpha(t, xt.dtype), schedule.sigma(t, xt.dtype)
  np.testing.assert_allclose(alpha * x0 + sigma * eps, xt, rtol=1e-10)


def test_loss_of_the_exact_predictor_is_its_bayes_error(schedule, x64):
  """Data N(0, s^2): what the best predictor leaves.

  E[eps | xt] = sigma xt / (alpha^2 s^2 + sigma^2); its mean squared error is
  alpha^2 s^2 / (alpha^2 s^2 + sigma^2). 40,000 draws agree within 4 standard
  errors of the squared error (a scaled chi-square: variance 2 mse^2).
  """
  s, t = 0.5, 300
  count, dims = 400, 100
  x0, eps = np.random.default_rng(3).normal(size=(2, count, dims))
  alpha2 = np.exp(schedule.log_alpha_bar[t])
  total = alpha2 * s**2 + 1 - alpha2
  values = denoising.errors(
    lambda xt, t: np.sqrt(1 - alpha2) * xt / total,
    schedule, 'eps', jnp.asarray(s * x0), jnp.full(count, t), jnp.asarray(eps),
  )  # fmt: skip
  mse = alpha2 * s**2 / total
  error = mse * np.sqrt(2 / (count * dims))
  assert values.shape == (count,)
  assert abs(values.mean() - mse) < 4 * error


def test_loss_is_a_mean_over_each_example(schedule):
  x0 = jnp.zeros((2, 4, 4, 3))
  eps = jnp.stack([jnp.ones((4, 4, 3)), 2 * jnp.ones((4, 4, 3))])
  values = denoising.errors(
    lambda xt, t: jnp.zeros_like(xt), schedule, 'eps', x0, jnp.array([3, 4]),
    eps,
  )  # fmt: skip
  np.testing.assert_allclose(values, [1, 4])
