"""What the methods of editing sample, exactly, where the data are Gaussian.

The denoiser of Gaussian data is linear, so every step is affine in x and in its
noises. A step applied to basis vectors gives its matrices, and the mean and the
covariance of the result follow from those of all rows, without sampling. They
are compared with recursions that are written here from the papers.
"""

import importlib.util
import itertools

import binaries
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.editing import (
  daps,
  kernels,
  linear,
  measurements,
  methods,
  replacement,
  sdedit,
)
from diffusion_jax.process import gaussian, noise, schedules
from diffusion_jax.samplers import grid, solve
from diffusion_jax.system.errors import UserError

T = 1000
LINEAR = schedules.linear(T)
CORRELATED = np.array([[1, 0.9], [0.9, 1]])
EYE = np.eye(2)
NOISE = 0.1  # of y = x[0] + NOISE n
Y = 1.0
SHAPE = (1, 2, 1)
FULL = [*range(T - 1, -1, -1), -1]
FIFTIES = [*range(950, -1, -50), -1]


# --- the propagation of a method ---------------------------------------------


def exact(S, schedule=LINEAR):
  """The denoiser of data N(0, S), of pictures with as many numbers."""
  values, vectors = np.linalg.eigh(S)

  def denoise(xt, t):
    alpha, sigma = gaussian.alpha_sigma(schedule, t, xt)
    flat = xt.reshape(len(xt), -1) @ vectors
    alpha, sigma = (of.reshape(-1, 1) for of in (alpha, sigma))
    own = values[None]
    x0 = alpha * own / (alpha**2 * own + sigma**2) * flat
    eps = sigma / (alpha**2 * own + sigma**2) * flat
    return gaussian.Denoised(
      *((of @ vectors.T).reshape(xt.shape) for of in (x0, eps))
    )

  return denoise


def problem(batch, noise_std=NOISE):
  """The measurement and y of a batch, which repeats the one example."""
  mask = np.broadcast_to([[[[1.0], [0.0]]]], (batch, *SHAPE))
  rows = {'noise': jnp.full(batch, noise_std), 'mask': jnp.asarray(mask)}
  make = measurements.create({'name': 'inpaint'}, SHAPE)
  return make(rows), Y * rows['mask']


def basis(size, noises):
  """(x, (noise 0, ...)): zeros, then each unit vector of each of them."""
  count = 1 + size * (1 + noises)
  units = np.eye(count)[:, 1:].reshape(count, 1 + noises, size)
  return units[:, 0], [units[:, 1 + k] for k in range(noises)]


def law_of(editing, schedule, times, shape=SHAPE, start=None):
  """(mean, covariance) of an editing's result, row by row."""
  size, noises = int(np.prod(shape)), 3
  x, ns = basis(size, noises)
  x, *ns = (jnp.asarray(of).reshape(-1, *shape) for of in (x, *ns))
  sampler = editing.sampler
  rows, _ = sampler.init(schedule, np.asarray(times, np.float64), x)
  rows = {name: jnp.asarray(row, jnp.float64) for name, row in rows.items()}

  def one(row):
    def noise_fn(k=0):
      return ns[k]

    return sampler.step(editing.denoiser, row, x, (), noise_fn)[0]

  found = np.asarray(jax.jit(jax.vmap(one))(rows))
  found = found.reshape(*found.shape[:2], size)
  offset = found[:, 0]
  moved = (found[:, 1:] - offset[:, None]).reshape(-1, 1 + noises, size, size)
  moved = moved.swapaxes(-1, -2)
  if start is None:
    begun = np.asarray(editing.start(ns[0], times[0])).reshape(-1, size)
    first = (begun[1 + size : 1 + 2 * size] - begun[0]).T
    mean, cov = begun[0], first @ first.T
  else:
    mean, cov = start
  for b, (K, *Q) in zip(offset, moved, strict=True):
    mean = K @ mean + b
    cov = K @ cov @ K.T + sum(q @ q.T for q in Q)
  return mean, cov


def edited(name, S=CORRELATED, noise_std=NOISE, schedule=LINEAR, **options):
  batch = 1 + 2 * 4
  return methods.create(
    name, exact(S, schedule), schedule, *problem(batch, noise_std), **options
  )


# --- recursions from the papers, in NumPy -------------------------------------

LOG = np.append(LINEAR.log_alpha_bar, 0.0)  # -1 is clean data
A = np.array([[1.0, 0.0]])


def alpha(t):
  return np.exp(0.5 * LOG[t])


def variance(t):
  return -np.expm1(LOG[t])


def estimate(S, t):
  """F of E[x0 | xt] = F xt, and Cov(x0 | xt)."""
  a = alpha(t)
  F = a * S @ np.linalg.inv(a**2 * S + variance(t) * EYE)
  return F, S - a * F @ S


def backwards(t, s):
  """q(xs | xt, x0): c0, ct and the variance."""
  ratio = np.exp(LOG[t] - LOG[s])
  c0 = alpha(s) * (1 - ratio) / variance(t)
  ct = np.sqrt(ratio) * variance(s) / variance(t)
  return c0, ct, (1 - ratio) * variance(s) / variance(t)


def chain(steps, mean=None, cov=EYE):
  mean = np.zeros(2) if mean is None else mean
  for K, b, Q in steps:
    mean, cov = K @ mean + b, K @ cov @ K.T + Q
  return mean, cov


def guided_law(S, spread, eta, times=FULL):
  """Tweedie's guidance with a covariance; spread: (S, t) -> C."""

  def steps():
    for t, s in itertools.pairwise(times):
      F, _ = estimate(S, t)
      C = spread(S, t)
      W = F.T @ A.T / (A @ C @ A.T + NOISE**2) * variance(t) / alpha(t)
      G, g = F - W @ A @ F, W[:, 0] * Y
      _, _, small = backwards(t, s)
      std = eta * np.sqrt(small)
      ceps = np.sqrt(variance(s) - std**2) / np.sqrt(variance(t))
      c0 = alpha(s) - ceps * alpha(t)
      yield c0 * G + ceps * EYE, c0 * g, std**2 * EYE

  return chain(steps())


def replacement_law(S):
  def steps():
    for t, s in itertools.pairwise(FULL):
      c0, ct, small = backwards(t, s)
      yield c0 * estimate(S, t)[0] + ct * EYE, np.zeros(2), small * EYE
      known = np.diag([variance(s), 0])
      yield np.diag([0, 1]), np.array([alpha(s) * Y, 0]), known

  return chain(steps())


def repaint_law(S, num_steps, jump_length, jump_n_sample):
  times = np.rint(np.linspace(0, T - 1, num_steps)).astype(int)
  jumps = dict.fromkeys(
    range(0, num_steps - jump_length, jump_length), jump_n_sample - 1
  )

  def steps():
    place = num_steps - 1
    begun = False
    while place >= 0:
      t, s = times[place], times[place - 1] if place else -1
      if begun:
        known = np.diag([variance(t), 0])
        yield np.diag([0, 1]), np.array([alpha(t) * Y, 0]), known
      begun = True
      c0, ct, small = backwards(t, s)
      yield c0 * estimate(S, t)[0] + ct * EYE, np.zeros(2), small * EYE
      place -= 1
      if jumps.get(place, 0):
        jumps[place] -= 1
        for _ in range(jump_length):  # one by one, as in the paper
          ratio = np.exp(LOG[times[place + 1]] - LOG[times[place]])
          yield np.sqrt(ratio) * EYE, np.zeros(2), (1 - ratio) * EYE
          place += 1

  return chain(steps())


def ddrm_law(S, times, eta=0.85, eta_b=1.0):
  k = np.sqrt(variance(times[0])) / alpha(times[0])

  def steps():
    for t, s in itertools.pairwise(times):
      F, _ = estimate(S, t)
      E = (EYE - alpha(t) * F) / np.sqrt(variance(t))
      k, keep = np.sqrt(variance(s)) / alpha(s), np.sqrt(1 - eta**2)
      K, b = F + keep * k * E, np.zeros(2)
      Q = (eta * k) ** 2 * EYE
      if k >= NOISE:
        K[0], b[0] = (1 - eta_b) * F[0], eta_b * Y
        Q[0, 0] = k**2 - (eta_b * NOISE) ** 2
      else:
        share = keep * k / NOISE
        K[0], b[0] = (1 - share) * F[0], share * Y
      yield alpha(s) * K, alpha(s) * b, alpha(s) ** 2 * Q

  start = np.diag([1 - (NOISE / k) ** 2, 1])
  return chain(steps(), np.array([Y / k, 0]), start)


def daps_law(S, ks, mean_of, cov_of):
  """In x / alpha; mean_of, cov_of: (S, k) -> F, C of x0 given x."""
  mean, cov = np.zeros(2), ks[0] ** 2 * EYE
  for i, k in enumerate(ks):
    F, C = mean_of(S, k), cov_of(S, k)
    P = np.linalg.inv(np.linalg.inv(C) + A.T @ A / NOISE**2)
    G = P @ np.linalg.inv(C) @ F
    mean = G @ mean + P @ A[0] * Y / NOISE**2
    cov = G @ cov @ G.T + P
    if i + 1 < len(ks):
      cov = cov + ks[i + 1] ** 2 * EYE
  return mean, cov


def posterior(S):
  gain = S @ A.T / (A @ S @ A.T + NOISE**2)
  return gain[:, 0] * Y, S - gain @ A @ S


def root_of(S):
  values, vectors = np.linalg.eigh(S)
  return vectors * np.sqrt(values) @ vectors.T


def close(found, expected, atol=1e-9):
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=atol)


# The laws as numbers: (mean, covariance).
KNOWN = {
  ('covariance', 0.0, 'correlated'): (
    [0.9893993687633994, 0.8884768267820636],
    [
      [0.009572256013859606, 0.008864090093597152],
      [0.008864090093597165, 0.19670304687868978],
    ],
  ),
  ('covariance', 0.0, 'eye'): (
    [0.9894837261979694, 0.0],
    [[0.009568871725558628, 0.0], [0.0, 0.9962521062682106]],
  ),
  ('covariance', 1.0, 'correlated'): (
    [0.9900982937833213, 0.8910816312470499],
    [
      [0.009190174136299878, 0.008783289605072723],
      [0.008783289605072716, 0.19461517691006047],
    ],
  ),
  ('covariance', 1.0, 'eye'): (
    [0.9900986142543832, 0.0],
    [[0.00918049223768779, 0.0], [0.0, 0.9910673763528228]],
  ),
  ('pigdm', 0.0, 'correlated'): (
    [0.9658026006325583, 0.8339510750402996],
    [
      [0.017706939260333142, 0.027403939917906014],
      [0.027403939917905996, 0.24059556750387173],
    ],
  ),
  ('pigdm', 0.0, 'eye'): (
    [0.9894837261979695, 0.0],
    [[0.009568871725558656, 0.0], [0.0, 0.9962521062682106]],
  ),
  ('pigdm', 1.0, 'correlated'): (
    [0.9807121370290226, 0.843257800508776],
    [
      [0.010588557466428302, 0.014350124890649902],
      [0.014350124890649896, 0.2209178879298348],
    ],
  ),
  ('pigdm', 1.0, 'eye'): (
    [0.9900986142543833, 0.0],
    [[0.009180492237687833, 0.0], [0.0, 0.9910673763528228]],
  ),
  'replacement': (
    [1.0, 0.6256140611171593],
    [[0.0, 0.0], [0.0, 0.3077974125581102]],
  ),
  ('repaint', (250, 10, 1)): (
    [0.9997684386230203, 0.6220509102569383],
    [
      [9.997215822826844e-05, 0.0001422143285006668],
      [0.0001422143285006668, 0.30025833713000977],
    ],
  ),
  ('repaint', (250, 10, 2)): (
    [0.9998340166003482, 0.760552327017253],
    [
      [9.99562405589752e-05, 0.00010859603409038328],
      [0.00010859603409038327, 0.22925612579896948],
    ],
  ),
  ('repaint', (250, 10, 5)): (
    [0.999876537939789, 0.8503578683756178],
    [
      [9.994729825545711e-05, 8.970978970128787e-05],
      [8.970978970128787e-05, 0.1893681678020868],
    ],
  ),
  ('repaint', (250, 10, 10)): (
    [0.9998882684812023, 0.8751329021797142],
    [
      [9.994440329086588e-05, 8.359559231832656e-05],
      [8.359559231832656e-05, 0.17645491499376112],
    ],
  ),
  ('repaint', (250, 1, 10)): (
    [0.9998899147036319, 0.8786097422423516],
    [
      [9.994245044116615e-05, 7.947115205417692e-05],
      [7.947115205417692e-05, 0.1677440513287732],
    ],
  ),
  ('ddrm', 20, 'correlated'): (
    [0.9392692198379162, 0.6037218880459432],
    [
      [0.017626213624994468, 0.028603778422046453],
      [0.028603778422046453, 0.22413710890816807],
    ],
  ),
  ('ddrm', 20, 'eye'): (
    [0.9714373225949114, 0.0],
    [[0.01778142991741543, 0.0], [0.0, 0.6342237353123704]],
  ),
  ('ddrm', 1000, 'correlated'): (
    [0.9933173990668784, 0.8770977520042204],
    [
      [0.0019252354228871443, 0.0043463331547931704],
      [0.004346333154793171, 0.15343930380764131],
    ],
  ),
  ('ddrm', 1000, 'eye'): (
    [0.9937378871281243, 0.0],
    [[0.0018609542345381072, 0.0], [0.0, 0.7555790312405103]],
  ),
}


@pytest.fixture(scope='module')
def reference():
  """The project's tables of exact laws, where they lie beside the code."""
  path = binaries.ROOT.parent / 'shared' / 'reference' / 'gauss.py'
  if not path.exists():
    pytest.skip('the reference ../shared/reference/gauss.py is not here')
  spec = importlib.util.spec_from_file_location('gauss', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


# --- guidance by the likelihood -----------------------------------------------

SPREADS = {
  'covariance': lambda S, t: estimate(S, t)[1],
  'pigdm': lambda S, t: variance(t) * EYE,
}
GUIDED = [
  (name, eta, S)
  for name in SPREADS
  for eta in (0.0, 1.0)
  for S in ('correlated', 'eye')
]
DATA = {'correlated': CORRELATED, 'eye': EYE}


@pytest.mark.parametrize(('name', 'eta', 'data'), GUIDED)
def test_guidance_has_its_law(x64, name, eta, data):
  S = DATA[data]
  found = law_of(edited(name, S, eta=eta), LINEAR, FULL)
  close(found, guided_law(S, SPREADS[name], eta))
  close(found, KNOWN[name, eta, data])


def test_guidance_agrees_with_the_reference(x64, reference):
  theirs = {'covariance': 'exact', 'pigdm': 'pgdm'}
  for name, eta, data in GUIDED:
    if data == 'correlated':
      law = reference.run(theirs[name], reference.full, eta == 0)
      close(law, KNOWN[name, eta, data], 1e-6)


@pytest.mark.parametrize(
  'kind', ['inpaint', 'upscale', 'colourise', 'deblur', 'denoise']
)
def test_the_covariance_of_the_data_makes_the_conditional_denoiser(x64, kind):
  """Guided by the exact covariance: E[x0 | xt, y], at any noise level."""
  shape = (2, 4, 3)
  options = {
    'upscale': {'factor': 2},
    'deblur': {'kernel': [[0.6, 0.1], [0.0, 0.3]]},
  }
  kind = {'name': kind, **options.get(kind, {})}
  rng = np.random.default_rng(0)
  size = int(np.prod(shape))
  root = rng.normal(size=(size, size)) / np.sqrt(size)
  S = root @ root.T
  mask = jnp.asarray(rng.normal(size=(2, *shape[:2], 1)) > 0)
  rows = {'noise': jnp.array([0.1, 0.3]), 'mask': mask}
  one = measurements.create(kind, shape)(rows)
  y = one.apply(jnp.asarray(rng.normal(size=(2, *shape))))
  x = jnp.asarray(rng.normal(size=(2, *shape)))
  eyes = jnp.eye(size).reshape(size, 1, *shape)
  seen = jax.vmap(lambda e: one.apply(jnp.repeat(e, 2, 0)))(eyes)
  seen = np.asarray(seen).reshape(size, 2, -1)
  editing = methods.create(
    'covariance', exact(S), LINEAR, one, y, iterations=3 * size
  )
  denoiser = jax.jit(editing.denoiser)
  for t in (5, 300, 800):
    found = denoiser(x, float(t)).x0
    a, v = alpha(t), variance(t)
    for b in range(2):
      matrix, level = seen[:, b].T, float(rows['noise'][b])
      # Given y, then given xt.
      inner = matrix @ S @ matrix.T + level**2 * np.eye(len(matrix))
      gain = S @ matrix.T @ np.linalg.inv(inner)
      mean, cov = gain @ y[b].ravel(), S - gain @ matrix @ S
      K = a * cov @ np.linalg.inv(a**2 * cov + v * np.eye(size))
      expected = mean + K @ (x[b].ravel() - a * mean)
      np.testing.assert_allclose(found[b].ravel(), expected, atol=1e-10)


def test_the_exact_covariance_samples_as_the_conditional_denoiser(x64):
  """To 1e-12, with DDIM and with ancestral steps."""
  mean, cov = posterior(CORRELATED)
  for eta in (0.0, 1.0):

    def steps(eta=eta):
      for t, s in itertools.pairwise(FULL):
        a, v = alpha(t), variance(t)
        F = a * cov @ np.linalg.inv(a**2 * cov + v * EYE)
        std = eta * np.sqrt(backwards(t, s)[2])
        ceps = np.sqrt(variance(s) - std**2) / np.sqrt(v)
        c0 = alpha(s) - ceps * a
        b = c0 * (mean - F @ (a * mean))
        yield c0 * F + ceps * EYE, b, std**2 * EYE

    found = law_of(edited('covariance', eta=eta), LINEAR, FULL)
    close(found, chain(steps()), 1e-12)


def test_pure_noise_is_not_guided_and_eps_belongs_to_x0(x64):
  schedule = schedules.flow(50)
  assert schedule.ends_in_noise
  x = jnp.asarray(np.random.default_rng(0).normal(size=(9, *SHAPE)))
  plain = exact(CORRELATED, schedule)
  for name in SPREADS:
    denoiser = jax.jit(edited(name, schedule=schedule).denoiser)
    for one, other in zip(denoiser(x, 49.0), plain(x, 49.0), strict=True):
      if one is not None:
        np.testing.assert_allclose(one, other, atol=1e-15)
    found = denoiser(x, 30.0)
    there = schedule.alpha(30.0, jnp.float64) * found.x0
    there += schedule.sigma(30.0, jnp.float64) * found.eps
    np.testing.assert_allclose(there, x, atol=1e-12)
    assert np.abs(found.x0 - plain(x, 30.0).x0).max() > 0.01


def test_dps_takes_the_gradient_of_each_examples_norm(x64):
  """Its step, in matrices: xs - zeta F' A' (A F x - y) / |A F x - y|."""
  rng = np.random.default_rng(0)
  x, z = rng.normal(size=(2, 9, 2))
  sampler = edited('dps', zeta=0.3).sampler
  rows, _ = sampler.init(LINEAR, np.array([400.0, 380.0]), None)
  row = {name: float(of[0]) for name, of in rows.items()}
  found, _ = sampler.step(
    exact(CORRELATED), row, jnp.asarray(x).reshape(9, *SHAPE), (),
    lambda k=0: jnp.asarray(z).reshape(9, *SHAPE),
  )  # fmt: skip
  F, _ = estimate(CORRELATED, 400)
  c0, ct, small = backwards(400, 380)
  off = x @ F.T @ A.T - Y
  expected = c0 * x @ F.T + ct * x + np.sqrt(small) * z
  expected -= 0.3 * off / np.abs(off) @ A @ F
  np.testing.assert_allclose(found.reshape(9, 2), expected, atol=1e-12)


# --- replacement, RePaint, DDRM -----------------------------------------------


def test_replacement_has_its_law(x64):
  found = law_of(edited('replacement', noise_std=0.0), LINEAR, FULL)
  close(found, replacement_law(CORRELATED))
  close(found, KNOWN['replacement'])
  # What is known is exact, and does not depend on the noise.
  assert found[0][0] == Y
  assert np.abs(found[1][0]).max() == 0


REPAINTED = [(250, 10, 1), (250, 10, 2), (250, 10, 5), (250, 10, 10)]
REPAINTED += [(250, 1, 10)]


@pytest.mark.parametrize('how', REPAINTED, ids=str)
def test_repaint_has_its_law(x64, how):
  num_steps, length, count = how
  editing = edited(
    'repaint', noise_std=0.0, jump_length=length, jump_n_sample=count
  )
  times = grid.uniform(LINEAR, num_steps)
  found = law_of(editing, LINEAR, times)
  close(found, repaint_law(CORRELATED, *how))
  close(found, KNOWN['repaint', how])


@pytest.mark.slow
def test_repaint_of_a_thousand_steps(x64):
  editing = edited('repaint', noise_std=0.0)
  found = law_of(editing, LINEAR, FULL)
  close(found, repaint_law(CORRELATED, 1000, 10, 10))


def test_replacement_and_repaint_agree_with_the_reference(x64, reference):
  close(reference.run('replace', reference.full), KNOWN['replacement'], 1e-6)
  for how in REPAINTED:
    *law, count = reference.repaint(*how)
    close(law, KNOWN['repaint', how], 1e-6)
    walked = replacement.walk(*how)
    assert len(walked) == count


def test_the_papers_walk_takes_4570_transitions():
  """Of which 2410 are evaluations (arXiv 2201.09865)."""
  walked = replacement.walk(250, 10, 10)
  assert len(walked) == 2410
  ups = sum(to - (place - 1) for place, to in walked)
  assert len(walked) + ups == 4570
  times = grid.uniform(LINEAR, 250)
  assert methods.count_evaluations('repaint', times) == 2410
  sampler = edited('repaint').sampler
  rows, _ = sampler.init(LINEAR, np.asarray(times, float), None)
  assert rows['ends'].sum() == 250
  # Steps of the grid end in order.
  assert (np.diff(rows['t'][rows['ends'] > 0]) < 0).all()


@pytest.mark.parametrize('data', DATA)
@pytest.mark.parametrize('times', [FIFTIES, FULL], ids=['20', '1000'])
def test_ddrm_has_its_law(x64, times, data):
  found = law_of(edited('ddrm', DATA[data]), LINEAR, times)
  close(found, ddrm_law(DATA[data], times))
  close(found, KNOWN['ddrm', len(times) - 1, data])


def test_ddrm_with_other_etas_has_its_law(x64):
  editing = edited('ddrm', eta=0.3, eta_b=0.6)
  found = law_of(editing, LINEAR, FIFTIES)
  close(found, ddrm_law(CORRELATED, FIFTIES, 0.3, 0.6))


def test_ddrm_agrees_with_the_reference(x64, reference):
  for data, S in DATA.items():
    for times in (FIFTIES, FULL):
      law = reference.ddrm(S, times[-2::-1])
      close(law, KNOWN['ddrm', len(times) - 1, data], 1e-6)


# --- DAPS ---------------------------------------------------------------------


def karras_levels(num_levels, high=100.0, low=0.1):
  return np.linspace(high ** (1 / 7), low ** (1 / 7), num_levels) ** 7


def times_of(ks, schedule):
  return [*schedule.host_t_of_logsnr(-2 * np.log(ks)), -1]


@pytest.mark.parametrize('num_levels', [3, 50])
def test_daps_with_the_exact_covariance_is_exact(x64, num_levels):
  """From three levels on, whatever they are."""

  def covariance(k):
    own = CORRELATED @ jnp.linalg.inv(CORRELATED + k**2 * EYE)
    cov = CORRELATED - own @ CORRELATED
    values, vectors = jnp.linalg.eigh(cov)
    root = vectors * jnp.sqrt(values)[None] @ vectors.T

    def times(matrix):
      return lambda v: (v.reshape(-1, 2) @ matrix.T).reshape(v.shape)

    return daps.Covariance(times(cov), times(root))

  ks = karras_levels(num_levels)
  editing = edited('daps', ode_steps=1, covariance=covariance)
  found = law_of(editing, LINEAR, times_of(ks, LINEAR))
  close(found, posterior(CORRELATED), 1e-6)
  law = daps_law(
    CORRELATED,
    ks,
    lambda S, k: S @ np.linalg.inv(S + k**2 * EYE),
    lambda S, k: S - S @ np.linalg.inv(S + k**2 * EYE) @ S,
  )
  close(found, law)


def euler(S, ks):
  """Euler's method along the flow through levels ks, on N(0, S)."""
  values, vectors = np.linalg.eigh(S)
  gains = np.ones(2)
  for a, b in itertools.pairwise(ks):
    gains = gains * (values + a * b) / (values + a**2)
  return vectors * gains @ vectors.T


@pytest.mark.parametrize(
  ('num_levels', 'ode_steps', 'q'), [(50, 1, 0.0), (20, 5, 0.0), (20, 5, 1.0)]
)
def test_daps_has_its_law(x64, num_levels, ode_steps, q):
  ks = karras_levels(num_levels)
  editing = edited('daps', ode_steps=ode_steps, data_std=q)
  found = law_of(editing, LINEAR, times_of(ks, LINEAR))
  last = np.sqrt(variance(0)) / alpha(0)

  def mean_of(S, k):
    between = np.linspace(k ** (1 / 7), last ** (1 / 7), ode_steps) ** 7
    return euler(S, [k, *between[1:], 0])

  def cov_of(S, k):
    return (k**2 * q**2 / (k**2 + q**2) if q else k**2) * EYE

  close(found, daps_law(CORRELATED, ks, mean_of, cov_of))


def test_daps_converges_to_the_end_of_the_flow(x64):
  """With Euler's order, 1; the schedule's first level is 1e-4."""
  schedule = schedules.edm(T, sigma_min=1e-4, sigma_max=100.0)
  ks = karras_levels(20)
  limit = daps_law(
    CORRELATED,
    ks,
    lambda S, k: root_of(S) @ np.linalg.inv(root_of(S + k**2 * EYE)),
    lambda S, k: k**2 * EYE,
  )
  errors = []
  for ode_steps in (100, 200, 400):
    editing = edited('daps', schedule=schedule, ode_steps=ode_steps)
    found = law_of(editing, schedule, times_of(ks, schedule))
    errors.append([np.abs(found[i] - limit[i]).max() for i in range(2)])
  orders = -np.diff(np.log2(errors), axis=0)
  assert max(errors[-1]) < 0.02
  np.testing.assert_allclose(orders, 1, atol=0.1)


def test_the_reference_of_daps_has_the_same_limit(x64, reference):
  for num_levels in (50, 200):
    law = daps_law(
      CORRELATED,
      karras_levels(num_levels),
      lambda S, k: root_of(S) @ np.linalg.inv(root_of(S + k**2 * EYE)),
      lambda S, k: k**2 * EYE,
    )
    close(law, reference.daps(CORRELATED, num_levels, 'gaussian'), 1e-6)
    exact_law = reference.daps(CORRELATED, num_levels, 'exact')
    close(exact_law, posterior(CORRELATED), 1e-6)


@pytest.mark.parametrize('angle', [30, 90])
def test_daps_draws_from_the_posterior_of_a_blur(x64, angle):
  """N(x0, spread I) given y, with and without singular values."""
  shape, spread, count = (4, 4, 1), 0.5, 16
  kind = {'name': 'deblur', 'kernel': kernels.motion(3, angle)}
  units = 1 + 2 * count
  one = measurements.create(kind, shape)({'noise': jnp.full(units, 0.2)})
  assert (one.spectrum is None) == (angle == 30)
  rng = np.random.default_rng(0)
  x0, y = (jnp.asarray(rng.normal(size=(1, *shape))) for _ in range(2))
  _, ns = basis(count, 2)
  ns = [jnp.asarray(n[np.r_[0, 1 + count : 1 + 3 * count]]) for n in ns]
  ns = [n.reshape(units, *shape) for n in ns]
  found = daps._given(
    one, jnp.repeat(y, units, 0), jnp.repeat(x0, units, 0), spread, 60,
    lambda k=0: ns[k],
  )  # fmt: skip
  found = np.asarray(found).reshape(units, count)
  root = found[1:] - found[0]
  eyes = jnp.eye(count).reshape(count, *shape)
  matrix = np.asarray(one.apply(eyes)).reshape(count, count).T
  precision = np.eye(count) / spread + matrix.T @ matrix / 0.2**2
  cov = np.linalg.inv(precision)
  mean = cov @ (x0.ravel() / spread + matrix.T @ y.ravel() / 0.2**2)
  np.testing.assert_allclose(found[0], mean, atol=1e-9)
  np.testing.assert_allclose(root.T @ root, cov, atol=1e-9)


# --- SDEdit and denoising -----------------------------------------------------

Q = 0.25  # the variance of the data, and the picture to start from is 1
POINT = (1, 1, 1)


STEPS = (1000, 2000, 4000)


def restyled(name, eta, values):
  """(gain, variance) of the result from x at the start.

  Args:
    name: 'sdedit' or 'denoise'.
    eta: of the steps.
    values: the times to start from, or the noise of y.

  Returns:
    [numbers of steps, values] each.
  """
  # Of each value three examples: 0, x = 1, noise = 1.
  size = 3 * len(values)
  spread = jnp.repeat(jnp.asarray(values, float), 3)
  one = measurements.diagonal({'noise': spread})
  data = {'t0': spread} if name == 'sdedit' else {}
  editing = methods.create(
    name, exact(np.array([[Q]])), LINEAR, one, jnp.ones((size, *POINT)),
    eta=eta, **data,
  )  # fmt: skip
  sampler = editing.sampler
  parts = [
    sampler.init(LINEAR, np.linspace(T - 1, -1, num_steps + 1), None)[0]
    for num_steps in STEPS
  ]
  rows = {k: jnp.concatenate([part[k] for part in parts]) for k in parts[0]}
  x, n = np.tile(np.eye(3)[1:], len(values)).reshape(2, size, *POINT)

  def one_row(row):
    moved, _ = sampler.step(
      editing.denoiser, row, jnp.asarray(x), (), lambda k=0: jnp.asarray(n)
    )
    return moved.ravel()

  found = np.asarray(jax.jit(jax.vmap(one_row))(rows))
  found = found.reshape(len(found), -1, 3)
  np.testing.assert_array_equal(found[..., 0], 0)
  gains, variances = [], []
  for part in np.split(found, np.cumsum(STEPS)[:-1]):
    gain, var = 1.0, 0.0
    for k, std in part[..., 1:].swapaxes(1, 2):
      gain, var = k * gain, k * k * var + std**2
    gains.append(gain)
    variances.append(var)
  return np.array(gains), np.array(variances)


def orders(errors):
  return -np.diff(np.log2(np.abs(errors)), axis=0)


STARTS = np.array([200, 500])


def test_sdedit_by_ancestral_steps_converges_to_its_closed_form(x64):
  """To 1% with 1000 steps, and with order 1; the mean is exact."""
  a, v = alpha(STARTS), variance(STARTS)
  k = a * Q / (a * a * Q + v)
  gain, var = restyled('sdedit', 1.0, STARTS)
  np.testing.assert_allclose(gain, np.stack([k] * 3), rtol=1e-9)
  expected = k**2 * v + Q * v / (a * a * Q + v)
  errors = (gain**2 * v + var) / expected - 1
  assert np.abs(errors[0]).max() < 0.01
  np.testing.assert_allclose(orders(errors), 1, atol=0.05)


def test_sdedit_along_the_flow_converges_to_its_closed_form(x64):
  """To 1% with 1000 steps, and with order 1; without noise of its own."""
  a, v = alpha(STARTS), variance(STARTS)
  gain, var = restyled('sdedit', 0.0, STARTS)
  np.testing.assert_array_equal(var, 0)
  errors = gain / np.sqrt(Q / (a * a * Q + v)) - 1
  assert np.abs(errors[0]).max() < 0.005  # of its square, the variance, 1%
  np.testing.assert_allclose(orders(errors), 1, atol=0.05)


def test_sdedit_starts_from_a_noised_picture_at_each_examples_time(x64):
  t0 = jnp.array([200.0, 500.5, -1.0])
  y = jnp.ones((3, *POINT))
  noises = jnp.full((3, *POINT), 2.0)
  keys = jax.random.split(jax.random.key(0), 3)
  denoiser = exact(np.array([[Q]]))
  times = grid.uniform(LINEAR, 8)

  @jax.jit
  def run(y, t0, noises, keys):
    editing = sdedit.sdedit(denoiser, LINEAR, None, y, t0=t0, eta=1.0)
    x = editing.start(noises, 999)
    return x, solve(editing.sampler, denoiser, LINEAR, times, x, keys)

  x, result = run(y, t0, noises, keys)
  level = np.sqrt(variance(200))
  np.testing.assert_allclose(x[0].ravel(), alpha(200) + 2 * level, atol=1e-12)
  # An example does not depend on the others' times.
  _, turned = run(y, t0[::-1], noises, keys[::-1])
  np.testing.assert_allclose(turned[::-1], result, atol=1e-12)
  assert float(result[2, 0, 0, 0]) == 1.0  # clean data stays as it is


LEVELS = np.array([0.1, 0.5, 2.0])


def test_a_posterior_samples_error_is_twice_that_of_the_mean(x64):
  """Whatever the noise; to 1% with 1000 steps, and with order 1."""
  share = Q / (Q + LEVELS**2)  # of the mean, from x0 + level n
  best = (1 - share) ** 2 * Q + (share * LEVELS) ** 2
  t = sdedit.level_time(LINEAR, LEVELS, jnp.float64)
  a = np.asarray(LINEAR.alpha(t, jnp.float64))
  gain, var = restyled('denoise', 1.0, LEVELS)
  error = (1 - gain * a) ** 2 * Q + (gain * a * LEVELS) ** 2 + var
  errors = error / best - 2
  assert np.abs(errors[0]).max() < 0.02
  np.testing.assert_allclose(orders(errors), 1, atol=0.1)


def test_the_posterior_mean_takes_one_evaluation(x64):
  one = measurements.diagonal({'noise': jnp.asarray([*LEVELS, 0.0])})
  calls = []

  def denoiser(x, t):
    calls.append(t)
    return exact(np.array([[Q]]))(x, t)

  y = jnp.full((4, *POINT), 0.7)
  keys = jax.random.split(jax.random.key(0), 4)
  editing = methods.create('denoise', denoiser, LINEAR, one, y)
  x = editing.start(jnp.zeros_like(y), 999)
  found = solve(editing.sampler, editing.denoiser, LINEAR, [999, -1], x, keys)
  expected = 0.7 * np.append(Q / (Q + LEVELS**2), 1.0)
  np.testing.assert_allclose(found.ravel(), expected, rtol=1e-9)
  assert len(calls) == 1


# --- through solve ------------------------------------------------------------


def test_solve_gives_a_row_several_independent_noises(x64):
  """Replacement by hand, with the noises of the keys: k-th at i + k rows."""
  times = [900, 600, 300, 0, -1]
  keys = jax.random.split(jax.random.key(3), 9)
  one, y = problem(9)
  editing = methods.create(
    'replacement', exact(CORRELATED), LINEAR, one, y, eta=1.0
  )
  x = noise.normal(keys, SHAPE, jnp.float64)
  found = solve(editing.sampler, editing.denoiser, LINEAR, times, x, keys)
  x = np.asarray(x).reshape(9, 2)
  for i, (t, s) in enumerate(itertools.pairwise(times)):
    z, n = (
      np.asarray(noise.draw(keys, label, SHAPE, jnp.float64)).reshape(9, 2)
      for label in (i, i + len(times) - 1)
    )
    c0, ct, small = backwards(t, s)
    x = c0 * x @ estimate(CORRELATED, t)[0].T + ct * x + np.sqrt(small) * z
    # y by its share of the precisions.
    share = variance(s) / (variance(s) + (alpha(s) * NOISE) ** 2)
    x[:, 0] += share * (alpha(s) * Y - x[:, 0])
    x[:, 0] += np.sqrt(variance(s) * share) * n[:, 0]
  np.testing.assert_allclose(found.reshape(9, 2), x, atol=1e-12)


@pytest.mark.parametrize('level', [0.0, 0.2, 1.0, 3.0])
def test_what_is_put_back_has_the_noise_of_its_level(level):
  """For any noise of y, of which the noise of x knows nothing."""
  rng = np.random.default_rng(0)
  count, x0, a, sigma = 200_000, 0.3, 0.8, 0.6
  rows = {'noise': jnp.full(1, a and sigma / a * level)}
  one = measurements.diagonal(rows)
  x, y, n = rng.normal(size=(3, 1, count, 1, 1))
  y = x0 + sigma / a * level * y
  put = replacement._putting(one, jnp.asarray(y))
  found = put(jnp.asarray(a * x0 + sigma * x), a, sigma, jnp.asarray(n))
  assert abs(found.mean() - a * x0) < 0.01
  assert abs(found.std() / sigma - 1) < 0.01


KINDS = {
  'inpaint': {'name': 'inpaint'},
  'upscale': {'name': 'upscale', 'factor': 2},
  'colourise': {'name': 'colourise'},
}


@pytest.mark.parametrize('name', ['replacement', 'ddrm'])
@pytest.mark.parametrize('kind', KINDS)
def test_without_noise_the_result_has_the_given_measurement(x64, kind, name):
  shape = (2, 4, 3)
  rng = np.random.default_rng(0)
  mask = jnp.asarray(rng.normal(size=(2, *shape[:2], 1)) > 0)
  rows = {'noise': jnp.zeros(2), 'mask': mask}
  one = measurements.create(KINDS[kind], shape)(rows)
  y = one.apply(jnp.asarray(rng.normal(size=(2, *shape))))
  editing = methods.create(name, exact(np.eye(24)), LINEAR, one, y)
  keys = jax.random.split(jax.random.key(0), 2)
  x = editing.start(noise.normal(keys, shape, jnp.float64), 999)
  times = grid.uniform(LINEAR, 6)
  x0 = solve(editing.sampler, editing.denoiser, LINEAR, times, x, keys)
  np.testing.assert_allclose(one.apply(x0), y, atol=1e-12)


def test_conjugate_gradients_agree_with_singular_values(x64):
  """For each example by itself, and for a residual of 0."""
  kind = {'name': 'deblur', 'kernel': kernels.gaussian(0.8, 4)}
  one = measurements.create(kind, (4, 5, 2))({'noise': jnp.array([0.1, 0.5])})
  residual = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 5, 2)))
  for given in (residual, 0 * residual, residual.at[0].set(0)):
    expected = linear.explain(one, given, 0.7, 1)
    found = linear.explain(one._replace(spectrum=None), given, 0.7, 200)
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_estimates_are_clipped_after_guidance(x64):
  """The gradient is that of the estimate as it is, and x0 is within bounds."""
  x = jnp.asarray(4 * np.random.default_rng(0).normal(size=(9, *SHAPE)))
  for name in ('covariance', 'ddrm'):
    plain = edited(name).denoiser(x, jnp.asarray(300.0))
    found = edited(name, bound=0.5).denoiser(x, jnp.asarray(300.0))
    assert np.abs(plain.x0).max() > 1
    np.testing.assert_array_equal(found.x0, jnp.clip(plain.x0, -0.5, 0.5))
    there = alpha(300) * found.x0 + np.sqrt(variance(300)) * found.eps
    np.testing.assert_allclose(there, x, atol=1e-12)


# --- the table ----------------------------------------------------------------


def test_every_method_keeps_float32_under_jit():
  kind, shape = {'name': 'denoise'}, (2, 2, 3)
  keys = jax.random.split(jax.random.key(0), 2)
  times = grid.uniform(LINEAR, 3)
  for name in methods.ABOUT:
    methods.check(name, kind if name != 'trained' else UPSCALE, shape)

    def run(keys, y, name=name):
      one = measurements.create(kind, shape)({'noise': jnp.full(2, 0.1)})
      data = {'t0': jnp.array([200.0, 999])} if name == 'sdedit' else {}
      editing = methods.create(
        name,
        lambda xt, t: gaussian.Denoised(0.5 * xt, 0.5 * xt),
        LINEAR,
        one,
        y,
        **data,
      )
      x = editing.start(noise.normal(keys, shape), times[0])
      found = solve(editing.sampler, editing.denoiser, LINEAR, times, x, keys)
      rows, _ = editing.sampler.init(LINEAR, np.asarray(times, float), x)
      assert len(rows['t']) == methods.count_evaluations(name, times)
      return found

    found = jax.eval_shape(run, keys, jnp.ones((2, *shape)))
    assert found.dtype == jnp.float32, name


MOTION = {'name': 'deblur', 'kernel': [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}
UPSCALE = {'name': 'upscale', 'factor': 2}
WRONG = [
  ('dppm', UPSCALE, {}, 'one of'),
  ('ddrm', MOTION, {}, 'singular values'),
  ('repaint', MOTION, {}, 'daps'),
  ('sdedit', UPSCALE, {}, 'size of the result'),
  ('denoise', UPSCALE, {}, 'nothing is missing'),
  ('ddrm', None, {}, 'sdedit'),
  ('ddrm', UPSCALE, {'zeta': 1}, 'no such option; it takes eta, eta_b'),
  ('ddrm', UPSCALE, {'eta': 1.5}, 'from 0 to 1'),
  ('ddrm', UPSCALE, {'eta': float('nan')}, 'from 0 to 1'),
  ('dps', UPSCALE, {'zeta': -1}, 'from 0'),
  ('dps', UPSCALE, {'zeta': float('inf')}, 'from 0'),
  ('dps', UPSCALE, {'zeta': 'much'}, 'a number'),
  ('repaint', UPSCALE, {'jump_length': 0}, 'a whole number from 1'),
  ('repaint', UPSCALE, {'jump_n_sample': 2.5}, 'a whole number'),
  ('daps', UPSCALE, {'ode_steps': True}, 'a whole number'),
]


@pytest.mark.parametrize(('name', 'kind', 'given', 'says'), WRONG)
def test_what_a_method_cannot_do_is_refused(name, kind, given, says):
  with pytest.raises(UserError, match=says) as told:
    methods.check(name, kind, (4, 4, 1), **given)
  assert '\n' not in str(told.value)


def test_the_table_names_every_method_with_its_options():
  head, *rows = methods.table()
  assert [row[0] for row in rows] == list(methods.ABOUT)
  assert {len(row) for row in rows} == {len(head)}
  for name in methods.ABOUT:
    given = methods.defaults(name)
    kind = UPSCALE if name == 'trained' else {'name': 'denoise'}
    assert methods.check(name, kind, (4, 4, 1), **given) == given
    assert set(given) <= set(methods.RANGES)
