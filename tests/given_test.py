"""What users give as a set of images: stores, runs, features, pickles."""

import shutil

import numpy as np
import pytest
from judges import brightness, random_features, random_images

from diffusion_jax.cli import given
from diffusion_jax.data import sets
from diffusion_jax.evaluation import features, statistics, stored_features
from diffusion_jax.evaluation.metrics import frechet
from diffusion_jax.runs import store
from diffusion_jax.system.errors import UserError


def refused(text, flag='reference') -> str:
  with pytest.raises(UserError) as error:
    given.check(flag, str(text))
  message = str(error.value)
  assert message.startswith(f'--{flag}={text} ')
  assert '\n' not in message
  return message


# --- features ----------------------------------------------------------------


@pytest.fixture
def pool(tmp_path):
  return random_features(2500, 6, 0).astype(np.float32), tmp_path / 'f.npz'


@pytest.mark.parametrize(
  ('name', 'shape'),
  [('pool_3', (6,)), ('feats', (1, 1, 6)), ('arr_0', (6,)), ('act', (6, 1))],
)
def test_features_become_statistics(pool, capsys, name, shape):
  x, path = pool
  np.savez(path, **{name: x.reshape(-1, *shape), 'labels': np.zeros(2500)})
  assert statistics.is_file(path)
  given.check('reference', str(path))
  found = statistics.read_gaussian(path, 6)
  np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-6)
  np.testing.assert_allclose(
    found.covariance, np.cov(x, rowvar=False), rtol=1e-5, atol=1e-6
  )
  told = capsys.readouterr().err
  assert f'{path}: mean and covariance are computed from {name} [2500, 6]' in (
    told
  )


def test_features_in_a_npy_and_compressed_ones(pool, tmp_path):
  x, path = pool
  np.savez_compressed(path, pool_3=x)
  np.save(tmp_path / 'f.npy', x.astype(np.float64))
  first, second = map(statistics.read_gaussian, (path, tmp_path / 'f.npy'))
  np.testing.assert_allclose(first.covariance, second.covariance, rtol=1e-5)


@pytest.mark.parametrize('shape', [(6,), (6, 1, 1)])
def test_features_in_the_order_of_fortran(pool, shape):
  """As NumPy saves an array that was transposed."""
  x, path = pool
  np.savez(path, pool_3=np.asfortranarray(x.reshape(-1, *shape)))
  found = statistics.read_gaussian(path, 6)
  np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-6)
  np.testing.assert_allclose(
    found.covariance, np.cov(x, rowvar=False), rtol=1e-5, atol=1e-6
  )


def test_few_features_are_told(pool, capsys):
  x, path = pool
  np.savez(path, pool_3=x[:5])
  statistics.read_gaussian(path)
  assert 'fewer than dimensions' in capsys.readouterr().err


def test_other_arrays_are_no_features(pool):
  x, path = pool
  for arrays in (
    {'arr_0': random_images(3)},
    {'pool_3': x.astype(np.int32)},
    {'pool_3': np.array([None])},
    {'pool_3': x[0]},
    {'weights': x},
  ):
    np.savez(path, **arrays)
    assert stored_features.find(path) is None
    assert not statistics.is_file(path)
  path.write_bytes(b'PK nothing')
  assert stored_features.find(path) is None


@pytest.mark.parametrize(
  ('change', 'must'),
  [
    (lambda x: x[:1], 'at least 2 rows'),
    (lambda x: np.full_like(x, np.nan), 'not finite'),
    (lambda x: np.zeros((3, 9000), np.float32), 'at most 8192'),
    (lambda x: np.zeros((3, 2048), np.float32), '--features=inception'),
  ],
)
def test_features_that_are_of_no_use(pool, change, must):
  x, path = pool
  np.savez(path, pool_3=change(x))
  with pytest.raises(UserError, match=must):
    statistics.read_gaussian(path, 6)


def test_features_that_are_cut_off(pool):
  x, path = pool
  np.save(path.with_suffix('.npy'), x)
  content = path.with_suffix('.npy').read_bytes()
  path.with_suffix('.npy').write_bytes(content[:-8])
  with pytest.raises(UserError, match='is damaged'):
    statistics.read_gaussian(path.with_suffix('.npy'))


@pytest.mark.parametrize(
  'names', [('mu', 'sigma'), ('mean', 'cov'), ('m', 's')]
)
def test_statistics_by_other_names(tmp_path, names):
  path, values = tmp_path / 's.npz', (np.arange(2.0), np.eye(2))
  np.savez(path, **dict(zip(names, values, strict=True)))
  assert statistics.is_file(path)
  judge = brightness()._replace(taps={'both': 'frechet'})
  found = statistics.read(path, judge, None)['both']
  for one, other in zip(found, frechet.Gaussian(*values), strict=True):
    np.testing.assert_array_equal(one, other)


def test_an_archive_of_something_else(tmp_path):
  np.savez(tmp_path / 'x.npz', weights=np.eye(3), more=np.eye(3))
  message = refused(tmp_path / 'x.npz')
  for must in ('holds weights, more', 'mu and sigma', 'pool_3 [N, D]', 'arr_0'):
    assert must in message


@pytest.mark.parametrize('name', ['edm.pkl', 'torch-fidelity.pt', 'a.pickle'])
def test_pickles_are_not_read(tmp_path, name):
  (tmp_path / name).write_bytes(b'\x80\x04cos\nsystem\n.')
  assert 'np.savez(FILE.npz, mu=..., sigma=...)' in refused(tmp_path / name)


# --- stores and runs ---------------------------------------------------------


def store_in(path, images, **protocol):
  store.open_store(path, {'seed': 0, **protocol})
  for first in range(0, len(images), 5):
    indices = np.arange(first, min(first + 5, len(images)))
    store.save(path, indices, images[indices])
  (path / 'grid.png').write_bytes(b'not read')
  return path


def test_a_store_is_the_set_of_its_samples(tmp_path):
  images = random_images(13)
  path = store_in(tmp_path / 'store', images)
  store.save(path, [2, 3], images[2:4] * 0)  # an overlapping part
  store.save(path, [20], images[:1])  # beyond a gap
  given.check('samples', str(path))
  source = given.store_of(str(path), 8, 1)
  assert len(source) == 13
  assert source.num_classes == 0
  (block,) = features.images_of(source).stream()
  np.testing.assert_array_equal(block[4:], images[4:])
  assert 'its first 13 samples' in source.notes[0]
  with pytest.raises(UserError, match='8x8x1, not 16x16x1'):
    given.store_of(str(path), 16)
  assert given.store_of(str(tmp_path)) is None


def test_a_store_of_floats_is_rounded(tmp_path):
  images = random_images(4)
  path = store_in(
    tmp_path / 'store', images.astype(np.float32) + 0.4, dtype='float32'
  )
  source = given.store_of(str(path))
  np.testing.assert_array_equal(source[3]['image'], images[3])
  assert 'rounded to 8 bits' in source.notes[0]


def test_a_damaged_part_is_named(tmp_path):
  path = store_in(tmp_path / 'store', random_images(9))
  source = given.store_of(str(path))
  part = path / 'parts' / '000000005-000000008.npy'
  part.write_bytes(part.read_bytes()[:-1])
  with pytest.raises(UserError, match=f'{part} is damaged'):
    source[6]


def test_a_store_without_samples(tmp_path):
  path = store_in(tmp_path / 'store', random_images(0))
  with pytest.raises(UserError, match='without samples: draw them first'):
    given.store_of(str(path))


def test_a_store_whose_parts_are_deleted_still_has_its_npz(tmp_path):
  path = store_in(tmp_path / 'store', random_images(9))
  whole = store.write_npz(path)
  shutil.rmtree(path / 'parts')
  with pytest.raises(UserError, match=f'without samples: give {whole}'):
    given.store_of(str(path))
  given.check('reference', str(whole))
  assert len(sets.open_set(str(whole))) == 9


def test_a_run_is_no_set(tmp_path):
  (tmp_path / 'checkpoints').mkdir()
  (tmp_path / 'config.json').write_text('{}')
  assert f'diffusion_jax.sample --workdir={tmp_path}' in refused(tmp_path)
  first = store_in(tmp_path / 'samples' / 'ddim', random_images(2))
  assert str(first) in refused(tmp_path, 'samples')
  assert str(first) in refused(tmp_path / 'samples')
  assert given.store_of(str(first))  # the remedy


def test_sets_are_not_refused(tmp_path):
  np.savez(tmp_path / 'a.npz', images=random_images(2))
  np.save(tmp_path / 'a.npy', random_images(2))
  for text in (tmp_path, tmp_path / 'a.npz', tmp_path / 'a.npy', 'digits',
               'tfds:cifar10@test', tmp_path / 'none'):  # fmt: skip
    given.check('reference', str(text))
