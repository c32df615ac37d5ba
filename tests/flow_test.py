"""The probability-flow likelihood, against flows that are known.

Data N(m, V): xt is normal, N(alpha m, alpha^2 V + sigma^2 I), and the flow that
carries one of these into the other is affine. Along an eigenvector of V with
eigenvalue v, a deviation from the mean grows as the standard deviation does.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from diffusion_jax.process import decoder, flow, gaussian, schedules
from diffusion_jax.system.errors import UserError

T = 1000
# Steps are chosen by errors at rounding, and compared.
pytestmark = pytest.mark.optimized

SCHEDULE = schedules.linear(T)
MEAN = np.array([0.1, -0.5, 0.0, 0.4])
EIGENVALUES = np.array([0.02, 0.1, 0.25, 1.0])
# A rotation in which no axis stays where it was.
AXES = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]


def keys_of(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


def at(t):
  """alpha and sigma^2, by the product of 1 - beta."""
  alpha_bar = np.prod(1.0 - np.linspace(1e-4, 0.02, T)[: t + 1])
  return np.sqrt(alpha_bar), 1 - alpha_bar


def normal_denoiser(mean, values, axes):
  """E[x0 | xt] for data N(mean, axes diag(values) axes'); xt is [B, D]."""

  def denoise(xt, t):
    m, v, q = (jnp.asarray(a, xt.dtype) for a in (mean, values, axes))
    alpha = SCHEDULE.alpha(t, xt.dtype)[:, None]
    sigma = SCHEDULE.sigma(t, xt.dtype)[:, None]
    gain = alpha * v[None] / (alpha**2 * v[None] + sigma**2)
    x0 = m[None] + (gain * ((xt - alpha * m[None]) @ q)) @ q.T
    return gaussian.Denoised(x0, (xt - alpha * x0) / sigma)

  return denoise


def first_noised(count, seed=0, mean=MEAN, values=EIGENVALUES, axes=AXES):
  """Data at t = 0, and their true log-density in nats per dimension."""
  alpha, sigma2 = at(0)
  v = alpha**2 * values + sigma2
  z = np.random.default_rng(seed).normal(size=(count, len(values)))
  x = alpha * mean + (np.sqrt(v) * z) @ axes.T
  return x, -0.5 * (z**2 + np.log(2 * np.pi * v)).mean(1)


def known_bits(x, mean=MEAN, values=EIGENVALUES, axes=AXES):
  """-log2 p_ode(x) per dimension: N(0, I) at T-1, and the affine flow."""
  (first, var_0), (last, var_t) = at(0), at(T - 1)
  growth = (last**2 * values + var_t) / (first**2 * values + var_0)
  end = last * mean + (((x - first * mean) @ axes) * np.sqrt(growth)) @ axes.T
  nats = -0.5 * (end**2 + np.log(2 * np.pi)) + 0.5 * np.log(growth)
  return -nats.mean(1) / np.log(2)


@functools.partial(jax.jit, static_argnames='divergence')
def bits_of(x, keys, values, divergence):
  return flow.density(
    normal_denoiser(MEAN, values, AXES), SCHEDULE, x, keys,
    divergence=divergence, rtol=1e-7, atol=1e-7,
  )  # fmt: skip


def test_the_density_of_normal_data(x64):
  """Each example's, and in the mean the entropy of the data at t = 0.

  That is of alpha x0 + sigma eps, x0 the data: no density of x0 itself, whose
  entropy is less by log2(1 + 1e-4 / v) / 2, less log2(alpha). What is left
  between the model and the truth is that N(0, I) stands for q(x_T-1).
  """
  x, log_density = first_noised(200)
  got = bits_of(jnp.asarray(x), keys_of(200), EIGENVALUES, 'exact')
  np.testing.assert_allclose(got.bits, known_bits(x), atol=1e-6)
  true = -log_density / np.log(2)
  assert abs(np.mean(got.bits - true)) < 1e-3
  assert np.abs(got.bits - true).max() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
  'divergence',
  ['rademacher', pytest.param('gaussian', marks=pytest.mark.slow)],
)
def test_hutchinsons_probes(x64, divergence):
  """The mean over 1000 probes, within 4 standard errors of the exact value.

  Near-round data, so that the error is small: the Jacobian's part that probes
  see as noise is what differs between directions, of signs only the part off
  the diagonal.
  """
  values = np.array([0.2, 0.22, 0.24, 0.26])
  x, log_density = first_noised(1000, values=values)
  got = bits_of(jnp.asarray(x), keys_of(1000), values, divergence)
  error = np.asarray(got.bits) - known_bits(x, values=values)
  assert abs(error.mean()) < 4 * error.std() / np.sqrt(1000)
  if divergence == 'rademacher':
    assert abs(np.mean(got.bits + log_density / np.log(2))) < 1e-3
    assert error.std() > 1e-3  # or the probes would be told nothing
    # Where the Jacobian is a multiple of 1, signs are exact.
    x, _ = first_noised(1000, values=np.full(4, 0.3))
    got = bits_of(jnp.asarray(x), keys_of(1000), np.full(4, 0.3), divergence)
    wanted = known_bits(x, values=np.full(4, 0.3))
    np.testing.assert_allclose(got.bits, wanted, atol=1e-6)


@pytest.mark.slow
def test_float32_in_batches_of_any_size():
  """Per example the same in 1 and 3, and as the closed form to 5e-4.

  Also the evaluations are counted, as the network is asked.
  """
  denoise = normal_denoiser(MEAN, np.full(4, 0.25), AXES)
  asked = []

  def counted(xt, t):
    jax.debug.callback(lambda xt: asked.append(len(xt)), xt)
    return denoise(xt, t)

  x = first_noised(3, values=np.full(4, 0.25))[0].astype(np.float32)
  x[2] *= 3  # asks for other steps than the rest
  keys = keys_of(3)
  run = jax.jit(functools.partial(flow.density, counted, SCHEDULE))
  whole = run(x, keys)
  jax.effects_barrier()
  # All wait for the slowest, and are asked as often.
  assert sum(asked) == 3 * whole.evaluations.max()
  assert whole.bits.dtype == jnp.float32
  wanted = known_bits(np.asarray(x, np.float64), values=np.full(4, 0.25))
  np.testing.assert_allclose(whole.bits, wanted, atol=5e-4)
  assert len(np.unique(whole.evaluations)) > 1
  for i in range(3):
    asked.clear()
    got = run(x[i : i + 1], keys[i : i + 1])
    jax.effects_barrier()
    np.testing.assert_allclose(got.bits, whole.bits[i : i + 1], atol=1e-5)
    assert sum(asked) == got.evaluations[0] == whole.evaluations[i]


@pytest.mark.slow
def test_the_density_of_two_bumps(x64):
  """A mixture in one dimension, whose flow is not affine; per example.

  The model's density is the true one at t = 0, but for N(0, 1) at T-1.
  """
  centres, std = np.array([-0.6, 0.5]), 0.1

  def denoise(xt, t):
    alpha = SCHEDULE.alpha(t, xt.dtype)[:, None]
    sigma = SCHEDULE.sigma(t, xt.dtype)[:, None]
    m, total = jnp.asarray(centres)[None], alpha**2 * std**2 + sigma**2
    share = jax.nn.softmax(-((xt - alpha * m) ** 2) / (2 * total), axis=-1)
    each = m + alpha * std**2 / total * (xt - alpha * m)
    x0 = jnp.sum(share * each, -1, keepdims=True)
    return gaussian.Denoised(x0, (xt - alpha * x0) / sigma)

  x = np.linspace(-1.2, 1.0, 41)[:, None]
  alpha, sigma2 = at(0)
  scale = np.sqrt(alpha**2 * std**2 + sigma2)
  true = scipy.stats.norm.pdf(x, alpha * centres, scale).mean(1)
  got = jax.jit(
    lambda x, keys: flow.density(
      denoise, SCHEDULE, x, keys, divergence='exact', rtol=1e-7, atol=1e-7
    )
  )(jnp.asarray(x), keys_of(41))
  # (x_T^2 ab_T / 2 nats where the means differ from 0: 1e-3 at the most.)
  np.testing.assert_allclose(got.bits, -np.log2(true), atol=1e-2)


# --- 8-bit images ------------------------------------------------------------

LEVELS = np.arange(256)
ONE = (np.array([0.1]), np.array([0.09]), np.eye(1))  # mean, variance, axes


def density_of_one(x):
  """p_ode of a single number with data N(0.1, 0.09)."""
  return 2.0 ** -known_bits(np.reshape(x, (-1, 1)), *ONE)


@pytest.mark.slow
def test_uniform_dequantisation(x64):
  """All 256 levels, each with the probability P that the model gives its bin.

  By Jensen's inequality code lengths are above the entropy of P, and little:
  for a density as smooth as a normal one of 38 levels' deviation w, by about
  1 / (24 w^2 log 2) = 4e-5 bits. The 7 bits are in it.
  """
  edges = np.arange(257) / 128 - 1
  p = np.array(
    [
      scipy.integrate.quad(lambda x: density_of_one(x)[0], *pair)[0]
      for pair in itertools.pairwise(edges)
    ]
  )
  x0 = jnp.asarray(LEVELS / 127.5 - 1)[:, None]
  run = jax.jit(
    functools.partial(flow.dequantised, normal_denoiser(*ONE), SCHEDULE)
  )
  total = []
  for seed in range(20):
    got = run(x0, keys_of(256, seed))
    total.append(np.sum(p * np.asarray(got.bits)) / p.sum())
  entropy = -np.sum(p * np.log2(p)) / p.sum()
  error = np.std(total) / np.sqrt(20)
  assert -4 * error < np.mean(total) - entropy < 1e-3
  assert error < 1e-3


@pytest.mark.slow
def test_the_first_noised_step_as_a_latent(x64):
  """All 256 levels: each code length by hand, and together above the evidence.

  By hand: the noise is known from the keys; then log p_ode in closed form, the
  decoder, and log q. P(k) = the integral of p_ode(x') decoder(k | x') dx'.
  Measured: 0.13 bits above it, as the decoder has half of the true variance,
  and q is not p's posterior.
  """
  mean, variance, _ = ONE
  alpha, sigma2 = at(0)
  x0 = LEVELS / 127.5 - 1
  step = 5.453e-5**0.5
  coded = jax.jit(decoder.discretised_log_likelihood)

  def decoded(k, x):
    gain = alpha * variance / (alpha**2 * variance + sigma2)
    estimate = np.asarray(mean + gain * (x - alpha * mean))
    k = np.broadcast_to(k, estimate.shape)
    return np.asarray(coded(k, estimate, np.log(step)))

  keys = keys_of(256)
  run = jax.jit(
    functools.partial(
      flow.variational, normal_denoiser(*ONE), SCHEDULE,
      decoder_variance=step**2, rtol=1e-7, atol=1e-7,
    )
  )  # fmt: skip
  got = run(jnp.asarray(x0)[:, None], keys)
  eps = jax.vmap(
    lambda key: jax.random.normal(jax.random.fold_in(key, 1), (1,), jnp.float32)
  )(keys)[:, 0]
  x = alpha * x0 + np.sqrt(sigma2) * np.asarray(eps)
  nats = np.log(density_of_one(x)) + decoded(x0, x)
  nats -= scipy.stats.norm.logpdf(x, alpha * x0, np.sqrt(sigma2))
  np.testing.assert_allclose(got.bits, -nats / np.log(2), atol=1e-4)
  fine = np.linspace(-1.6, 1.8, 4001)
  chance = np.exp(decoded(x0[:, None], np.tile(fine, (256, 1))))
  p = chance @ density_of_one(fine) * (fine[1] - fine[0])
  np.testing.assert_allclose(p.sum(), 1, atol=2e-3)
  means = [
    np.sum(p * np.asarray(run(jnp.asarray(x0)[:, None], keys_of(256, s)).bits))
    for s in range(20)
  ]
  entropy = -np.sum(p * np.log2(p))
  error = np.std(means) / np.sqrt(20)
  assert entropy - 4 * error < np.mean(means) < entropy + 0.25


@pytest.mark.slow
def test_the_decoders_default_variance_and_images():
  """[B, H, W, C] in float32, and the table's first entry for the decoder."""

  def denoise(xt, t):
    alpha = gaussian.per_example(SCHEDULE.alpha(t, xt.dtype), xt)
    sigma = gaussian.per_example(SCHEDULE.sigma(t, xt.dtype), xt)
    x0 = 0.25 * alpha / (0.25 * alpha**2 + sigma**2) * xt
    return gaussian.Denoised(x0, (xt - alpha * x0) / sigma)

  images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3))
  x0 = jnp.asarray(images, jnp.float32) / 127.5 - 1
  first = gaussian.step_variance(SCHEDULE, 1, 0, 'fixedsmall')
  default, given = (
    jax.jit(functools.partial(flow.variational, denoise, SCHEDULE, **options))(
      x0, keys_of(2)
    )
    for options in ({}, {'decoder_variance': first})
  )
  assert default.bits.dtype == jnp.float32
  np.testing.assert_allclose(default.bits, given.bits, rtol=1e-6)


@pytest.mark.slow
def test_a_solver_that_gives_up_gives_no_number():
  x, keys = np.ones((2, 1), np.float32), keys_of(2)
  got = jax.jit(
    functools.partial(
      flow.density, normal_denoiser(*ONE), SCHEDULE, max_steps=3
    )
  )(x, keys)
  assert np.isnan(got.bits).all()
  np.testing.assert_array_equal(got.evaluations, 19)


def test_an_unknown_divergence_is_named():
  with pytest.raises(UserError, match="divergence='hutch': one of rademacher"):
    flow.density(None, SCHEDULE, jnp.zeros((1, 1)), None, divergence='hutch')
