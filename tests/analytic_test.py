"""The optimal variance and the optimal grids: closed forms, and by command."""

import itertools
import json
import re
import types

import binaries
import jax
import jax.numpy as jnp
import mixture
import numpy as np
import pytest
import tiny

from diffusion_jax import data, load, samplers
from diffusion_jax.evaluation import calibration as passes
from diffusion_jax.evaluation import features
from diffusion_jax.evaluation.batches import Batches
from diffusion_jax.process import gaussian, likelihood, schedules
from diffusion_jax.runs import calibration
from diffusion_jax.runs.calibration import Calibration
from diffusion_jax.samplers import grid
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

T = 1000
FEW = 20  # of the run
LINEAR = schedules.linear(T)
SHORT = schedules.linear(12, 0.02, 0.4)


def alpha_sigma(schedule, t):
  log_alpha_bar, variance = schedule.host(np.asarray(t, np.float64))
  return np.exp(0.5 * log_alpha_bar), np.sqrt(variance)


def gaussian_variance(schedule, t, v):
  """Var(x0 | xt) for x0 ~ N(0, v): that of a Gaussian posterior."""
  alpha, sigma = alpha_sigma(schedule, t)
  return v * sigma**2 / (alpha**2 * v + sigma**2)


def gaussian_denoiser(schedule, v):
  def denoise(xt, t):
    alpha = schedule.alpha(t, xt.dtype)
    sigma = schedule.sigma(t, xt.dtype)
    x0 = alpha * v / (alpha**2 * v + sigma**2) * xt
    return gaussian.Denoised(x0, (xt - alpha * x0) / sigma)

  return denoise


def mixture_variance(alpha, sigma):
  """E Var(x0 | xt) = E x0^2 - E E[x0 | xt]^2, by the trapezoidal rule."""
  at = np.linspace(-12, 12, 200_001)
  spread = alpha**2 * mixture.VARIANCES + sigma**2
  density = (
    mixture.WEIGHTS
    * np.exp(-((at[:, None] - alpha * mixture.MEANS) ** 2) / (2 * spread))
    / np.sqrt(2 * np.pi * spread)
  ).sum(-1)
  square = mixture.x0(at, alpha, sigma) ** 2
  second = mixture.WEIGHTS @ (mixture.VARIANCES + mixture.MEANS**2)
  return second - np.trapezoid(density * square, at)


# --- the samplers ------------------------------------------------------------

TIMES = (999, 700, 400.5, 200, 60, 9, 0)


@pytest.mark.parametrize('name', samplers.CALIBRATED)
@pytest.mark.parametrize('v', [0.04, 0.5, 1.7])
def test_it_attains_the_optimal_variance(name, v):
  """Of N(0, v) the reverse step is Gaussian, and known without any sampler.

  For DDPM q(xs | xt) is a regression of xs on xt in the joint Gaussian of the
  forward process, of variance Var xs - Cov^2 / Var xt: then each step is exact,
  and x has the forward process's variance at every time. For DDIM's process
  (eq. 7 of arXiv 2010.02502 at sigma = 0) xs is alpha_s x0 + sigma_s eps with
  the eps of xt, so Cov(xs, xt) = alpha_s alpha_t v + sigma_s sigma_t.
  """
  times = np.array(TIMES)
  given = gaussian_variance(LINEAR, times[:-1], v)
  sampler = samplers.create(name, x0_variance=given, pixel_noise=np.inf)
  rows, _ = sampler.init(LINEAR, times, None)
  alpha, sigma = alpha_sigma(LINEAR, times)
  total = alpha**2 * v + sigma**2  # Var xt
  for i, (a, s) in enumerate(
    itertools.pairwise(zip(alpha, sigma, strict=True))
  ):
    if name == 'analytic_ddpm':  # xt = (a_t / a_s) xs + noise
      covariance = a[0] / s[0] * total[i + 1]
    else:
      covariance = a[0] * s[0] * v + a[1] * s[1]
    exact = total[i + 1] - covariance**2 / total[i]
    np.testing.assert_allclose(rows['std'][i] ** 2, exact, rtol=1e-6)


@pytest.mark.parametrize('name', samplers.CALIBRATED)
def test_samples_have_the_datas_variance_at_every_time(x64, name):
  """By drawing: within four standard errors, with the means by the sampler."""
  v, count = 0.5, 40_000
  given = gaussian_variance(LINEAR, np.array(TIMES[:-1]), v)
  sampler = samplers.create(name, x0_variance=given, pixel_noise=np.inf)
  alpha, sigma = alpha_sigma(LINEAR, TIMES)
  total = alpha**2 * v + sigma**2
  x = jax.random.normal(jax.random.key(1), (count, 1)) * np.sqrt(total[0])
  keys = jax.random.split(jax.random.key(2), count)
  frames = tuple(range(len(TIMES)))
  _, way = samplers.solve(
    sampler, gaussian_denoiser(LINEAR, v), LINEAR, TIMES, x, keys, frames
  )
  found = np.var(np.asarray(way)[..., 0], axis=1)
  assert np.all(np.abs(found / total - 1) < 4 * np.sqrt(2 / count)), found


def test_without_spread_they_are_ddim_and_ancestral(x64):
  """At x0_variance 0, which is a denoiser that knows."""
  x = jnp.linspace(-1, 1, 6).reshape(2, 3)
  keys = jax.random.split(jax.random.key(0), 2)
  nothing = [0.0] * (len(TIMES) - 1)
  for name, plain, options in (
    ('analytic_ddpm', 'ancestral', {'variance': 'fixedsmall'}),
    ('analytic_ddim', 'ddim', {}),
  ):
    ends = [
      samplers.solve(
        sampler, gaussian_denoiser(LINEAR, 0.5), LINEAR, TIMES, x, keys
      )
      for sampler in (
        samplers.create(name, x0_variance=nothing),
        samplers.create(plain, **options),
      )
    ]
    np.testing.assert_allclose(*ends, rtol=1e-9)


def test_the_noise_that_is_seen_is_bounded():
  """Only of the step before the last, which adds none, as published."""
  times = np.array([999.0, 500, 100, 0, -1])
  x0_variance = [0.5] * 4
  stds = {
    levels: samplers.create(
      'analytic_ddpm', x0_variance=x0_variance, pixel_noise=levels
    ).init(LINEAR, times, None)[0]['std']
    for levels in (0.5, 2.0, np.inf)
  }
  for levels, std in stds.items():
    assert std[-1] == 0
    np.testing.assert_array_equal(std[:2], stds[np.inf][:2])
    # E |std N(0, 1)| in units of a level, 2 / 255.
    if levels < np.inf:
      assert std[2] * np.sqrt(2 / np.pi) * 255 / 2 == pytest.approx(levels)
  assert stds[np.inf][2] > stds[2.0][2]


@pytest.mark.parametrize(
  ('options', 'said'),
  [
    ({}, 'sampler=analytic_ddpm needs x0_variance'),
    ({'x0_variance': [0.1, -1]}, 'x0_variance='),
    ({'x0_variance': [np.nan]}, 'x0_variance='),
    ({'x0_variance': [0.1], 'pixel_noise': -1.0}, 'pixel_noise=-1.0'),
    ({'x0_variance': [0.1], 'eta': 0.5}, 'eta=0.5'),
  ],
)
def test_bad_options_are_one_line(options, said):
  with pytest.raises(UserError, match=said):
    samplers.create('analytic_ddpm', **options)


def test_another_number_than_of_steps_is_one_line():
  sampler = samplers.create('analytic_ddim', x0_variance=[0.1, 0.1])
  with pytest.raises(UserError, match='2 numbers and the grid has 3 steps'):
    sampler.init(LINEAR, np.array([9.0, 5, 1, -1]), None)


# --- what they take of a network ---------------------------------------------


def test_the_error_of_an_exact_denoiser_is_the_posteriors_variance(x64):
  """E Var(x0 | xt) of a mixture, an integral, within 4 standard errors."""
  count = 20_000
  rng = np.random.default_rng(0)
  which = rng.choice(3, size=(count, 1), p=mixture.WEIGHTS)
  x0 = mixture.MEANS[which] + np.sqrt(mixture.VARIANCES[which]) * (
    rng.normal(size=(count, 1))
  )
  asked = np.array([0, 100, 300, 600, 999])

  def denoise(xt, t):
    alpha, sigma = LINEAR.alpha(t[0], xt.dtype), LINEAR.sigma(t[0], xt.dtype)
    x0 = mixture.x0(xt, alpha, sigma, jnp)
    return gaussian.Denoised(x0, (xt - alpha * x0) / sigma)

  found = passes.scored(
    denoise, LINEAR, jnp.asarray(x0),
    jax.random.split(jax.random.key(4), count), asked,
  )  # fmt: skip
  for i, t in enumerate(asked):
    values = np.asarray(found['mse'][i])
    error = values.std() / np.sqrt(count)
    exact = mixture_variance(*alpha_sigma(LINEAR, t))
    assert abs(values.mean() - exact) < 4 * error, t


def test_what_is_kept_is_of_the_network_that_errs(x64):
  """Of one that says x0 = 3 xt: alpha and sigma give its error, clipped or not.

  x0 - 3 xt = (1 - 3 alpha) x0 - 3 sigma eps, with x0 of N(0, v); all is kept of
  what it really errs by, also where no data could vary as much.
  """
  v, count = 0.09, 4000

  def denoise(xt, t):
    return gaussian.Denoised(3 * xt, xt)

  x0 = np.sqrt(v) * np.random.default_rng(1).normal(size=(count, 4))
  asked = np.array([0, 500, 999])
  found = passes.scored(
    denoise, LINEAR, jnp.asarray(x0),
    jax.random.split(jax.random.key(2), count), asked,
  )  # fmt: skip
  alpha, sigma = alpha_sigma(LINEAR, asked)
  exact = (1 - 3 * alpha) ** 2 * v + 9 * sigma**2
  errors = np.std(np.asarray(found['mse']), axis=1) / np.sqrt(count)
  assert np.all(np.abs(np.mean(found['mse'], axis=1) - exact) < 4 * errors)
  # At T-1 the estimate is 3 eps: clipped it is off by its own square, and v.
  rng = np.random.default_rng(0)
  clipped = np.mean(np.clip(3 * rng.normal(size=10**6), -1, 1) ** 2) + v
  np.testing.assert_allclose(
    np.mean(found['clipped_mse'][2]), clipped, rtol=0.02
  )


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return tiny.trained(
    tmp_path_factory.mktemp('runs') / 'digits',
    **{'process.num_timesteps': FEW},
  )


@pytest.mark.slow
def test_a_pass_is_the_same_in_any_batches_and_goes_on(
  run, tmp_path, monkeypatch
):
  source = data.create('digits', split='test', image_size=8, channels=1)
  images = features.images_of(source, 11)
  one = load(run, mesh=sharding.make_mesh(devices=jax.devices()[:1]))
  done = []
  whole = passes.measure(
    Batches(one, images, tmp_path / 'a', 4, done.append), 5
  )
  assert sum(done) == 11 * FEW
  # All of it is on disk, so nothing is computed again.
  with monkeypatch.context() as patch:
    patch.setattr(passes, 'scored', None)
    again = passes.measure(Batches(one, images, tmp_path / 'a', 4), 5)
  eight = passes.measure(Batches(load(run), images, tmp_path / 'b', 64), 5)
  for other, rtol in ((again, 0), (eight, 1e-4)):
    for table, expected in zip(other[:2], whole[:2], strict=True):
      np.testing.assert_allclose(table, expected, rtol=rtol, atol=1e-6)
  assert whole.weights_sha256 == one.weights_sha256
  (x,) = images.stream()
  x0 = jnp.asarray(x / np.float32(127.5) - 1)
  root = jax.random.fold_in(jax.random.key(5), 3)
  keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(np.arange(11))
  found = passes.scored(one.denoise, one.schedule, x0, keys, np.array([0, 10]))
  np.testing.assert_allclose(
    np.mean(found['mse'], axis=1), [whole.mse[0], whole.mse[10]], rtol=1e-4
  )


# --- optimal grids -----------------------------------------------------------


def bound_between(schedule, times, mse):
  """The steps' part of the bound in nats, as `likelihood` has it.

  With the optimal variance given as numbers, and the expected squared error.
  """
  times = np.array([*times, -1], float)
  c0, _, v = gaussian.posterior_coefficients(schedule, times[:-1], times[1:])
  at = mse[times[:-1].astype(int)]
  best = v + c0**2 * at
  steps = likelihood.prepare(schedule, times, np.append(best[:-1], 1e-3))
  return (steps.constant + steps.weight * at)[:-1].sum()


@pytest.mark.parametrize('num_steps', [2, 3, 5, 11, 12])
def test_the_optimal_grid_is_the_best_of_all(num_steps):
  """Of all grids of so many steps from T-1 to 0, each scored by itself."""
  rng = np.random.default_rng(num_steps)
  mse = np.sort(rng.uniform(0.01, 1, 12))
  chosen = grid.optimal(SHORT, num_steps, mse)
  assert (chosen[0], chosen[-2], chosen[-1]) == (11, 0, -1)
  assert len(chosen) == num_steps + 1
  scores = {
    times: bound_between(SHORT, times, mse)
    for inner in itertools.combinations(range(10, 0, -1), num_steps - 2)
    for times in [(11, *inner, 0)]
  }
  assert min(scores, key=scores.get) == tuple(chosen[:-1])


def test_more_steps_bound_better():
  """Of a mixture by each step more; of Gaussian data all grids are equal.

  There the reverse steps of any length are Gaussian, so nothing is lost. One
  step has nowhere to go but clean data.
  """
  levels = np.transpose(alpha_sigma(SHORT, np.arange(12)))
  mixed = np.array([mixture_variance(*level) for level in levels])
  plain = gaussian_variance(SHORT, np.arange(12), 0.3)
  gains = [
    np.diff(
      [
        bound_between(SHORT, grid.optimal(SHORT, n, mse)[:-1], mse)
        for n in range(2, 13)
      ]
    )
    for mse in (mixed, plain)
  ]
  assert np.all(gains[0] < -1e-7)
  np.testing.assert_allclose(gains[1], 0, atol=1e-12)
  assert grid.optimal(SHORT, 1, mixed) == [11, -1]
  assert grid.optimal(SHORT, 12, mixed) == list(range(11, -2, -1))


def kept():
  mse = gaussian_variance(LINEAR, np.arange(T), 0.3)
  return Calibration(mse.tolist(), (0.9 * mse).tolist(), 'sha')


def test_a_plan_is_made_of_what_was_found():
  plan = samplers.plan.create(
    LINEAR, sampler='analytic_ddpm', num_steps=10, grid='quadratic',
    calibration=kept,
  )  # fmt: skip
  expected = np.interp(plan.grid[:-1], np.arange(T), kept().clipped_mse)
  np.testing.assert_array_equal(plan.options['x0_variance'], expected)
  json.dumps(plan.protocol())  # it stands beside the samples

  def none():
    raise UserError('not yet computed')

  given = samplers.plan.create(
    LINEAR, sampler='analytic_ddpm', num_steps=1, x0_variance=[0.25],
    calibration=none,
  )  # fmt: skip
  assert given.options['x0_variance'] == [0.25]
  for clip, mse in ((True, kept().clipped_mse), (False, kept().mse)):
    plan = samplers.plan.create(
      LINEAR, sampler='ddim', num_steps=8, grid='optimal', clip=clip,
      calibration=kept,
    )  # fmt: skip
    assert plan.grid == grid.optimal(LINEAR, 8, mse)
  with pytest.raises(UserError, match='grid=optimal'):
    samplers.plan.create(LINEAR, num_steps=8, grid='optimal')


def test_what_is_kept_reads_back_or_is_told_of(tmp_path):
  place = calibration.path(tmp_path, 30, False)
  calibration.write(place, kept(), {'seed': 1})
  found = calibration.read(tmp_path, 30, False, T)
  assert found == kept()
  network = types.SimpleNamespace(
    weights_sha256='sha', workdir=tmp_path, step=30, weights=False
  )
  calibration.check(found, network)
  with pytest.raises(UserError, match=r'are not for the weights.*--ema=false'):
    calibration.check(found._replace(weights_sha256='another'), network)
  with pytest.raises(UserError, match='damaged'):
    calibration.read(tmp_path, 30, False, T - 1)
  place.write_text(place.read_text()[:-9])
  with pytest.raises(UserError, match='damaged'):
    calibration.read(tmp_path, 30, False, T)
  with pytest.raises(UserError, match=r'not yet computed.*--step=31'):
    calibration.read(tmp_path, 31, True, T)


# --- by command --------------------------------------------------------------


@pytest.mark.slow
def test_samples_of_a_run_that_is_calibrated(run):
  """Before it is, one line; after it, both samplers and the optimal grid."""
  analytic = ('--sampler=analytic_ddpm', '--num_steps=4', '--num_samples=2')
  best = (
    '--sampler=ddim',
    '--grid=optimal',
    '--num_steps=4',
    '--num_samples=2',
  )
  before = sorted(run.rglob('*'))
  for flags in (analytic, best):
    done = binaries.run('sample', f'--workdir={run}', *flags)
    assert 'are not yet computed' in done.message
    assert 'diffusion_jax.calibrate' in done.message
  assert sorted(run.rglob('*')) == before
  done = binaries.run(
    'calibrate', f'--workdir={run}', '--num_images=3', '--json'
  )
  assert done.code == 0, done.err
  told = json.loads(done.out)
  assert told['num_images'] == 3
  (kept,) = (run / 'calibration').iterdir()
  assert str(kept) == told['path']
  found = json.loads(kept.read_text())
  assert len(found['mse']) == FEW
  again = binaries.run('calibrate', f'--workdir={run}', '--num_images=3')
  assert again.code == 0, again.err
  assert 'calibrating' not in again.err  # it is there
  assert 'squared error of x0' in again.out
  for flags in (analytic, best):
    done = binaries.run('sample', f'--workdir={run}', *flags, '--json')
    assert done.code == 0, done.err
    assert len(json.loads(done.out)['grid']) == 5
  trained = load(run)
  images = trained.sample(2, sampler='analytic_ddpm', num_steps=4)
  (store,) = run.glob('samples/*analytic_ddpm4*/store.json')
  protocol = json.loads(store.read_text())
  assert len(protocol['x0_variance']) == 4
  drawn = np.load(store.parent / 'samples.npz')['arr_0']
  np.testing.assert_allclose(drawn.astype(int), images, atol=1)
  # Of another pass they are other samples, in a folder of their own.
  told = json.loads(kept.read_text())
  told['clipped_mse'] = [2 * x for x in told['clipped_mse']]
  kept.write_text(json.dumps(told))
  done = binaries.run('sample', f'--workdir={run}', *analytic)
  assert done.code == 0, done.err
  assert len(list(run.glob('samples/*analytic_ddpm4*/store.json'))) == 2
  # A damaged one is made anew.
  kept.write_text('{')
  assert 'damaged' in binaries.run('sample', f'--workdir={run}', *best).message
  anew = binaries.run('calibrate', f'--workdir={run}', '--num_images=3')
  assert anew.code == 0, anew.err
  assert json.loads(kept.read_text()) == found
  done = binaries.run(
    'evaluate', f'--workdir={run}', '--follow', '--grid=optimal'
  )
  assert 'calibrated first' in done.message


@pytest.mark.parametrize(
  ('binary', 'flags'),
  [
    ('train', ['--config=digits', '--config.sample.sampler=analytic_ddpm']),
    ('train', ['--config=digits', '--config.sample.grid=optimal']),
    ('reproduce', ['--config=digits', '--sampler=analytic_ddim']),
    ('invert', ['--grid=optimal']),
  ],
)
def test_where_no_calibration_can_be_it_is_one_line(
  run, tmp_path, binary, flags
):
  workdir = run if binary == 'invert' else tmp_path / 'new'
  ended = binaries.run(binary, f'--workdir={workdir}', *flags)
  assert re.search('calibrated|not known in advance', ended.message)
  assert not (tmp_path / 'new').exists()
