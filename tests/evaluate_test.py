"""Evaluation through the binary: a run, its judge, cards, other devices."""

import hashlib
import json
import shutil

import binaries
import jax
import numpy as np
import pytest
import scipy.linalg
import tiny
from parity import inception as parity
from PIL import Image

from diffusion_jax import data
from diffusion_jax.evaluation import cards, classifier
from diffusion_jax.models import inception
from diffusion_jax.runs import store
from diffusion_jax.weights import inception as weights

DRAW = ('--sampler=ddim', '--num_steps=3')
COUNT = 150

DATA = binaries.ROOT.parent / 'shared' / 'data'
REAL = DATA / 'inception' / 'inception_2015_12_05_to_mixed_7.npz'
CIFAR10 = DATA / 'cifar10'


def evaluate(*arguments, devices=1):
  result = binaries.run('evaluate', *arguments, '--json', devices=devices)
  assert result.code == 0, result.err
  return json.loads(result.out)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """With a judge of few steps, where the binary looks for it.

  judges_test trains where there is none, and a slow test as long as it takes.
  """
  run = tiny.trained(tmp_path_factory.mktemp('runs') / 'digits')
  source = data.create('digits', split='train', image_size=8, channels=1)
  name = f'classifier_{classifier.fingerprint(source)[:8]}.npz'
  classifier.train(run / 'evaluations' / name, source, num_steps=100)
  return run


@pytest.fixture(scope='module')
def card(run):
  return evaluate(f'--workdir={run}', f'--num_samples={COUNT}', *DRAW)


def judge_of(run):
  (path,) = (run / 'evaluations').glob('classifier_*.npz')
  return path


def digits(split):
  source = data.create('digits', split=split, image_size=8, channels=1)
  return np.stack([source[i]['image'] for i in range(len(source))])


def test_the_judge_knows_digits(card):
  """So that what it says of samples is worth something."""
  assert card['details']['classifier_accuracy'] >= 0.9
  assert card['results']['confident_heldout'] >= 0.5
  assert sum(card['details']['class_histogram']) == pytest.approx(1)


def test_the_distance_is_numpys_and_scipys(run, card):
  """From the files that it left: samples.npz's images and the classifier.

  Features are computed here in one batch, so they differ by float32's
  rounding, a few 1e-7; the matrix root is SciPy's, on the units that are ever
  active (the root of a singular matrix is no test of anything).
  """
  folder = run / 'samples' / 'step30_ddim3_seed0_float'
  judge = classifier.load(judge_of(run), (8, 8, 1))

  def features(images):
    return np.asarray(judge.apply(judge.params, images)['hidden'], np.float64)

  samples = features(store.load(folder, COUNT))
  train, held = features(digits('train')), features(digits('test'))
  active = [x.std(0) > 1e-3 for x in (samples, train, held)]

  def distance(a, b):
    means = np.square(a.mean(0) - b.mean(0)).sum()
    a_cov, b_cov = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # A unit that is silent in one set adds nothing to the root.
    both = np.ix_(*[(a.std(0) > 1e-3) & (b.std(0) > 1e-3)] * 2)
    root = scipy.linalg.sqrtm(a_cov[both] @ b_cov[both])
    return means + np.trace(a_cov) + np.trace(b_cov) - 2 * np.trace(root.real)

  assert sum(active[1]) > 20
  for name, a in (
    ('frechet', samples),
    ('frechet_floor', held[np.arange(COUNT) * len(held) // COUNT]),
  ):
    np.testing.assert_allclose(
      card['results'][name], distance(a, train), rtol=1e-6
    )


def test_the_card_holds_all_that_the_number_depends_on(run, card):
  subject, protocol = card['subject'], card['protocol']
  assert subject['step'] == 30
  assert subject['grid'] == [999, 500, 0, -1]
  assert subject['evaluations'] == 3
  assert len(subject['weights_sha256']) == 64
  assert {'ema', 'sampler', 'eta', 'seed', 'clip', 'workdir'} <= subject.keys()
  assert protocol['data'] == 'digits'
  assert protocol['split'] == 'train'
  assert protocol['num_reference'] == 1438
  assert protocol['num_samples'] == COUNT
  assert protocol['num_heldout'] == COUNT
  assert len(protocol['features_sha256']) == 64
  assert len(protocol['reference_sha256']) == 64
  assert {'resize', 'features', 'metrics'} <= protocol.keys()
  assert protocol['rounding'] == 'float'
  assert card['environment']['versions']['jax'] == jax.__version__
  path = run / 'evaluations' / card['path'].rpartition('/')[2]
  stored = cards.read(path)
  assert stored.items() <= card.items()
  width, _ = Image.open(path.with_name(f'{path.stem}_neighbours.png')).size
  assert width > 300
  assert (run / 'report.html').exists()


def test_again_redraws_and_retrains_nothing(run, card):
  files = [judge_of(run)]
  files += (run / 'samples').rglob('parts/*')
  before = [path.stat().st_mtime_ns for path in files]
  again = evaluate(f'--workdir={run}', f'--num_samples={COUNT}', *DRAW)
  assert [path.stat().st_mtime_ns for path in files] == before
  assert again['drawn'] == 0
  assert again['results'] == card['results']
  assert again['protocol'] == card['protocol']


@pytest.mark.slow
def test_eight_devices_and_an_interruption_change_nothing(run, card, tmp_path):
  """Drawn anew in parts of 16, killed three times; judged by eight devices."""
  out = tmp_path / 'drawn'
  arguments = [
    f'--workdir={run}', f'--num_samples={COUNT}', *DRAW, f'--output={out}',
    '--batch_size=16',
  ]  # fmt: skip
  for goal in (1, 3, 6):
    process = binaries.start('evaluate', *arguments)
    process.wait_until(lambda goal=goal: len(store.parts(out)) >= goal)
    process.kill()
  drawn = COUNT - len(store.missing(out, COUNT))
  assert 0 < drawn < COUNT
  other = evaluate(*arguments, devices=8)
  assert other['drawn'] == COUNT - drawn
  assert other['protocol'] == card['protocol']
  for name, value in card['results'].items():
    assert other['results'][name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.slow
def test_more_samples_than_were_there(run, card):
  more = evaluate(f'--workdir={run}', f'--num_samples={COUNT + 3}', *DRAW)
  assert more['drawn'] == 3
  assert more['protocol']['num_samples'] == COUNT + 3


def test_people_read_a_table(run, card):
  result = binaries.run(
    'evaluate', f'--workdir={run}', f'--num_samples={COUNT}', *DRAW
  )
  assert result.code == 0
  assert f'{card["results"]["frechet"]:.4g}' in result.out
  assert f'{card["details"]["classifier_accuracy"]:.1%}' in result.out
  assert card['path'] in result.out
  table = [x for x in result.out.splitlines()[:-3] if x[:6] != 'note: ']
  assert max(map(len, table)) <= 80


@pytest.mark.slow
def test_pixels_judge_too_and_other_cards_are_not_compared(run, card):
  pixels = evaluate(
    f'--workdir={run}', f'--num_samples={COUNT}', *DRAW, '--features=pixels',
    '--neighbours=0',
  )  # fmt: skip
  assert pixels['protocol']['features'] == 'pixels'
  assert 'confident' not in pixels['results']
  result = binaries.run(
    'evaluate', f'--compare={card["path"]},{pixels["path"]}'
  )
  assert 'features: classifier and pixels' in result.message


@pytest.mark.slow
def test_cards_of_one_protocol_stand_in_one_table(run, card):
  raw = evaluate(f'--workdir={run}', f'--num_samples={COUNT}', *DRAW, '--noema')
  paths = f'{card["path"]},{raw["path"]}'
  result = binaries.run('evaluate', f'--compare={paths}')
  assert result.code == 0, result.err
  for one in (card, raw):
    assert f'{one["results"]["frechet"]:.4g}' in result.out
  assert 'averaged' in result.out
  assert 'raw' in result.out
  both = evaluate(f'--compare={paths}')
  (table,) = both['tables']
  assert [c['results'] for c in table] == [card['results'], raw['results']]
  # Of a run's folder, those that can be compared with the other place's.
  both = evaluate(f'--compare={run},{raw["path"]}')
  (table,) = both['tables']
  assert card['results'] in [c['results'] for c in table]
  assert {json.dumps(c['protocol']) for c in table} == {
    json.dumps(card['protocol'])
  }


@pytest.mark.slow
def test_a_judge_of_another_run(run, card, tmp_path):
  """So that cards of two machines can be compared."""
  other = tmp_path / 'other'
  shutil.copytree(run, other)
  shutil.rmtree(other / 'evaluations')
  judge = judge_of(run)
  got = evaluate(
    f'--workdir={other}', f'--num_samples={COUNT}', *DRAW,
    f'--features={judge}',
  )  # fmt: skip
  assert got['protocol'] == card['protocol']
  assert not list((other / 'evaluations').glob('classifier*'))


@pytest.mark.slow
def test_images_without_labels_or_held_out_ones(tmp_path):
  np.save(tmp_path / 'images.npy', tiny.images(60)['image'])
  workdir = tmp_path / 'run'
  tiny.train(
    workdir, num_steps=4, **{'data.name': 'arrays',
    'data.path': tmp_path / 'images.npy'},
  )  # fmt: skip
  moved = (tmp_path / 'images.npy').rename(tmp_path / 'moved.npy')
  result = binaries.run('evaluate', f'--workdir={workdir}', *DRAW)
  assert 'images.npy' in result.message
  arguments = [f'--workdir={workdir}', *DRAW, f'--data_path={moved}']
  card = evaluate(*arguments, '--num_samples=20')
  assert card['protocol']['features'] == 'pixels'
  assert set(card['results']) == {'frechet', 'identical', 'nearest'}
  # Where the data lie is no part of the protocol.
  moved = moved.rename(tmp_path / 'again.npy')
  arguments[-1] = f'--data_path={moved}'
  again = evaluate(*arguments, '--num_samples=20')
  assert again['protocol'] == card['protocol']
  result = binaries.run('evaluate', *arguments, '--features=classifier')
  assert 'unlabelled' in result.message
  assert '--features=pixels' in result.message


@pytest.mark.parametrize(
  ('arguments', 'must'),
  [
    ([], '--workdir is missing'),
    (['--workdir=/nowhere'], 'train first'),
    (['--workdir={run}', '--num_samples=1'], 'num_samples=1'),
    (['--workdir={run}', '--neighbours=-1'], 'neighbours=-1'),
    (['--workdir={run}', '--batch_size=0'], 'batch_size=0'),
    (['--workdir={run}', '--sampler=magic'], 'magic'),
    (['--workdir={run}', '--features=inception'], 'inception'),
    (['--workdir={run}', '--step=31'], '10, 20, 25, 30'),
    (['--workdir={run}', '--data_path=x'], 'data.path=x'),
    (['--compare={run}/samples'], 'holds no metric cards'),
    (['--compare={run}/config.json'], 'not a metric card'),
    (['--compare={run}/nothing.json'], 'nothing.json'),
  ],
)
def test_mistakes_are_answered_before_anything_is_drawn(run, arguments, must):
  before = sorted(map(str, run.rglob('*')))
  result = binaries.run('evaluate', *(a.format(run=run) for a in arguments))
  assert must in result.message
  assert sorted(map(str, run.rglob('*'))) == before


@pytest.mark.slow
def test_inception_judges_a_run_by_any_rounding(run, tmp_path):
  """Random weights, up to the first tap, against 20 digits in a file.

  What the network is shown is checked in the cache, by the hashes of unrounded,
  rounded and truncated samples.
  """
  network = {k: parity.params()[k] for k in inception.shapes(['64'])}
  weights.write(tmp_path / 'inception.npz', network)
  np.save(tmp_path / 'reference.npy', digits('test')[:20])
  arguments = [
    f'--workdir={run}', '--num_samples=20', *DRAW,
    f'--features={tmp_path}/inception.npz', '--taps=64', '--metrics=fid,kid',
    f'--reference={tmp_path}/reference.npy',
  ]  # fmt: skip
  found = {}
  for rounding in ('float', 'round', 'truncate'):
    cache = tmp_path / rounding
    card = evaluate(*arguments, f'--rounding={rounding}', f'--cache={cache}')
    assert card['protocol']['rounding'] == rounding
    assert card['protocol']['data'] == 'images'
    assert 'reference.npy' in card['details']['reference']
    assert 'fid_64_floor' not in card['results']
    found[rounding] = (
      card['results']['fid_64'],
      {path.name for path in (run / 'samples').rglob('features/*/*/*.npy')},
    )
  folder = run / 'samples' / 'step30_ddim3_seed0_float'
  unrounded = store.load(folder, 20)
  assert unrounded.dtype == np.float32
  for rounding, images in (
    ('float', unrounded),
    ('round', np.round(unrounded).astype(np.uint8)),
    ('truncate', np.floor(unrounded).astype(np.uint8)),
  ):
    digest = hashlib.sha256(f'{images.dtype} {images.shape} '.encode())
    digest.update(images.tobytes())
    assert f'{digest.hexdigest()[:32]}.npy' in found[rounding][1]
  distances = [distance for distance, _ in found.values()]
  assert len(set(distances)) == 3
  assert distances[1] == pytest.approx(distances[0], rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason=f'there is no {REAL}')
@pytest.mark.skipif(not CIFAR10.exists(), reason=f'there is no {CIFAR10}')
def test_the_distance_of_real_images_on_other_devices_and_after_kills(tmp_path):
  """2,000 training and 2,000 test images of CIFAR-10, by 768 real features.

  On one device; on eight; and on one, in other batches, killed three times.
  """
  for split in ('train', 'test'):
    sheets = sorted((CIFAR10 / split).glob('*.webp'))[:20]
    images = [np.asarray(Image.open(path).convert('RGB')) for path in sheets]
    images = np.stack(images).reshape(20, 10, 32, 10, 32, 3).swapaxes(2, 3)
    np.savez(tmp_path / f'{split}.npz', images.reshape(-1, 32, 32, 3))

  def arguments(cache, batch_size=64):
    return (
      f'--samples={tmp_path}/test.npz', f'--reference={tmp_path}/train.npz',
      f'--features={REAL}', '--taps=768', f'--cache={tmp_path}/{cache}',
      f'--batch_size={batch_size}', '--json',
    )  # fmt: skip

  cards = {}
  for name, devices in (('one', 1), ('eight', 8)):
    result = binaries.run('fid', *arguments(name), devices=devices, limit=3600)
    assert result.code == 0, result.err
    cards[name] = json.loads(result.out)
  kept = tmp_path / 'killed' / 'features'
  for goal in (1, 4, 11):
    process = binaries.start('fid', *arguments('killed', 20))
    process.wait_until(
      lambda goal=goal: len(list(kept.rglob('*.npy'))) >= goal, limit=3600
    )
    process.kill()
  assert len(list(kept.rglob('*.npy'))) < 16
  result = binaries.run('fid', *arguments('killed', 20), limit=3600)
  assert result.code == 0, result.err
  cards['killed'] = json.loads(result.out)
  print({name: card['results'] for name, card in cards.items()})
  for card in cards.values():
    assert card['protocol'] == cards['one']['protocol']
    assert card['results']['fid_768'] == pytest.approx(
      cards['one']['results']['fid_768'], rel=1e-4
    )


@pytest.mark.slow
def test_digits_are_digits(tmp_path):
  """The shipped config, and the command of the README: what it must show.

  Of 2,000 samples 90% are given a class above 0.8 by a classifier that is right
  on 97% of the held-out digits (of which 98% are given one), no class has less
  than 4%, and samples lie at most 1.5 times as far from the training images as
  held-out images do, equally many.
  """
  result = binaries.run(
    'train', '--config=digits', f'--workdir={tmp_path}', limit=1500
  )
  assert result.code == 0, result.err
  card = evaluate(
    f'--workdir={tmp_path}', '--num_samples=2000', '--sampler=ddim',
    '--num_steps=50',
  )  # fmt: skip
  results = card['results']
  assert card['details']['classifier_accuracy'] >= 0.97
  assert results['confident_heldout'] >= 0.98
  assert results['confident'] >= 0.9
  assert results['smallest_class'] >= 0.04
  assert card['protocol']['num_heldout'] == 359
  assert results['frechet_ratio'] <= 1.5
