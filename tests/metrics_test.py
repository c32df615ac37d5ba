"""FID, KID, Inception Score, precision and recall, against closed forms.

References are written anew in NumPy and SciPy, with every pair and every
probability in memory.
"""

import zipfile

import numpy as np
import pytest
import scipy.linalg
import scipy.special
from scipy.spatial import distance as scipy_distance

from diffusion_jax.evaluation import statistics
from diffusion_jax.evaluation.metrics import (
  frechet,
  inception_score,
  kid,
  precision,
)
from diffusion_jax.system.errors import UserError


def features_of(count, dim, seed, scale=1.0, shift=0.0):
  """Correlated, with variances over three orders, as a network's are."""
  rng = np.random.default_rng(seed)
  mixing = np.random.default_rng(99).normal(size=(dim, dim)) / np.sqrt(dim)
  spread = np.exp(-3 * np.arange(dim) / dim)
  x = rng.normal(size=(count, dim)) * spread @ mixing
  return scale * x + shift


# --- Frechet -----------------------------------------------------------------


def nuclear_distance(a, b):
  """From the features themselves: tr (C_a C_b)^(1/2) is |A B^T|_*.

  A and B are what deviates from the means, over sqrt(N - 1). No covariance is
  formed and no root taken, so it is as good where they are singular.
  """
  means = [x.mean(0) for x in (a, b)]
  a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
  cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
  traces = np.square(a).sum() + np.square(b).sum()
  return np.square(means[0] - means[1]).sum() + traces - 2 * cross


@pytest.mark.parametrize(
  ('n_a', 'n_b', 'dim'),
  [(700, 600, 128), (60, 700, 256), (60, 50, 256), (257, 256, 256), (2, 3, 64)],
)
def test_distance_of_any_rank(n_a, n_b, dim):
  a = features_of(n_a, dim, 1)
  b = features_of(n_b, dim, 2, scale=1.1, shift=0.05)
  got = frechet.distance(frechet.moments_of(a), frechet.moments_of(b))
  np.testing.assert_allclose(got, nuclear_distance(a, b), rtol=1e-8)


def test_distance_equals_scipys_root():
  """With covariances that SciPy's can take: positive definite by far."""
  a, b = features_of(600, 96, 1), features_of(500, 96, 2, shift=0.1)
  covariances = [np.cov(x, rowvar=False) for x in (a, b)]
  root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
  expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(
    covariances[0] + covariances[1] - 2 * root.real
  )
  got = frechet.distance(frechet.moments_of(a), frechet.moments_of(b))
  np.testing.assert_allclose(got, expected, rtol=1e-8)


def bias(a, count):
  """Expected distance of `count` draws from their Gaussian, to order 1 / count.

  With eigenvalues l_i of C, to second order in the Wishart noise of the
  covariance and without any in the mean,

    E d = [ sum_i l_i + sum_ij l_i l_j / (2 (l_i + l_j)) + sum_i l_i / 4 ] / N

  which is (1 + (D + 1) / 4) tr C / N if all l_i are equal: it grows with D.
  (For D = 1 it is s^2 / N + s^2 / (2 N), from the mean and the deviation.) The
  distance between two sets from one Gaussian is the sum of their biases. The
  formula holds for N far above the rank of C, and fails for N below it. The
  order 1 / N is from arXiv 1911.07023; the terms are derived here.
  """
  values = np.linalg.eigvalsh(a.covariance)
  pairs = values[:, None] * values / (values[:, None] + values)
  return (1.25 * values.sum() + pairs.sum() / 2) / count


@pytest.mark.parametrize('other', [False, True])
def test_few_images_lie_from_their_gaussian_by_the_bias(other):
  """The mean of 1,500 draws, to 4 standard errors and an order 1 / N^2."""
  count, draws = 400, 1500
  deviations = np.array([2.0, 1.0, 0.5, 0.1])
  truth = frechet.Gaussian(np.zeros(4), np.diag(deviations**2))
  rng = np.random.default_rng(7)

  def drawn():
    return frechet.moments_of(rng.normal(size=(count, 4)) * deviations)

  distances = [
    frechet.distance(drawn(), drawn() if other else truth) for _ in range(draws)
  ]
  expected = bias(truth, count) * (2 if other else 1)
  error = np.std(distances) / np.sqrt(draws)
  assert error < 0.02 * expected  # else it would say little
  assert abs(np.mean(distances) - expected) < 4 * error + 0.01 * expected


@pytest.mark.parametrize('dim', [128, 256])
def test_simulated_bias_of_equal_variances(dim):
  truth = frechet.Gaussian(np.zeros(dim), 3 * np.eye(dim))
  count = 50 * dim
  expected = (1 + (dim + 1) / 4) * 3 * dim / count
  assert bias(truth, count) == pytest.approx(expected, rel=1e-12)
  got = frechet.simulated_bias(truth, count)
  assert got == pytest.approx(expected, rel=0.05)


def test_statistics_come_back(tmp_path):
  a, b = (frechet.moments_of(features_of(50, 8, seed)) for seed in (1, 2))
  path = tmp_path / 'deeper' / 'a.npz'
  statistics.write(path, {'x': frechet.Gaussian(a.mean, a.covariance)})
  with np.load(path) as file:  # as pytorch-fid reads them
    assert sorted(file) == ['mu', 'sigma']
    assert file['mu'].dtype == file['sigma'].dtype == np.float64
  read = statistics.read_gaussian(path, dim=8)
  np.testing.assert_array_equal(read.mean, a.mean)
  np.testing.assert_allclose(read.covariance, a.covariance, rtol=1e-15)
  assert frechet.distance(read, b) == pytest.approx(
    frechet.distance(a, b), rel=1e-12
  )


@pytest.mark.parametrize('savez', [np.savez, np.savez_compressed])
def test_others_statistics_are_read(savez, tmp_path):
  """With other arrays beside them, of which nothing is looked at."""
  a = frechet.moments_of(features_of(50, 8, 1))
  path = tmp_path / 'a.npz'
  savez(
    path,
    mu=a.mean.astype(np.float32),
    sigma=a.covariance.astype(np.float32),
    mu_s=a.mean + 1,
    sigma_s=np.asfortranarray(4 * a.covariance),
    activations=np.array([{}], object),
  )
  np.testing.assert_allclose(
    statistics.read_gaussian(path).mean, a.mean, rtol=1e-6
  )
  spatial = statistics.read_gaussian(path, 8, keys=('mu_s', 'sigma_s'))
  np.testing.assert_allclose(spatial.covariance, 4 * a.covariance, rtol=1e-15)


def test_what_is_no_statistics_is_answered_in_one_line(tmp_path, monkeypatch):
  monkeypatch.setattr(statistics, 'MOST', 16)
  path = tmp_path / 'a.npz'
  mu, sigma = np.zeros(3), np.eye(3)

  def save(**arrays):
    np.savez_compressed(path, **arrays)

  def claim(shape):
    """A header that promises more than there is."""
    with zipfile.ZipFile(path, 'w') as archive:
      for name in ('mu.npy', 'sigma.npy'):
        with archive.open(name, 'w') as file:
          np.lib.format.write_array_header_1_0(
            file, {'descr': '<f8', 'fortran_order': False, 'shape': shape}
          )

  def cut():
    save(mu=mu, sigma=sigma)
    path.write_bytes(path.read_bytes()[:-60])

  cases = [
    ('No such file', lambda: None),
    ('no readable statistics', lambda: path.write_bytes(b'PK nothing')),
    ('no readable statistics', cut),
    ('no readable statistics', lambda: claim((10**6, 10**6))),
    ('no readable statistics', lambda: claim((10**12, 10**12))),
    ('sigma is not a file.*it holds mu, x', lambda: save(mu=mu, x=mu)),
    ('mu is not a file', lambda: save()),
    ('Object arrays', lambda: save(mu=mu, sigma=np.array([{}], object))),
    ('int64', lambda: save(mu=mu.astype(int), sigma=sigma)),
    (r'shapes \[3\] and \[4, 4\]', lambda: save(mu=mu, sigma=np.eye(4))),
    (r'shapes \[3\] and \[3\]', lambda: save(mu=mu, sigma=mu)),
    (r'shapes \[0\]', lambda: save(mu=mu[:0], sigma=sigma[:0, :0])),
    ('not finite', lambda: save(mu=mu, sigma=sigma * np.nan)),
    ('halves differ', lambda: save(mu=mu, sigma=np.triu(np.ones((3, 3))))),
    ('below 0', lambda: save(mu=mu, sigma=-sigma)),
    ('takes 80280 bytes', lambda: save(mu=mu, sigma=np.eye(100))),
    ('has 3 dimensions, but the features here have 2048', lambda: save(
      mu=mu, sigma=sigma
    )),
  ]  # fmt: skip
  for said, make in cases:
    make()
    with pytest.raises(UserError, match=said) as error:
      statistics.read_gaussian(path, dim=2048)
    assert '\n' not in str(error.value)
    assert str(path) in str(error.value)


# --- KID ---------------------------------------------------------------------


def mean_kernel(m_1, c_1, m_2, c_2):
  """E (x.y / D + 1)^3 of independent Gaussians.

  Given y, x.y is a Gaussian of mean m_1.y and variance y.C_1 y; the moments of
  those over y follow from Isserlis' theorem.
  """
  m = m_1 @ m_2
  first = m
  second = np.trace(c_1 @ c_2) + m_1 @ c_2 @ m_1 + m_2 @ c_1 @ m_2 + m**2
  third = (
    m**3
    + 3 * m * (m_1 @ c_2 @ m_1 + m_2 @ c_1 @ m_2 + np.trace(c_1 @ c_2))
    + 6 * m_1 @ c_2 @ c_1 @ m_2
  )
  dim = len(m_1)
  return 1 + 3 * first / dim + 3 * second / dim**2 + third / dim**3


@pytest.mark.parametrize('equal', [True, False])
def test_kid_has_no_bias(equal):
  """The mean of 4,000 draws of 6 and 9 images, to 4 standard errors."""
  dim, rng = 5, np.random.default_rng(3)
  roots = rng.normal(size=(2, dim, dim)) / 2
  means = rng.normal(size=(2, dim))
  if equal:
    roots[1], means[1] = roots[0], means[0]
  covariances = [root.T @ root for root in roots]

  def drawn(i, count):
    return rng.normal(size=(count, dim)) @ roots[i] + means[i]

  values = [kid.squared_mmd(drawn(0, 6), drawn(1, 9)) for _ in range(4000)]
  args = list(zip(means, covariances, strict=True))
  expected = (
    mean_kernel(*args[0], *args[0])
    + mean_kernel(*args[1], *args[1])
    - 2 * mean_kernel(*args[0], *args[1])
  )
  error = np.std(values) / np.sqrt(len(values))
  assert abs(np.mean(values) - expected) < 4 * error
  if equal:
    assert expected == pytest.approx(0, abs=1e-12)
    assert np.min(values) < 0
  else:
    assert expected > 20 * error  # else 0 would pass too


def every_pair(x, y):
  """The unbiased estimate, pair by pair."""

  def mean(a, b, is_same):
    kernel = np.array([[(u @ v / len(u) + 1) ** 3 for v in b] for u in a])
    return kernel[~np.eye(len(a), dtype=bool) if is_same else ...].mean()

  return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


@pytest.mark.parametrize('block_size', [1, 7, 40, 41, 1000])
def test_kid_in_blocks_is_that_of_every_pair(block_size):
  x, y = features_of(41, 6, 1, shift=1), features_of(30, 6, 2, shift=1.5)
  got = kid.squared_mmd(x, y, block_size=block_size)
  np.testing.assert_allclose(got, every_pair(x, y), rtol=1e-9)
  float32 = kid.squared_mmd(x.astype(np.float32), y, block_size=block_size)
  np.testing.assert_allclose(float32, got, rtol=1e-5)


def test_kid_over_subsets():
  x, y = features_of(400, 6, 1), features_of(300, 6, 2, shift=0.5)
  how = {'num_subsets': 200, 'subset_size': 50}
  got = kid.over_subsets(x, y, seed=0, **how)
  assert got == kid.over_subsets(x, y, seed=0, **how)
  assert got != kid.over_subsets(x, y, seed=1, **how)
  assert got.subset_size == 50
  assert got.standard_error == pytest.approx(got.std / np.sqrt(199))
  # Subsets of one set have its own estimate as their mean.
  assert abs(got.mean - kid.squared_mmd(x, y)) < 4 * got.standard_error
  rng, values = np.random.RandomState(0), []
  for _ in range(200):
    chosen = [z[rng.permutation(len(z))[:50]] for z in (x, y)]
    values.append(kid.squared_mmd(*chosen))
  np.testing.assert_allclose(
    got[:2], (np.mean(values), np.std(values)), rtol=1e-12
  )


def test_kid_of_few_images():
  x, y = features_of(20, 6, 1), features_of(30, 6, 2)
  got = kid.over_subsets(x, y, seed=0, num_subsets=3)
  assert got.subset_size == 20
  with pytest.raises(UserError, match='at least 2'):
    kid.over_subsets(x[:1], y, seed=0)
  with pytest.raises(UserError, match='at least 2'):
    kid.over_subsets(x, y, seed=0, num_subsets=1)


# --- Inception Score ---------------------------------------------------------


def plain_score(logits, num_splits):
  """As the original: KL of each image to its split's mean."""
  p = scipy.special.softmax(logits, 1)
  count, scores = len(p), []
  for i in range(num_splits):
    part = p[i * count // num_splits : (i + 1) * count // num_splits]
    kl = scipy.special.rel_entr(part, part.mean(0)).sum(1)
    scores.append(np.exp(kl.mean()))
  return np.mean(scores), np.std(scores)


def score_of(logits, num_splits=10, seed=None, batch=None):
  logits = np.asarray(logits)
  splits = inception_score.splits_of(len(logits), num_splits, seed)
  sums = inception_score.nothing(num_splits, logits.shape[1])
  batch = batch or len(logits)
  for i in range(0, len(logits), batch):
    sums = inception_score.update(
      sums, logits[i : i + batch], splits[i : i + batch]
    )
  return inception_score.score_of(sums)


def random_logits(count, num_classes):
  return 3 * np.random.default_rng(5).normal(size=(count, num_classes))


@pytest.mark.parametrize('num_splits', [1, 3, 10])
@pytest.mark.parametrize('batch', [1, 7, 50, 203])
def test_score_in_any_batches(num_splits, batch):
  logits = random_logits(203, 12)
  got = score_of(logits, num_splits, batch=batch)
  np.testing.assert_allclose(got, plain_score(logits, num_splits), rtol=1e-10)


def test_score_of_a_permutation():
  logits = np.sort(random_logits(203, 12), axis=0)
  order = np.random.RandomState(2020).permutation(203)
  got = score_of(logits, seed=2020, batch=50)
  np.testing.assert_allclose(got, plain_score(logits[order], 10), rtol=1e-10)
  assert got != score_of(logits)


def test_score_at_its_ends():
  """1 where all look alike, K where each class is sure and equally frequent."""
  np.testing.assert_allclose(score_of(np.zeros((40, 7))), (1, 0), atol=1e-12)
  same = np.tile(random_logits(1, 7), (40, 1))
  np.testing.assert_allclose(score_of(same), (1, 0), atol=1e-12)
  sure = np.tile(np.where(np.eye(4), 0, -np.inf), (20, 1))
  np.testing.assert_allclose(score_of(sure), (4, 0), atol=1e-12)
  np.testing.assert_allclose(
    score_of(np.tile(2e3 * np.eye(4), (20, 1))), (4, 0)
  )
  # In order of their classes: a split each, and in each nothing but one.
  ordered = np.repeat(np.where(np.eye(4), 0, -np.inf), 5, axis=0)
  np.testing.assert_allclose(score_of(ordered, 4), (1, 0), atol=1e-12)


def test_splits_share_the_images():
  for count, num_splits in ((203, 10), (10, 10), (11, 3), (5, 1)):
    for seed in (None, 4):
      splits = inception_score.splits_of(count, num_splits, seed)
      sizes = np.bincount(splits, minlength=num_splits)
      assert len(splits) == sizes.sum() == count
      assert sizes.max() - sizes.min() <= 1
  for num_splits in (0, 6):
    with pytest.raises(UserError, match='give between 1 and 5'):
      inception_score.splits_of(5, num_splits)


# --- precision and recall ----------------------------------------------------


def plain_precision(samples, reference, k, density_k):
  """Every pair, by subtraction."""
  within = {
    name: np.sort(scipy_distance.cdist(x, x), 1)
    for name, x in (('x', samples), ('y', reference))
  }
  across = scipy_distance.cdist(samples, reference)
  inside = across <= within['y'][:, density_k]
  return (
    (across <= within['y'][:, k]).any(1).mean(),
    (across <= within['x'][:, k, None]).any(0).mean(),
    inside.sum() / density_k / len(samples),
    inside.any(0).mean(),
  )


@pytest.mark.parametrize('block_size', [1, 17, 80, 120, 500])
def test_precision_in_blocks_is_that_of_every_pair(block_size):
  x = features_of(120, 6, 1, shift=40.0)
  y = features_of(80, 6, 2, scale=1.3, shift=40.2)
  got = precision.precision_recall(x, y, block_size=block_size)
  np.testing.assert_allclose(got, plain_precision(x, y, 3, 5), rtol=1e-12)
  assert all(0.1 < value < 0.9 for value in got[:2])
  again = precision.precision_recall(x, y, k=1, density_k=2)
  np.testing.assert_allclose(again, plain_precision(x, y, 1, 2), rtol=1e-12)
  assert again != got


def test_precision_of_constructed_sets():
  x = features_of(100, 64, 1, shift=3.0)
  of = precision.precision_recall
  equal = of(x, x)
  assert equal[:2] == (1, 1)
  assert equal.coverage == 1
  assert equal.density >= 1  # its own ball, and k others on average
  assert of(x, x + 100) == (0, 0, 0, 0)
  # A part lies in the whole; of the whole, less in the part's balls.
  near = x[np.argsort(np.linalg.norm(x - x.mean(0), axis=1))[:50]]
  some = of(near, x)
  assert some.precision == 1
  assert some.recall < 1
  assert of(x, near)[:2] == some[1::-1]
  # Two clusters of which samples have one.
  both = np.concatenate([x, x + 100])
  assert of(x, both)[:2] == (1, 0.5)


def test_ties_are_inside_and_equal_points_neighbours():
  def of(samples, reference, k):
    return precision.precision_recall(
      np.array(samples, float), np.array(reference, float), k=k, density_k=k
    )

  line = [[0], [1], [2]]
  assert of([[-1], [3], [9]], line, 1).precision == pytest.approx(2 / 3)
  # Four equal images: a ball of no size holds what equals them, and no more.
  heap = [[0.3, 0.7]] * 4
  assert of(heap, heap, 3) == (1, 1, 4 / 3, 1)
  assert of([[0.3, 0.701]] * 4, heap, 3) == (0, 0, 0, 0)
  # Far from the center of the reference, where rounding is largest.
  x = features_of(200, 64, 1)
  doubled = np.concatenate([x, x])
  assert of(x, doubled, 1)[:2] == (1, 1)
  assert of(doubled + 1e-2, doubled, 1)[:2] == (0, 0)
  # Each sample on the surface of the ball of another reference image.
  spheres = 50 * features_of(40, 64, 2)
  step = np.zeros(64)
  step[0] = 0.5
  pairs = np.concatenate([spheres, spheres + step])
  assert of(np.concatenate([spheres - step, spheres]), pairs, 1).precision == 1


def test_density_and_coverage_of_one_distribution():
  """Ranks alone decide (arXiv 2002.09797), in any dimension.

  A sample is among the k nearest of N - 1 others and itself with k / N. A ball
  stays empty where the k nearest of N - 1 others and M samples are all others.
  The mean of 1,000 draws, to 4 standard errors.
  """
  samples, reference, k, rng = 20, 30, 4, np.random.default_rng(11)
  found = []
  for _ in range(1000):
    x, y = rng.normal(size=(samples, 3)), rng.normal(size=(reference, 3))
    found.append(precision.precision_recall(x, y, density_k=k)[2:])
  others = reference - 1 - np.arange(k)
  expected = [1, 1 - np.prod(others / (others + samples))]
  error = np.std(found, 0) / np.sqrt(len(found))
  assert (np.abs(np.mean(found, 0) - expected) < 4 * error).all()
  assert error.max() < 0.02


def test_precision_of_too_few_images():
  x = features_of(6, 3, 1)
  precision.precision_recall(x, x)
  for samples, reference in ((x[:3], x), (x, x[:5])):
    with pytest.raises(UserError, match='use more images or a smaller k'):
      precision.precision_recall(samples, reference)
  with pytest.raises(UserError, match='neighbours 0'):
    precision.precision_recall(x, x, k=0)


# --- what is to be told ------------------------------------------------------


@pytest.mark.parametrize(
  ('caveats', 'args', 'few'),
  [
    (frechet.caveats, (2048,), 2048),
    (kid.caveats, (1000,), 1000),
    (inception_score.caveats, (1008, 10), 10_079),
  ],
)
def test_too_few_images_are_told(caveats, args, few):
  assert caveats(few + 1, *args) == []
  (line,) = caveats(few, *args)
  assert f'{few} images' in line
  assert '\n' not in line
