"""Grids, samplers and draws, against closed forms of their own.

Where data are Gaussian the best denoiser is linear, every sampler is a linear
map plus Gaussian noise, and its result is known exactly.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from diffusion_jax import models, samplers
from diffusion_jax.codecs import pixels
from diffusion_jax.guidance import clipping
from diffusion_jax.process import gaussian, schedules
from diffusion_jax.runs import draw
from diffusion_jax.samplers import grid
from diffusion_jax.samplers.plan import Plan
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

T = 1000


@pytest.fixture(scope='module')
def schedule():
  return linear(T)


linear = functools.cache(schedules.linear)


def keys_of(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


def alpha_bar(times):
  """The product of 1 - beta, in float64; log-linear between whole times."""
  table = np.cumprod(1.0 - np.linspace(1e-4, 0.02, T))
  log_table = np.concatenate([[0.0], np.log(table)])
  return np.exp(np.interp(times, np.arange(-1, T), log_table))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def noise_of(keys, num_steps, shape, dtype=jnp.float32):
  """[num_steps, B, *shape]: what `solve` gives a sampler in every step."""
  recorder = samplers.Sampler(
    lambda schedule, grid, x: ({'t': grid[:-1]}, ()),
    lambda denoiser, row, x, memory, noise_fn: (noise_fn(), memory),
  )
  return samplers.solve(
    recorder, None, None, np.arange(num_steps - 1, -2, -1),
    jnp.zeros((len(keys), *shape), dtype), keys, tuple(range(1, num_steps + 1)),
  )[1]  # fmt: skip


def exact_denoiser(schedule, mean, std):
  """E[x0 | xt] for independent data N(mean_d, std_d^2); xt is [B, D, ...].

  xt ~ N(alpha mean, alpha^2 std^2 + sigma^2), and x0 is regressed on it.
  """

  def denoise(xt, t):
    shape = (1, len(mean)) + (1,) * (xt.ndim - 2)
    m = jnp.asarray(mean, xt.dtype).reshape(shape)
    variance = jnp.asarray(std, xt.dtype).reshape(shape) ** 2
    alpha, sigma = schedule.alpha(t, xt.dtype), schedule.sigma(t, xt.dtype)
    gain = alpha * variance / (alpha**2 * variance + sigma**2)
    x0 = m + gain * (xt - alpha * m)
    return gaussian.Denoised(x0, (xt - alpha * x0) / sigma)

  return denoise


def crooked_eps(xt, t):
  """An eps network that is exact for no data; runs in NumPy and in JAX."""
  lib = np if isinstance(xt, np.ndarray) else jnp
  t = t.reshape(t.shape + (1,) * (xt.ndim - t.ndim))
  return 0.7 * xt + 0.3 * lib.cos(2.0 * xt + 0.01 * t)


def assert_moments(x, mean, std, what):
  """Independent x ~ N(mean, std^2): both moments, within 4 standard errors.

  The mean's is std / sqrt(n). (n - 1) times the sample variance over std^2 is
  chi-squared, so the variance's is std^2 sqrt(2 / (n - 1)).
  """
  z = (np.asarray(x, np.float64).ravel() - mean) / std
  assert abs(z.mean()) < 4 / np.sqrt(z.size), what
  assert abs(z.var(ddof=1) - 1) < 4 * np.sqrt(2 / (z.size - 1)), what


# --- grids -------------------------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'num_timesteps', 'num_steps', 'times'),
  [
    ('uniform', 10, 4, [9, 6, 3, 0, -1]),
    ('uniform', 9, 4, [8, 5, 3, 0, -1]),  # 8, 5.33, 2.67, 0
    ('uniform', 1000, 1, [999, -1]),
    ('uniform', 1, 1, [0, -1]),
    ('leading', 10, 5, [8, 6, 4, 2, 0, -1]),
    ('leading', 10, 2, [5, 0, -1]),
    ('leading', 1000, 1, [0, -1]),
    ('stable_diffusion', 10, 3, [7, 4, 1, 0]),
    ('sdxl', 10, 4, [7, 5, 3, 1, -1]),
    ('sdxl', 1000, 1, [1, -1]),
    ('trailing', 10, 5, [9, 7, 5, 3, 1, -1]),
    ('trailing', 10, 3, [9, 6, 2, -1]),  # 10, 6.67, 3.33; less 1
    ('trailing', 1000, 4, [999, 749, 499, 249, -1]),
    ('trailing', 1000, 1, [999, -1]),
    ('quadratic', 10, 4, [9, 4, 1, 0, -1]),
    ('quadratic', 101, 5, [100, 56.25, 25, 6.25, 0, -1]),
    ('quadratic', 1000, 1, [999, -1]),
  ],
)
def test_grids_by_hand(name, num_timesteps, num_steps, times):
  got = grid.create(name, linear(num_timesteps), num_steps)
  assert got == pytest.approx(times, rel=1e-12, abs=0)


PUBLISHED = ('ddim_uniform', 'ddim_quadratic')  # with numbers of their own
OFFSET = ('stable_diffusion', 'sdxl')  # which start at 1


def every_size(name=None):
  """(T, S) for small T, and some for a real one; leading needs a divisor."""
  for t in (*range(1, 41), T):
    for s in range(1, t + 1, 1 if t < T else 37):
      if not (name == 'leading' and t % s) and not (name in OFFSET and s == t):
        yield t, s


@pytest.mark.parametrize('name', grid.GRIDS)
def test_every_grid_falls_strictly_to_clean_data(name):
  """S steps, S + 1 times, and no time twice, in the float32 of their use.

  Whole times cannot repeat where the stride is above 1, and are all of them
  where it is 1; a tie that is rounded to the even neighbour may not break it.
  """
  for num_timesteps, num_steps in every_size(name):
    times = grid.create(name, linear(num_timesteps), num_steps)
    if name not in PUBLISHED:
      assert len(times) == num_steps + 1
    assert np.all(np.diff(np.asarray(times, np.float32)) < 0)
    assert times[-1] == (0 if name == 'stable_diffusion' else -1)
    assert times[-2] >= 0


@pytest.mark.parametrize('name', grid.GRIDS)
def test_a_printed_grid_can_be_given_back(name):
  """What a metric card or a log shows is a literal grid, in [0, T-1]."""
  for num_timesteps, num_steps in every_size(name):
    schedule = linear(num_timesteps)
    times = grid.create(name, schedule, num_steps)
    given = grid.literal(times)
    assert grid.create(','.join(map(str, given)), schedule, 1) == times
    assert grid.create(given, schedule, 1) == times


def test_the_grids_of_stable_diffusion_start_at_one():
  stable = grid.create('stable_diffusion', linear(T), 50)
  assert stable == [*range(981, 0, -20), 0]
  assert grid.literal(stable)[-3:] == [1, 0, grid.END]
  assert grid.create('sdxl', linear(T), 30)[:2] == [958, 925]
  with pytest.raises(UserError, match='at most 999 steps, not 1000'):
    grid.create('sdxl', linear(T), T)
  for wrong in ('end', '999,end', '9,-1,end', '1,2,end', '5,end,3'):
    with pytest.raises(UserError):
      grid.create(wrong, linear(T), 1)


def test_which_ends_a_grid_visits():
  for num_timesteps, num_steps in every_size():
    sizes = linear(num_timesteps), num_steps
    last = num_timesteps - 1
    uniform = grid.create('uniform', *sizes)
    quadratic = grid.create('quadratic', *sizes)
    trailing = grid.create('trailing', *sizes)
    logsnr = grid.create('logsnr', *sizes)
    karras = grid.create('karras', *sizes)
    assert uniform[0] == quadratic[0] == trailing[0] == last, sizes
    assert logsnr[0] == karras[0] == last
    if num_steps > 1:
      assert uniform[-2] == quadratic[-2] == logsnr[-2] == karras[-2] == 0
    assert (trailing[-2] == 0) == (round(num_timesteps / num_steps) == 1)


@pytest.mark.parametrize('name', ['uniform', 'leading', 'trailing'])
def test_as_many_steps_as_times_is_every_time(name):
  assert grid.create(name, linear(T), T) == list(range(T - 1, -2, -1))


@pytest.mark.parametrize('num_steps', [1, 2, 10, 50, 500, 1000])
def test_leading_is_ddims_range(num_steps):
  """range(0, T, T // S); T-1 is visited by the full grid alone."""
  times = list(range(0, T, T // num_steps))
  assert grid.create('leading', linear(T), num_steps) == [*times[::-1], -1]
  assert (times[-1] == T - 1) == (num_steps == T)


@pytest.mark.parametrize('num_steps', [15, 300, 600])
def test_leading_refuses_what_does_not_divide(num_steps):
  """The published code yields other counts there: 16, 334, 1000 entries."""
  with pytest.raises(UserError, match=f'divides 1000, not {num_steps}'):
    grid.create('leading', linear(T), num_steps)


def test_literal_grids():
  assert grid.create('999,500,100', linear(T), 7) == [999, 500, 100, -1]
  assert grid.create('999,500,100,-1', linear(T), 7) == [999, 500, 100, -1]
  assert grid.create('998.5, 10.25, 0', linear(T), 7) == [998.5, 10.25, 0, -1]
  assert grid.create('0', linear(T), 7) == [0, -1]
  for times in ([999, 500.5, -1], (999, 500.5), np.array([999, 500.5, -1])):
    assert grid.create(times, linear(T), 7) == [999, 500.5, -1]
  assert all(isinstance(t, int) for t in grid.create('999.0,5', linear(T), 7))


@pytest.mark.parametrize(
  'text',
  [
    '5,9', '9,9', '1000', '999.5', '500,-0.5', '500,-2', '5,-1,-1', '-1', '',
    'cosine', '999,,5', '999 500', 'nan', '999,nan', 'inf', '-inf', '999,-inf',
  ],
)  # fmt: skip
def test_bad_grids_are_answered_in_one_line(text):
  with pytest.raises(UserError) as error:
    grid.create(text, linear(T), 10)
  assert f'grid={text}' in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('num_steps', [0, -1, 1001])
def test_bad_numbers_of_steps_are_answered_in_one_line(num_steps):
  for name in grid.GRIDS:
    with pytest.raises(UserError, match=f'^num_steps={num_steps}: .*1000'):
      grid.create(name, linear(T), num_steps)


# --- samplers by name --------------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'options', 'said'),
  [
    ('rk45', {}, "sampler='rk45'"),
    ('ancestral', {'eta': 0.5}, 'eta=0.5'),
    ('ddim', {'variance': 'fixedsmall'}, 'variance=fixedsmall'),
    ('ddim', {'eta': 1.5}, 'eta=1.5'),
    ('ddim', {'eta': -0.1}, 'eta=-0.1'),
    ('ddim', {'eta': float('nan')}, 'eta=nan'),
    ('ancestral', {'variance': 'large'}, 'large'),
  ],
)
def test_bad_options_are_answered_before_any_work(name, options, said):
  with pytest.raises(UserError) as error:
    samplers.create(name, **options)
  assert said in str(error.value)
  assert '\n' not in str(error.value)


def test_options_that_were_not_given_are_none():
  samplers.create('ancestral', eta=None, variance='fixedsmall')
  samplers.create('ddim', eta=0.5, variance=None)
  samplers.create('ddim', eta=0.0)  # given, though it is false


def test_defaults_are_those_of_the_papers(schedule):
  """DDPM's CIFAR-10 numbers are with the large variance, DDIM is without any.

  The noise of the step 300 -> 100 is as long as the product of betas says.
  """
  ab_t, ab_s = alpha_bar(300), alpha_bar(100)
  for name, variance in (('ancestral', 1 - ab_t / ab_s), ('ddim', 0)):
    rows, _ = samplers.create(name).init(schedule, np.array([300, 100]), None)
    np.testing.assert_allclose(rows['std'] ** 2, [variance], rtol=1e-10)


# --- ancestral ---------------------------------------------------------------

TIMES = (999, 749, 500.5, 300, 120, 40, 9, 1, 0, -1)


@pytest.mark.parametrize('variance', gaussian.VARIANCES)
def test_ancestral_on_gaussian_data(schedule, variance):
  """Mean and variance at every time of the grid, by recursion.

  With x0 = m + g (x - a_t m), g = a_t s^2 / (a_t^2 s^2 + 1 - ab_t), a = sqrt ab
  and beta = 1 - ab_t / ab_s, equation 7 of arXiv 2006.11239 makes a step

    x' = A x + c0 (1 - g a_t) m + std z,   A = c0 g + ct,
    c0 = a_s beta / (1 - ab_t),   ct = sqrt(ab_t / ab_s) (1 - ab_s) / (1 - ab_t)

  so mean' = A mean + c0 (1 - g a_t) m and variance' = A^2 variance + std^2,
  from 0 and 1. std^2 is beta (large) or beta (1 - ab_s) / (1 - ab_t) (small),
  and nothing in the last step. The seed is fixed: no draw is unlucky.
  """
  mean, std = np.array([0.0, 0.5, -1.0]), np.array([1.0, 0.25, 0.03])
  x = jax.random.normal(jax.random.key(7), (2, 3, 16_384))
  _, frames = samplers.solve(
    samplers.create('ancestral', variance=variance),
    exact_denoiser(schedule, mean, std),
    schedule, TIMES, x, keys_of(2, seed=8), tuple(range(1, len(TIMES))),
  )  # fmt: skip
  at, var = np.zeros(3), np.ones(3)
  for t, s, frame in zip(TIMES[:-1], TIMES[1:], frames, strict=True):
    ab_t, ab_s = alpha_bar(t), alpha_bar(s)
    a_t, beta = np.sqrt(ab_t), 1 - ab_t / ab_s
    g = a_t * std**2 / (ab_t * std**2 + 1 - ab_t)
    c0 = np.sqrt(ab_s) * beta / (1 - ab_t)
    a = c0 * g + np.sqrt(ab_t / ab_s) * (1 - ab_s) / (1 - ab_t)
    noise = beta if variance == 'fixedlarge' else beta * (1 - ab_s) / (1 - ab_t)
    at = a * at + c0 * (1 - g * a_t) * mean
    var = a**2 * var + (noise if s >= 0 else 0)
    for d in range(3):
      assert_moments(frame[:, d], at[d], np.sqrt(var[d]), (t, s, d))


def test_ancestral_from_a_point_reproduces_q(schedule):
  """x0 known: every frame is q(xs | x0), and neighbours are correlated so.

  xt = r xs + noise, r = alpha_t / alpha_s, so Cov(xs, xt) = r sigma_s^2 and the
  correlation is r sigma_s / sigma_t; a sample correlation's standard error is
  below 1 / sqrt(n). The seed is fixed.
  """
  x0 = 0.8
  alpha = np.sqrt(alpha_bar(TIMES[:-1]))
  sigma = np.sqrt(1 - alpha**2)
  z = jax.random.normal(jax.random.key(1), (2, 40_000))

  def denoise(xt, t):
    return gaussian.Denoised(jnp.full_like(xt, x0), None)

  end, frames = samplers.solve(
    samplers.create('ancestral', variance='fixedsmall'), denoise, schedule,
    TIMES, alpha[0] * x0 + sigma[0] * z, keys_of(2, seed=2),
    tuple(range(len(TIMES) - 1)),
  )  # fmt: skip
  for i, frame in enumerate(frames):
    assert_moments(frame, alpha[i] * x0, sigma[i], TIMES[i])
    if i:
      r = alpha[i - 1] / alpha[i]
      got = np.corrcoef(np.ravel(frames[i - 1]), np.ravel(frame))[0, 1]
      expected = r * sigma[i] / sigma[i - 1]
      assert abs(got - expected) < 4 / np.sqrt(z.size)
  np.testing.assert_array_equal(end, np.float32(x0))


@pytest.mark.parametrize('options', [
  {'name': 'ancestral', 'variance': 'fixedlarge'},
  {'name': 'ancestral', 'variance': 'fixedsmall'},
  {'name': 'ddim', 'eta': 0.0},
  {'name': 'ddim', 'eta': 1.0},
])  # fmt: skip
def test_the_last_step_adds_no_noise(schedule, options):
  """It gives the estimate of x0 itself, bit by bit, whatever the keys."""
  x0 = jnp.linspace(-1.0, 1.0, 7)
  x = jax.random.normal(jax.random.key(0), (3, 7))

  def denoise(xt, t):
    return gaussian.Denoised(jnp.broadcast_to(x0, xt.shape), xt)

  end = samplers.solve(
    samplers.create(**options), denoise, schedule, (999, 3.5, -1), x, keys_of(3)
  )
  np.testing.assert_array_equal(end, np.broadcast_to(x0, x.shape))


@pytest.mark.parametrize('variance', gaussian.VARIANCES)
def test_ancestral_is_algorithm_2(x64, variance):
  """All T steps as the paper prints them (arXiv 2006.11239, algorithm 2).

    x <- (x - beta_t / sqrt(1 - ab_t) eps(x, t)) / sqrt(1 - beta_t) + std_t z

  for a network that is not clipped. Both sides are float64; the sampler's way
  round by x0 divides by sqrt(ab_t) > 0.006 and loses no more than two digits.
  """
  betas = np.linspace(1e-4, 0.02, T)
  ab = np.cumprod(1 - betas)
  before = np.concatenate([[1.0], ab[:-1]])
  posterior = betas * (1 - before) / (1 - ab)
  std = np.sqrt(betas if variance == 'fixedlarge' else posterior)
  keys = keys_of(2)
  noise = np.asarray(noise_of(keys, T, (5,), jnp.float64))
  start = x = np.random.default_rng(0).normal(size=(2, 5))
  for i, t in enumerate(range(T - 1, -1, -1)):
    eps = crooked_eps(x, np.full(2, t))
    x = (x - betas[t] / np.sqrt(1 - ab[t]) * eps) / np.sqrt(1 - betas[t])
    x = x + (std[t] * noise[i] if t > 0 else 0)
  schedule = schedules.from_betas(betas)
  end = samplers.solve(
    samplers.create('ancestral', variance=variance),
    gaussian.denoiser(crooked_eps, schedule, 'eps'),
    schedule, grid.create('uniform', linear(T), T), jnp.asarray(start), keys,
  )  # fmt: skip
  assert end.dtype == jnp.float64
  np.testing.assert_allclose(end, x, rtol=1e-10, atol=1e-10)


# --- ddim --------------------------------------------------------------------


@pytest.mark.parametrize('eta', [0.0, 0.3, 1.0])
def test_ddim_is_equations_12_and_16(schedule, x64, eta):
  """arXiv 2010.02502, whose alpha is our alpha_bar; fractional times too."""
  keys = keys_of(2)
  num_steps = len(TIMES) - 1
  noise = np.asarray(noise_of(keys, num_steps, (5,), jnp.float64))
  start = x = np.random.default_rng(0).normal(size=(2, 5))
  end, frames = samplers.solve(
    samplers.create('ddim', eta=eta),
    gaussian.denoiser(crooked_eps, schedule, 'eps'),
    schedule, TIMES, jnp.asarray(start), keys, tuple(range(1, num_steps + 1)),
  )  # fmt: skip
  for i in range(num_steps):
    t = TIMES[i]
    ab_t, ab_s = alpha_bar(t), alpha_bar(TIMES[i + 1])
    eps = crooked_eps(x, np.full(2, t))
    std = eta * np.sqrt((1 - ab_s) / (1 - ab_t)) * np.sqrt(1 - ab_t / ab_s)
    x0 = (x - np.sqrt(1 - ab_t) * eps) / np.sqrt(ab_t)
    x = np.sqrt(ab_s) * x0 + np.sqrt(1 - ab_s - std**2) * eps + std * noise[i]
    np.testing.assert_allclose(frames[i], x, rtol=1e-10, atol=1e-10)
  np.testing.assert_array_equal(end, frames[-1])


def test_ddim_at_eta_1_is_ancestral(schedule, x64):
  """With the small variance and the same noise; also where x0 is clipped.

  The two write one mean in (x0, eps) and in (x0, xt), so they agree only if
  clipping keeps xt = alpha x0 + sigma eps. Some places are clipped, some not.
  """
  denoise = gaussian.denoiser(crooked_eps, schedule, 'eps')
  denoise = clipping.clip_x0(denoise, schedule)
  x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 50)))
  assert 0.1 < jnp.mean(jnp.abs(denoise(x, 300).x0) < 1) < 0.9
  ddim, ancestral = (
    samplers.solve(sampler, denoise, schedule, TIMES, x, keys_of(2))
    for sampler in (samplers.ddim(1.0), samplers.ancestral('fixedsmall'))
  )
  np.testing.assert_allclose(ddim, ancestral, rtol=1e-10, atol=1e-10)


def test_ddim_converges_to_the_probability_flow(schedule, x64):
  """Gaussian data, eta = 0: first order in the number of steps.

  The probability-flow ODE of Gaussian data N(m, s^2) keeps every quantile where
  it is: xt ~ N(alpha_t m, v_t) with v_t = alpha_t^2 s^2 + sigma_t^2, and

    x_s = alpha_s m + sqrt(v_s / v_t) (x_t - alpha_t m)

  for any two times. DDIM is Euler's method for it in sigma / alpha (equation 14
  of arXiv 2010.02502), so its error falls as 1 / steps. From t = T-1 to t = 0,
  both on every grid, and not to clean data: the last step would add an error of
  sigma_0 that no grid makes smaller.
  """
  mean, std = np.array([0.0, 0.5, -1.0]), np.array([1.5, 0.3, 0.05])
  start = np.array([[1.3, -0.4, 0.9]])
  centre, spread = zip(
    *((np.sqrt(ab) * mean, np.sqrt(ab * std**2 + 1 - ab))
      for ab in (alpha_bar(T - 1), alpha_bar(0))),
    strict=True,
  )  # fmt: skip
  exact = centre[1] + spread[1] / spread[0] * (start - centre[0])
  counts = np.array([25, 50, 100, 200, 400])
  errors = []
  for count in counts:
    times = np.linspace(1, 0, count + 1) ** 2 * (T - 1)
    end = samplers.solve(
      samplers.ddim(), exact_denoiser(schedule, mean, std), schedule, times,
      jnp.asarray(start), keys_of(1),
    )  # fmt: skip
    errors.append(np.abs(end - exact)[0])
  order, _ = np.polyfit(np.log(counts), np.log(errors), 1)
  np.testing.assert_allclose(order, -1, atol=0.15)
  assert np.all(errors[-1] < 0.01)


def test_ddim_without_eta_asks_for_no_noise(schedule):
  def rows(sampler):
    rows, memory = sampler.init(schedule, np.asarray(TIMES), None)
    assert memory == ()
    return [{k: v[i] for k, v in rows.items()} for i in range(len(TIMES) - 1)]

  def denoise(xt, t):
    return gaussian.Denoised(xt, xt)

  asked = []

  def noise():
    asked.append(1)
    return 1.0

  for row in rows(samplers.ddim()):
    samplers.ddim().step(denoise, row, 1.0, (), noise)
  assert not asked
  for row in rows(samplers.ddim(0.5)):
    samplers.ddim(0.5).step(denoise, row, 1.0, (), noise)
  assert len(asked) == len(TIMES) - 1


# --- clipping ----------------------------------------------------------------


def test_clipping_acts_inside_every_step(schedule, x64):
  """The mean is that of q(xs | xt, clipped x0), for both samplers.

  After the first step already, not only at the end, where x is x0 itself.
  """
  denoise = gaussian.denoiser(crooked_eps, schedule, 'eps')
  clipped = clipping.clip_x0(denoise, schedule)
  x = 2 * np.random.default_rng(0).normal(size=(2, 50))
  t, s = 300, 100
  ab_t, ab_s = alpha_bar(t), alpha_bar(s)
  eps = crooked_eps(x, np.full(2, t))
  raw = (x - np.sqrt(1 - ab_t) * eps) / np.sqrt(ab_t)
  x0 = np.clip(raw, -1, 1)
  assert np.mean(x0 != raw) > 0.2
  beta = 1 - ab_t / ab_s
  c0 = np.sqrt(ab_s) * beta / (1 - ab_t)
  ct = np.sqrt(ab_t / ab_s) * (1 - ab_s) / (1 - ab_t)
  std = np.sqrt(beta * (1 - ab_s) / (1 - ab_t))
  keys = keys_of(2)
  noise = noise_of(keys, 1, (50,), jnp.float64)[0]
  got = samplers.solve(
    samplers.ancestral('fixedsmall'), clipped, schedule, (t, s),
    jnp.asarray(x), keys,
  )  # fmt: skip
  np.testing.assert_allclose(got, c0 * x0 + ct * x + std * noise, rtol=1e-10)
  got = samplers.solve(
    samplers.ddim(), clipped, schedule, (t, s), jnp.asarray(x), keys
  )
  eps = (x - np.sqrt(ab_t) * x0) / np.sqrt(1 - ab_t)
  expected = np.sqrt(ab_s) * x0 + np.sqrt(1 - ab_s) * eps
  np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_a_clipped_draw_ends_in_range(schedule):
  wild = gaussian.denoiser(lambda x, t: -0.5 * x, schedule, 'eps')
  tame = clipping.clip_x0(wild, schedule)
  x = jax.random.normal(jax.random.key(0), (2, 50))
  for sampler, denoise, held in (
    (samplers.ddim(), wild, False),
    (samplers.ddim(), tame, True),
    (samplers.ancestral(), tame, True),
  ):
    end = samplers.solve(sampler, denoise, schedule, TIMES, x, keys_of(2))
    assert (jnp.abs(end).max() <= 1) == held


# --- solve -------------------------------------------------------------------


# Those of a grid of their own, or without one: analytic_test, adaptive_test.
@pytest.mark.parametrize(
  'name',
  [n for n in samplers.SAMPLERS if n not in (*samplers.CALIBRATED, 'adaptive')],
)
def test_frames_are_the_steps_of_a_python_loop(schedule, name):
  """Frame k is x after k steps, by `step` itself and by the grid's prefix.

  In float32, to the rounding of a program that is compiled in another way.
  """
  sampler = samplers.create(name)
  denoise = gaussian.denoiser(crooked_eps, schedule, 'eps')
  keys, num_steps = keys_of(2), len(TIMES) - 1
  x = jax.random.normal(jax.random.key(4), (2, 5))
  solve = functools.partial(samplers.solve, sampler, denoise, schedule)
  chosen = (0, 1, 4, num_steps)
  end, frames = solve(TIMES, x, keys, chosen)
  rows, memory = sampler.init(schedule, np.asarray(TIMES), x)
  num_rows = len(rows['t'])
  noise = noise_of(keys, num_rows, (5,))
  ends = rows.get('ends', np.ones(num_rows))

  @jax.jit
  def step(row, x, memory, noise):
    return sampler.step(denoise, row, x, memory, lambda: noise)

  loop, now = [x], x
  for i in range(num_rows):
    row = {key: np.float32(value[i]) for key, value in rows.items()}
    now, memory = step(row, now, memory, noise[i])
    if ends[i]:
      loop.append(now)
  assert frames.shape == (len(chosen), 2, 5)
  assert np.isfinite(frames).all()
  for frame, k in zip(frames, chosen, strict=True):
    np.testing.assert_allclose(frame, loop[k], rtol=2e-5, atol=2e-5)
  np.testing.assert_array_equal(frames[0], x)
  np.testing.assert_array_equal(frames[-1], end)
  np.testing.assert_allclose(
    frames[2], solve(TIMES[:5], x, keys), rtol=1e-6, atol=1e-6
  )


def test_memory_is_handed_on():
  """Each step adds its row and the memory: 1, then 2 + 1, then 3 + (2 + 1)."""
  sampler = samplers.Sampler(
    lambda schedule, grid, x: (
      {'t': grid[:-1], 'w': np.arange(1.0, len(grid))}, jnp.zeros_like(x)
    ),
    lambda denoiser, row, x, memory, noise_fn: (
      x + memory + row['w'], memory + row['w']
    ),
  )  # fmt: skip
  _, frames = samplers.solve(
    sampler, None, None, [2, 1, 0, -1], jnp.zeros((1, 1)), keys_of(1),
    (1, 2, 3),
  )  # fmt: skip
  np.testing.assert_array_equal(frames.ravel(), [1, 4, 10])


def test_solve_keeps_the_dtype_and_runs_under_jit(schedule, x64):
  """float32 is float64 up to its rounding, ddim at eta = 0 having no noise.

  The first step's is 6e-8 / alpha(999) = 1e-5 in units of x0, those of the
  later are smaller; the bar is ten times the first.
  """
  denoise = gaussian.denoiser(crooked_eps, schedule, 'eps')
  x = jax.random.normal(jax.random.key(5), (2, 5))

  def run(x, sampler):
    return samplers.solve(sampler, denoise, schedule, TIMES, x, keys_of(2))

  double = run(x, samplers.ddim())
  single = run(x.astype(jnp.float32), samplers.ddim())
  assert double.dtype == jnp.float64
  assert single.dtype == jnp.float32
  np.testing.assert_allclose(single, double, rtol=1e-4, atol=1e-4)
  sampler = samplers.ancestral()
  jitted = jax.jit(lambda x: run(x, sampler))(x)
  np.testing.assert_allclose(jitted, run(x, sampler), rtol=1e-10, atol=1e-10)


# --- drawing -----------------------------------------------------------------


def test_pixels_are_rounded_to_the_nearest_and_clipped():
  """k / 127.5 - 1 is level k, and holds for half a level on each side.

  0 lies between 127 and 128 and goes to the even one. The offset of 0.49 levels
  is far above float32's rounding of 1 + x, 6e-8 * 127.5.
  """
  levels = np.arange(256)
  for offset in (-0.49, 0, 0.49):
    x = ((levels + offset) / 127.5 - 1).astype(np.float32)
    np.testing.assert_array_equal(pixels.to_uint8(x), levels)
  x = jnp.array([-1.0, 0.0, 1.0, -1.01, 1.01, -50.0, 50.0, -jnp.inf, jnp.inf])
  got = pixels.to_uint8(x)
  assert got.dtype == jnp.uint8
  np.testing.assert_array_equal(got, [0, 128, 255, 0, 255, 0, 255, 0, 255])


def test_float_pixels_are_those_that_were_not_rounded():
  rng = np.random.default_rng(0)
  inside = rng.uniform(-1, 1, (2, 50, 50, 3))
  x = np.concatenate([inside, rng.normal(0, 20, inside.shape)])
  x = jnp.asarray(x, jnp.float32)
  got = np.asarray(jax.jit(pixels.from_float)(x))
  assert got.dtype == np.float32
  np.testing.assert_array_equal(np.round(got), pixels.to_uint8(x))
  expected = np.clip((np.asarray(x, np.float64) + 1) * 127.5, 0, 255)
  np.testing.assert_allclose(got, expected, atol=3e-5)
  assert got[2:].min() == 0
  assert got[2:].max() == 255
  assert np.mean(got == np.round(got)) < 0.6  # the clipped half, hardly more
  ends = jnp.array([-1.0, 1.0, -jnp.inf, jnp.inf])
  np.testing.assert_array_equal(pixels.from_float(ends), [0, 255, 0, 255])


@pytest.mark.parametrize(
  ('clip', 'name'), [(True, 'ancestral'), (False, 'ddim')]
)
def test_drawer_is_its_parts(schedule, clip, name):
  """Keys, first noise, denoiser, clipping, solve, rounding: in this order.

  Compiled in another way than its parts are, so a pixel may be rounded to the
  other side. The network leaves [-1, 1] often enough for clipping to show.
  """
  indices, shape = jnp.array([4, 2, 9]), (4, 4, 3)
  frames = (0, 3, len(TIMES) - 1)
  how = Plan(name, {}, TIMES, clip, 5)

  def apply(params, xt, t, keys, cond):
    assert t.shape == (3,)
    return params * crooked_eps(xt, t)

  (images, kept), _ = jax.jit(
    draw.drawer(
      tiny.recipe(models.Model(None, apply), shape, schedule, 'v'),
      tiny.one_device(), how, frames=frames,
    )
  )({'net': jnp.float32(2.0)}, indices)  # fmt: skip
  denoise = gaussian.denoiser(
    lambda xt, t: 2.0 * crooked_eps(xt, t), schedule, 'v'
  )
  if clip:
    denoise = clipping.clip_x0(denoise, schedule)

  @jax.jit
  def parts(indices):
    first, later = draw.sample_keys(5, indices)
    x = jnp.stack([jax.random.normal(key, shape) for key in first])
    return samplers.solve(
      how.create(), denoise, schedule, TIMES, x, later, frames
    )

  end, xs = parts(indices)
  assert images.dtype == kept.dtype == jnp.uint8
  assert images.shape == (3, *shape)
  assert kept.shape == (3, 3, *shape)
  np.testing.assert_array_equal(kept[-1], images)
  # Most places must be neither 0 nor 255, or they would say little.
  assert np.mean((images > 0) & (images < 255)) > 0.3
  for got, expected in ((images, end), (kept, xs)):
    apart = np.abs(got.astype(int) - pixels.to_uint8(expected).astype(int))
    assert apart.max() <= 1
    assert np.mean(apart > 0) < 0.01


def test_drawer_gives_the_pixels_of_what_the_network_says(schedule):
  """A network that always sees the same x0, predicted as x0: its levels."""
  values = np.array([-1.7, -1.0, -0.3, 0.25, 1.0, 1.7], np.float32)

  def drawn(**dtype):
    same = models.Model(
      None, lambda params, xt, *_: jnp.broadcast_to(params, xt.shape)
    )
    draw_fn = draw.drawer(
      tiny.recipe(same, (2, 3, 1), schedule, 'x0'),
      tiny.one_device(),
      Plan('ancestral', {}, [999, 400, -1], True, 0),
      **dtype,
    )
    images, is_finite = jax.jit(draw_fn)(
      {'net': values.reshape(2, 3, 1)}, jnp.arange(2)
    )
    assert is_finite
    return images

  # (1 - 0.3) 127.5 = 89.25, (1 + 0.25) 127.5 = 159.375
  for image in drawn():
    np.testing.assert_array_equal(image.ravel(), [0, 0, 89, 159, 255, 255])
  unrounded = drawn(dtype='float32')
  assert unrounded.dtype == jnp.float32
  for image in unrounded:
    np.testing.assert_allclose(
      image.ravel(), [0, 0, 89.25, 159.375, 255, 255], atol=1e-3
    )


@pytest.mark.parametrize('dtype', ['float16', 'uint'])
def test_an_unknown_dtype_is_one_line(schedule, dtype):
  with pytest.raises(UserError, match='one of uint8, float32') as error:
    draw.drawer(
      tiny.recipe(shape=(2, 2, 1)), tiny.one_device(),
      Plan('ddim', {}, [0, -1], True, 0), dtype=dtype,
    )  # fmt: skip
  assert repr(dtype) in str(error.value)
  assert '\n' not in str(error.value)


# --- (seed, index) -> noise, x, pixels ---------------------------------------

SHAPE = (16, 16, 3)


class Drawn(NamedTuple):
  noise: np.ndarray  # [4, B, *SHAPE]: the first noise, then three steps of it
  x: np.ndarray  # [B, *SHAPE]: Gaussian data, before rounding
  images: np.ndarray  # [B, *SHAPE]: of a network, uint8


def convolutions(params, xt, t, keys, cond):
  """A small network whose sums a compiler may order as it likes."""
  x = xt
  for kernel in params:
    x = jax.lax.conv_general_dilated(
      jnp.tanh(x), kernel, (1, 1), 'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )  # fmt: skip
  return x + 0.1 * jnp.cos(0.01 * t).reshape(-1, 1, 1, 1)


@pytest.fixture(scope='module')
def draw_all(schedule):
  """indices -> Drawn, jitted once for all tests; a mesh to spread over."""
  rng = np.random.default_rng(0)
  params = [
    jnp.asarray(rng.normal(size=(3, 3, i, o)) / np.sqrt(9 * i), jnp.float32)
    for i, o in ((3, 8), (8, 3))
  ]
  times, sampler = grid.create('uniform', linear(T), 10), samplers.ancestral()
  denoise = exact_denoiser(schedule, np.full(16, 0.3), np.full(16, 0.5))

  @functools.cache
  def program(mesh):
    draw_images = draw.drawer(
      tiny.recipe(models.Model(None, convolutions), SHAPE, schedule, 'v'),
      mesh,
      Plan('ancestral', {}, times, True, 3),
    )
    return jax.jit(functools.partial(run, draw_images))

  def run(draw_images, params, indices):
    first, later = draw.sample_keys(3, indices)
    start = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(first)
    noise = jnp.concatenate([start[None], noise_of(later, 3, SHAPE)])
    x = samplers.solve(sampler, denoise, schedule, times, start, later)
    return Drawn(noise, x, draw_images({'net': params}, indices)[0])

  def draw_all(indices, mesh=None):
    inputs = params, np.asarray(indices)
    if mesh is not None:
      specs = PartitionSpec(), PartitionSpec('data')
      inputs = jax.device_put(
        inputs, tuple(NamedSharding(mesh, s) for s in specs)
      )
    out = program(mesh or tiny.one_device())(*inputs)
    return Drawn(*map(np.asarray, out)), out.images.sharding.device_set

  return draw_all


def assert_same(got, expected):
  """What a sample owes to its address alone.

  Noise bit by bit; x to the rounding of float32 (the exact denoiser makes no
  difference grow, as an untrained network may); pixels at most 1 apart, in
  fewer than 0.1% of places. And these are images, neither flat nor saturated.
  """
  np.testing.assert_array_equal(got.noise, expected.noise)
  np.testing.assert_allclose(got.x, expected.x, rtol=0, atol=1e-5)
  assert got.images.dtype == np.uint8
  apart = np.abs(got.images.astype(int) - expected.images.astype(int))
  assert apart.max() <= 1
  assert np.mean(apart > 0) < 1e-3
  assert np.mean((got.images > 0) & (got.images < 255)) > 0.3
  assert got.images.std() > 20


def pick(drawn, which):
  return Drawn(drawn.noise[:, which], drawn.x[which], drawn.images[which])


def test_a_sample_does_not_depend_on_its_batch(draw_all):
  """All at once, one by one, in another order, in other company."""
  together, _ = draw_all(range(8))
  alone = [draw_all([i])[0] for i in range(8)]
  assert_same(
    Drawn(
      np.concatenate([one.noise for one in alone], axis=1),
      np.concatenate([one.x for one in alone]),
      np.concatenate([one.images for one in alone]),
    ),
    together,
  )
  order = np.array([5, 0, 7, 3, 1, 6, 2, 4])
  assert_same(draw_all(order)[0], pick(together, order))
  company, _ = draw_all([70_000, 3, 12, 3, 0, 9, 8, 7])
  assert_same(pick(company, [1, 3, 4, 7]), pick(together, [3, 3, 0, 7]))


def test_many_devices_draw_what_one_draws(draw_all):
  devices = jax.devices()[:8]
  assert len(devices) == 8  # the suite simulates them
  mesh = sharding.make_mesh(devices=devices)
  got, where = draw_all(range(len(devices)), mesh)
  assert len(where) == len(devices)
  expected, _ = draw_all(range(8))
  assert_same(got, pick(expected, slice(len(devices))))


def test_noise_differs_by_index_and_step(draw_all):
  """No two of 8 indices and 4 draws are equal, or correlated.

  Two independent rows of 768 numbers have a correlation of standard deviation
  1 / sqrt(768) = 0.036; the largest of 496 stays below 4.5 of those. Equal or
  opposite rows would give 1. The seed is fixed.
  """
  noise = draw_all(range(8))[0].noise.reshape(32, -1)
  correlation = np.corrcoef(noise)
  np.fill_diagonal(correlation, 0)
  assert np.abs(correlation).max() < 4.5 / np.sqrt(noise.shape[1])
  assert_moments(noise, 0, 1, 'standard normal')


def test_keys_are_all_different():
  """By index, by seed, and the first noise's from the sampler's."""
  data = [
    np.asarray(jax.random.key_data(keys))
    for seed in (0, 1, 2**31)
    for keys in draw.sample_keys(seed, jnp.arange(1000))
  ]
  assert len(np.unique(np.concatenate(data), axis=0)) == 3 * 2 * 1000


def test_the_type_of_an_index_does_not_matter(x64):
  """A store counts in int64, a device in uint32."""
  keys = [
    jax.random.key_data(
      jnp.stack(draw.sample_keys(0, np.arange(9, dtype=kind)))
    )
    for kind in (np.uint32, np.int32, np.int64)
  ]
  np.testing.assert_array_equal(keys[0], keys[1])
  np.testing.assert_array_equal(keys[0], keys[2])
