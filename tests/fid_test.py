"""The binary that judges two sets of images, and its cache."""

import json

import binaries
import numpy as np
import pytest
from judges import levels, mesh_of, random_images, scipy_distance
from parity import inception as parity
from PIL import Image

from diffusion_jax.evaluation import cards, features, statistics
from diffusion_jax.evaluation.metrics import frechet
from diffusion_jax.models import inception
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import inception as weights


@pytest.fixture(scope='module')
def there(tmp_path_factory):
  """Two sets of images, in several kinds of files, and weights up to '64'."""
  folder = tmp_path_factory.mktemp('sets')
  sets = {
    'a': random_images(20, (8, 8, 3), 1),
    'b': levels(12, 2).repeat(3, -1),
  }
  for name, images in sets.items():
    np.savez(folder / f'{name}.npz', images)
    (folder / name).mkdir()
    for i, image in enumerate(images):
      Image.fromarray(image).save(folder / name / f'{i:03d}.png')
  np.save(folder / 'few.npy', sets['a'][:5])
  np.save(folder / 'grey.npy', levels(20, 1))
  np.save(folder / 'large.npy', random_images(20, (16, 16, 3)))
  network = {k: parity.params()[k] for k in inception.shapes(['64'])}
  weights.write(folder / 'inception.npz', network)
  return folder


def fid(there, *arguments, cache='cache', devices=1):
  return binaries.run(
    'fid', *(a.format(there=there) for a in arguments),
    f'--cache={there / cache}', '--json', devices=devices,
  )  # fmt: skip


def card_of(there, *arguments, **more):
  result = fid(there, *arguments, **more)
  assert result.code == 0, result.err
  return json.loads(result.out)


PIXELS = ('--features=pixels',)
# Batches are filled up: by default to 64 images.
NETWORK = (
  '--features={there}/inception.npz', '--taps=64', '--batch_size=10',
)  # fmt: skip


def test_two_folders_and_two_files_are_the_same(there):
  of_folders = card_of(
    there, '--samples={there}/a', '--reference={there}/b', *PIXELS
  )
  of_files = card_of(
    there, '--samples={there}/a.npz', '--reference={there}/b.npz', *PIXELS
  )
  assert of_folders['results'] == of_files['results']
  assert set(of_folders['results']) == {'frechet'}
  for key, value in of_files['protocol'].items():
    assert of_folders['protocol'][key] == value
  pixels = [
    np.load(there / f'{name}.npz')['arr_0'].reshape(-1, 192) / 127.5 - 1
    for name in 'ab'
  ]
  moments = [frechet.moments_of(x) for x in pixels]
  assert of_files['results']['frechet'] == pytest.approx(
    frechet.distance(*moments), rel=1e-4
  )


@pytest.mark.slow
@pytest.mark.optimized
def test_inceptions_distance_and_everything_else_of_one_pass(there, tmp_path):
  """By random weights, up to the first tap; SciPy's distance of the features.

  64 features of 20 images: the card says what is wrong with that.
  """
  card = card_of(
    there, '--samples={there}/a', '--reference={there}/b.npz', *NETWORK,
    '--metrics=fid,kid,pr,copies', f'--card={tmp_path}/card.json',
    f'--write_statistics={tmp_path}/statistics.npz',
  )  # fmt: skip
  assert set(card['results']) == {
    'fid_64', 'kid', 'kid_error', 'precision', 'recall', 'density', 'coverage',
    'identical', 'nearest',
  }  # fmt: skip
  network = weights.read(there / 'inception.npz', ['64'])
  features = [
    np.asarray(
      inception.apply(network, np.load(there / f'{name}.npz')['arr_0'], ['64'])[
        '64'
      ],
      np.float64,
    )
    for name in 'ab'
  ]
  with np.load(tmp_path / 'statistics.npz') as written:
    np.testing.assert_allclose(written['mu'], features[1].mean(0), rtol=1e-5)
    np.testing.assert_allclose(
      written['sigma'], np.cov(features[1], rowvar=False), atol=1e-6
    )
  assert card['results']['fid_64'] == pytest.approx(
    scipy_distance(*features), rel=1e-2
  )
  (few, _, noise) = card['details']['caveats']
  assert '12 images in 64 dimensions' in few
  assert 'the samples look like noise' in noise
  protocol = card['protocol']
  assert protocol['convention'] == 'tf1'
  assert protocol['rounding'] == 'none'
  assert protocol['taps'] == ['64']
  assert protocol['kid_subsets'] == 100
  assert len(card['subject']['samples_sha256']) == 64
  assert cards.read(tmp_path / 'card.json')['results'] == card['results']
  assert Image.open(tmp_path / 'card_neighbours.png').size[0] > 100
  table = binaries.run('evaluate', f'--compare={tmp_path}/card.json')
  assert table.code == 0, table.err
  assert 'FID-64' in table.out

  # Statistics do in place of the reference's images, and so does the cache.
  again = card_of(
    there, '--samples={there}/a', f'--reference={tmp_path}/statistics.npz',
    *NETWORK,
  )  # fmt: skip
  assert again['results'] == pytest.approx(
    {'fid_64': card['results']['fid_64']}, rel=1e-9
  )
  for path in (there / 'cache' / 'features').rglob('*.npy'):
    path.unlink()
  cached = card_of(
    there, '--samples={there}/a', '--reference={there}/b', *NETWORK
  )
  assert cached['results'] == again['results']
  kept = list((there / 'cache' / 'features').rglob('*.npy'))
  assert len(kept) == 1  # of the samples; the reference had statistics
  assert cached['protocol']['reference_sha256'] == protocol['reference_sha256']


@pytest.mark.slow
def test_on_other_devices_and_in_other_batches_it_is_the_same(there):
  how = ['--samples={there}/a', '--reference={there}/b', *NETWORK]
  one = card_of(there, *how, cache='one')
  eight = card_of(there, *how, '--batch_size=8', cache='eight', devices=8)
  assert one['protocol'] == eight['protocol']
  assert one['results'] == pytest.approx(eight['results'], rel=1e-4)


@pytest.mark.slow
def test_two_processes_judge_as_one(there, tmp_path):
  """First computed by both, then from the cache."""
  how = ['--samples={there}/few.npy', '--reference={there}/few.npy', *NETWORK]
  alone = card_of(there, *how, cache='one')
  for number in range(2):
    processes = binaries.start_several(
      'fid', *(flag.format(there=there) for flag in how), '--json',
      f'--cache={tmp_path}/cache',
    )  # fmt: skip
    results = [process.end() for process in processes]
    assert [r.code for r in results] == [0, 0], [r.err for r in results]
    assert not results[1].out
    card = json.loads(results[0].out)
    assert card['results'] == pytest.approx(alone['results'], abs=1e-6)
    assert card['protocol'] == alone['protocol'], number


def test_statistics_of_two_need_no_network(there, tmp_path):
  for name, scale in (('a', 1.0), ('b', 4.0)):
    np.savez(tmp_path / f'{name}.npz', mu=np.zeros(3), sigma=np.eye(3) * scale)
  card = card_of(
    there, f'--samples={tmp_path}/a.npz', f'--reference={tmp_path}/b.npz'
  )
  assert card['results'] == {'frechet': pytest.approx(3.0)}


def test_files_that_hold_images_and_statistics(there, tmp_path):
  """As guided-diffusion's: the statistics are of more than the images."""
  with np.load(there / 'b.npz') as archive:
    images = archive['arr_0']
  both = tmp_path / 'both.npz'
  np.savez(both, arr_0=images, mu=np.zeros(192), sigma=np.eye(192))
  how = ['--samples={there}/a', f'--reference={both}', *PIXELS]
  of_statistics = card_of(there, *how)
  assert of_statistics['protocol']['data'] == 'statistics'
  of_images = card_of(there, *how, '--metrics=fid,kid')
  assert of_images['protocol']['num_reference'] == 12


def test_statistics_of_sfid_go_out_and_in(there, tmp_path):
  """Through the library: the network up to the spatial features is slow."""
  found = {
    tap: frechet.Gaussian(np.arange(3.0) + i, np.eye(3) * (i + 1))
    for i, tap in enumerate(('2048', 'spatial'))
  }
  path = tmp_path / 'deeper' / 'statistics.npz'
  statistics.write(path, found)
  judge = features.Judge(None, {}, dict.fromkeys(found, ''), '', {}, {})
  again = statistics.read(path, judge, None)
  for tap, gaussian in found.items():
    np.testing.assert_array_equal(again[tap].mean, gaussian.mean)
    np.testing.assert_array_equal(again[tap].covariance, gaussian.covariance)


def judge_of(**protocol):
  """A judge of 3 features; nothing is computed with it."""
  usual = {
    'features': 'inception', 'convention': 'tf1', 'resize': 'bilinear to 299',
    'features_sha256': 'abc',
  }  # fmt: skip
  return features.Judge(
    lambda params, images: {'2048': np.zeros((len(images), 3))},
    {}, {'2048': 'fid'}, '', {**usual, **protocol}, {},
  )  # fmt: skip


GAUSSIAN = frechet.Gaussian(np.arange(3.0), np.eye(3))


@pytest.mark.parametrize(
  ('protocol', 'told'),
  [
    ({'convention': 'pytorch-fid'}, 'convention: tf1 there, pytorch-fid here'),
    ({'features_sha256': 'fed'}, 'weights: abc there, fed here'),
    ({'resize': 'none'}, 'resize: bilinear to 299 there, none here'),
    ({'features': 'classifier'}, 'features: inception there, classifier here'),
  ],
)
def test_statistics_of_unlike_features_are_refused(tmp_path, protocol, told):
  path = tmp_path / 'statistics.npz'
  made = statistics.describe(judge_of(), 7)
  statistics.write(path, {'2048': GAUSSIAN}, made)
  assert statistics.origin(path) == made
  assert made['mu']['num_images'] == 7
  read = statistics.read(path, judge_of(), None)
  np.testing.assert_array_equal(read['2048'].mean, GAUSSIAN.mean)
  with pytest.raises(UserError, match=told) as error:
    statistics.read(path, judge_of(**protocol), None)
  assert str(path) in str(error.value)
  assert '\n' not in str(error.value)


def test_statistics_of_another_tap_or_number_of_images(tmp_path):
  """Of 3 features both; the number of images makes no difference."""
  path = tmp_path / 'statistics.npz'
  statistics.write(path, {'2048': GAUSSIAN}, statistics.describe(judge_of(), 7))
  other = judge_of()._replace(taps={'768': 'fid_768'})
  with pytest.raises(UserError, match='tap: 2048 there, 768 here'):
    statistics.read(path, other, None)
  there, here = (statistics.describe(judge_of(), n) for n in (7, 9))
  statistics.check_alike(path, there, here)


@pytest.mark.parametrize(
  'damaged', ['', '{', '[1]', '{"mu": 3}', '[' * 10_000, 'x' * 100_000, 5.0]
)
def test_a_record_that_cannot_be_read_is_none(tmp_path, damaged):
  path = tmp_path / 'statistics.npz'
  np.savez(path, mu=GAUSSIAN.mean, sigma=GAUSSIAN.covariance, made_with=damaged)
  assert statistics.origin(path) == {}
  statistics.read(path, judge_of(), None)


def test_what_statistics_were_made_with_is_on_the_card(there, tmp_path):
  written = tmp_path / 'written.npz'
  how = ('--samples={there}/a.npz', *PIXELS)
  card_of(there, *how, '--reference={there}/b.npz',
          f'--write_statistics={written}')  # fmt: skip
  known = card_of(
    there, *how, f'--reference={written}',
    f'--write_statistics={tmp_path}/again.npz',
  )  # fmt: skip
  facts = known['details']['reference_made_with']['mu']
  assert facts['features'] == 'pixels'
  assert facts['num_images'] == 12
  assert not any('does not say' in x for x in known['details']['caveats'])
  assert statistics.origin(tmp_path / 'again.npz') == {'mu': facts}

  with np.load(written) as arrays:
    unknown = {name: arrays[name] for name in ('mu', 'sigma')}
  np.savez(tmp_path / 'unknown.npz', **unknown)
  of_others = f'--reference={tmp_path}/unknown.npz'
  card = card_of(
    there, *how, of_others, f'--write_statistics={tmp_path}/again.npz'
  )
  assert card['details']['reference_made_with'] == {}
  assert card['details']['caveats'][-1].endswith(
    'unknown.npz does not say which network and convention it was made with; '
    'pixels is assumed'
  )
  assert statistics.origin(tmp_path / 'again.npz') == {}  # still unknown
  both = fid(there, f'--samples={written}', of_others)
  assert both.code == 0, both.err
  assert 'the same as those of the other file are assumed' in both.out


def test_two_files_of_unlike_statistics_are_refused(there, tmp_path):
  for name, convention in (('a', 'tf1'), ('b', 'pytorch-fid')):
    made = statistics.describe(judge_of(convention=convention))
    statistics.write(tmp_path / f'{name}.npz', {'2048': GAUSSIAN}, made)
  result = fid(
    there, f'--samples={tmp_path}/a.npz', f'--reference={tmp_path}/b.npz'
  )
  assert 'convention: tf1 there, pytorch-fid here' in result.message


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_numbers_that_are_not_finite_have_no_distance(there, tmp_path, value):
  mesh, judge = mesh_of(1), features.pixels((8, 8, 3))
  images = np.zeros((3, 8, 8, 3), np.float32)
  images[1, 0, 0] = value
  with pytest.raises(UserError, match='pixels that are not finite'):
    list(features.passes(judge, [images], 2, mesh))


@pytest.mark.slow
def test_a_damaged_file_of_the_cache_is_written_anew(there):
  how = ['--samples={there}/few.npy', '--reference={there}/b', *NETWORK]
  first = card_of(there, *how, cache='hurt')
  (path,) = (there / 'hurt' / 'statistics').rglob('*.npz')
  content = path.read_bytes()
  path.write_bytes(content[:100])
  again = card_of(there, *how, cache='hurt')
  assert again['results'] == first['results']
  assert len(path.read_bytes()) == len(content)
  # Those that are there are not written again, whatever takes the images.
  before = path.stat().st_mtime_ns
  card_of(there, *how, '--metrics=fid,kid', cache='hurt')
  assert path.stat().st_mtime_ns == before


@pytest.mark.optimized
def test_people_read_it(there):
  result = binaries.run(
    'fid', f'--samples={there}/a', f'--reference={there}/b', '--metrics=fid,pr',
    f'--features={there}/inception.npz', '--taps=64', '--batch_size=4',
    f'--cache={there}/cache',
  )  # fmt: skip
  assert result.code == 0, result.err
  assert 'FID-64' in result.out
  assert 'features inception' in result.out
  assert 'convention tf1' in result.out
  assert 'note: fid_64: 12 images in 64 dimensions' in result.out

  np.savez(there / 'unit.npz', mu=np.zeros(64), sigma=np.eye(64))
  result = binaries.run(
    'fid', f'--samples={there}/unit.npz', f'--reference={there}/unit.npz'
  )
  assert result.code == 0, result.err
  assert 'Fréchet distance' in result.out


@pytest.mark.parametrize(
  ('arguments', 'must'),
  [
    ([], '--samples is missing'),
    (['--samples={there}/a'], '--reference is missing'),
    (['--samples={there}/none', '--reference={there}/b'], '/none'),
    (['--samples={there}/a', '--reference={there}/b'], '--download'),
    (
      ['--samples={there}/a', '--reference={there}/large.npy', *PIXELS],
      '--image_size=N',
    ),
    (
      ['--samples={there}/a', '--reference={there}/grey.npy', *PIXELS],
      'cannot be compared; --channels=3',
    ),
    (
      ['--samples={there}/few.npy', '--reference={there}/b', *PIXELS,
       '--metrics=fid,pr'], '6 images',
    ),
    (
      ['--samples={there}/a', '--reference={there}/b', *PIXELS,
       '--metrics=is'], 'has none',
    ),
    (
      ['--samples={there}/a', '--reference={there}/b', *PIXELS,
       '--metrics=sfid'], '--features=inception',
    ),
    (
      ['--samples={there}/a', '--reference={there}/b',
       '--features={there}/inception.npz'], 'lacks conv_3/w',
    ),
    (
      ['--samples={there}/a', '--reference={there}/b', *NETWORK[:1],
       '--taps=65'], "no tap '65'",
    ),
    (
      ['--samples={there}/a', '--reference={there}/b',
       '--features=classifier'], 'is for evaluating a run',
    ),
    (
      ['--samples={there}/a', '--reference={there}/b', *NETWORK,
       '--kid_subsets=1'], '--kid_subsets=1: at least 2',
    ),
    (['--samples={there}/a', '--workdir=x'], 'workdir'),
    (
      ['--samples={there}/a', '--reference={there}/b', '--metrics=bpd'],
      '--metrics=bpd needs a trained network: use evaluate',
    ),
    (
      ['--samples={there}/a', '--reference={there}/b', *PIXELS,
       '--metrics=pr', '--pr_k=60'], 'need at least 61 images',
    ),
    (
      ['--samples={there}/a', '--reference={there}/b', *PIXELS,
       '--kid_seed=4294967296'], '--kid_seed=4294967296: below',
    ),
    (
      ['--samples={there}/a', '--reference={there}/b', *PIXELS,
       '--card={there}'], 'is a folder: give a file',
    ),
    (
      ['--samples={there}/a', '--reference={there}/b', *PIXELS,
       '--write_statistics={there}/a.npz/x.npz'], 'is a file',
    ),
    (
      ['--samples={there}/a', '--reference={there}/b', '--features=nope'],
      '--features=nope: there is no such file',
    ),
  ],
)  # fmt: skip
def test_a_mistake_is_told_in_one_line_and_writes_nothing(
  there, arguments, must
):
  before = sorted(map(str, there.rglob('*')))
  result = fid(there, *arguments, cache='other')
  assert must in result.message
  assert sorted(map(str, there.rglob('*'))) == before


def test_statistics_of_another_network(there, tmp_path):
  np.savez(tmp_path / 'of3.npz', mu=np.zeros(3), sigma=np.eye(3))
  result = fid(
    there, '--samples={there}/a', f'--reference={tmp_path}/of3.npz', *NETWORK
  )
  assert '3 dimensions' in result.message
  assert '64' in result.message
  np.savez(tmp_path / 'of64.npz', mu=np.zeros(64), sigma=np.eye(64))
  result = fid(
    there, '--samples={there}/a', f'--reference={tmp_path}/of64.npz', *NETWORK,
    '--metrics=fid,kid',
  )  # fmt: skip
  assert 'kid need images' in result.message
  result = fid(
    there, f'--samples={tmp_path}/of3.npz', f'--reference={tmp_path}/of64.npz'
  )
  assert 'statistics of 3 and of 64 dimensions' in result.message
