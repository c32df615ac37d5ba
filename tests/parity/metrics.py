"""Our metrics against torch-fidelity's, of the same random features.

`compare` is the one comparison. What it compares with comes from torch-fidelity
itself (`reference_live`) or from a file (`reference_golden`), which
tests/golden/make_metrics.py writes. The features follow from a seed, so that
the file holds numbers only.
"""

import json
import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'metrics.json'
TOLERANCE = 1e-6

COUNTS, DIM, NUM_CLASSES = (320, 280), 48, 20
SEED = 2020
SUBSETS = {'num_subsets': 20, 'subset_size': 100}


def given() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Samples [N, D], reference [M, D] and logits [N, K], float64.

  From NumPy's frozen generator, so that they are the same in any version.
  """
  rng = np.random.RandomState(0)
  mixing = rng.standard_normal((DIM, DIM)) * np.exp(-np.arange(DIM) / 4)
  samples, reference = (
    rng.standard_normal((count, DIM)) @ mixing.T for count in COUNTS
  )
  logits = 2 * rng.standard_normal((COUNTS[0], NUM_CLASSES))
  return 0.9 * samples + 0.1, reference, logits


def of_given() -> float:
  """One number of all that is given: where it differs, so does the question."""
  return float(sum(np.square(x).mean() for x in given()))


def reference_live() -> dict:
  """What torch-fidelity answers."""
  import torch
  from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

  samples, reference, logits = (torch.from_numpy(x) for x in given())
  statistics = [
    metric_fid.fid_features_to_statistics(x) for x in (samples, reference)
  ]
  frechet = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
  kid = metric_kid.kid_features_to_metric(
    samples, reference, kid_subsets=SUBSETS['num_subsets'],
    kid_subset_size=SUBSETS['subset_size'], rng_seed=SEED, verbose=False,
  )  # fmt: skip
  shuffled = metric_isc.isc_features_to_metric(logits, 10, True, SEED)
  ordered = metric_isc.isc_features_to_metric(logits, 10, False)
  precision = metric_prc.prc_features_to_metric(
    samples, reference, prc_neighborhood=3, prc_batch_size=100,
    save_cpu_ram=False, verbose=False,
  )  # fmt: skip
  return {
    'given': of_given(),
    'frechet': frechet[metric_fid.KEY_METRIC_FID],
    'kid': kid[metric_kid.KEY_METRIC_KID_MEAN],
    'kid_std': kid[metric_kid.KEY_METRIC_KID_STD],
    'score': ordered[metric_isc.KEY_METRIC_ISC_MEAN],
    'score_std': ordered[metric_isc.KEY_METRIC_ISC_STD],
    'shuffled_score': shuffled[metric_isc.KEY_METRIC_ISC_MEAN],
    'shuffled_score_std': shuffled[metric_isc.KEY_METRIC_ISC_STD],
    'precision': precision[metric_prc.KEY_METRIC_PRECISION],
    'recall': precision[metric_prc.KEY_METRIC_RECALL],
  }


def reference_golden() -> dict:
  """What torch-fidelity answered when the file was made."""
  return json.loads(GOLDEN.read_text())


def ours() -> dict:
  """What we answer."""
  from diffusion_jax.evaluation.metrics import (
    frechet,
    inception_score,
    kid,
    precision,
  )

  samples, reference, logits = given()
  of_subsets = kid.over_subsets(samples, reference, seed=SEED, **SUBSETS)
  found = precision.precision_recall(samples, reference)

  def score(seed):
    splits = inception_score.splits_of(len(logits), 10, seed)
    sums = inception_score.nothing(10, NUM_CLASSES)
    return inception_score.score_of(
      inception_score.update(sums, logits, splits)
    )

  return {
    'given': of_given(),
    'frechet': frechet.distance(
      frechet.moments_of(samples), frechet.moments_of(reference)
    ),
    'kid': of_subsets.mean,
    'kid_std': of_subsets.std,
    'score': score(None).mean,
    'score_std': score(None).std,
    'shuffled_score': score(SEED).mean,
    'shuffled_score_std': score(SEED).std,
    'precision': found.precision,
    'recall': found.recall,
  }


def compare(reference: dict) -> float:
  """The largest relative difference, which must be below TOLERANCE."""
  got = ours()
  assert got.keys() == reference.keys()
  errors = {
    name: abs(got[name] / value - 1) for name, value in reference.items()
  }
  assert max(errors.values()) < TOLERANCE, f'relative errors {errors}'
  return max(errors.values())
