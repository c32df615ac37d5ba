"""Recall at k by known answers, its chance, interval and permutations."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from diffusion_jax.evaluation.metrics import retrieval


def unit(count, dim, seed):
  x = np.random.default_rng(seed).normal(size=(count, dim))
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def each(count):
  return np.arange(count)[:, None]


def test_perfect_vectors_find_their_texts(monkeypatch):
  monkeypatch.setattr(retrieval, 'BLOCK', 7)
  texts = unit(50, 8, 0)
  found = retrieval.ranks(texts, texts, each(50))
  assert retrieval.recall(found, 1) == 1
  # The opposite of a vector finds its text last.
  found = retrieval.ranks(-texts, texts, each(50))
  np.testing.assert_array_equal(found, 49)


def test_ranks_are_those_of_a_sort():
  images, texts = unit(40, 5, 1), unit(30, 5, 2)
  own = np.arange(40) % 30
  order = np.argsort(-images @ texts.T, axis=1)
  want = [row.tolist().index(k) for row, k in zip(order, own, strict=True)]
  assert retrieval.ranks(images, texts, own[:, None]).tolist() == want
  # Of several texts the best one counts, and they do not compete.
  several = np.stack([own, (own + 7) % 30], axis=1)
  want = [
    min(row.tolist().index(k) for k in mine)
    for row, mine in zip(order, several, strict=True)
  ]
  assert retrieval.ranks(images, texts, several).tolist() == want


def test_ties_are_no_success():
  same = np.ones((6, 1))
  assert retrieval.recall(retrieval.ranks(same, same, each(6)), 5) == 0
  counts = retrieval.by_text(same, same, np.arange(6), np.arange(6), 5)
  assert counts.sum() == 0
  counts = retrieval.by_text(same, same, np.arange(6), np.arange(6), 6)
  assert counts.sum() == 36


@pytest.mark.parametrize('k', [1, 5, 20])
def test_random_vectors_give_chance(k):
  images, texts = unit(4000, 6, 3), unit(200, 6, 4)
  rng = np.random.default_rng(5)
  one = rng.integers(0, 200, (4000, 1))
  two = np.stack([rng.permutation(200)[:2] for _ in range(4000)])
  for own in (one, two):
    chance = retrieval.chance(own, 200, k)
    got = retrieval.recall(retrieval.ranks(images, texts, own), k)
    assert abs(got - chance) < 4 * math.sqrt(chance * (1 - chance) / 4000)


def test_chance_in_closed_form():
  assert retrieval.chance(np.array([[3]]), 1382, 1) == pytest.approx(1 / 1382)
  assert retrieval.chance(np.array([[3]]), 1382, 5) == pytest.approx(5 / 1382)
  # A repeat counts once; two of four texts among two: 1 - 2/4 1/3.
  mixed = np.array([[0, 0], [1, 2]])
  assert retrieval.chance(mixed, 4, 2) == pytest.approx((1 / 2 + 5 / 6) / 2)
  assert retrieval.chance(mixed, 4, 9) == 1


# --- the interval ------------------------------------------------------------


@pytest.mark.parametrize(('right', 'count'), [(0, 20), (3, 20), (20, 20)])
def test_independent_pictures_have_clopper_and_pearsons_interval(right, count):
  hits = np.arange(count) < right
  got = retrieval.interval(hits, np.arange(count))
  want = scipy.stats.binomtest(right, count).proportion_ci(method='exact')
  np.testing.assert_allclose(got, (want.low, want.high), rtol=1e-9)


def test_pictures_of_one_text_count_as_less():
  # Twelve groups of 20 copies of one picture say as much as twelve pictures.
  alone = np.arange(12) < 4
  got = retrieval.interval(np.repeat(alone, 20), np.repeat(np.arange(12), 20))
  want = retrieval.interval(alone, np.arange(12))
  assert got[0] <= want[0] < want[1] <= got[1]
  assert got[1] - got[0] < 1.2 * (want[1] - want[0])
  nothing = np.zeros(240, bool)
  groups = np.repeat(np.arange(12), 20)
  assert retrieval.interval(nothing, groups) == retrieval.interval(
    np.zeros(12, bool), np.arange(12)
  )
  assert retrieval.interval(nothing, np.zeros(240, int)) is None


def test_the_interval_covers_the_share():
  rng, groups, covered = np.random.default_rng(0), np.repeat(range(30), 10), 0
  for _ in range(400):
    of_group = rng.beta(0.6, 1.4, 30)  # with a mean of 0.3
    hits = rng.random(300) < of_group[groups]
    low, high = retrieval.interval(hits, groups)
    covered += low <= 0.3 <= high
  assert covered >= 0.92 * 400


# --- permutations ------------------------------------------------------------


def test_counts_by_text_are_those_of_ranks(monkeypatch):
  monkeypatch.setattr(retrieval, 'BLOCK', 11)
  images, texts = unit(60, 4, 6), unit(25, 4, 7)
  groups, asked = np.arange(60) % 3, np.array([4, 20, 9])
  for k in (1, 5, 24, 25, 30):
    got = retrieval.by_text(images, texts, groups, asked, k)
    for g, h in itertools.product(range(3), repeat=2):
      mine = images[groups == g]
      own = np.full((len(mine), 1), asked[h])
      want = np.count_nonzero(retrieval.ranks(mine, texts, own) < k)
      assert got[g, h] == want


def test_the_p_value_is_uniform_where_texts_do_not_matter():
  rng = np.random.default_rng(8)
  found = [
    retrieval.permuted(rng.normal(size=(8, 8)), 99, seed) for seed in range(600)
  ]
  places = np.rint(100 * np.array(found)).astype(int)  # 1 to 100
  assert places.min() >= 1
  counts = np.bincount((places - 1) // 10, minlength=10)
  assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_the_p_value_of_rare_hits_is_not_below_its_level():
  rng = np.random.default_rng(9)
  found = np.array([
    retrieval.permuted(rng.random((12, 12)) < 0.1, 199, seed)
    for seed in range(400)
  ])  # fmt: skip
  for level in (0.05, 0.2):
    allowed = level + 3 * math.sqrt(level / 400)
    assert np.mean(found <= level) <= allowed


def test_texts_that_matter_have_a_small_p_value():
  assert retrieval.permuted(20 * np.eye(12), 999) == pytest.approx(1e-3)
  assert retrieval.permuted(1 - np.eye(12), 99) == 1
  assert retrieval.permuted(np.ones((12, 12)), 99) == 1
