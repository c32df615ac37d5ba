"""Steps of each sample's own length, against mathematics and a plain loop."""

import json

import binaries
import jax
import jax.numpy as jnp
import mixture
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import integrate

import diffusion_jax
from diffusion_jax import samplers
from diffusion_jax.process import gaussian, schedules
from diffusion_jax.runs import store
from diffusion_jax.samplers import levels
from diffusion_jax.samplers.adaptive import Took, solve
from diffusion_jax.system.errors import UserError

LINEAR = schedules.linear(1000)
LAM = levels.of(LINEAR, [999, 0]).lam


def alpha_sigma(lam):
  return 1 / np.sqrt(1 + np.exp([-2 * lam, 2 * lam]))


def denoise(xt, t):
  """The best, of the mixture."""
  assert t.shape == xt.shape[:1]
  alpha, sigma = LINEAR.alpha(t, xt.dtype), LINEAR.sigma(t, xt.dtype)
  x0 = jax.vmap(lambda *row: mixture.x0(*row, jnp))(xt, alpha, sigma)
  return gaussian.Denoised(x0, None)  # the other half is not asked for


def noise(count, size=16):
  return np.random.default_rng(0).normal(size=(count, size))


def jitted(denoiser=denoise, **options):
  return jax.jit(lambda x: solve(denoiser, LINEAR, x, **options))


# --- what it converges to ----------------------------------------------------


@pytest.fixture(scope='module')
def exact():
  """x0 at t = 0 after the probability flow, to 12 digits.

  In lambda, as d(x / alpha) = eps d(e^-lambda), by a Runge-Kutta method of
  order 8.
  """

  def slope(lam, y):
    alpha, sigma = alpha_sigma(lam)
    x0 = mixture.x0(alpha * y, alpha, sigma)
    return -np.exp(-lam) * (alpha * y - alpha * x0) / sigma

  start = noise(4).ravel() / alpha_sigma(LAM[0])[0]
  found = integrate.solve_ivp(
    slope, LAM, start, method='DOP853', rtol=1e-12, atol=1e-12
  )
  alpha, sigma = alpha_sigma(LAM[1])
  return mixture.x0(alpha * found.y[:, -1], alpha, sigma).reshape(4, -1)


def test_the_error_is_proportional_to_the_tolerance(x64, exact):
  """And the number of steps to one over its square root.

  A step of length h is taken where two methods, whose errors are of h^2 and
  h^3, agree to the tolerance: so h^2 goes as the tolerance. x follows the
  better, and after 1 / h steps of h^3 each is off by h^2. Slopes are by least
  squares over five tolerances, from 46 to 402 steps.
  """
  tolerances = np.array([1e-3, 3e-4, 1e-4, 3e-5, 1e-5])
  errors, steps = [], []
  for tolerance in tolerances:
    x0, took = jitted(rtol=tolerance, atol=tolerance / 5, budget=5000)(
      jnp.asarray(noise(4))
    )
    assert took.finished.all()
    errors.append(np.sqrt(np.mean((x0 - exact) ** 2)))
    steps.append(np.mean(took.accepted))
  assert abs(np.polyfit(*np.log([tolerances, errors]), 1)[0] - 1) < 0.15
  assert abs(np.polyfit(*np.log([tolerances, steps]), 1)[0] + 0.5) < 0.1


def test_it_ends_where_a_fine_grid_does(x64):
  x = jnp.asarray(noise(4))
  x0, took = jitted(rtol=1e-5, atol=1e-6, budget=5000)(x)
  plan = samplers.plan.create(
    LINEAR, sampler='dpmpp_3m', grid='logsnr', num_steps=1000
  )
  end = samplers.solve(
    plan.create(), denoise_scalar, LINEAR, plan.grid, x,
    jax.random.split(jax.random.key(0), 4),
  )  # fmt: skip
  assert took.finished.all()
  # The largest of 64 errors, whose root mean square is about the tolerance.
  np.testing.assert_allclose(x0, end, rtol=0, atol=5e-5)


def denoise_scalar(xt, t):
  return denoise(xt, jnp.broadcast_to(t, xt.shape[:1]))


# --- a plain loop ------------------------------------------------------------


def plain(x, rtol, atol, end=LAM[1]):
  """One sample, as the paper writes it, in NumPy: (seen, accepted, rejected).

  `seen`: (evaluations, x0) at each beginning of a step, and at the end.
  """

  def move(x, x0, lam, to):
    (_, sigma), (alpha, sigma_to) = alpha_sigma(lam), alpha_sigma(to)
    return sigma_to / sigma * x + alpha * (1 - np.exp(lam - to)) * x0

  lam, h, evaluations, seen, accepted, rejected = LAM[0], 0.05, 0, [], 0, 0
  while lam < end - 1e-12:
    evaluations += 1
    x0 = mixture.x0(x, *alpha_sigma(lam))
    seen.append((evaluations, x0))
    while True:
      h = min(h, end - lam)
      middle = move(x, x0, lam, lam + h / 2)
      evaluations += 1
      second = move(
        x, mixture.x0(middle, *alpha_sigma(lam + h / 2)), lam, lam + h
      )
      first = move(x, x0, lam, lam + h)
      size = np.maximum(np.abs(x), np.abs(first))
      off = (second - first) / np.maximum(atol, rtol * size)
      E = np.sqrt(np.mean(off**2))
      lam, x = (lam + h, second) if E <= 1 else (lam, x)
      h = h * min(0.9 * E**-0.5, 5)
      accepted, rejected = accepted + (E <= 1), rejected + (E > 1)
      if E <= 1:
        break
  seen.append((evaluations + 1, mixture.x0(x, *alpha_sigma(end))))
  return seen, accepted, rejected


X = noise(5) * np.array([[1], [0.3], [2], [1], [4]])  # of several difficulties


@pytest.mark.parametrize('rtol', [0.1, 0.05, 0.01])
def test_it_is_the_plain_loop_of_each_sample(x64, rtol):
  x0, took = jitted(rtol=rtol)(jnp.asarray(X))
  for i, x in enumerate(X):
    seen, accepted, rejected = plain(x, rtol, 0.0078)
    evaluations, expected = seen[-1]
    found = [int(count[i]) for count in took]
    assert found == [evaluations, accepted, rejected, True]
    # An evaluation at the start of each step, in the middle of each attempt,
    # and at the end.
    assert evaluations == 2 * accepted + rejected + 1
    np.testing.assert_allclose(x0[i], expected, atol=1e-8)
  assert len(set(took.evaluations.tolist())) > 1


@pytest.mark.parametrize(
  'budget',
  [
    *(3, 17, 25, 26),
    *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 10, 24, 40)),
  ],
)
def test_a_budget_is_held_and_what_comes_of_it(x64, budget):
  """Who is cut short gets x0 of where it last began a step."""
  calls = []

  def counted(xt, t):
    jax.debug.callback(lambda: calls.append(1))
    return denoise(xt, t)

  x0, took = jitted(counted, budget=budget)(jnp.asarray(X))
  jax.effects_barrier()
  assert len(calls) == took.evaluations.max() <= budget
  for i, x in enumerate(X):
    seen, *_ = plain(x, 0.05, 0.0078)
    assert took.finished[i] == (seen[-1][0] <= budget)
    assert took.evaluations[i] == min(seen[-1][0], budget)
    expected = [x0 for count, x0 in seen if count <= budget][-1]
    np.testing.assert_allclose(x0[i], expected, atol=1e-8)


# --- each sample by itself ---------------------------------------------------


def test_what_is_easy_takes_little():
  """A network that knows the answer, one of a Gaussian, one of two points.

  In one batch. Of the first, both methods are exact, so that steps are 0.05,
  0.25, 1.25, 6.25 long, and one of what is left of 9.7; two evaluations each,
  and one at the end.
  """

  def mixed(xt, t):
    alpha, sigma = (
      gaussian.per_example(of(t), xt) for of in (LINEAR.alpha, LINEAR.sigma)
    )
    steep = jnp.tanh(alpha * xt / sigma**2)  # data are 1 and -1
    known = jnp.full_like(xt, 0.25)
    kind = gaussian.per_example(jnp.arange(len(xt)), xt) // 3
    x0 = jnp.select([kind == 0, kind == 1], [known, alpha * xt], steep)
    return gaussian.Denoised(x0, None)

  x = jnp.asarray(noise(9), jnp.float32)
  x0, took = jitted(mixed)(x)
  assert took.finished.all()
  known, normal, steep = np.split(took.evaluations, 3)
  np.testing.assert_array_equal(known, 11)
  np.testing.assert_allclose(x0[:3], 0.25, rtol=1e-6)
  assert known.max() < normal.min()
  assert normal.max() < steep.min()
  # What is done first stays as it was, whatever the others go on to do.
  cut, fewer = jitted(mixed, budget=int(normal.max()))(x)
  np.testing.assert_array_equal(fewer.finished, np.arange(9) < 6)
  np.testing.assert_array_equal(cut[:6], x0[:6])
  for name in Took._fields:
    before, after = getattr(fewer, name), getattr(took, name)
    np.testing.assert_array_equal(before[:6], after[:6])


def assert_same(got, expected):
  """Counts are equal, numbers but for float32's rounding."""
  np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=1e-5)
  for one, other in zip(got[1], expected[1], strict=True):
    np.testing.assert_array_equal(one, other)


def pick(result, rows):
  x0, took = result
  return x0[rows], Took(*(count[rows] for count in took))


def test_a_sample_does_not_depend_on_its_batch():
  """Alone, with others, in another order."""
  x = jnp.asarray(np.concatenate([X, noise(3)]), jnp.float32)
  run = jitted()
  together = run(x)
  assert len(set(together[1].evaluations.tolist())) > 1
  for i in range(len(x)):
    assert_same(run(x[i : i + 1]), pick(together, slice(i, i + 1)))
  order = np.array([5, 0, 7, 3, 1, 6, 2, 4])
  assert_same(run(x[order]), pick(together, order))


def test_eight_devices_do_what_one_does():
  x = jnp.asarray(np.concatenate([X, noise(3)]), jnp.float32)
  run, devices = jitted(), jax.devices()[:8]
  assert len(devices) == 8  # the suite simulates them
  where = NamedSharding(
    Mesh(np.array(devices), ('data',)), PartitionSpec('data')
  )
  got = run(jax.device_put(x, where))
  assert len(got[0].sharding.device_set) == 8
  assert_same(got, run(x))


def test_it_compiles_once():
  traced = []

  def counted(xt, t):
    traced.append(1)
    return denoise(xt, t)

  run = jitted(counted)
  for scale in (1, 3):  # which take different numbers of steps
    x0, took = run(jnp.asarray(scale * X, jnp.float32))
    assert x0.dtype == jnp.float32
    assert took.evaluations.dtype == took.accepted.dtype == jnp.int32
  assert run._cache_size() == 1
  assert len(traced) == 1


def test_what_is_not_a_number_is_not_finished():
  """In one sample; the others do not notice."""

  def broken(xt, t):
    x0 = denoise(xt, t).x0
    row = gaussian.per_example(jnp.arange(len(xt)), xt)
    late = gaussian.per_example(t < 500, xt)
    return gaussian.Denoised(jnp.where((row == 1) & late, jnp.nan, x0), None)

  x = jnp.asarray(X, jnp.float32)
  good, took = jitted(budget=60)(x)
  x0, found = jitted(broken, budget=60)(x)
  np.testing.assert_array_equal(found.finished, np.arange(5) != 1)
  others = np.array([0, 2, 3, 4])
  assert_same(pick((x0, found), others), pick((good, took), others))
  assert found.evaluations[1] == 60


# --- mistakes ----------------------------------------------------------------


@pytest.mark.parametrize(
  ('options', 'said'),
  [
    ({'rtol': -0.1}, 'rtol=-0.1: at least 0'),
    ({'rtol': float('nan')}, 'rtol=nan'),
    ({'atol': 0.0}, 'atol=0.0: above 0'),
    ({'atol': -1.0}, 'atol=-1.0'),
    ({'rtol': 0.0, 'atol': 0.0}, 'atol=0.0'),
    ({'rtol': 1e-9, 'atol': 1e-8}, 'one of them must be at least 1e-06'),
    ({'budget': 2}, 'budget=2: a whole number of evaluations, at least 3'),
    ({'budget': 9.5}, 'budget=9.5'),
  ],
)
def test_bad_options_are_one_line(options, said):
  for call in (
    lambda: samplers.create('adaptive', **options),
    lambda: solve(denoise, LINEAR, jnp.zeros((1, 1)), **options),
  ):
    with pytest.raises(UserError) as error:
      call()
    assert said in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'given', [{'num_steps': 10}, {'grid': 'logsnr'}, {'grid': '999,5'}]
)
def test_a_plan_takes_no_steps(given):
  with pytest.raises(UserError, match='sampler=adaptive chooses its own steps'):
    samplers.plan.create(LINEAR, sampler='adaptive', **given)


def test_a_plan_knows_what_it_costs_at_most():
  plan = samplers.plan.create(LINEAR, sampler='adaptive', rtol=0.01, budget=90)
  assert plan.adaptive
  assert plan.evaluations == 90
  assert plan.cost() == 'at most 90 evaluations'
  assert plan.grid == [999, 0, -1]
  assert plan.protocol() == {
    'sampler': 'adaptive', 'rtol': 0.01, 'atol': 0.0078, 'budget': 90,
    'clip': True, 'seed': 0,
  }  # fmt: skip
  assert not samplers.plan.create(LINEAR, sampler='ddim').adaptive


# --- a run -------------------------------------------------------------------

HOW = ('--sampler=adaptive', '--rtol=0.3', '--atol=0.05', '--json')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return tiny.trained(tmp_path_factory.mktemp('runs') / 'digits')


def sample(run, *arguments, devices=1):
  result = binaries.run(
    'sample', f'--workdir={run}', *HOW, *arguments, devices=devices
  )
  assert result.code == 0, result.err
  return json.loads(result.out)


@pytest.mark.slow
def test_samples_and_what_they_took(run):
  """By the library, by the binary, in two jobs, on eight devices."""
  trained = diffusion_jax.load(run)
  plan = trained.plan(sampler='adaptive', rtol=0.3, atol=0.05)
  images, took = trained.drawer(plan, took=True)(np.arange(7))
  images, evaluations = np.asarray(images)[:7], np.asarray(took.evaluations)[:7]
  drawn = trained.sample(
    7, batch_size=3, sampler='adaptive', rtol=0.3, atol=0.05
  )
  assert np.abs(drawn.astype(int) - images).max() <= 1
  sample(run, '--num_samples=3', '--batch_size=2')
  told = sample(run, '--num_samples=7', '--batch_size=5', devices=8)
  output = run / 'samples' / 'step30_adaptive_rtol0.3_atol0.05_seed0'
  assert told == {
    'output': str(output), 'num_samples': 7, 'step': 30, 'drawn': 4,
    'evaluations': {
      'mean': pytest.approx(evaluations.mean()),
      'least': evaluations.min(), 'most': evaluations.max(),
    },
    'unfinished': 0,
  }  # fmt: skip
  np.testing.assert_array_equal(
    np.load(output / 'evaluations.npy'), evaluations
  )
  kept = np.load(output / 'samples.npz')['arr_0']
  assert np.abs(kept.astype(int) - images).max() <= 1
  assert json.loads((output / 'store.json').read_text())['budget'] == 200


@pytest.mark.slow
def test_what_was_taken_is_drawn_again_where_it_is_missing(run, tmp_path):
  how = (f'--output={tmp_path / "o"}', '--num_samples=5', '--batch_size=2')
  whole = sample(run, *how)
  assert whole['drawn'] == 5
  *_, path = next(iter(store.parts(tmp_path / 'o' / 'took')))
  path.unlink()
  again = sample(run, *how)
  assert again == {**whole, 'drawn': 2}


@pytest.mark.slow
def test_a_budget_that_cuts_is_told(run, tmp_path):
  result = binaries.run(
    'sample', f'--workdir={run}', '--sampler=adaptive', '--budget=4',
    '--num_samples=3', f'--output={tmp_path / "o"}',
  )  # fmt: skip
  assert result.code == 0, result.err
  assert 'the budget cut 3 short' in result.out
  assert 'at most 4 evaluations each' in result.err
  np.testing.assert_array_equal(np.load(tmp_path / 'o' / 'evaluations.npy'), 4)


@pytest.mark.parametrize(
  ('flag', 'said'),
  [
    ('--num_steps=20', 'leave num_steps and grid out'),
    ('--grid=logsnr', 'leave num_steps and grid out'),
    ('--trajectory=2', 'leave --trajectory out'),
    ('--eta=0.5', 'adaptive has no such option'),
    ('--budget=2', 'budget=2'),
  ],
)
def test_what_it_does_not_take_is_one_line(run, flag, said):
  before = sorted(map(str, run.rglob('*')))
  result = binaries.run('sample', f'--workdir={run}', *HOW, flag)
  assert said in result.message
  assert sorted(map(str, run.rglob('*'))) == before
