"""Noise schedules: closed forms, diffusers' tables, files, pure noise."""

import json

import jax
import jax.numpy as jnp
import mixture
import numpy as np
import pytest

from diffusion_jax import runs, samplers
from diffusion_jax.configs import default
from diffusion_jax.process import flow, gaussian, likelihood, schedules
from diffusion_jax.samplers import grid, plan
from diffusion_jax.samplers.adaptive import solve as adaptive_solve
from diffusion_jax.samplers.inversion import ddim_inversion
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import settings

T = 1000
# alpha_bar at AT, of DDPMScheduler of diffusers 0.42.1, in float32.
AT = [0, 250, 500, 750, 999]
SD = {'beta_start': 0.00085, 'beta_end': 0.012}
THEIRS = {
  'scaled_linear': (
    SD, {'beta_schedule': 'scaled_linear', **SD},
    [0.99914998, 0.67379230, 0.27633247, 0.05616980, 0.00466009508],
  ),
  'cosine': (
    {}, {'beta_schedule': 'squaredcos_cap_v2'},
    [0.99995869, 0.84588802, 0.49228504, 0.14317866, 2.428734990e-09],
  ),
  'sigmoid': (
    {}, {'beta_schedule': 'sigmoid', 'beta_start': 1e-4, 'beta_end': 0.02},
    [0.99985081, 0.90279901, 0.29888758, 0.00562291965, 3.968182136e-05],
  ),
  'zero_snr': (
    {'schedule': 'scaled_linear', 'zero_snr': True, **SD},
    {'beta_schedule': 'scaled_linear', 'rescale_betas_zero_snr': True, **SD},
    [0.99914998, 0.65245676, 0.24101864, 0.03279908, 0.0],
  ),
}  # fmt: skip


def ours(name) -> schedules.Schedule:
  options = {'schedule': name, 'num_timesteps': T} | THEIRS[name][0]
  return schedules.create(**options)


@pytest.mark.parametrize('name', THEIRS)
def test_tables_are_those_of_diffusers(name):
  alpha_bar = np.exp(ours(name).log_alpha_bar)
  np.testing.assert_allclose(alpha_bar[AT], THEIRS[name][2], rtol=2e-4)
  np.testing.assert_allclose(alpha_bar[AT][:4], THEIRS[name][2][:4], rtol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize('name', THEIRS)
def test_tables_are_those_of_diffusers_live(name):
  import diffusers

  _, settings, golden = THEIRS[name]
  theirs = diffusers.DDPMScheduler(**settings).alphas_cumprod.numpy()
  alpha_bar = np.exp(ours(name).log_alpha_bar)
  np.testing.assert_allclose(theirs, alpha_bar, rtol=2e-4, atol=1e-7)
  np.testing.assert_allclose(theirs[AT], golden, rtol=1e-5)


def test_levels_of_edm_and_of_flow():
  """EDM's eq. 5 with rho = 7, and u / (1 - u), at all times."""
  log_alpha_bar, variance = schedules.edm(18).host(np.arange(18))
  level = np.sqrt(variance) / np.exp(0.5 * log_alpha_bar)
  roots = np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 18)
  np.testing.assert_allclose(level, roots**7, rtol=1e-11)
  log_alpha_bar, variance = schedules.flow(4).host([0, 1, 2, 3])
  level = np.sqrt(variance[:3]) / np.exp(0.5 * log_alpha_bar[:3])
  np.testing.assert_allclose(level, [1 / 3, 1, 3], rtol=1e-12)
  assert log_alpha_bar[3] == -np.inf


@pytest.mark.parametrize('name', ['linear', 'cosine', 'flow'])
def test_a_shift_multiplies_the_levels(name):
  """simple diffusion's form, and the time shift of flows."""
  plain = schedules.create(name, num_timesteps=100)
  moved = schedules.create(name, num_timesteps=100, shift=3.0)
  there, here = (
    np.log(s.host(np.arange(99))[1]) - s.host(np.arange(99))[0]
    for s in (plain, moved)
  )
  np.testing.assert_allclose(here - there, 2 * np.log(3.0), rtol=1e-10)
  if name == 'flow':
    u = np.arange(1, 101) / 100
    u = 3 * u / (1 + 2 * u)
    np.testing.assert_allclose(
      np.exp(0.5 * moved.log_alpha_bar), (1 - u) / np.hypot(1 - u, u),
      atol=1e-14,
    )  # fmt: skip


def test_zero_snr_keeps_the_first_and_loses_the_last():
  plain = schedules.linear(T)
  moved = schedules.with_zero_snr(plain)
  np.testing.assert_allclose(moved.betas[0], plain.betas[0], rtol=1e-9)
  assert moved.betas[-1] == 1
  assert moved.ends_in_noise
  assert not plain.ends_in_noise
  assert moved.last == T - 2


@pytest.mark.parametrize('name', ['flow', 'zero_snr'])
def test_times_of_a_schedule_that_ends_in_noise(name, x64):
  """All functions agree, and the inverse is exact, up to the last step."""
  schedule = schedules.flow(T) if name == 'flow' else ours(name)
  t = jnp.concatenate([jnp.linspace(-1.0, 999.0, 4001), jnp.array([998.999])])
  host, variance = schedule.host(np.asarray(t))
  np.testing.assert_allclose(
    schedule.log_alpha_bar_at(t, t.dtype), host, rtol=1e-9
  )
  assert jnp.isneginf(schedule.log_alpha_bar_at(jnp.array(999)))
  assert schedule.alpha(999, t.dtype) == 0
  assert schedule.sigma(999.0, t.dtype) == 1
  assert (np.diff(host[:-1]) < 0).all()
  logsnr = schedule.logsnr(t, t.dtype)
  np.testing.assert_allclose(
    schedule.t_of_logsnr(logsnr, t.dtype), t, atol=1e-8
  )
  np.testing.assert_allclose(
    schedule.host_t_of_logsnr(np.asarray(logsnr)), t, atol=1e-8
  )
  assert variance[4000] == 1


# --- from pure noise ---------------------------------------------------------


def exact(schedule):
  """The exact denoiser of the mixture, which is finite at pure noise."""

  def denoise(xt, t):
    alpha, sigma = gaussian.alpha_sigma(schedule, t, xt, jnp.inf)
    levels = [jnp.broadcast_to(x.reshape(-1), len(xt)) for x in (alpha, sigma)]
    x0 = jax.vmap(lambda x, a, s: mixture.x0(x, a, s, jnp))(xt, *levels)
    return gaussian.Denoised(x0, (xt - alpha * x0) / sigma)

  return denoise


FINE = {'rtol': 1e-4, 'atol': 1e-4, 'budget': 2000}
NAMES = [n for n in samplers.SAMPLERS if n not in samplers.CALIBRATED]


@pytest.mark.parametrize('name', NAMES)
def test_samplers_start_from_pure_noise(name, x64):
  """Deterministic ones converge to the flow from the last finite level.

  There the level is 999, so that the mixture's mean is all of x0.
  """
  schedule = schedules.flow(T)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(512, 2)))
  keys = jax.random.split(jax.random.key(0), 512)
  times = grid.create('karras', schedule, 60)
  assert times[:2] == [999, 998]
  found = samplers.solve(
    samplers.create(name, **(FINE if name == 'adaptive' else {})),
    exact(schedule), schedule, times, x, keys,
  )  # fmt: skip
  assert jnp.isfinite(found).all()
  if name == 'predictor_corrector':
    return  # its Langevin steps are long in two dimensions
  if samplers.ABOUT[name].noise == 'yes':
    mean = mixture.WEIGHTS @ mixture.MEANS
    std = np.sqrt(
      mixture.WEIGHTS @ (mixture.MEANS**2 + mixture.VARIANCES) - mean**2
    )
    assert abs(found.mean() - mean) < 0.1
    assert abs(found.std() / std - 1) < 0.1
  else:
    start = gaussian.alpha_sigma(schedule, 998, x)[1] * x
    start = start + (mixture.WEIGHTS @ mixture.MEANS) * 1e-3
    fine = samplers.solve(
      samplers.create('heun'), exact(schedule), schedule,
      grid.create('karras', schedule, 400)[1:], start, keys,
    )  # fmt: skip
    order = samplers.ABOUT[name].order
    assert jnp.abs(found - fine).max() < (0.2 if order == '1' else 0.05)


def test_the_first_step_is_counted_once_and_kept(x64):
  schedule = schedules.flow(T)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
  keys = jax.random.split(jax.random.key(0), 4)
  made = plan.create(schedule, sampler='heun', num_steps=4)
  assert made.grid == [999, 666, 333, 0, -1]
  assert made.evaluations == 1 + 2 + 2 + 1
  calls = []

  def denoiser(xt, t):
    jax.debug.callback(lambda t: calls.append(float(t)), t)
    return exact(schedule)(xt, t)

  sampler = samplers.create('heun')
  end, kept = samplers.solve(
    sampler, denoiser, schedule, made.grid, x, keys, (0, 1, 3, 4)
  )
  jax.effects_barrier()
  assert len(calls) == made.evaluations
  np.testing.assert_array_equal(kept[0], x)
  np.testing.assert_array_equal(kept[-1], end)
  first = samplers.solve(
    samplers.ddim(), exact(schedule), schedule, made.grid[:2], x, keys
  )
  np.testing.assert_allclose(kept[1], first, rtol=1e-12)
  only = samplers.solve(
    sampler, exact(schedule), schedule, [999, -1], x, keys, (1,)
  )
  np.testing.assert_allclose(only[1][0], exact(schedule)(x, 999).x0)


def test_adaptive_counts_its_first_step(x64):
  schedule = schedules.flow(T)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
  _, took = adaptive_solve(exact(schedule), schedule, x, rtol=1e-3)
  assert took.finished.all()
  np.testing.assert_array_equal(
    took.evaluations, 2 + 2 * took.accepted + took.rejected
  )


def test_inversion_to_pure_noise_goes_back(x64):
  schedule = schedules.flow(T)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2)))
  keys = jax.random.split(jax.random.key(0), 8)
  times = [999, 900, 700, 400, 100, 0]
  solve = samplers.solve
  down = solve(samplers.ddim(), exact(schedule), schedule, times, x, keys)
  up = solve(
    ddim_inversion(60), exact(schedule), schedule, times[::-1], down, keys
  )
  np.testing.assert_allclose(up, x, atol=1e-6)
  with pytest.raises(UserError, match='cannot be inverted'):
    solve(ddim_inversion(1), exact(schedule), schedule, [-1, 999], x, keys)


def test_the_likelihood_of_a_flow_stops_before_pure_noise(x64):
  """N(0, s^2) has the density of alpha x0 + sigma eps at t = 0."""
  schedule, s = schedules.flow(T), 0.5

  def denoise(xt, t):
    alpha, sigma = gaussian.alpha_sigma(schedule, t, xt, jnp.inf)
    x0 = alpha * s**2 / (alpha**2 * s**2 + sigma**2) * xt
    return gaussian.Denoised(x0, (xt - alpha * x0) / sigma)

  log_alpha_bar, sigma2 = schedule.host(0)
  variance = np.exp(log_alpha_bar) * s**2 + sigma2
  x = np.sqrt(variance) * np.linspace(-2, 2, 5)[:, None]
  found = flow.density(
    denoise, schedule, jnp.asarray(x), jax.random.split(jax.random.key(0), 5),
    divergence='exact',
  )  # fmt: skip
  nats = 0.5 * (x**2 / variance + np.log(2 * np.pi * variance))
  np.testing.assert_allclose(found.bits, nats[:, 0] / np.log(2), atol=1e-4)


def test_the_bound_of_a_flow_is_finite_and_its_prior_is_0(x64):
  """At pure noise q(xt | x0) is N(0, I)."""
  schedule = schedules.flow(20)
  steps = likelihood.prepare(schedule, [*range(19, -2, -1)], 'fixedlarge')
  x0 = jnp.full((2, 3), 0.4)
  keys = jax.random.split(jax.random.key(0), 2)
  found = likelihood.terms(exact(schedule), steps, x0, keys, discrete=False)
  assert jnp.isfinite(found.bits).all()
  np.testing.assert_array_equal(likelihood.prior(schedule, x0), 0)


# --- files -------------------------------------------------------------------


@pytest.mark.parametrize('suffix', ['.npy', '.txt', '.json'])
@pytest.mark.parametrize('kind', ['betas', 'alpha_bar'])
def test_a_schedule_from_a_file(tmp_path, suffix, kind):
  plain = schedules.linear(10)
  values = plain.betas if kind == 'betas' else np.exp(plain.log_alpha_bar)
  path = tmp_path / f'table{suffix}'
  if suffix == '.npy':
    np.save(path, values)
  elif suffix == '.txt':
    np.savetxt(path, values)
  else:
    path.write_text(json.dumps(values.tolist()))
  made = schedules.create(kind, num_timesteps=10, path=str(path))
  np.testing.assert_allclose(made.log_alpha_bar, plain.log_alpha_bar, rtol=1e-9)


@pytest.mark.parametrize(
  ('text', 'must'),
  [
    ('0.9 0.8 0.85', 'number 3 is 0.85 after 0.8'),
    ('1.0 0.8 0.5', 'number 1 is 1'),
    ('0.9 0.8 -0.1', 'number 3 is -0.1'),
    ('0.9 0.8', 'set it to 2'),
    ('a b c', 'not a list of numbers'),
  ],
)
def test_a_broken_file_is_one_line(tmp_path, text, must):
  path = tmp_path / 'table.txt'
  path.write_text(text)
  with pytest.raises(UserError, match='process') as error:
    schedules.create('alpha_bar', num_timesteps=3, path=str(path))
  assert must in str(error.value)
  assert '\n' not in str(error.value)


def test_a_run_keeps_the_hash_of_its_file(tmp_path):
  """A moved file is the same schedule, another content is another run."""
  config = default.get_config()
  config.process.schedule, config.process.num_timesteps = 'betas', 2
  path = tmp_path / 'table.txt'
  path.write_text('0.1 0.2')
  config.process.path = str(path)
  before = runs.to_plain(config)
  assert len(before['process']['sha256']) == 64
  moved = tmp_path / 'moved.txt'
  path.rename(moved)
  config.process.path = str(moved)
  assert runs.fixed(before, runs.to_plain(config)) == []
  moved.write_text('0.1 0.3')
  (line,) = runs.fixed(before, runs.to_plain(config))
  assert line.startswith('process.sha256')


def test_a_file_that_changed_or_is_absent_is_one_line(tmp_path):
  path = tmp_path / 'table.txt'
  path.write_text('0.1 0.2')
  with pytest.raises(UserError, match='has changed'):
    schedules.create('betas', num_timesteps=2, path=str(path), sha256='0' * 64)
  with pytest.raises(UserError, match='cannot be read'):
    schedules.create('betas', num_timesteps=2, path=str(tmp_path / 'no.txt'))
  with pytest.raises(UserError, match='is empty'):
    schedules.create('betas', num_timesteps=2)
  path.write_text('0.1 1.2')
  with pytest.raises(UserError, match='between 0 and 1'):
    schedules.create('betas', num_timesteps=2, path=str(path))


@pytest.mark.parametrize(
  'process',
  [
    {'schedule': 'scaled_linear', **SD}, {'schedule': 'cosine'},
    {'schedule': 'sigmoid'}, {'schedule': 'linear', 'zero_snr': True},
  ],
)  # fmt: skip
def test_settings_of_a_scheduler_go_round(process):
  process = {
    'num_timesteps': T, 'beta_start': 1e-4, 'beta_end': 0.02, 'shift': 1.0,
    'zero_snr': False, **process,
  }  # fmt: skip
  config = {
    'process': process, 'loss': {'prediction': 'v', 'variance': 'fixed'},
    'sample': {'variance': 'fixedsmall', 'clip': True},
  }  # fmt: skip
  found = settings.process_of(settings.scheduler_of(config), 'it')
  assert found['process'] == process
  assert found['loss'].items() <= config['loss'].items()
  for changes in (
    {'process': {**process, 'schedule': 'flow'}},
    {'process': {**process, 'shift': 2.0}},
    {'loss': {'prediction': 'edm', 'variance': 'fixed'}},
  ):
    with pytest.raises(UserError, match='cannot be written') as error:
      settings.scheduler_of({**config, **changes})
    assert '\n' not in str(error.value)
