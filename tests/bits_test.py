"""Bits per dimension of a run's data: streamed, resumed, on any mesh."""

import dataclasses
import json

import binaries
import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from diffusion_jax import data, load
from diffusion_jax.evaluation import bits, features, kept
from diffusion_jax.evaluation.batches import Batches
from diffusion_jax.process import flow, likelihood
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

# It compares the numbers of different programs.
pytestmark = pytest.mark.optimized

GRID = [999, 750, 500, 250, 100, 0, -1]
FINE = [*range(999, -1, -45), -1]  # 23 steps


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return tiny.trained(tmp_path_factory.mktemp('runs') / 'digits')


@pytest.fixture(scope='module')
def images():
  source = data.create('digits', split='test', image_size=8, channels=1)
  return features.images_of(source, 13)


def loaded(run, devices=1):
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  return load(run, mesh=mesh)


def how(kind, **changes):
  made = bits.How(kind, 3, GRID, 'fixedlarge', True)
  return made._replace(**changes)


@pytest.mark.slow
def test_the_bound_is_the_librarys_in_any_batches(run, images, tmp_path):
  """By one call of it, and by its parts: every image, every step."""
  trained = loaded(run)
  done = []
  found = bits.measure(
    Batches(trained, images, tmp_path / 'a', 5, done.append), how('bpd')
  )
  (x,) = images.stream()
  x0 = x / np.float32(127.5) - 1
  root = jax.random.fold_in(jax.random.key(3), 2)
  keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(np.arange(13))
  denoiser = bits._denoiser(trained, trained.params, {}, True)
  steps = likelihood.prepare(trained.schedule, GRID, 'fixedlarge')
  prior = likelihood.prior(trained.schedule, x0, GRID[0])
  table = likelihood.Table(prior, *likelihood.terms(denoiser, steps, x0, keys))
  total = np.asarray(table.total)
  assert found.results['bpd'] == pytest.approx(total.mean(), rel=1e-5)
  assert found.results['bpd_error'] == pytest.approx(
    total.std(ddof=1) / 13**0.5, rel=1e-4
  )
  details = found.details
  assert details['times'] == GRID[:-1]
  np.testing.assert_allclose(
    details['bits_of_steps'], table.bits.mean(1), rtol=1e-4
  )
  parts = details['prior'] + details['between'] + details['decoder']
  assert found.results['bpd'] == pytest.approx(parts, rel=1e-5)
  rate, rmse = likelihood.rate_distortion(table)
  np.testing.assert_allclose(details['rate'], rate, rtol=1e-4)
  np.testing.assert_allclose(details['rmse'], rmse, rtol=1e-4)
  assert sum(done) == 13 * bits.work(how('bpd')) == 13 * 6
  other = bits.measure(
    Batches(loaded(run, 8), images, tmp_path / 'b', 64), how('bpd')
  )
  assert other.results == pytest.approx(found.results, rel=1e-5)


@pytest.mark.slow
def test_what_was_interrupted_goes_on(run, images, tmp_path, monkeypatch):
  """In the second stage, after the first of three batches; one is damaged."""
  trained, asked = loaded(run), how('bpd_fast', grid=FINE)
  whole = bits.measure(Batches(trained, images, tmp_path / 'whole', 5), asked)
  computed, once = [], kept.once

  def stop(path, compute_fn):
    if len(computed) == 4:
      raise KeyboardInterrupt
    computed.append(path)
    return once(path, compute_fn)

  with monkeypatch.context() as patch:
    patch.setattr(kept, 'once', stop)
    with pytest.raises(KeyboardInterrupt):
      bits.measure(Batches(trained, images, tmp_path / 'part', 5), asked)
  paths = sorted((tmp_path / 'part').rglob('*.npz'))
  assert len(paths) == 4
  paths[0].write_bytes(paths[0].read_bytes()[:-30])
  done = []
  again = bits.measure(
    Batches(trained, images, tmp_path / 'part', 5, done.append), asked
  )
  assert again == whole
  assert sum(done) == 13 * bits.work(asked)
  assert len(list((tmp_path / 'part').rglob('*.npz'))) == 6


@pytest.mark.slow
def test_the_estimate_is_of_the_bound(run, tmp_path):
  """Of 200 images, within one and a half times its interval.

  That holds for the images' spread too, of which both have the same here: a
  wide bar. The library's tests count how often an interval holds.
  """
  source = data.create('digits', split='test', image_size=8, channels=1)
  images, trained = features.images_of(source, 200), loaded(run)
  exact, fast = (
    bits.measure(
      Batches(trained, images, tmp_path / kind, 100), how(kind, grid=FINE)
    ).results
    for kind in ('bpd', 'bpd_fast')
  )
  assert fast['bpd_fast'] == pytest.approx(
    exact['bpd'], abs=1.5 * fast['bpd_fast_error']
  )
  assert fast['bpd_fast_error'] < 0.2 * exact['bpd']


@pytest.mark.slow
@pytest.mark.parametrize(
  'dtype', ['float32', pytest.param('float64', marks=pytest.mark.slow)]
)
def test_the_flow_is_the_librarys(run, images, tmp_path, dtype):
  trained = loaded(run)
  asked = how('bpd_ode', dtype=dtype, tolerance=1e-3)
  found = bits.measure(Batches(trained, images, tmp_path, 5), asked)
  (x,) = images.stream()
  with jax.enable_x64(dtype == 'float64'):
    x0 = jax.numpy.asarray(x, dtype) / 127.5 - 1
    root = jax.random.fold_in(jax.random.key(3), 2)
    keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(
      np.arange(13, dtype=np.uint32)
    )
    solved = jax.jit(
      lambda params, x0, keys: flow.dequantised(
        bits._denoiser(trained, params, {}, clip=False), trained.schedule, x0,
        keys, rtol=1e-3, atol=1e-3,
      )
    )(trained.params, x0, keys)  # fmt: skip
    solved = jax.device_get(solved)
  assert found.results['bpd_ode'] == pytest.approx(solved.bits.mean(), rel=1e-3)
  assert found.results['evaluations'] == pytest.approx(
    solved.evaluations.mean(), rel=0.05
  )
  assert found.details['most_evaluations'] >= found.results['evaluations'] > 20


def test_what_cannot_be(run, images, tmp_path):
  trained = loaded(run)
  with pytest.raises(UserError, match='at least 2 images'):
    bits.measure(
      Batches(trained, images._replace(count=1), tmp_path / 'a', 5), how('bpd')
    )
  with pytest.raises(UserError, match='the grid has only 6 steps: use bpd'):
    bits.check(how('bpd_fast'), trained.schedule, (8, 8, 1))
  exact = how('bpd_ode', divergence='exact')
  with pytest.raises(UserError, match='at most 1024 dimensions'):
    bits.check(exact, trained.schedule, (32, 32, 3))
  bits.check(exact, trained.schedule, (8, 8, 1))
  assert not (tmp_path / 'a').exists()


def test_what_is_not_finite_is_refused_and_not_kept(run, images, tmp_path):
  trained = loaded(run)
  params = jax.tree.map(lambda x: x * np.nan, trained.params)
  sick = dataclasses.replace(trained, params=params)
  with pytest.raises(UserError, match='images 0 to 4 have no finite'):
    bits.measure(Batches(sick, images, tmp_path, 5), how('bpd'))
  assert not list(tmp_path.rglob('*.npz'))


def test_the_binary_leaves_cards_a_plot_and_a_page(run):
  arguments = [
    f'--workdir={run}', '--metrics=bpd,bpd_fast', '--num_images=9',
    '--num_steps=20', '--batch_size=4',
  ]  # fmt: skip
  result = binaries.run('evaluate', *arguments)
  assert result.code == 0, result.err
  assert 'RMSE of 255' in result.out
  assert '(95%)' in result.out
  (card,) = (run / 'evaluations').glob('step30_bpd_9_*.json')
  made = json.loads(card.read_text())
  assert made['protocol']['bits'] == 'bpd'
  assert len(made['protocol']['grid']) == 21
  assert made['protocol']['split'] == 'test'
  assert len(made['details']['rate']) == 20
  plot = card.with_name(f'{card.stem}_rate_distortion.png')
  assert Image.open(plot).size[0] > 500
  assert 'bits/dim' in (run / 'report.html').read_text()
  fast = list((run / 'evaluations').glob('step30_bpd_fast_9_*.json'))
  table = binaries.run('evaluate', f'--compare={card}')
  assert table.code == 0, table.err
  assert f'{made["results"]["bpd"]:.4g}' in table.out
  result = binaries.run('evaluate', f'--compare={card},{fast[0]}')
  assert 'bits: bpd and bpd_fast' in result.message


@pytest.mark.parametrize(
  ('arguments', 'must'),
  [
    (['--metrics=bpd,fid'], 'likelihoods are not measured together'),
    (['--metrics=bpd', '--follow'], 'with --follow'),
    (['--metrics=bpd_ode', '--tolerance=0'], '--tolerance=0.0'),
    (['--metrics=bpd', '--num_images=1'], '--num_images=1: at least 2'),
    (['--metrics=bpd_fast', '--num_steps=10', '--num_images=2'], 'use bpd'),
    (['--metrics=bpd', '--split=test'], 'split'),
    (['--metrics=bpd,bpd_fast', '--num_steps=10'], 'use bpd'),
    (['--metrics=bpd', '--num_samples=10'], '--num_samples does not apply'),
    (['--metrics=bpd_fst'], 'bpd_fast, bpd_ode'),
    (['--metrics=bpd_ode', '--num_steps=50'], '--num_steps does not apply to'),
    (
      ['--metrics=bpd,bpd_fast', '--dtype=float64'],
      '--dtype does not apply to',
    ),
    (['--metrics=bpd', '--sampler=ddim'], '--sampler does not apply to bpd'),
    (['--metrics=fid', '--split=train'], '--split does not apply to distances'),
  ],
)
def test_a_mistake_is_told_in_one_line(run, arguments, must):
  before = sorted(map(str, run.rglob('*')))
  result = binaries.run('evaluate', f'--workdir={run}', *arguments)
  assert must in result.message
  assert sorted(map(str, run.rglob('*'))) == before
