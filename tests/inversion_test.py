"""From data to noise and back, between two noises, and what x0 seems to be.

Against the exact denoisers of Gaussians and of a mixture of them, in float64;
then through the binaries, on a tiny run.
"""

import itertools
import json

import binaries
import jax
import jax.numpy as jnp
import mixture
import numpy as np
import pytest
import tiny
from PIL import Image
from solvers_test import LINEAR, SMOOTH, alpha_sigma, falling

import diffusion_jax
from diffusion_jax import data, models, samplers
from diffusion_jax.codecs import pixels
from diffusion_jax.guidance import clipping
from diffusion_jax.process import gaussian
from diffusion_jax.reporting import pictures
from diffusion_jax.runs import draw, trajectories
from diffusion_jax.samplers import grid, plan
from diffusion_jax.samplers.inversion import ddim_inversion, slerp
from diffusion_jax.system.errors import UserError

DATA = np.linspace(-2, 2, 17)[None]  # also as noise: it goes as far out


def denoise_mixture(xt, t):
  alpha, sigma = LINEAR.alpha(t, xt.dtype), LINEAR.sigma(t, xt.dtype)
  x0 = mixture.x0(xt, alpha, sigma, jnp)
  return gaussian.Denoised(x0, (xt - alpha * x0) / sigma)


def gaussian_denoiser(m, v):
  """E[x0 | xt] of data N(m, v)."""

  def denoise(xt, t):
    alpha, sigma = LINEAR.alpha(t, xt.dtype), LINEAR.sigma(t, xt.dtype)
    eps = sigma * (xt - alpha * m) / (alpha**2 * v + sigma**2)
    return gaussian.Denoised((xt - sigma * eps) / alpha, eps)

  return denoise


def solve(sampler, times, x, denoiser=denoise_mixture, schedule=LINEAR):
  keys = jax.random.split(jax.random.key(0), len(x))
  times = list(times)
  return np.asarray(
    samplers.solve(sampler, denoiser, schedule, times, jnp.asarray(x), keys)
  )


def off(got, wanted):
  """The largest error, relative to the largest |x|."""
  return np.abs(got - wanted).max() / np.abs(wanted).max()


# --- there and back ----------------------------------------------------------


@pytest.mark.parametrize(
  ('num_steps', 'iterations', 'bound'),
  [(1000, 1, 1e-2), (1000, 2, 1e-5), (50, 4, 1e-5), (20, 30, 1e-12)],
)
def test_there_and_back(x64, num_steps, iterations, bound):
  """Data to noise to data, and noise to data to noise, on the whole grid.

  One evaluation in each of 1000 steps comes back to 1e-2, two to 1e-5; of 50
  steps it takes four. Enough of them undo even long steps to rounding.
  """
  times = grid.uniform(LINEAR, num_steps)
  up, down = ddim_inversion(iterations), samplers.ddim()
  noise = solve(up, times[::-1], DATA)
  assert off(solve(down, times, noise), DATA) < bound
  assert off(solve(up, times[::-1], solve(down, times, DATA)), DATA) < bound
  # It is noise: it lies in the order of the data, wider than they do.
  assert np.all(np.diff(noise) > 0)
  assert np.abs(noise).max() > np.abs(DATA).max()


@pytest.mark.parametrize('iterations', [1, 2, 3])
def test_order_of_the_round_trip(x64, iterations):
  r"""It misses by steps^-iterations, on a grid uniform in lambda, of length h.

  A step up starts with x_s for x_t, which is off by O(h). An evaluation takes
  an error e of x_t to alpha_t (k_t - k_s) eps' e = O(h) e, as the step is O(h)
  long. So after i of them the step is undone to O(h^(i+1)), and 1 / h steps
  add up to O(h^i): order 1 for the usual inversion.
  """
  counts = np.array([48, 96, 192])
  errors = []
  for count in counts:
    times = falling(count)
    noise = solve(
      ddim_inversion(iterations), times[::-1], DATA, SMOOTH.denoise, SMOOTH
    )
    back = solve(samplers.ddim(), times, noise, SMOOTH.denoise, SMOOTH)
    errors.append(np.sqrt(np.mean((back - DATA) ** 2)))
  slope, _ = np.polyfit(np.log2(counts), np.log2(errors), 1)
  assert abs(-slope - iterations) < 0.15, (slope, errors)


@pytest.mark.parametrize('v', [0.25, 1.0, 0.0])
@pytest.mark.parametrize(('s', 't'), [(-1, 0), (-1, 99), (99, 100), (300, 999)])
def test_each_evaluation_contracts_as_derived(x64, s, t, v):
  """Of N(m, v) a step is linear: its error shrinks by one factor.

  The error before the first is that of x_s in place of x_t. Where v = 0 the
  step from clean data has the factor 1, and never ends anywhere.
  """
  m = 0.3
  (a, b), (a1, b1) = alpha_sigma(t), alpha_sigma(s)
  spread = a**2 * v + b**2
  factor = b * (b - b1 * a / a1) / spread
  denoiser = gaussian_denoiser(m, v)
  if v == 0 and s < 0:
    np.testing.assert_allclose(factor, 1, rtol=1e-12)
    return
  assert 0 < factor < 1
  # DDIM's own step from t to s, solved for x_t.
  gain = (a1 * a * v + b1 * b) / spread
  solution = a * m + (DATA - a1 * m) / gain
  for iterations in (1, 2, 3):
    got = solve(ddim_inversion(iterations), [s, t], DATA, denoiser)
    wanted = solution + factor**iterations * (DATA - solution)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-9)


def test_data_that_are_gaussian_have_a_noise_in_closed_form(x64):
  """The flow only scales: x_T = x_0 sqrt((alpha_T^2 v + sigma_T^2) / v).

  DDIM's steps, undone, do it by a product of factors, one a step, which tends
  to that root as steps grow: to first order, so twice as many halve the rest.
  """
  v = 0.25
  limit = np.sqrt(np.sum(np.square(alpha_sigma(999)) * [v, 1]) / v)
  missed = []
  for num_steps in (250, 500, 1000):
    times = grid.uniform(LINEAR, num_steps)
    product = 1.0
    for t, s in itertools.pairwise(times):
      (a, b), (a1, b1) = alpha_sigma(t), alpha_sigma(s)
      product *= (a**2 * v + b**2) / (a1 * a * v + b1 * b)
    got = solve(ddim_inversion(8), times[::-1], DATA, gaussian_denoiser(0, v))
    np.testing.assert_allclose(got, product * DATA, rtol=1e-9)
    missed.append(product / limit - 1)
  assert abs(missed[-1]) < 5e-3
  ratios = np.divide(missed[:-1], missed[1:])
  np.testing.assert_allclose(ratios, 2, atol=0.1)


@pytest.mark.parametrize('times', [(-1, 0, 500.5, 999), (-1, 999), (40, 41)])
def test_it_is_asked_at_the_later_time_alone(x64, times):
  """Never at clean data, whose noise nobody knows: there sigma is 0."""
  asked = []

  def denoise(xt, t):
    # As of a network that predicts x0: of clean data eps would be 0 / 0.
    return gaussian.from_prediction(LINEAR, 0.5 * xt, xt, t, 'x0')

  def counted(xt, t):
    jax.debug.callback(lambda t: asked.append(float(t)), t, ordered=True)
    return denoise(xt, t)

  sampler = ddim_inversion(3)
  with np.errstate(all='raise'):
    got = solve(sampler, times, DATA, counted)
  jax.effects_barrier()
  assert np.isfinite(got).all()
  assert asked == [t for t in times[1:] for _ in range(3)]
  assert sampler.evaluations(times) == len(asked)


def test_frames_on_the_way_up(x64):
  """One a step, whatever the number of evaluations in it."""
  times, keys = [-1, 9, 99, 999], jax.random.split(jax.random.key(0), 1)
  x, kept = samplers.solve(
    ddim_inversion(2), denoise_mixture, LINEAR, times, jnp.asarray(DATA), keys,
    frames=(0, 1, 2, 3),
  )  # fmt: skip
  np.testing.assert_array_equal(kept[0], DATA)
  np.testing.assert_array_equal(kept[3], x)
  for k in (1, 2):
    part = solve(ddim_inversion(2), times[: k + 1], DATA)
    np.testing.assert_allclose(kept[k], part, rtol=1e-12)


@pytest.mark.parametrize('iterations', [0, -1])
def test_no_iterations_are_refused(iterations):
  with pytest.raises(UserError, match=f'iterations={iterations}: at least 1'):
    ddim_inversion(iterations)


# --- between two noises ------------------------------------------------------


def noises(count, seed=0):
  return np.random.default_rng(seed).normal(size=(count, 4, 3, 2))


def norms(x):
  return np.sqrt(np.sum(np.square(x), (1, 2, 3)))


def test_slerp_is_the_formula_and_keeps_norms(x64):
  """Equation 67 of arXiv 2010.02502, each example with its own weight."""
  a, b = noises(5), noises(5, seed=1)
  b *= (norms(a) / norms(b))[:, None, None, None]
  weight = np.array([0.1, 0.25, 0.5, 0.8, 0.99])
  got = slerp(a, b, weight)
  for i, w in enumerate(weight):
    angle = np.arccos(np.sum(a[i] * b[i]) / norms(a)[i] / norms(b)[i])
    wanted = np.sin((1 - w) * angle) * a[i] + np.sin(w * angle) * b[i]
    np.testing.assert_allclose(got[i], wanted / np.sin(angle), rtol=1e-10)
  np.testing.assert_allclose(norms(got), norms(a), rtol=1e-12)
  # Their average is shorter, by the cosine of half the angle.
  assert np.all(norms((a + b) / 2) < 0.9 * norms(a))


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_slerp_ends_where_it_should(x64, dtype):
  a, b = noises(3).astype(dtype), 2 * noises(3, seed=1).astype(dtype)
  np.testing.assert_array_equal(slerp(a, b, np.zeros(3, dtype)), a)
  np.testing.assert_array_equal(slerp(a, b, np.ones(3, dtype)), b)


@pytest.mark.parametrize('factor', [1.0, 3.0, 1 + 1e-9, -1.0, -2.0, 0.0])
def test_slerp_of_parallel_vectors_is_a_line(x64, factor):
  """No angle, or two of them as good as each other: no 0 / 0."""
  a = noises(4)
  weight = np.array([0.0, 0.3, 0.5, 1.0])
  got = slerp(a, factor * a, weight)
  if factor:
    line = (1 + weight * (factor - 1))[:, None, None, None] * a
    np.testing.assert_allclose(got, line, rtol=0, atol=1e-12)
  assert np.isfinite(got).all()


def test_slerp_of_a_small_angle_keeps_its_digits():
  """In float32, where an arccos would find an angle of 1e-4 to be nothing."""
  angle, weight = np.float32(1e-4), np.float32(0.25)
  a = np.array([[1, 0]], np.float32)
  b = np.array([[np.cos(angle), np.sin(angle)]], np.float32)
  got = np.asarray(slerp(a, b, weight[None]))[0]
  np.testing.assert_allclose(got, [1, weight * angle], rtol=1e-6)


# --- what x0 seems to be -----------------------------------------------------

SHAPE = (2, 2, 1)
FRAMES = (0, 1, 3, 4)
TIMES = (999, 600, 300, 20, -1)


def apply(params, xt, t, keys=None, cond=None):
  """The eps of the mixture; examples have one time."""
  alpha, sigma = LINEAR.alpha(t[0]), LINEAR.sigma(t[0])
  return params * (xt - alpha * mixture.x0(xt, alpha, sigma, jnp)) / sigma


@pytest.mark.parametrize('clip', [True, False])
@pytest.mark.parametrize('name', ['ddim', 'ancestral'])
def test_estimates_are_the_denoisers_of_the_frames(name, clip):
  """The estimate at t is denoise(xt, t).x0; of clean data it is the sample."""
  how = plan.create(LINEAR, sampler=name, grid=TIMES, clip=clip, seed=3)
  draw_fn = jax.jit(
    draw.drawer(
      tiny.recipe(models.Model(None, apply), SHAPE, LINEAR), tiny.one_device(),
      how, frames=FRAMES, dtype='float32', estimates=True,
    )
  )  # fmt: skip
  indices = jnp.arange(5, dtype=jnp.uint32)
  (images, kept), _ = draw_fn({'net': jnp.float32(1)}, indices)
  assert kept.shape == (4, 5, *SHAPE)

  def network(xt, t):
    return apply(1.0, xt, t)

  denoiser = gaussian.denoiser(network, LINEAR, 'eps')
  if clip:
    denoiser = clipping.clip_x0(denoiser, LINEAR)
  first, later = draw.sample_keys(3, indices)
  x = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(first)
  x, frames = samplers.solve(
    how.create(), denoiser, LINEAR, TIMES, x, later, FRAMES
  )
  np.testing.assert_allclose(images, pixels.from_float(x), atol=1e-3)
  np.testing.assert_array_equal(kept[-1], images)
  for k, frame in enumerate(FRAMES[:-1]):
    wanted = pixels.from_float(denoiser(frames[k], TIMES[frame]).x0)
    # In float32: at t = 999 x0 = (x - sigma eps) / 0.0064, times 127.5.
    np.testing.assert_allclose(kept[k], wanted, atol=2e-2)
    assert np.abs(wanted - pixels.from_float(frames[k])).max() > 1


def test_estimates_need_no_frame_with_noise():
  recipe = tiny.recipe(models.Model(None, apply), SHAPE, LINEAR)
  draw_fn = draw.drawer(
    recipe, tiny.one_device(), plan.create(LINEAR, sampler='ddim', grid=TIMES),
    frames=(4,), dtype='float32', estimates=True,
  )  # fmt: skip
  (images, kept), is_finite = draw_fn(
    {'net': jnp.float32(1)}, jnp.arange(2, dtype=jnp.uint32)
  )
  assert is_finite
  np.testing.assert_array_equal(kept[0], images)
  assert np.isfinite(kept).all()


# --- of a run ----------------------------------------------------------------


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return tiny.trained(tmp_path_factory.mktemp('runs') / 'digits')


@pytest.fixture(scope='module')
def trained(run):
  return diffusion_jax.load(run)


@pytest.mark.parametrize(
  ('name', 'options', 'adds'),
  [
    ('ancestral', {}, True),
    ('predictor_corrector', {}, True),
    ('dpmpp_2m_sde', {}, True),
    ('ddim', {}, False),
    ('ddim', {'eta': 0.5}, True),
    ('heun', {}, False),
    ('heun', {'churn': 1.0}, True),
    ('unipc', {}, False),
  ],
)
def test_which_samplers_add_noise(name, options, adds):
  assert plan.create(LINEAR, sampler=name, **options).adds_noise == adds


@pytest.mark.parametrize('batch_size', [3, 64])
def test_what_is_carried_down_are_the_samples(trained, batch_size):
  """Over all devices, batch by batch: the noise and the images of `sample`."""
  how = trained.plan(sampler='heun', num_steps=3, seed=4)
  carry = trajectories.carrier(
    trained, how.create(), how.grid, clip=how.clip, batch_size=batch_size
  )
  got = carry(trajectories.noises(trained, 4, 10))
  assert got.dtype == np.float32
  images = trained.sample(10, sampler='heun', num_steps=3, seed=4)
  assert (
    np.abs(np.asarray(pixels.to_uint8(got)).astype(int) - images).max() <= 1
  )


def test_a_picture_of_ways_holds_what_is_drawn():
  """Rows are pairs, columns weights, and the third noise has no other."""
  seen = []

  def draw_fn(x):
    seen.append(x)
    return np.zeros(x.shape, np.uint8)

  ends = noises(3).astype(np.float32)[..., :1]
  picture = pictures.interpolation(draw_fn, ends, 2)
  (flat,) = seen
  assert flat.shape == (4, 4, 3, 1)
  np.testing.assert_array_equal(flat[0], ends[0])
  np.testing.assert_array_equal(flat[3], ends[1])
  wanted = slerp(ends[:1], ends[1:2], np.array([1 / 3], np.float32))
  np.testing.assert_allclose(flat[1:2], wanted, rtol=1e-6)
  assert picture.dtype == np.uint8


def tile(path, row, column):
  """An 8x8 image of a picture with labelled columns, in its own pixels."""
  picture = np.asarray(Image.open(path))
  top, left = 18 + 8 + 72 * row, 8 + 72 * column
  return picture[top : top + 64 : 8, left : left + 64 : 8, 0].astype(int)


@pytest.mark.slow
def test_sample_draws_estimates_and_ways(run, tmp_path):
  result = binaries.run(
    'sample', f'--workdir={run}', f'--output={tmp_path}', '--num_samples=5',
    '--sampler=ddim', '--grid=200,10', '--progressive=3', '--interpolate=2',
    '--trajectory=3',
  )  # fmt: skip
  assert result.code == 0, result.err
  images = np.load(tmp_path / 'samples.npz')['arr_0'][..., 0].astype(int)
  path = tmp_path / 'progressive.png'
  assert Image.open(path).size == (8 + 3 * 72, 18 + 8 + 3 * 72)
  for i in range(3):
    assert np.abs(tile(path, i, 2) - images[i]).max() <= 1
    # DDIM's last step gives its estimate.
    assert np.abs(tile(path, i, 1) - images[i]).max() <= 1
    # And the first is not what was there, which is noise.
    noised = tile(tmp_path / 'trajectory.png', i, 0)
    assert np.abs(tile(path, i, 0) - noised).max() > 10
  path = tmp_path / 'interpolation.png'
  assert Image.open(path).size == (8 + 4 * 72, 18 + 8 + 2 * 72)
  for pair in range(2):
    for column, image in ((0, images[2 * pair]), (3, images[2 * pair + 1])):
      assert np.abs(tile(path, pair, column) - image).max() <= 1
      for between in (1, 2):
        assert np.abs(tile(path, pair, between) - image).max() > 1


@pytest.mark.parametrize(
  ('arguments', 'must'),
  [
    (['--interpolate=2'], '--sampler=ancestral'),
    (['--interpolate=2', '--sampler=ddim', '--eta=0.5'], '--sampler=ddim'),
    (['--interpolate=2', '--sampler=ddim', '--num_samples=1'], 'num_samples=2'),
    (['--progressive=70'], 'progressive=70'),
    (['--progressive=-1'], 'at least 0'),
  ],
)
def test_mistakes_before_anything_is_drawn(run, tmp_path, arguments, must):
  output = tmp_path / 'out'
  result = binaries.run(
    'sample', f'--workdir={run}', f'--output={output}', *arguments
  )
  assert must in result.message
  assert not output.exists()


def invert(run, *arguments):
  return binaries.run(
    'invert', f'--workdir={run}', '--num_images=4', '--num_steps=5', *arguments
  )


@pytest.fixture(scope='module')
def inverted(run):
  result = invert(run, '--iterations=3', '--interpolate=1', '--json')
  assert result.code == 0, result.err
  return json.loads(result.out)


@pytest.mark.slow
def test_a_run_inverts_its_held_out_images(run, trained, inverted):
  """What is told is found again, from noises.npy and the images."""
  folder = run / 'inversions' / 'step30_ddim5_iterations3_heldout4'
  assert inverted['output'] == str(folder)
  kept = json.loads((folder / 'inversion.json').read_text())
  assert kept == {k: v for k, v in inverted.items() if k != 'output'}
  assert kept['weights_sha256'] == trained.weights_sha256
  assert kept['grid'] == [999, 749, 500, 250, 0, -1]
  assert kept['evaluations'] == {'inversion': 15, 'drawing': 5}
  assert kept['step'] == 30
  assert not kept['clip']

  _, heldout = data.splits(trained.config['data'])
  chosen = [heldout[i * len(heldout) // 4]['image'] for i in range(4)]
  x0 = np.stack(chosen) / 127.5 - 1
  keys = jax.random.split(jax.random.key(0), 4)
  up = samplers.solve(
    ddim_inversion(3), trained.denoise, trained.schedule, kept['grid'][::-1],
    jnp.float32(x0), keys,
  )  # fmt: skip
  saved = np.load(folder / 'noises.npy')
  assert saved.dtype == np.float32
  np.testing.assert_allclose(saved, up, atol=1e-3)
  again = samplers.solve(
    samplers.ddim(), trained.denoise, trained.schedule, kept['grid'],
    jnp.asarray(saved), keys,
  )  # fmt: skip
  error = np.asarray(again) - x0
  for i, told in enumerate(kept['images']):
    root, most = np.sqrt(np.mean(error[i] ** 2)), np.abs(error[i]).max()
    np.testing.assert_allclose(told['rms'], root, rtol=1e-2)
    np.testing.assert_allclose(told['max'], most, rtol=1e-2)
    np.testing.assert_allclose(told['rms_255'], told['rms'] * 127.5)
    np.testing.assert_allclose(told['max_255'], told['max'] * 127.5)
    root = np.sqrt(np.mean(saved[i] ** 2))
    np.testing.assert_allclose(told['noise_rms'], root, rtol=1e-5)
  whole = kept['error']
  np.testing.assert_allclose(
    whole['rms'], np.sqrt(np.mean(error**2)), rtol=1e-2
  )
  assert whole['max'] == max(told['max'] for told in kept['images'])

  path = folder / 'inversion.png'
  assert Image.open(path).size == (8 + 4 * 72, 18 + 8 + 4 * 72)
  drawn = np.asarray(pixels.to_uint8(again)).astype(int)
  for i in range(4):
    np.testing.assert_array_equal(tile(path, i, 0), chosen[i][..., 0])
    assert np.abs(tile(path, i, 2) - drawn[i, ..., 0]).max() <= 1
    ways = folder / 'interpolation.png'
    assert np.abs(tile(ways, i // 2, i % 2 * 2) - drawn[i, ..., 0]).max() <= 1
  assert Image.open(ways).size == (8 + 3 * 72, 18 + 8 + 2 * 72)


def test_one_evaluation_comes_back_less_well(run, inverted):
  result = invert(run, '--iterations=1')
  assert result.code == 0, result.err
  folder = run / 'inversions' / 'step30_ddim5_iterations1_heldout4'
  kept = json.loads((folder / 'inversion.json').read_text())
  assert kept['error']['rms'] > 1.2 * inverted['error']['rms']
  assert not (folder / 'interpolation.png').exists()
  # People read a row an image, and one of all.
  rows = [line.split() for line in result.out.splitlines()]
  assert rows[-1] == ['in', str(folder)]
  (whole,) = (row for row in rows if row[:1] == ['all'])
  assert float(whole[1]) == pytest.approx(kept['error']['rms'], rel=1e-2)
  assert [row[0] for row in rows if row and row[0].isdigit()][1:] == list(
    '0123'
  )


@pytest.mark.parametrize(
  ('arguments', 'must'),
  [
    (['--num_images=360'], 'at most 359'),
    (['--split=train', '--num_images=2000'], 'at most 1438'),
    (['--num_images=1', '--interpolate=1'], 'num_images=2'),
    (['--iterations=0'], 'iterations=0: at least 1'),
    (['--num_steps=0'], 'num_steps=0'),
    (['--num_steps=1001'], '1 to 1000'),
    (['--grid=5,10'], 'strictly decrease'),
    (['--output='], 'output is empty'),
  ],
)
def test_mistakes_of_inversion_are_one_line(run, arguments, must):
  before = sorted((run / 'inversions').glob('*'))
  result = binaries.run('invert', f'--workdir={run}', *arguments)
  assert must in result.message
  assert sorted((run / 'inversions').glob('*')) == before


def test_a_run_without_held_out_images(run, tmp_path):
  """It is told so; nothing is written."""
  workdir = tmp_path / 'run'
  (workdir / 'checkpoints').mkdir(parents=True)
  (workdir / 'checkpoints' / '30').symlink_to(run / 'checkpoints' / '30')
  config = json.loads((run / 'config.json').read_text())
  config['data']['heldout_split'] = ''
  (workdir / 'config.json').write_text(json.dumps(config))
  result = binaries.run('invert', f'--workdir={workdir}')
  assert '--split=train' in result.message
  assert not (workdir / 'inversions').exists()
