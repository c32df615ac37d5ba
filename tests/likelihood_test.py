"""The variational bound and its fast estimate, against closed forms.

Where data are Gaussian, N(m, v) in each dimension, the best denoiser is linear
and every term is a quadratic function of the standard normal numbers behind x0
and eps. Signs +1 and -1 have the same first and second moments, so the mean
over the four pairs of signs is the expectation, to rounding.
"""

import decimal
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from diffusion_jax.guidance import clipping
from diffusion_jax.process import (
  decoder,
  fast_bound,
  gaussian,
  likelihood,
  schedules,
)
from diffusion_jax.samplers import grid
from diffusion_jax.system.errors import UserError

T = 1000
FULL = list(range(T - 1, -2, -1))
MEANS = np.array([0.0, 0.3, -0.8, 0.1])
VARIANCES = np.array([0.01, 0.25, 1.0, 4.0])


SCHEDULE = schedules.linear(T)


@pytest.fixture
def schedule():
  return SCHEDULE


def bound(
  denoiser, schedule, times, x0, keys, noise='fixedlarge', discrete=True
):
  """All parts of the bound (arXiv 2006.11239, eq. 5), for a batch at once."""
  steps = likelihood.prepare(schedule, times, noise)
  scored = likelihood.terms(denoiser, steps, x0, keys, discrete=discrete)
  return likelihood.Table(likelihood.prior(schedule, x0, times[0]), *scored)


def keys_of(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


def alpha_bar(times):
  """The product of 1 - beta, in float64; log-linear between whole times."""
  table = np.cumprod(1.0 - np.linspace(1e-4, 0.02, T))
  log_table = np.concatenate([[0.0], np.log(table)])
  return np.exp(np.interp(times, np.arange(-1, T), log_table))


def exact_denoiser(schedule, mean, variance):
  """E[x0 | xt] for independent data N(mean_d, variance_d); xt is [B, D]."""

  def denoise(xt, t):
    m, v = (jnp.asarray(a, xt.dtype)[None] for a in (mean, variance))
    alpha = schedule.alpha(t, xt.dtype)[:, None]
    sigma = schedule.sigma(t, xt.dtype)[:, None]
    x0 = m + alpha * v / (alpha**2 * v + sigma**2) * (xt - alpha * m)
    return gaussian.Denoised(x0, (xt - alpha * x0) / sigma)

  return denoise


def signs(mean, variance):
  """x0, eps [4, D], whose mean over the 4 is an expectation."""
  first = np.array([[1.0], [1.0], [-1.0], [-1.0]])
  second = np.array([[1.0], [-1.0], [1.0], [-1.0]])
  x0 = mean + np.sqrt(variance) * first
  return jnp.asarray(x0), jnp.asarray(second * np.ones_like(x0))


@functools.partial(jax.jit, static_argnames='discrete')
def every_term(steps, mean, variance, x0, eps, discrete=False):
  """Terms [K, B] of given x0 and eps, by the best denoiser."""
  denoise = exact_denoiser(SCHEDULE, mean, variance)

  def one(i):
    return likelihood.term(denoise, steps, i, x0, eps, discrete)

  return jax.lax.map(one, jnp.arange(len(steps.t)), batch_size=len(steps.t))


def expected_terms(schedule, times, mean, variance, noise):
  """[K] bits and [K] squared errors, in expectation, from the library."""
  steps = likelihood.prepare(schedule, times, noise)
  bits, mse = every_term(steps, mean, variance, *signs(mean, variance))
  return np.mean(bits, 1), np.mean(mse, 1)


@functools.partial(jax.jit, static_argnums=1)
def prior(x0, t):
  return likelihood.prior(SCHEDULE, x0, t)


def expected_bound(schedule, times, mean, variance, noise):
  bits, _ = expected_terms(schedule, times, mean, variance, noise)
  x0, _ = signs(mean, variance)
  return bits.sum() + np.mean(prior(x0, times[0]))


def left(t, variance):
  """Var(x0 | xt) = v sigma^2 / (alpha^2 v + sigma^2), [K, D]."""
  ab = alpha_bar(np.asarray(t, np.float64))[:, None]
  return variance * (1 - ab) / (ab * variance + 1 - ab)


def entropy(variance):
  """Of independent normal data, bits per dimension."""
  return np.mean(0.5 * np.log2(2 * np.pi * np.e * variance))


def marginal_kl(t, mean, variance):
  """KL(q(xt) || N(0, I)) of the data's xt, bits per dimension."""
  ab = alpha_bar(t)
  m, v = np.sqrt(ab) * mean, ab * variance + 1 - ab
  return np.mean(v + m**2 - 1 - np.log(v)) / 2 / np.log(2)


def true_variances(times, variance):
  """[K, D]: of p(xs | xt), the variance of xs given xt for data N(m, v).

  xs = c0 x0 + ct xt + sqrt(vq) z, and x0 given xt has the variance `left`:
  together c0^2 left + vq, by the law of total variance. At s = -1, c0 is 1 and
  vq is 0.
  """
  t, s = np.asarray(times[:-1], float), np.asarray(times[1:], float)
  ab_t, ab_s = alpha_bar(t)[:, None], alpha_bar(s)[:, None]
  beta = 1 - ab_t / ab_s
  c0 = np.sqrt(ab_s) * beta / (1 - ab_t)
  return c0**2 * left(t, variance) + beta * (1 - ab_s) / (1 - ab_t)


# --- terms -------------------------------------------------------------------

GRIDS = {
  'strided': grid.create('uniform', SCHEDULE, 20),
  'fractional': grid.create('quadratic', SCHEDULE, 20),
  'short of T-1': grid.create('leading', SCHEDULE, 20),
  'literal': [700, 300.5, 4, 1, -1],
}


@pytest.mark.parametrize('times', GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize('noise', gaussian.VARIANCES)
def test_a_term_is_the_kl_of_its_two_gaussians(schedule, x64, times, noise):
  """For given x0 and eps, by the formula of KL with both means written out."""
  rng = np.random.default_rng(0)
  x0, eps = rng.normal(size=(2, 3, 5))
  steps = likelihood.prepare(schedule, times, noise)
  pairs = list(itertools.pairwise(times))
  for i, (t, s) in enumerate(pairs):
    ab_t, ab_s = alpha_bar(t), alpha_bar(s)
    xt = np.sqrt(ab_t) * x0 + np.sqrt(1 - ab_t) * eps
    guess = np.tanh(xt)
    got = likelihood.term(
      lambda xt, t: gaussian.Denoised(jnp.tanh(xt), None),
      steps, i, jnp.asarray(x0), jnp.asarray(eps), discrete=False,
    )  # fmt: skip
    beta = 1 - ab_t / ab_s
    c0 = np.sqrt(ab_s) * beta / (1 - ab_t)
    ct = np.sqrt(ab_t / ab_s) * (1 - ab_s) / (1 - ab_t)
    vq = beta * (1 - ab_s) / (1 - ab_t)
    v = beta if noise == 'fixedlarge' else vq
    if s >= 0:
      far = (c0 * x0 + ct * xt - c0 * guess - ct * xt) ** 2
      nats = 0.5 * (np.log(v / vq) + (vq + far) / v - 1)
    else:
      t, s = pairs[-2]
      v = (1 - alpha_bar(t) / alpha_bar(s)) * (1 - alpha_bar(s))
      v /= 1 - alpha_bar(t)
      nats = 0.5 * np.log(2 * np.pi * v) + (x0 - guess) ** 2 / (2 * v)
    np.testing.assert_allclose(
      got.bits, nats.mean(1) / np.log(2), rtol=1e-6, atol=1e-12
    )
    np.testing.assert_allclose(got.mse, ((x0 - guess) ** 2).mean(1), rtol=1e-9)


def test_terms_of_gaussian_data_in_expectation(schedule, x64):
  """E |x0 - E[x0 | xt]|^2 is the variance that xt leaves."""
  bits, mse = expected_terms(schedule, FULL, MEANS, VARIANCES, 'fixedlarge')
  wanted = left(FULL[:-1], VARIANCES).mean(1)
  np.testing.assert_allclose(mse, wanted, rtol=1e-8)
  ab, before = alpha_bar(FULL[:-2]), alpha_bar(FULL[1:-1])
  beta, ratio = 1 - ab / before, (1 - before) / (1 - ab)
  weight = before * beta / (1 - ab) ** 2
  kl = 0.5 * (ratio - 1 - np.log(ratio) + weight * wanted[:-1])
  np.testing.assert_allclose(bits[:-1], kl / np.log(2), rtol=1e-6)


@pytest.mark.parametrize('t', [0, 300, 899.5, None])
def test_the_prior_is_its_kl(schedule, x64, t):
  x0 = np.random.default_rng(1).normal(size=(3, 4, 4, 1))
  ab = alpha_bar(T - 1 if t is None else t)
  nats = 0.5 * (ab * x0**2 + 1 - ab - 1 - np.log(1 - ab)).mean((1, 2, 3))
  for dtype, rtol in ((jnp.float64, 1e-7), (jnp.float32, 1e-5)):
    got = likelihood.prior(schedule, jnp.asarray(x0, dtype), t)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, nats / np.log(2), rtol=rtol)


def test_float32_is_as_good_as_float64(schedule, x64):
  """To 1e-4 of a term, at every step: no difference of large numbers."""
  steps = likelihood.prepare(schedule, FULL)
  x0, eps = np.random.default_rng(2).normal(size=(2, 2, 64)) * 0.5
  x0 = np.rint(np.clip(x0 + 1, 0, 2) * 127.5) / 127.5 - 1

  for discrete in (True, False):
    got, wanted = (
      every_term(
        steps, np.zeros(64), np.full(64, 0.25), jnp.asarray(x0, dtype),
        jnp.asarray(eps, dtype), discrete=discrete,
      ).bits
      for dtype in (jnp.float32, jnp.float64)
    )  # fmt: skip
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


def test_the_decoders_variance_is_that_of_the_step_before(schedule):
  for name in gaussian.VARIANCES:
    t = np.arange(T - 1, 0, -1)
    every = gaussian.step_variance(schedule, t, t - 1, name)
    decoder = gaussian.step_variance(schedule, 1, 0, 'fixedsmall')
    np.testing.assert_allclose(
      likelihood.variances(schedule, FULL, name), [*every, decoder], rtol=1e-12
    )
  strided = likelihood.variances(schedule, [999, 400, 100, -1], 'fixedlarge')
  np.testing.assert_allclose(
    strided[2], gaussian.step_variance(schedule, 400, 100, 'fixedsmall')
  )
  given = likelihood.variances(schedule, [5, -1], [0.1])
  np.testing.assert_array_equal(given, [0.1])


@pytest.mark.parametrize(
  ('times', 'variance', 'said'),
  [
    (FULL, 'fixed', "'fixed'"),
    ([9, -1], 'fixedlarge', 'one step'),
    ([9, 4, -1], [0.1], r'shape \(1,\).* 2 numbers'),
    ([9, 4, -1], [0.1, 0.0], 'above 0'),
    ([9, 4, -1], [0.1, np.nan], 'above 0'),
  ],
)
def test_bad_variances_are_refused(schedule, times, variance, said):
  with pytest.raises(UserError, match=said) as error:
    likelihood.prepare(schedule, times, variance)
  assert '\n' not in str(error.value)


# --- the whole bound ---------------------------------------------------------


@pytest.mark.parametrize('times', [FULL, *GRIDS.values()],
                         ids=['full', *GRIDS])  # fmt: skip
def test_with_the_true_variance_the_bound_is_the_entropy(schedule, x64, times):
  """All but KL(q(x_t1) || N(0, I)), t1 the grid's first time.

  For any p, the mean bound is E[log q(x_t1.. | x0) - log p(x0, .. x_t1)], and
  with q(x0) q(.. | x0) = q(x_t1) prod q(xs | xt) that is

    H(x0) + KL(q(x_t1) || p(x_t1)) + sum E KL(q(xs | xt) || p(xs | xt)).

  For data N(m, v I), q(xs | xt) is normal, its mean that of the best denoiser
  and its variance `true_variances`, so that all but the first two vanish: the
  entropy is met by every grid, but for 2e-6 bits/dim at T-1.
  """
  for m, v in ((0.3, 0.01), (-0.8, 0.25), (0.0, 4.0)):
    mean, variance = np.array([m]), np.array([v])
    noise = true_variances(times, variance)[:, 0]
    got = expected_bound(schedule, times, mean, variance, noise)
    rest = marginal_kl(times[0], mean, variance)
    np.testing.assert_allclose(got, entropy(variance) + rest, atol=1e-8)
    if times[0] == T - 1:
      assert abs(got - entropy(variance)) < 1e-3


@pytest.mark.parametrize('name', ['full', 'fractional'])
def test_one_variance_for_unequal_dimensions(schedule, x64, name):
  """The best one is the mean of the true v_d, and leaves a gap.

  KL(N(., v_d) || N(., v)) = (log(v / v_d) + v_d / v - 1) / 2, whose mean over d
  is (log v - mean log v_d) / 2 at v = mean v_d, and larger at any other v.
  """
  times = FULL if name == 'full' else GRIDS[name]
  true = true_variances(times, VARIANCES)
  best = true.mean(1)
  gap = 0.5 * (np.log(best) - np.log(true).mean(1)).sum() / np.log(2)
  floor = entropy(VARIANCES) + marginal_kl(times[0], MEANS, VARIANCES)
  got = expected_bound(schedule, times, MEANS, VARIANCES, best)
  np.testing.assert_allclose(got, floor + gap, atol=1e-7)
  for factor in (0.99, 1.01):
    noise = factor * best
    assert expected_bound(schedule, times, MEANS, VARIANCES, noise) > got


@pytest.mark.parametrize(
  ('noise', 'low', 'high'),
  [('fixedlarge', 0.16, 0.19), ('fixedsmall', 0.72, 0.85)],
)
@pytest.mark.parametrize('v', [0.01, 0.05, 0.25, 1.0, 4.0])
def test_what_fixed_variances_cost(schedule, x64, noise, low, high, v):
  """Over the entropy, T = 1000, t = 0 as a density.

  Measured: 0.186, 0.172, 0.165, 0.164, 0.165 for fixedlarge and 0.723, 0.792,
  0.822, 0.835, 0.842 for fixedsmall. Nearly all of it is the last steps', whose
  decoder has half of the variance that t = 0 leaves.
  """
  mean, variance = np.zeros(1), np.array([v])
  got = expected_bound(schedule, FULL, mean, variance, noise)
  assert low < got - entropy(variance) < high


@pytest.mark.parametrize('noise', gaussian.VARIANCES)
@pytest.mark.parametrize('name', ['strided', 'fractional', 'short of T-1'])
def test_strided_bounds_in_closed_form(schedule, x64, name, noise):
  """Entropy, prior, and sum of E KL(q(xs | xt) || p) at the fixed variance."""
  times = GRIDS[name]
  true = true_variances(times, VARIANCES)
  fixed = likelihood.variances(schedule, times, noise)[:, None]
  kl = 0.5 * (np.log(fixed / true) + true / fixed - 1).mean(1).sum() / np.log(2)
  floor = entropy(VARIANCES) + marginal_kl(times[0], MEANS, VARIANCES)
  np.testing.assert_allclose(
    expected_bound(schedule, times, MEANS, VARIANCES, noise),
    floor + kl,
    rtol=1e-7,
  )


def test_drawn_noise_gives_the_expectation(schedule, x64):
  """`bound` itself on 4000 images of 4 normal numbers, within 4 errors."""
  times = GRIDS['strided']
  count = 4000
  x0 = MEANS + np.sqrt(VARIANCES) * np.random.default_rng(3).normal(
    size=(count, 4)
  )
  denoise = exact_denoiser(schedule, MEANS, VARIANCES)
  table = jax.jit(
    lambda x0, keys: bound(denoise, schedule, times, x0, keys, discrete=False)
  )(jnp.asarray(x0), keys_of(count))
  assert table.bits.shape == table.mse.shape == (20, count)
  wanted, mse = expected_terms(schedule, times, MEANS, VARIANCES, 'fixedlarge')
  for got, known in ((table.bits, wanted), (table.mse, mse)):
    error = np.std(got, axis=1) / np.sqrt(count)
    assert np.all(abs(np.mean(got, 1) - known) < 4 * error)
  total = expected_bound(schedule, times, MEANS, VARIANCES, 'fixedlarge')
  error = np.std(table.total) / np.sqrt(count)
  assert abs(table.total.mean() - total) < 4 * error


def two_levels(schedule):
  """The best denoiser of images whose values are -1 or 1, evenly."""

  def denoise(xt, t):
    alpha = gaussian.per_example(schedule.alpha(t, xt.dtype), xt)
    sigma = gaussian.per_example(schedule.sigma(t, xt.dtype), xt)
    x0 = jnp.tanh(alpha * xt / sigma**2)
    return gaussian.Denoised(x0, (xt - alpha * x0) / sigma)

  return denoise


@pytest.mark.parametrize(
  'noise', ['fixedsmall', pytest.param('fixedlarge', marks=pytest.mark.slow)]
)
def test_black_and_white_images(schedule, noise):
  """Fair coins: 1 bit, which the steps must pay, and the decoder's own.

  At t = 0 the value is known for certain, at a mean that is it, and the decoder
  pays for what its Gaussian leaves outside of the open bin: -log2 of the
  distribution function at half a bin, over the deviation. Before, prior and
  terms must pay 1 bit, the information; what small steps add to it is 0 for
  'fixedsmall', and the constants for 'fixedlarge'.
  """
  x0 = jnp.where(jax.random.bernoulli(jax.random.key(1), 0.5, (8, 64)), 1.0, -1)
  score = jax.jit(
    lambda x0, keys: bound(
      two_levels(schedule), schedule, FULL, x0, keys, noise
    )
  )
  table = score(x0, keys_of(8))
  z = 1 / 255 / np.sqrt(5.4531e-5)
  np.testing.assert_allclose(
    table.bits[-1], -np.log2(scipy.special.ndtr(z)), atol=1e-3
  )
  rate, _ = likelihood.rate_distortion(table)
  over = likelihood.prepare(schedule, FULL, noise).constant[:-1].sum()
  assert 1 < rate[-1] < 1.01 + over / np.log(2)
  np.testing.assert_allclose(
    rate[-1] + table.bits[-1].mean(), table.total.mean(), rtol=1e-5
  )


def test_noise_has_an_address(schedule):
  """The same numbers in batches of 1, 3 and all, and in chunks of steps."""
  times = GRIDS['strided']
  x0, keys = jax.random.normal(jax.random.key(0), (7, 4)), keys_of(7)
  denoise = exact_denoiser(schedule, MEANS, VARIANCES)

  @jax.jit
  def score(x0, keys):
    return bound(denoise, schedule, times, x0, keys, discrete=False)

  together = score(x0, keys)
  for size in (1, 3):
    cuts = [slice(i, i + size) for i in range(0, 7, size)]
    parts = [score(x0[cut], keys[cut]) for cut in cuts]
    for whole, *pieces in zip(together, *parts, strict=True):
      np.testing.assert_allclose(np.concatenate(pieces, -1), whole, rtol=1e-5)
  steps = likelihood.prepare(schedule, times)
  chunk = jax.jit(
    lambda steps, which: likelihood.terms(
      denoise, steps, x0, keys, which, discrete=False
    )
  )
  parts = [chunk(steps, np.arange(i, i + 5)) for i in range(0, 20, 5)]
  bits = np.concatenate([part.bits for part in parts])
  np.testing.assert_allclose(bits, together.bits, rtol=1e-5)
  assert np.all(score(x0, keys[::-1]).mse[:, 0] != together.mse[:, 0])
  assert len(np.unique(np.asarray(together.mse))) == together.mse.size


def test_a_clipped_estimate_is_scored_as_it_is_clipped(schedule):
  wild = clipping.clip_x0(
    lambda xt, t: gaussian.Denoised(jnp.full_like(xt, 7), None), schedule
  )
  steps = likelihood.prepare(schedule, FULL)
  score = jax.jit(lambda x0, eps: likelihood.term(wild, steps, 0, x0, eps).mse)
  assert score(jnp.zeros((1, 3)), jnp.ones((1, 3))) == 1


def test_rate_and_distortion_by_hand():
  table = likelihood.Table(
    jnp.array([1.0, 3.0]),
    jnp.array([[1.0, 1.0], [2.0, 4.0], [9.0, 9.0]]),
    jnp.array([[1.0, 1.0], [0.25, 0.25], [0.0, 2.0]]),
  )
  rate, rmse = likelihood.rate_distortion(table)
  np.testing.assert_allclose(rate, [2, 3, 6])
  np.testing.assert_allclose(rmse, [127.5, 63.75, 127.5])
  np.testing.assert_allclose(table.total, [13, 17])


# --- the decoder -------------------------------------------------------------


def levels(*which):
  return np.asarray(which) / 127.5 - 1


def in_many_digits(x, mean, log_scale):
  """The same formula in 60 digits, as it is written: tanh and differences."""
  with decimal.localcontext(prec=60):
    d = decimal.Decimal
    scale = (-d(float(log_scale))).exp()
    pi = d('3.14159265358979323846264338327950288419716939937510582097494')

    def cdf(centre):
      z = centre * scale
      y = (2 / pi).sqrt() * (z + d('0.044715') * z**3)
      if abs(y) > 60:  # tanh is +-1 to 50 digits
        return d(int(y > 0))
      up, down = y.exp(), (-y).exp()
      return (1 + (up - down) / (up + down)) / 2

    x, mean = d(float(x)), d(float(mean))
    upper, lower = cdf(x - mean + d(1) / 255), cdf(x - mean - d(1) / 255)
    if x < d('-0.999'):
      upper, lower = upper, d(0)
    elif x > d('0.999'):
      upper = d(1)
    return float(max(upper - lower, d('1e-12')).ln())


SCALES = 0.5 * np.log([5.453e-5, 1e-3, 0.05, 1.0])


@pytest.mark.parametrize('log_scale', SCALES)
@pytest.mark.parametrize(
  ('dtype', 'rtol'), [('float64', 1e-9), ('float32', 2e-4)]
)
def test_the_decoder_in_sixty_digits(x64, log_scale, dtype, rtol):
  """In the bulk, in the tails, and where probability is below 1e-12.

  The tolerance in float32 is that of x - mean: at |x - mean| = 6 deviations of
  0.0074 a rounding of x by 6e-8 moves log p by 5e-5.
  """
  std = np.exp(log_scale)
  x = levels(0, 1, 2, 77, 128, 200, 254, 255)[:, None].astype(dtype)
  # Away from the ends by deviations and by bins, on both sides.
  mean = x + np.array([-40, -6, -2, -0.5, 0, 0.3, 1, 4, 7, 30]) * std
  mean = np.clip(mean, -1, 1).astype(dtype)
  x = np.broadcast_to(x, mean.shape)
  wanted = np.vectorize(in_many_digits)(x, mean, log_scale)
  got = jax.jit(decoder.discretised_log_likelihood)(x, mean, log_scale)
  assert got.dtype == dtype
  np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol)
  assert wanted.min() == np.log(1e-12) or std > 0.02


@pytest.mark.parametrize('log_scale', SCALES)
def test_probabilities_of_all_levels_sum_to_one(x64, log_scale):
  x = levels(*range(256))
  for mean in (-1.0, -0.4, 0.003, 1.0):
    got = jax.jit(decoder.discretised_log_likelihood)(
      x, np.full_like(x, mean), log_scale
    )
    np.testing.assert_allclose(np.exp(got).sum(), 1, atol=3e-10)


def test_how_far_the_tanh_is_from_the_normal_distribution(x64):
  """What DDPM's approximation costs, measured.

  The distribution function is off by 1.8e-4 at the most. For pixels of exact
  normal probabilities code lengths are 3.1e-5 bits too long in the mean with
  the decoder of T = 1000, and at most 4.6e-5 with the other scales here: far
  below what a bound is quoted to. A single value within 2 deviations is off by
  0.011 bits at the most, and further out, where it is improbable, by more.
  """
  z = np.linspace(-6, 6, 10_001)
  tanh = 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
  assert 1e-4 < abs(scipy.special.ndtr(z) - tanh).max() < 2e-4
  x = levels(*range(256))
  edges = (x[1:] + x[:-1]) / 2
  coded = jax.jit(decoder.discretised_log_likelihood)
  for log_scale in SCALES:
    std = np.exp(log_scale)
    for mean in (0.0, 0.9):
      below = scipy.special.ndtr((edges - mean) / std)
      exact = np.diff(below, prepend=0, append=1)
      bits = -np.asarray(coded(x, np.full(256, mean), log_scale)) / np.log(2)
      cost = (exact * bits).sum() - scipy.special.entr(exact).sum() / np.log(2)
      near = abs(x - mean) < 2 * std
      assert abs(bits + np.log2(np.maximum(exact, 1e-99)))[near].max() < 0.02
      assert 0 <= cost < 1e-4


# --- the fast estimate -------------------------------------------------------


def easy_or_hard(schedule, stds, shares, dims):
  """Images N(0, std^2 I), std one of two: the best denoiser, and the data.

  The posterior of the kind is by the density of xt under each.
  """
  v = np.square(stds)[:, None]

  def denoise(xt, t):
    alpha = schedule.alpha(t, xt.dtype)[None]
    sigma = schedule.sigma(t, xt.dtype)[None]
    square = jnp.sum(jnp.square(xt), 1)[None]
    total = alpha**2 * v + sigma**2  # [2, B]
    log_share = np.log(shares)[:, None] - 0.5 * (
      square / total + dims * jnp.log(total)
    )
    share = jax.nn.softmax(log_share, axis=0)
    gain = jnp.sum(share * alpha * v / total, 0)
    x0 = gain[:, None] * xt
    return gaussian.Denoised(x0, None)

  return denoise


def expected_easy_or_hard(schedule, stds, shares, dims):
  """The mean bound in closed form, but for one integral for each t.

  E |x0 - E[x0 | xt]|^2 = E |x0|^2 - E |E[x0 | xt]|^2, and the estimate is xt
  times a function of |xt|^2, which is a scaled chi-square under either kind.
  """
  root = np.linspace(0, 12, 601)
  square = root**2
  log_chi = (dims - 1) * np.log(np.maximum(root, 1e-300)) - square / 2
  chi = np.exp(log_chi)
  chi /= chi.sum()
  v = np.square(stds)
  ab = alpha_bar(FULL[:-1])[:, None, None]
  known = np.zeros((T, 1))
  for kind, share in enumerate(shares):
    total = ab * v + 1 - ab  # [T, 1, 2]
    here = total[..., kind : kind + 1] * square[:, None]  # |xt|^2
    log_share = np.log(shares) - 0.5 * (here / total + dims * np.log(total))
    gain = (scipy.special.softmax(log_share, -1) * np.sqrt(ab) * v / total).sum(
      -1
    )
    known += share * (gain**2 * here[..., 0] * chi).sum(-1, keepdims=True)
  mse = (shares * v).sum() - known[:, 0] / dims
  steps = likelihood.prepare(schedule, FULL)
  nats = (steps.constant + steps.weight * mse).sum()
  ab = ab[0, 0, 0]
  prior = 0.5 * (ab * (shares * v).sum() - ab - np.log1p(-ab))
  return (nats + prior) / np.log(2)


STDS, SHARES, DIMS = np.array([0.05, 1.0]), np.array([0.9, 0.1]), 4


def sampler(denoiser, steps):
  """`sampled`, compiled, or the tests take twice as long."""

  @jax.jit
  def sampled(x0, keys, p):
    return fast_bound.sampled(
      denoiser, SCHEDULE, steps, x0, keys, p, discrete=False
    )

  return sampled


def piloted(denoiser, steps):
  return jax.jit(functools.partial(fast_bound.pilot, denoiser, steps))


def images_of(seed, count):
  rng = np.random.default_rng(seed)
  std = rng.choice(STDS, size=(count, 1), p=SHARES)
  return jnp.asarray(std * rng.normal(size=(count, DIMS)), jnp.float32)


def counting(denoiser, rows):
  """Appends to `rows` how many the denoiser is given, each time that it is."""

  def counted(xt, t):
    jax.debug.callback(lambda xt: rows.append(len(xt)), xt)
    return denoiser(xt, t)

  return counted


@pytest.mark.slow
def test_the_interval_covers_the_bound(schedule):
  """In at least 90 of 100 repetitions, with 256 new images each.

  One image in ten is hard, terms are skewed (chi-squares of 4 degrees), and so
  are the images' sums: over 1000 other repetitions the interval covered in 95%
  with 256 images, in 93% with 128 and 64, and missed above more than below.
  """
  rows = []
  denoise = counting(easy_or_hard(schedule, STDS, SHARES, DIMS), rows)
  steps = likelihood.prepare(schedule, FULL)
  pilot, sampled = piloted(denoise, steps), sampler(denoise, steps)
  exact = expected_easy_or_hard(schedule, STDS, SHARES, DIMS)
  found = []
  for seed in range(100):
    x0, keys = images_of(seed, 256), keys_of(256, seed)
    p = fast_bound.proposal(*pilot(x0, keys), T)
    values = sampled(x0, keys, p)
    found.append(fast_bound.interval(values))
  jax.effects_barrier()
  assert sum(rows) == 100 * (T * 256 // 100)  # one evaluation in a hundred
  mean, low, high = np.transpose(found)
  assert np.sum((low <= exact) & (exact <= high)) >= 90
  assert abs(mean.mean() - exact) < 4 * mean.std() / 10
  # An image's value is its own, whoever else is in the batch.
  alone = sampled(x0[7:8], keys[7:8], p)
  np.testing.assert_allclose(alone, values[7:8], rtol=1e-5)


@pytest.mark.slow
def test_the_exact_bound_of_easy_and_hard_images(schedule):
  """The integral that the interval is held against, by the full bound."""
  x0 = images_of(1000, 1000)
  denoise = easy_or_hard(schedule, STDS, SHARES, DIMS)
  table = jax.jit(
    lambda x0, keys: bound(denoise, schedule, FULL, x0, keys, discrete=False)
  )(x0, keys_of(1000))
  error = np.std(table.total) / np.sqrt(1000)
  exact = expected_easy_or_hard(schedule, STDS, SHARES, DIMS)
  assert abs(table.total.mean() - exact) < 4 * error


def fixed_images(schedule, noise='fixedlarge'):
  """Three images of easy and hard dimensions, and their bounds given x0.

  x0 - E[x0 | xt] = (1 - g alpha) (x0 - m) - g sigma eps: squared, in mean.
  """
  x0 = np.random.default_rng(7).normal(size=(3, 4)) * np.sqrt(VARIANCES)
  ab = alpha_bar(FULL[:-1])[:, None, None]
  g = np.sqrt(ab) * VARIANCES / (ab * VARIANCES + 1 - ab)
  mse = ((1 - g * np.sqrt(ab)) * (x0 - MEANS)) ** 2 + g**2 * (1 - ab)
  steps = likelihood.prepare(schedule, FULL, noise)
  nats = steps.constant[:, None] + steps.weight[:, None] * mse.mean(-1)
  prior = np.asarray(likelihood.prior(schedule, jnp.asarray(x0)))
  return x0, steps, prior + nats.sum(0) / np.log(2)


@pytest.mark.parametrize(
  'kind', ['piloted', pytest.param('uniform', marks=pytest.mark.slow)]
)
def test_the_estimate_of_each_image_is_unbiased(schedule, x64, kind):
  """For any probabilities; those of a pilot have the least error.

  2000 repetitions for each of 3 images, within 4 standard errors.
  """
  x0, steps, known = fixed_images(schedule)
  denoise = exact_denoiser(schedule, MEANS, VARIANCES)
  repeated = jnp.repeat(jnp.asarray(x0), 2000, axis=0)
  keys = keys_of(len(repeated))
  p = {
    'piloted': lambda: fast_bound.proposal(
      *piloted(denoise, steps)(repeated[::30], keys[::30]), T
    ),
    'uniform': lambda: np.full(T - 1, 1 / (T - 1)),
  }[kind]()
  got = sampler(denoise, steps)(repeated, keys, p).reshape(3, 2000)
  std = np.std(got, 1)
  assert np.all(abs(got.mean(1) - known) < 4 * std / np.sqrt(2000))
  # Measured: 1.8 with the pilot's probabilities, 10 with even ones.
  assert np.all(std < 3 if kind == 'piloted' else std > 5)


@pytest.mark.slow
def test_a_pilot_finds_the_size_of_the_terms(schedule):
  """The probabilities follow the root mean squares, known in closed form.

  From 200 evaluations, within a factor of 2 where it counts; and what is far
  below is drawn by the uniform part.
  """
  denoise = exact_denoiser(schedule, MEANS, VARIANCES)
  noise = np.random.default_rng(0).normal(size=(200, 4))
  x0 = jnp.asarray(MEANS + np.sqrt(VARIANCES) * noise, jnp.float32)
  steps = likelihood.prepare(schedule, FULL)
  which, bits = piloted(denoise, steps)(x0, keys_of(200))
  assert which.shape == bits.shape == (1, 200)
  assert 0 <= which.min() <= which.max() < T - 1
  p = fast_bound.proposal(which, bits, T)
  np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)
  assert p.min() >= 0.1 / (T - 1)
  eps = jax.random.normal(jax.random.key(1), x0.shape)
  terms = every_term(steps, MEANS, VARIANCES, x0, eps)
  size = np.sqrt(np.mean(np.square(terms.bits[:-1]), 1))
  best = 0.1 / (T - 1) + 0.9 * size / size.sum()
  assert np.all(abs(np.log2(p / best)) < 1)


def test_terms_of_nothing_are_drawn_evenly():
  p = fast_bound.proposal([[0, 3]], [[0.0, 0.0]], 6)
  np.testing.assert_allclose(p, 0.2)


def test_the_interval_by_hand():
  """4 values: mean 2.5, deviation sqrt(5 / 3), Student's t of 3 is 3.182446."""
  mean, low, high = fast_bound.interval([1.0, 2.0, 3.0, 4.0])
  half = 3.182446305284263 * np.sqrt(5 / 3) / 2
  np.testing.assert_allclose([mean, low, high], [2.5, 2.5 - half, 2.5 + half])


def test_an_interval_needs_two_images():
  with pytest.raises(UserError, match=r'^1 images'):
    fast_bound.interval([1.0])
