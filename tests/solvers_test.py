"""What samplers converge to, how fast, and what they cost.

Orders of convergence against the exact denoiser of a mixture of Gaussians;
moments of the stochastic ones against recursions from their papers.
"""

import inspect
import itertools

import jax
import jax.numpy as jnp
import mixture
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import integrate

from diffusion_jax import samplers
from diffusion_jax.process import gaussian, schedules
from diffusion_jax.samplers import grid, levels
from diffusion_jax.system.errors import UserError

T = 1000
LINEAR = schedules.linear(T)


def keys_of(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


# --- order of convergence ----------------------------------------------------


class Smooth:
  """beta linear in continuous time: -log alpha_bar = 0.1 u + 9.95 u^2.

  u = (t + 1) / T, so t = -1 is clean. The limit of DDPM's table, without the
  kinks that a table has between its entries.
  """

  num_timesteps = T
  ends_in_noise, last = False, T - 1

  def host(self, t):
    u = (np.asarray(t, np.float64) + 1) / T
    log_alpha_bar = -(0.1 * u + 9.95 * u**2)
    return log_alpha_bar, -np.expm1(log_alpha_bar)

  def host_t_of_logsnr(self, logsnr):
    falling = np.logaddexp(0, -np.asarray(logsnr))
    u = (np.sqrt(0.1**2 + 4 * 9.95 * falling) - 0.1) / (2 * 9.95)
    return T * u - 1

  def denoise(self, xt, t):
    u = (t + 1) / T
    log_alpha_bar = -(0.1 * u + 9.95 * u**2)
    alpha = jnp.exp(0.5 * log_alpha_bar)
    sigma = jnp.sqrt(-jnp.expm1(log_alpha_bar))
    x0 = mixture.x0(xt, alpha, sigma, jnp)
    return gaussian.Denoised(x0, (xt - alpha * x0) / sigma)


SMOOTH = Smooth()
START = np.linspace(-2, 2, 17)


def falling(num_steps):
  """Uniform in lambda from t = T-1 to t = 0, and not to clean data."""
  lam = levels.of(SMOOTH, [T - 1, 0]).lam
  return SMOOTH.host_t_of_logsnr(2 * np.linspace(*lam, num_steps + 1))


@pytest.fixture(scope='module')
def exact():
  """The end of the probability flow, d(x / alpha) = eps d(sigma / alpha).

  In lambda, with sigma / alpha = e^-lambda, by an explicit Runge-Kutta method
  of order 8 to 13 digits.
  """

  def slope(lam, y):
    alpha, sigma = 1 / np.sqrt(1 + np.exp([-2 * lam, 2 * lam]))
    x0 = mixture.x0(alpha * y, alpha, sigma)
    return -np.exp(-lam) * (alpha * y - alpha * x0) / sigma

  alpha, _, lam = levels.of(SMOOTH, [T - 1, 0])
  found = integrate.solve_ivp(
    slope, lam, START / alpha[0], method='DOP853', rtol=1e-13, atol=1e-13
  )
  return alpha[1] * found.y[:, -1]


ORDERS = [
  ('ddim', {}, 1),
  ('euler', {}, 1),
  ('heun', {}, 2),
  ('plms', {}, 2),
  ('plms', {'variant': 'improved_euler'}, 2),
  ('ipndm', {}, 2),
  ('dpm_solver', {'order': 1}, 1),
  ('dpm_solver', {'order': 2}, 2),
  ('dpm_solver', {'order': 3}, 3),
  ('dpm_solver', {'order': 3, 'variant': 'diffusers'}, 3),
  ('dpmpp_2s', {}, 2),
  ('dpmpp_2m', {}, 2),
  ('dpmpp_3m', {}, 3),
  ('dpmpp_3m', {'variant': 'published'}, 2),
  ('unipc', {'order': 1}, 2),
  ('unipc', {'order': 1, 'variant': 'bh1'}, 2),
  ('unipc', {'order': 2}, 3),
  ('unipc', {'order': 2, 'variant': 'bh1'}, 3),
  ('unipc', {'order': 3}, 4),
]


@pytest.mark.parametrize(('name', 'options', 'order'), ORDERS)
def test_order_of_convergence(x64, exact, name, options, order):
  r"""The error falls as steps^-order, on a grid uniform in lambda, of length h.

  In y = x / alpha and k = sigma / alpha the flow is dy = eps dk, with k =
  e^-lambda; in x / sigma it is d(x / sigma) = x0 d(e^lambda). A method is of
  order p where one step errs by h^(p+1).

  - Euler's takes eps as constant: 1. DDIM is the same step. Heun's is the
    trapezoidal rule in k, with an end found to h^2: 2.
  - DPM-Solver-k and 2S take eps (or x0) by Taylor in lambda, k - 1 derivatives
    of it from k evaluations: k.
  - 2M has x0 + h x0' / 2 in place of the line's integral, which is off by h^2
    x0' / 12: with the step's length, h^3, so 2. 3M integrates the parabola
    through three x0: 3. Published, its second derivative is half of it, and h^2
    x0'' / 12 is missing: 2.
  - PLMS gives eps at the middle of the step, in the number of the step, to
    fourth order. But steps grow in k within a step too: the mean of eps over dk
    differs from that over the numbers of steps by their covariance, h^2 eps'
    (log k')' / 12. So 2, whatever the order of its weights is, and so for the
    Runge-Kutta start, whose middle is not the middle in k.
  - UniP-p integrates the polynomial through p values of x0, and UniC-p that
    through p + 1, the next among them: p + 1. Where one coefficient is set to
    1/2 it is off by h^2 / 12 of a difference that is of order h. That is h^3:
    what UniC-1 may err by, so 2 still, and what UniP-2 may, as it comes to the
    corrected x through the next x0 alone, times h: 3.

  The first steps of a multistep method are of lower order. There alpha is
  0.007, so x0 varies by as little, and it counts for e^lambda = 0.007 in x /
  sigma: 5e-5 h^2, or h^3 where it is corrected. At the smallest h here, 0.025,
  that is a tenth of the error of 3M, and less of the others'.

  Slopes are by least squares over three numbers of steps, all multiples of 6,
  so that singlestep methods have no rest.
  """
  counts = np.array([96, 192, 384] if order > 2 else [48, 96, 192])
  errors = []
  for count in counts:
    end = samplers.solve(
      samplers.create(name, **options), SMOOTH.denoise, SMOOTH,
      falling(count), jnp.asarray(START[None]), keys_of(1),
    )  # fmt: skip
    errors.append(np.sqrt(np.mean((np.asarray(end)[0] - exact) ** 2)))
  slope, _ = np.polyfit(np.log2(counts), np.log2(errors), 1)
  assert abs(-slope - order) < 0.15, (slope, errors)


# --- what all do -------------------------------------------------------------

SHORT = [
  (999, -1), (999, 400, -1), (999, 600.5, 3, -1), (999, 700, 400, 100, -1),
  (999, 800, 600, 400, 200, 0, -1), (999, 800, 600, 400, 200, 0),
  (*range(999, 0, -50), -1),
]  # fmt: skip
ALL = [
  # 'adaptive' has no grid and no rows: adaptive_test
  *((name, {}) for name in samplers.SAMPLERS if name != 'adaptive'),
  ('plms', {'variant': 'improved_euler'}),
  ('dpm_solver', {'order': 2}),
  ('dpm_solver', {'order': 3, 'variant': 'diffusers'}),
  ('dpmpp_3m', {'variant': 'published'}),
  ('unipc', {'order': 1, 'variant': 'bh1'}),
  ('unipc', {'order': 2}),
  ('euler', {'churn': 10.0}),
  ('heun', {'churn': 10.0, 'churn_max': 50.0}),
  ('ddim', {'eta': 1.0}),
  ('predictor_corrector', {'corrector_steps': 2}),
]
NOISY = (
  *('ancestral', 'dpmpp_2m_sde', 'predictor_corrector'),
  *samplers.CALIBRATED,
)


def made(name, options, times):
  """A sampler; what is calibrated has a number for each step."""
  if name in samplers.CALIBRATED:
    options = {**options, 'x0_variance': [0.2] * (len(times) - 1)}
  return samplers.create(name, **options)


def loop(sampler, denoiser, times, x):
  """(x after each step of the grid, the times asked at), without noise."""
  rows, memory = sampler.init(LINEAR, np.asarray(times, np.float64), x)
  silence = jnp.zeros_like(x)
  ends = rows.get('ends', np.ones(len(rows['t'])))
  way, asked = [], []

  def counted(xt, t):
    asked.append(float(t))
    return denoiser(xt, t)

  for i in range(len(ends)):
    row = {name: value[i] for name, value in rows.items()}
    x, memory = sampler.step(counted, row, x, memory, lambda: silence)
    if ends[i]:
      way.append(np.asarray(x))
  return way, asked


@pytest.mark.parametrize(('name', 'options'), ALL)
def test_rows_are_finite_and_counted(name, options):
  """One row an evaluation, at times the network has; whatever the grid."""
  for times in SHORT:
    sampler = made(name, options, times)
    with np.errstate(all='raise', under='ignore'):
      rows, _ = sampler.init(
        LINEAR, np.asarray(times, np.float64), jnp.zeros(1)
      )
    lengths = {len(value) for value in rows.values()}
    assert lengths == {sampler.evaluations(times)}, (name, times)
    assert all(np.isfinite(value).all() for value in rows.values())
    assert rows['t'].min() >= 0
    assert rows['t'].max() <= T - 1
    ends = rows.get('ends', np.ones(len(rows['t'])))
    assert ends.sum() == len(times) - 1
    assert ends[-1] == 1


@pytest.mark.parametrize(('name', 'options'), ALL)
def test_a_network_that_knows_the_answer(x64, name, options):
  """It says x0 = c whatever x is: then c is what comes out, of any grid.

  And without noise x is alpha c + sigma eps with one eps all the way, on the
  straight line that every solver follows exactly.
  """
  c = np.linspace(-1, 1, 5)[None]
  x = np.linspace(2, -1.5, 5)[None]

  def denoise(xt, t):
    alpha, sigma, _ = levels.of(LINEAR, float(t))
    return gaussian.Denoised(jnp.asarray(c), (xt - alpha * c) / sigma)

  plain = (
    name not in NOISY and not options.get('churn') and 'eta' not in options
  )
  for times in SHORT:
    sampler = made(name, options, times)
    alpha, sigma, _ = levels.of(LINEAR, times)
    eps = (x - alpha[0] * c) / sigma[0]
    way, asked = loop(sampler, denoise, times, jnp.asarray(x))
    assert len(asked) == sampler.evaluations(times)
    if times[-1] < 0:
      np.testing.assert_allclose(way[-1], c, rtol=0, atol=1e-9)
    for i, found in enumerate(way if plain else ()):
      line = alpha[i + 1] * c + sigma[i + 1] * eps
      np.testing.assert_allclose(found, line, rtol=0, atol=1e-9)


@pytest.mark.parametrize(('name', 'options'), ALL)
def test_several_devices_change_nothing(name, options):
  """Noise and all: eight devices with two examples each, and one with all."""
  mesh = Mesh(np.array(jax.devices()[:8]), ('data',))
  across = NamedSharding(mesh, PartitionSpec('data'))
  times = SHORT[4]
  sampler = made(name, options, times)

  def denoise(xt, t):
    x0 = jnp.tanh(xt + 0.1 * jnp.sin(t))
    alpha, sigma = LINEAR.alpha(t), LINEAR.sigma(t)
    return gaussian.Denoised(x0, (xt - alpha * x0) / sigma)

  @jax.jit
  def solve(x, keys):
    return samplers.solve(sampler, denoise, LINEAR, times, x, keys)

  given = (jax.random.normal(jax.random.key(0), (16, 3)), keys_of(16))
  spread = solve(*jax.device_put(given, across))
  assert len(spread.sharding.device_set) == 8
  np.testing.assert_allclose(spread, solve(*given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ('name', 'options', 'times', 'evaluations'),
  [
    ('ddim', {}, (999, 500, 0, -1), 3),
    ('heun', {}, (999, 500, 0, -1), 5),  # the last step has one
    ('heun', {}, (999, 500, 0), 4),
    ('plms', {}, (999, 800, 600, 400, 200, -1), 4 * 3 + 2),
    ('plms', {'variant': 'improved_euler'}, (999, 500, 0, -1), 4),
    ('ipndm', {}, (999, 500, 0, -1), 3),
    ('dpm_solver', {'order': 3}, (999, 500, 0, -1), 3),
    ('predictor_corrector', {}, (999, 500, 0, -1), 5),
    ('predictor_corrector', {'corrector_steps': 3}, (999, 500, 0, -1), 9),
  ],
)
def test_evaluations_by_hand(name, options, times, evaluations):
  sampler = samplers.create(name, **options)
  assert sampler.evaluations(times) == evaluations


def test_where_singlestep_methods_look(x64):
  """At the grid's times, each once; groups of 3, 2 for the rest, 1 to clean."""
  times = (999, 800, 600, 400, 200, 0, -1)

  def denoise(xt, t):
    return gaussian.Denoised(xt, xt)

  sampler = samplers.dpm_solver(3)
  _, asked = loop(sampler, denoise, times, jnp.ones((1, 1)))
  assert asked == list(times[:-1])
  rows, _ = sampler.init(LINEAR, np.array(times, float), np.ones(1))
  np.testing.assert_array_equal(rows['begins'], [1, 0, 0, 1, 0, 1])


def test_euler_without_churn_is_ddim_and_so_is_order_1(x64):
  """Three writings of one step, for a network that is exact for no data."""

  def eps(xt, t):
    return 0.7 * xt + 0.3 * jnp.cos(2 * xt + 0.01 * t[:, None])

  denoise = gaussian.denoiser(eps, LINEAR, 'eps')
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5)))
  ends = [
    samplers.solve(sampler, denoise, LINEAR, SHORT[2], x, keys_of(2))
    for sampler in (samplers.ddim(), samplers.euler(), samplers.dpm_solver(1))
  ]
  np.testing.assert_allclose(ends[1], ends[0], rtol=1e-10)
  np.testing.assert_allclose(ends[2], ends[0], rtol=1e-10)


# --- moments -----------------------------------------------------------------

MEAN, STD = np.array([0.0, 0.5, -1.0]), np.array([1.0, 0.25, 0.5])
TIMES = (999, 900, 749, 600, 500.5, 300, 200, 120, 40, 9, 0, -1)


def denoise_gaussian(xt, t):
  """E[x0 | xt] of independent data N(MEAN, STD^2); xt is [B, 3, N]."""
  m, v = (jnp.asarray(a, xt.dtype)[None, :, None] for a in (MEAN, STD**2))
  alpha, sigma = LINEAR.alpha(t, xt.dtype), LINEAR.sigma(t, xt.dtype)
  x0 = m + alpha * v / (alpha**2 * v + sigma**2) * (xt - alpha * m)
  return gaussian.Denoised(x0, (xt - alpha * x0) / sigma)


def alpha_sigma(t):
  """From the betas, with nothing of the library's; -1 is clean."""
  table = np.cumsum(np.log(1 - np.linspace(1e-4, 0.02, T)))
  log = np.interp(t, np.arange(-1, T), np.concatenate([[0.0], table]))
  return np.exp(log / 2), np.sqrt(-np.expm1(log))


class Affine:
  """Mean and covariance of a state [x, ...] that steps are affine in.

  x0 = g x + o is the exact denoiser of one dimension of the data.
  """

  def __init__(self, m, v, size=1, x=(0.0, 1.0)):
    self.m, self.v = m, v
    self.mean, self.covariance = np.zeros(size), np.zeros((size, size))
    self.mean[0], self.covariance[0, 0] = x

  def x0(self, alpha, sigma):
    g = alpha * self.v / (alpha**2 * self.v + sigma**2)
    return g, self.m * (1 - g * alpha)

  def step(self, matrix, offset, noise):
    matrix, noise = np.atleast_2d(matrix), np.atleast_1d(noise)
    self.mean = matrix @ self.mean + offset
    self.covariance = matrix @ self.covariance @ matrix.T
    self.covariance += np.outer(noise, noise)


def ddim_moments(m, v, times, eta):
  """arXiv 2010.02502, equations 12 and 16."""
  state = Affine(m, v)
  for t, s in itertools.pairwise(times):
    (a, b), (a1, b1) = alpha_sigma(t), alpha_sigma(s)
    std = eta * b1 / b * np.sqrt(1 - a**2 / a1**2)
    g, o = state.x0(a, b)
    direction = np.sqrt(max(b1**2 - std**2, 0)) / b
    # x' = a1 x0 + direction (x - a x0) + std z
    c0 = a1 - direction * a
    state.step(c0 * g + direction, c0 * o, std)
  return state.mean[0], state.covariance[0, 0]


def sde_moments(m, v, times):
  """SDE-DPM-Solver++ (2M), arXiv 2211.01095; of x and the last x0."""
  state = Affine(m, v, size=2)
  before = None
  for i, (t, s) in enumerate(itertools.pairwise(times)):
    (a, b), (a1, b1) = alpha_sigma(t), alpha_sigma(s)
    shrink = (b1 * a) / (b * a1)  # e^-h
    drop = a1 * (1 - shrink**2)
    w = 0.0
    if i > 0 and s >= 0:
      w = np.log(shrink) / np.log(before) / 2  # 1 / (2 r)
    before = shrink
    g, o = state.x0(a, b)
    state.step(
      [[b1 / b * shrink + drop * (1 + w) * g, -drop * w], [g, 0]],
      np.array([drop * (1 + w) * o, o]),
      [b1 * np.sqrt(1 - shrink**2), 0],
    )
  return state.mean[0], state.covariance[0, 0]


def edm_moments(m, v, times, churn, churn_max, churn_noise, second):
  """arXiv 2206.00364, algorithm 2, in y = x / alpha and k = sigma / alpha."""
  alpha = alpha_sigma(times[0])[0]
  state = Affine(m, v, x=(0.0, alpha**-2))
  gamma = min(churn / (len(times) - 1), np.sqrt(2) - 1)
  for t, s in itertools.pairwise(times):
    k, k1 = (sigma / alpha for alpha, sigma in map(alpha_sigma, (t, s)))
    up = k * (1 + gamma) if k <= churn_max else k
    state.step(1, 0, churn_noise * np.sqrt(up**2 - k**2))
    # D(y; k) = m + v / (v + k^2) (y - m), and (y - D) / k:
    d = up / (v + up**2)
    move = 1 + (k1 - up) * d
    if second and k1 > 0:
      d1 = k1 / (v + k1**2)
      move = 1 + (k1 - up) * (d + d1 * move) / 2
    state.step(move, (1 - move) * m, 0)
  return state.mean[0], state.covariance[0, 0]


CHURN = {'churn': 3.0, 'churn_max': 50.0, 'churn_noise': 1.01}
MOMENTS = [
  ('ddim', {'eta': 0.5}, lambda *a: ddim_moments(*a, 0.5)),
  ('ddim', {'eta': 1.0}, lambda *a: ddim_moments(*a, 1.0)),
  ('dpmpp_2m_sde', {}, sde_moments),
  ('euler', CHURN, lambda *a: edm_moments(*a, *CHURN.values(), False)),
  ('heun', CHURN, lambda *a: edm_moments(*a, *CHURN.values(), True)),
]


@pytest.mark.parametrize(('name', 'options', 'moments_of'), MOMENTS)
def test_moments_of_samples(name, options, moments_of):
  """Gaussian data: every step is affine in x and its noise.

  So mean and variance follow the recursions above exactly. Of n = 98,304
  samples they lie within 4 standard errors, std / sqrt(n) and
  variance sqrt(2 / (n - 1)); the seed is fixed.
  """
  x = jax.random.normal(jax.random.key(7), (2, 3, 49_152))
  end = samplers.solve(
    samplers.create(name, **options), denoise_gaussian, LINEAR, TIMES, x,
    keys_of(2, seed=8),
  )  # fmt: skip
  end = np.asarray(end, np.float64).transpose(1, 0, 2).reshape(3, -1)
  for got, m, s in zip(end, MEAN, STD, strict=True):
    mean, variance = moments_of(m, s**2, TIMES)
    z = (got - mean) / np.sqrt(variance)
    assert abs(z.mean()) < 4 / np.sqrt(z.size)
    assert abs(z.var(ddof=1) - 1) < 4 * np.sqrt(2 / (z.size - 1))


@pytest.mark.parametrize(
  'moments_of',
  [
    lambda *a: ddim_moments(*a, 0.5),
    lambda *a: ddim_moments(*a, 1.0),
    sde_moments,
    lambda *a: edm_moments(*a, 3.0, 50.0, 1.0, False),
    lambda *a: edm_moments(*a, 3.0, 50.0, 1.0, True),
  ],
  ids=['ddim 0.5', 'ddim 1', 'dpmpp_2m_sde', 'euler', 'heun'],
)
def test_moments_tend_to_the_datas(moments_of):
  """The recursion does, in 10, 100 and 1000 steps; the library has no part.

  The error of the variance falls at the first order or faster, down to what the
  last step leaves: it gives E[x0 | x], whose variance is less by sigma^2 /
  (v + sigma^2) = 0.0016 for sigma = 0.01. The mean begins at 0 instead of
  alpha m, 0.013 m / std at the most, and keeps less than that.
  """
  for m, s in zip(MEAN, STD, strict=True):
    off = []
    for stride in (100, 10, 1):
      times = [*range(999, -1, -stride), -1]
      mean, variance = moments_of(m, s**2, times)
      assert abs(mean - m) / s < 0.003
      off.append(abs(variance / s**2 - 1))
    assert off[1] < off[0] / 2
    assert off[2] < off[1] / 4 + 0.002
    assert off[2] < 0.03


def corrected_moments(m, v, times, snr, corrector_steps):
  """arXiv 2011.13456, algorithms 3 and 5, for an example of many dimensions.

  All dimensions alike, so that the norms are what they tend to: |z|^2 is 1 and
  |score|^2 its mean, for each dimension.
  """
  state = Affine(m, v)
  betas = np.linspace(1e-4, 0.02, T)
  for t, s in itertools.pairwise(times):
    (a, b), (a1, b1) = alpha_sigma(t), alpha_sigma(s)
    beta = 1 - a**2 / a1**2
    g, o = state.x0(a, b)
    c0, ct = a1 * beta / b**2, a / a1 * b1**2 / b**2
    state.step(c0 * g + ct, c0 * o, np.sqrt(beta) if s >= 0 else 0)
    for _ in range(corrector_steps if s >= 0 else 0):
      total = a1**2 * v + b1**2  # score = -(x - a1 m) / total
      norm = (state.covariance[0, 0] + (state.mean[0] - a1 * m) ** 2) / total**2
      size = 2 * (1 - np.interp(s, np.arange(T), betas)) * snr**2 / norm
      state.step(1 - size / total, size / total * a1 * m, np.sqrt(2 * size))
  return state.mean[0], state.covariance[0, 0]


@pytest.mark.parametrize(('snr', 'corrector_steps'), [(0.16, 1), (0.3, 2)])
def test_moments_of_predictor_corrector(snr, corrector_steps):
  """A step's length has norms in it, which for 8,192 dimensions are their means
  up to 1%, and in the moments' expectation up to 1 / 8,192; 4 standard errors
  of 98,304 numbers are 1.8% of the variance.
  """
  m, s = 0.5, 0.6
  times = tuple(t for t in TIMES if t == int(t))

  def denoise(xt, t):
    alpha, sigma = LINEAR.alpha(t, xt.dtype), LINEAR.sigma(t, xt.dtype)
    x0 = m + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (xt - alpha * m)
    return gaussian.Denoised(x0, (xt - alpha * x0) / sigma)

  x = jax.random.normal(jax.random.key(1), (12, 64, 128))
  end = samplers.solve(
    samplers.predictor_corrector(snr, corrector_steps), denoise, LINEAR, times,
    x, keys_of(12, seed=2),
  )  # fmt: skip
  mean, variance = corrected_moments(m, s**2, times, snr, corrector_steps)
  z = (np.asarray(end, np.float64).ravel() - mean) / np.sqrt(variance)
  assert abs(z.mean()) < 4 / np.sqrt(z.size)
  assert abs(z.var(ddof=1) - 1) < 4 * np.sqrt(2 / (z.size - 1))


def test_predictor_corrector_tends_to_the_data():
  """Up to Langevin's own error: its variance is too large by about snr^2.

  A step x - e x / v + sqrt(2 e) z with e = 2 snr^2 v keeps the variance
  v / (1 - e / 2v), so 1 + snr^2 times what it should be: 2.6% for 0.16.
  """
  for m, s in zip(MEAN, STD, strict=True):
    for snr in (0.16, 0.05):
      mean, variance = corrected_moments(m, s**2, [*range(999, -2, -1)], snr, 1)
      assert abs(mean - m) / s < 1e-3
      assert abs(variance / s**2 - 1) < snr**2 + 0.002


def test_langevin_steps_have_each_examples_own_length():
  """An example in other company is what it is alone."""
  x = jax.random.normal(jax.random.key(0), (3, 40)) * jnp.array([[1], [5], [9]])
  sampler = samplers.predictor_corrector()

  def denoise(xt, t):
    return gaussian.Denoised(0.1 * jnp.tanh(xt), xt)

  keys = keys_of(3)
  together = samplers.solve(sampler, denoise, LINEAR, (500, 200, 50), x, keys)
  for i in range(3):
    alone = samplers.solve(
      sampler, denoise, LINEAR, (500, 200, 50), x[i : i + 1], keys[i : i + 1]
    )
    np.testing.assert_allclose(alone[0], together[i], rtol=1e-5, atol=1e-6)


def test_churn_stays_within_what_the_network_knows():
  """At T-1 there is no level above, so nothing is added; below it is.

  sqrt(2) - 1 at the most, whatever S_churn is (EDM, algorithm 2).
  """
  times = np.array([999.0, 500, 100, -1])
  rows, _ = samplers.euler(churn=1e6).init(LINEAR, times, np.ones(1))
  alpha, sigma = alpha_sigma(times[:-1])
  asked_alpha, asked_sigma = alpha_sigma(rows['t'])
  ratio = asked_sigma / asked_alpha / (sigma / alpha)
  np.testing.assert_allclose(ratio, [1, np.sqrt(2), np.sqrt(2)], rtol=1e-9)
  assert rows['std'][0] == 0
  assert rows['std'][1] > 0


# --- grids and mistakes ------------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'function'),
  [('logsnr', np.log), ('karras', lambda level: level ** (1 / 7))],
)
def test_grids_by_noise_level(name, function):
  """Evenly spaced in log(sigma / alpha), and in its seventh root."""
  times = grid.create(name, LINEAR, 20)
  assert len(times) == 21
  assert times[0] == T - 1
  assert times[-2:] == [0, -1]
  alpha, sigma = alpha_sigma(times[:-1])
  values = function(sigma / alpha)
  np.testing.assert_allclose(np.diff(values), np.diff(values)[0], rtol=1e-6)


@pytest.mark.parametrize(
  ('num_steps', 'entries', 'first', 'stride'),
  [
    (10, 10, 900, 100),
    (15, 16, 990, 66),
    (300, 334, 999, 3),
    (600, 1000, 999, 1),
  ],
)
def test_the_uniform_grid_of_ddims_code(num_steps, entries, first, stride):
  times = grid.create('ddim_uniform', LINEAR, num_steps)
  assert len(times) - 1 == entries
  assert times[0] == first
  assert times[-2:] == [0, -1]
  assert {a - b for a, b in itertools.pairwise(times[:-1])} == {stride}


@pytest.mark.parametrize(
  ('num_steps', 'repeated'), [(10, 0), (50, 1), (100, 4), (1000, 312)]
)
def test_the_quadratic_grid_of_ddims_code(num_steps, repeated):
  """The published list has them; what samplers get has each time once."""
  published = grid.ddim_quadratic(LINEAR, num_steps)
  assert len(published) == num_steps + 1
  assert published[0] == 800
  expected = [int(r**2) for r in np.linspace(0, np.sqrt(800), num_steps)]
  assert published == [*expected[::-1], -1]
  times = grid.create('ddim_quadratic', LINEAR, num_steps)
  assert times == sorted(set(published), reverse=True)
  assert len(published) - len(times) == repeated


def test_a_repeated_time_is_a_step_of_no_length(x64):
  """So leaving it out changes nothing, with eta or without."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)))
  for sampler in (
    samplers.ddim(), samplers.ddim(1.0), samplers.ancestral(), samplers.euler()
  ):  # fmt: skip
    _, frames = samplers.solve(
      sampler, denoise_gaussian, LINEAR, (500, 300, 300, 100), x, keys_of(2),
      (1, 2),
    )  # fmt: skip
    np.testing.assert_allclose(frames[1], frames[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
  ('name', 'options', 'said'),
  [
    ('unipc', {'order': 0}, 'order=0'),
    ('unipc', {'order': 4}, 'order=4'),
    ('dpm_solver', {'order': 2.5}, 'order=2.5'),
    ('dpmpp_2m', {'order': 2}, 'order=2: dpmpp_2m has no such option'),
    ('dpm_solver', {'variant': 'fast'}, "variant='fast'"),
    ('dpmpp_3m', {'variant': 'bh1'}, "variant='bh1'"),
    ('unipc', {'variant': 'bh3'}, "variant='bh3'"),
    ('plms', {'variant': 'prk'}, "variant='prk'"),
    ('euler', {'churn': -1.0}, 'churn=-1.0'),
    ('heun', {'churn_noise': float('nan')}, 'churn_noise=nan'),
    ('heun', {'churn_max': -2.0}, 'churn_max=-2.0'),
    ('predictor_corrector', {'snr': 0.0}, 'snr=0.0'),
    ('predictor_corrector', {'corrector_steps': 0}, 'corrector_steps=0'),
  ],
)
def test_bad_options_are_one_line(name, options, said):
  with pytest.raises(UserError) as error:
    samplers.create(name, **options)
  assert said in str(error.value)
  assert '\n' not in str(error.value)


def test_a_plan_knows_what_it_costs():
  plan = samplers.plan.create(LINEAR, sampler='heun', num_steps=10)
  assert plan.num_steps == 10
  assert plan.evaluations == 19
  assert plan.cost() == '10 steps, 19 evaluations'
  assert samplers.plan.create(LINEAR, num_steps=10).cost() == '10 steps'
  plan = samplers.plan.create(LINEAR, num_steps=15, grid='ddim_uniform')
  assert plan.num_steps == plan.evaluations == 16


@pytest.mark.parametrize(
  ('given', 'said'),
  [
    ({'num_steps': 0}, 'num_steps=0'),
    ({'num_steps': 2, 'sampler': 'unipc', 'order': 3}, 'order=3'),
    ({'grid': '500,600', 'sampler': 'heun'}, 'grid=500,600'),
    ({'grid': '999,5', 'num_steps': 3}, 'num_steps=3'),
    ({'sampler': 'heun', 'eta': 0.5}, 'eta=0.5'),
  ],
)
def test_bad_plans_are_one_line(given, said):
  with pytest.raises(UserError) as error:
    samplers.plan.create(LINEAR, **given)
  assert said in str(error.value)
  assert '\n' not in str(error.value)


def test_few_steps_are_no_mistake():
  """A default order is that of enough steps; fewer have what they can."""
  plan = samplers.plan.create(LINEAR, sampler='unipc', num_steps=1)
  assert plan.options['order'] == 3


def test_every_sampler_is_told_of():
  """In the order of their dict, with the paper that its module names."""
  head, *rows = samplers.table()
  assert [row[0] for row in rows] == list(samplers.SAMPLERS)
  assert all(len(row) == len(head) for row in rows)
  for name, *_, paper, _ in rows:
    module = inspect.getmodule(samplers.SAMPLERS[name])
    assert paper in inspect.getsource(module), name
