"""`edit anomaly`: errors against closed forms, then the command."""

import csv
import dataclasses
import itertools
import json
import re
import shutil
import types

import binaries
import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from diffusion_jax import data, load
from diffusion_jax.evaluation import anomalies, anomaly_scores, features
from diffusion_jax.evaluation.batches import Batches
from diffusion_jax.evaluation.metrics import anomaly
from diffusion_jax.process import gaussian, likelihood, schedules
from diffusion_jax.reporting import anomalies as writing
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

HOW = anomalies.How(3, [700, 200, 0], [800, 300], 3, 'fixedlarge', False, 1)


def set_of(images):
  return features.Images(
    len(images), lambda: iter([images]), 'images', images.__getitem__
  )


def measured(trained, images, folder, how=HOW, size=64, levels=None, tell=None):
  one = set_of(images)
  batches = Batches(trained, one, folder, size, tell or (lambda count: None))
  return anomalies.measure(batches, how, anomalies.numbers_of(one), levels)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return tiny.trained(tmp_path_factory.mktemp('runs') / 'digits')


def loaded(run, devices=1):
  return load(run, mesh=sharding.make_mesh(devices=jax.devices()[:devices]))


# --- Errors ------------------------------------------------------------------

VARIANCE = 0.01  # of Gaussian data, whose denoiser is exact


def denoise(params, xt, t, cond):
  del params, cond
  schedule = schedules.linear(1000)
  alpha, sigma = schedule.alpha(t, xt.dtype), schedule.sigma(t, xt.dtype)
  alpha, sigma = (gaussian.per_example(x, xt) for x in (alpha, sigma))
  x0 = xt * alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
  return gaussian.Denoised(x0, (xt - alpha * x0) / sigma)


def kept_of(schedule, times):
  """What DDIM with that denoiser multiplies xt with, down a grid."""
  factor = 1.0
  for t, s in itertools.pairwise(times):
    (at, vt), (au, vu) = ((np.exp(x / 2), v) for x, v in
                          map(schedule.host, (t, s)))  # fmt: skip
    x0 = at * VARIANCE / (at**2 * VARIANCE + vt)
    factor *= au * x0 + np.sqrt(vu) * (1 - at * x0) / np.sqrt(vt)
  return factor


def test_errors_of_gaussian_data_are_the_closed_form(tmp_path):
  """The means over 500 images of one colour, within four standard errors."""
  made = tiny.recipe(tiny.dense())
  trained = types.SimpleNamespace(
    recipe=made, codec=made.codec, schedule=made.schedule, params={},
    mesh=tiny.one_device(), workdir=tmp_path,
    compiled=types.SimpleNamespace(denoise=denoise),
  )  # fmt: skip
  images = np.full((500, *tiny.SHAPE), 150, np.uint8)
  # No two are the same, or they had the same noise.
  code = np.arange(500)[:, None] >> np.arange(9) & 1
  images.reshape(500, -1)[:, :9] += code.astype(np.uint8)
  # With two noises the errors spread half as much, so the mean is closer.
  how = HOW._replace(bound_draws=2, start_draws=2)
  x = np.square(images / 127.5 - 1).mean((1, 2, 3))
  single = measured(trained, images, tmp_path)
  found = measured(trained, images, tmp_path / 'two', how)

  def check(two, one, wanted):
    error = two - wanted
    assert error.mean() == pytest.approx(0, abs=4 * error.std() / 500**0.5)
    assert error.var() / (one - wanted).var() == pytest.approx(0.5, abs=0.15)

  for i, start in enumerate(HOW.start_times):
    alpha_bar, variance = trained.schedule.host(start)
    kept = kept_of(trained.schedule, anomalies.grid_of(start, 3))
    wanted = (kept * np.exp(alpha_bar / 2) - 1) ** 2 * x + kept**2 * variance
    check(found.reconstruction[:, i], single.reconstruction[:, i], wanted)
  steps = likelihood.prepare(trained.schedule, range(999, -2, -1))
  for i, time in enumerate(HOW.bound_times[:-1]):
    alpha_bar, variance = trained.schedule.host(time)
    alpha = np.exp(alpha_bar / 2)
    kept = alpha * VARIANCE / (alpha**2 * VARIANCE + variance)
    mse = (kept * alpha - 1) ** 2 * x + kept**2 * variance
    row = 999 - time
    wanted = (steps.constant[row] + steps.weight[row] * mse) / np.log(2)
    check(found.bound[:, i], single.bound[:, i], wanted)


def test_an_image_has_its_scores_in_any_set_batch_and_mesh(run, tmp_path):
  images = tiny.images(13)['image']
  done = []
  one = measured(loaded(run), images, tmp_path / 'a', size=5, tell=done.append)
  assert sum(done) == 13 * HOW.evaluations == 13 * (3 + 2 * 3)
  other = measured(loaded(run, 2), images[:4:-1], tmp_path / 'b')
  for score in anomalies.SCORES:
    np.testing.assert_allclose(
      one.errors(score)[:4:-1], other.errors(score), rtol=2e-5
    )
  seed = measured(loaded(run), images[:2], tmp_path / 'c', HOW._replace(seed=4))
  assert (seed.reconstruction != one.reconstruction[:2]).all()
  # What is finished is read: this network would give no numbers.
  trained = loaded(run)
  params = jax.tree.map(lambda x: x * np.nan, trained.params)
  sick = dataclasses.replace(trained, params=params)
  again = measured(sick, images, tmp_path / 'a', size=5)
  np.testing.assert_array_equal(again.bound, one.bound)
  with pytest.raises(UserError, match='no finite score'):
    measured(sick, images, tmp_path / 'd')


def test_maps_are_errors_by_pixel(run, tmp_path):
  trained, images = loaded(run), tiny.images(6)['image']
  base = measured(trained, images, tmp_path)
  assert base.maps is None
  levels = anomalies.levels_of_pixels(base)
  found = measured(trained, images, tmp_path / 'maps', levels=levels)
  np.testing.assert_array_equal(found.reconstruction, base.reconstruction)
  standard = (base.reconstruction - levels.mean) / levels.deviation
  np.testing.assert_allclose(
    found.maps.mean((1, 2)), standard.mean(1), atol=1e-5
  )
  assert found.maps.mean() == pytest.approx(0, abs=1e-5)
  # Of one level, they give the errors themselves, and their squares.
  how = HOW._replace(start_times=[300])
  single = anomaly.Levels(levels.mean[1:], levels.deviation[1:])
  maps = measured(trained, images, tmp_path / 'one', how, levels=single).maps
  errors = maps * single.deviation + single.mean
  assert (errors > -1e-6).all()
  np.testing.assert_allclose(
    errors.mean((1, 2)), base.reconstruction[:, 1], rtol=1e-4
  )
  np.testing.assert_allclose(
    np.square(errors).mean((1, 2)), base.squares[:, 1], rtol=1e-4
  )


def test_times():
  assert anomalies.grid_of(100, 5) == [100, 75, 50, 25, 0, -1]
  assert anomalies.grid_of(3, 1) == [3, -1]
  assert anomalies.grid_of(1, 3) == [1, 0.5, 0, -1]
  assert anomalies.default_times(1000) == [*range(900, 0, -100)]
  assert anomalies.check_times('t', ['5', ' 9'], 0, 10) == [9, 5]
  for bad in (['10'], ['-1'], ['0.5'], ['a'], []):
    with pytest.raises(UserError, match='whole times from 0 to 9'):
      anomalies.check_times('t', bad, 0, 10)
  with pytest.raises(UserError, match='each time once'):
    anomalies.check_times('t', ['5', '5'], 0, 10)


# --- Scores ------------------------------------------------------------------


def found_of(count, shift=0.0, seed=0):
  rng = np.random.default_rng(seed)
  errors = [rng.normal(shift, 1, (count, levels)) for levels in (3, 2, 2)]
  return anomalies.Found(*errors)


def test_sets_are_judged_and_compared():
  found = {
    'reference': found_of(199), 'input': found_of(60, 3, 1),
    'inliers': found_of(300, 0, 2),
  }  # fmt: skip
  scored, limit = anomaly_scores.judge(found, 'bound', 0.1)
  own = scored['reference']
  assert own.above.sum() == 19  # a tenth of 200 images, one of which is new
  np.testing.assert_array_equal(own.score('bound') > limit, own.above)
  assert (scored['input'].shares[scored['input'].above] <= 0.1).all()
  results, details = anomaly_scores.compare(
    *(anomaly_scores.Group(scored[x]) for x in ('inliers', 'input')), HOW
  )
  assert results['detected'] == scored['input'].above.mean() > 0.9
  assert results['false_alarms'] == pytest.approx(0.1, abs=0.06)
  # The mean of three levels: Phi(3 sqrt 3 / sqrt 2) = .9999.
  assert results['auroc_bound'] > results['auroc_reconstruction'] > 0.99
  assert details['auroc_bound_by_time'].keys() == {'700', '200', '0'}
  # Parts of one set.
  whole = anomaly_scores.Group(scored['inliers'])
  half = whole._replace(which=np.arange(300) < 150)
  other = whole._replace(which=np.arange(300) >= 150)
  area = anomaly_scores.compare(half, other, HOW)[0]['auroc_bound']
  assert 0.4 < area < 0.6


def test_heat():
  maps = np.array([[[-5.0, 0.0], [1.0, 9.0]]])
  seen = writing.heat(maps, 2.0)
  assert seen.shape == (1, 2, 2, 3)
  assert seen.dtype == np.uint8
  assert (seen[0, 0, 0] == seen[0, 0, 1]).all()  # 0 and less is black
  assert seen.sum(-1).argmax() == 3
  assert writing.usual_top(maps) == pytest.approx(8.76)
  assert writing.usual_top(maps / 100) == 3


# --- The command -------------------------------------------------------------


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """A folder of two classes: held-out digits, and their negatives."""
  folder = tmp_path_factory.mktemp('pictures')
  source = data.create('digits', split='test', image_size=8, channels=1)
  for i in range(8):
    image = source[i]['image'][..., 0]
    for name, one in (('good', image), ('bad', 255 - image)):
      (folder / name).mkdir(exist_ok=True)
      Image.fromarray(one).save(folder / name / f'{i}.png')
  return folder


def anomaly_of(run, output, *arguments, **how):
  given = [f'--workdir={run}', f'--output={output}', *arguments]
  return binaries.run('edit', 'anomaly', *given, **how)


CHEAP = ('--num_steps=2', '--start_times=500,100', '--bound_times=300',
         '--bound_draws=1', '--num_reference=60',
         '--false_alarms=0.1')  # fmt: skip


def test_the_command_leaves_a_table_maps_a_picture_and_a_card(
  run, pictures, tmp_path
):
  given = [f'--input={pictures}', '--reference=heldout', '--normal=good']
  output = tmp_path / 'found'
  result = anomaly_of(run, output, *given, *CHEAP)
  assert result.code == 0, result.err
  assert 'AUROC' in result.out
  assert '2 images of --input are reference images too' in result.err
  card = json.loads((output / 'anomalies.json').read_text())
  rows = list(csv.DictReader((output / 'scores.csv').open()))
  assert len(rows) == 16
  assert [row['name'] for row in rows[7:9]] == ['bad/7.png', 'good/0.png']
  assert {row['class'] for row in rows} == {'good', 'bad'}
  for row in rows:
    each = [float(row[f'reconstruction@{t}']) for t in (500, 100)]
    assert float(row['reconstruction']) == pytest.approx(
      np.mean(each), rel=1e-4
    )
    above = float(row['reconstruction']) > card['results']['threshold']
    assert row['anomaly'] == ('yes' if above else 'no')
    assert (float(row['share_above']) <= 0.1) == above
    with Image.open(output / 'heat_maps' / f'{row["name"]}.png') as image:
      assert image.size == (8, 8)
      top = float(image.text['brightest'])
      assert top == pytest.approx(card['details']['heat_max'], rel=1e-5)
  assert card['protocol']['evaluations'] == 5
  assert card['protocol']['reference_num_images'] == 60
  scores = {x: [float(row['bound']) for row in rows if row['class'] == x]
            for x in ('good', 'bad')}  # fmt: skip
  area = anomaly.auroc(scores['good'], scores['bad'])
  assert card['results']['auroc_bound'] == pytest.approx(area.value, abs=0.01)
  # In another place and order, against the reference itself; it replaces.
  with Image.open(pictures / 'bad' / '3.png') as image:
    image.save(tmp_path / 'alone.png')
  again = anomaly_of(
    run, output, f'--input={tmp_path}/alone.png', '--reference=heldout', *CHEAP
  )
  assert again.code == 0, again.err
  (row,) = csv.DictReader((output / 'scores.csv').open())
  assert row.pop('name') == 'alone.png'
  same = next(x for x in rows if x['name'] == 'bad/3.png')
  for name in ('bound', 'reconstruction', 'bound@300'):
    assert float(row[name]) == pytest.approx(float(same[name]), rel=1e-3)
  assert [x.name for x in (output / 'heat_maps').iterdir()] == ['alone.png.png']


@pytest.mark.slow
def test_several_processes_find_the_same(run, pictures, tmp_path):
  given = ['anomaly', f'--workdir={run}', f'--input={pictures}',
           '--reference=heldout', '--inliers=reference', *CHEAP]  # fmt: skip
  several = binaries.run_several(
    'edit', *given, f'--output={tmp_path}/a', '--seed=1'
  )
  assert all(one.code == 0 for one in several), several
  one = binaries.run(
    'edit', *given, f'--output={tmp_path}/b', '--seed=1', '--batch_size=7'
  )
  assert one.code == 0, one.err
  cards = [json.loads((tmp_path / x / 'anomalies.json').read_text())
           for x in 'ab']  # fmt: skip
  assert cards[0]['results'] == pytest.approx(cards[1]['results'], rel=1e-3)


@pytest.mark.parametrize(
  ('arguments', 'must'),
  [
    (['--reference='], '--reference is missing'),
    (['--false_alarms=1'], '--false_alarms=1: the share of normal'),
    (['--false_alarms=0.001'], 'cannot be seen on 359 reference images'),
    (['--start_times=0'], 'whole times from 1 to 999'),
    (['--bound_times=1000,3'], 'whole times from 0 to 999'),
    (['--input={empty}'], 'has no images'),
    (['--input={large}'], '16x16x1.*8x8x1: --resize crops them'),
    (['--input={arrays}'], '16x16x1.*8x8x1: only image files are resized'),
    (['--reference={mixed}'], 'is 9x9 and the first one 8x8: --resize crops'),
    (['--normal=good'], 'has no labels'),
    (['--input=digits@test', '--normal=12'], 'no class 12: its classes are 0'),
    (['--normal=0', '--inliers=reference'], 'give one of them'),
    (['--output={large}'], 'holds other files, such as 0.png'),
    (['--output={run}'], 'is the run itself'),
    (['--reference={pair}'], 'has 2 images: give at least 3'),
    (['--input={run}'], 'not a set of images'),
  ],
)
def test_a_mistake_is_told_in_one_line(
  run, pictures, tmp_path, arguments, must
):
  large, pair, empty = (tmp_path / x for x in ('large', 'pair', 'empty'))
  for folder, size, count in ((large, 16, 1), (pair, 8, 2), (empty, 8, 0)):
    folder.mkdir()
    for i in range(count):
      Image.new('L', (size, size), 255 - i).save(folder / f'{i}.png')
  shutil.copytree(pair, tmp_path / 'mixed')
  Image.new('L', (9, 9), 255).save(tmp_path / 'mixed' / '2.png')
  np.save(tmp_path / 'large.npy', np.full((2, 16, 16), 255, np.uint8))
  places = {
    'large': large, 'pair': pair, 'empty': empty, 'run': run,
    'arrays': tmp_path / 'large.npy', 'mixed': tmp_path / 'mixed',
  }  # fmt: skip
  before = sorted(map(str, [*run.rglob('*'), *tmp_path.rglob('*')]))
  given = {'workdir': run, 'input': pictures / 'bad', 'reference': 'heldout',
           'output': tmp_path / 'out'}  # fmt: skip
  given |= (x.format(**places)[2:].split('=', 1) for x in arguments)
  result = binaries.run(
    'edit', 'anomaly', *(f'--{name}={x}' for name, x in given.items())
  )
  assert re.search(must, result.message), result.message
  assert sorted(map(str, [*run.rglob('*'), *tmp_path.rglob('*')])) == before
