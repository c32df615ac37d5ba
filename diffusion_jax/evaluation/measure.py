"""Computes metrics of samples from one pass over each set of images."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from diffusion_jax.evaluation import (
  by_class,
  features,
  looks,
  noise,
  statistics,
)
from diffusion_jax.evaluation.metrics import (
  frechet,
  inception_score,
  kid,
  neighbours,
  precision,
)
from diffusion_jax.system.errors import UserError

METRICS = {
  'fid': 'the Frechet distance, at each tap',
  'sfid': 'the same between spatial features (arXiv 2103.03841)',
  'kid': 'kernel inception distance (arXiv 1801.01401)',
  'is': 'Inception Score (arXiv 1606.03498)',
  'pr': 'precision, recall (arXiv 1904.06991), density, coverage (2002.09797)',
  'copies': 'distances to the nearest training images',
  'classes': "the samples' classes by a classifier",
}
# Metrics that need only statistics of a set.
OF_STATISTICS = ('fid', 'sfid')

KID_SEED = 2020  # as in torch-fidelity
NUM_NEAR = 4  # nearest training images to find
NEAR = 0.05  # the share of held-out images that counts as near


class Options(NamedTuple):
  """Options of the metrics; the defaults are the papers'.

  Attributes:
    kid_subsets: number of subsets, see `kid.over_subsets`.
    kid_subset_size: images per subset, from each set.
    kid_seed: seed of the subsets.
    is_splits: number of splits for the Inception Score.
    is_seed: seed of a permutation before the split, or None, see
      `inception_score.splits_of`.
    pr_k: which neighbour sets the radius, see `precision.precision_recall`.
  """

  kid_subsets: int = kid.NUM_SUBSETS
  kid_subset_size: int = kid.SUBSET_SIZE
  kid_seed: int = KID_SEED
  is_splits: int = inception_score.NUM_SPLITS
  is_seed: int | None = None
  pr_k: int = precision.K


DEFAULTS = Options()


class Task(NamedTuple):
  """How samples are judged, and against what.

  Attributes:
    judge: the network.
    reference: the training images, all of which are used, or statistics.
    metrics: keys of METRICS.
    options: options of the metrics.
    heldout: held-out images, at most as many as there are samples, or None.
    about: other facts that the numbers depend on, for the card.
    more: what else is measured of the samples: images -> (results, details);
      None for nothing.
  """

  judge: features.Judge
  reference: statistics.Set
  metrics: Sequence[str]
  options: Options = DEFAULTS
  heldout: features.Images | None = None
  about: dict = {}  # noqa: RUF012
  more: Callable[[features.Images], tuple[dict, dict]] | None = None

  @property
  def result(self) -> str:
    """The name of the main distance."""
    return next(iter(self.judge.taps.values()))

  @property
  def protocol(self) -> dict:
    """Everything that the numbers depend on, for the card."""
    metrics = [name for name in METRICS if name in self.metrics]
    told = {**self.about, **self.judge.protocol, 'metrics': metrics}
    for name, value in self.options._asdict().items():
      if name.split('_')[0] in metrics:
        told[name] = value
    if {'kid', 'pr'} & set(self.metrics):
      told['num_compared'] = looks.COMPARED
    if 'pr' in self.metrics:
      told['density_k'] = precision.DENSITY_K
    if 'copies' in self.metrics:
      told['num_searched'] = looks.QUERIES
    return {**told, 'num_heldout': self.heldout.count if self.heldout else 0}


class Measured(NamedTuple):
  """The results for a card, and the nearest training images.

  Attributes:
    results: name -> number.
    details: name -> anything that is not a single number.
    searched: [Q], the indices of the samples in `nearest`.
    nearest: the nearest training images of those; None if not measured.
    nearer: [Q], see `neighbours.share_nearer`; None without held-out images.
    statistics: statistics of the reference, by tap.
  """

  results: dict
  details: dict
  searched: np.ndarray
  nearest: neighbours.Nearest | None
  nearer: np.ndarray | None
  statistics: statistics.Statistics


def check(task: Task, samples: statistics.Set) -> None:
  """Checks a task before anything is measured.

  Args:
    task: the task.
    samples: the set to judge.

  Raises:
    UserError: the inputs of a metric are missing.
  """
  judge, metrics = task.judge, task.metrics
  if 'is' in metrics and not judge.logits:
    raise UserError(
      f'the Inception Score needs classes, but {judge.protocol["features"]} '
      'has none: leave the metric "is" out, or give another judge'
    )
  if 'classes' in metrics and 'num_classes' not in judge.protocol:
    raise UserError(
      'the metric classes needs a classifier of the data, not '
      f'{judge.protocol["features"]}: leave it out'
    )
  sets = {'samples': samples, 'reference': task.reference}
  if not any(isinstance(one, features.Images) for one in sets.values()):
    for tap in judge.taps:
      sizes = [len(one[tap].mean) for one in sets.values()]
      if sizes[0] != sizes[1]:
        told = ' and of '.join(map(str, sizes))
        raise UserError(
          f'statistics of {told} dimensions: give statistics of one network'
        )
  for what, given in sets.items():
    _check_set(task, what, given)
  if task.heldout and task.heldout.count < 2:
    told = f'{task.heldout.description}: give at least 2 held-out images'
    raise UserError(told)


def _check_set(task, what, given):
  metrics, least = task.metrics, 2
  if 'pr' in metrics:
    least = 1 + max(task.options.pr_k, precision.DENSITY_K)
  # The Inception Score uses no reference.
  fine = (*OF_STATISTICS, *['is'] * (what == 'reference'))
  beyond = [name for name in metrics if name not in fine]
  if isinstance(given, features.Images):
    if given.count < least:
      raise UserError(
        f'{given.description}: {", ".join(metrics)} need at least {least} '
        'images'
      )
  elif beyond:
    raise UserError(
      f'{", ".join(beyond)} need images, but the {what} are statistics: give '
      f'images, or use {", ".join(fine)}'
    )


def measure(
  task: Task,
  samples: statistics.Set,
  *,
  batch_size: int,
  mesh: Mesh,
  cache=None,
  sample_cache=None,
  known: statistics.Statistics | None = None,
  on_images: Callable[[int], None] = lambda count: None,
) -> Measured:
  """Compares samples, and held-out images, with the training images.

  A distance falls with the number of images. To be comparable with the held-out
  images, it is therefore also computed for the first samples, as many as there
  are held-out images.

  Args:
    task: the task, checked by `check`.
    samples: the images, or statistics of them.
    batch_size: images per call of the network.
    mesh: the devices to shard over.
    cache: folder of features, see `features.passes`.
    sample_cache: the same for the features of the samples.
    known: statistics of the reference's images, to use in place of them.
    on_images: called with the number of images after each block.
  """
  near = {}

  def look(images, folder, first=0):
    if not isinstance(images, features.Images):
      return looks.Seen(images)
    batches = features.passes(
      task.judge, images.stream(), batch_size, mesh, folder
    )
    return looks.look(
      task, images.count, batches, first=first, labels=images.labels,
      by_label=by_label and images is not task.heldout, on_features=search,
    )  # fmt: skip

  def search(first, found):
    for name in near:  # empty until the reference's turn
      near[name] = neighbours.update(
        near[name], seen[name].chosen['queries'], found, first
      )
    on_images(len(found))

  by_label = by_class.is_measured(task, samples, OF_STATISTICS)
  first = task.heldout.count if task.heldout else 0
  seen = {'samples': look(samples, sample_cache, first)}
  if task.heldout:
    seen['heldout'] = look(task.heldout, cache)
  if 'copies' in task.metrics:
    num_near = min(NUM_NEAR, task.reference.count)
    near |= {
      name: neighbours.nothing(len(one.chosen['queries']), num_near)
      for name, one in seen.items()
    }
  train = look(known or task.reference, cache)
  results, nearer = _results(task, seen, train, near)
  details = {**task.judge.details, **by_class.details(task, seen)}
  caveats = _caveats(task, samples, seen['samples'], train)
  if by_label:
    found, told = by_class.distances(seen['samples'], train)
    details |= found
    caveats += told
  if caveats:
    details['caveats'] = caveats
  return Measured(
    {name: float(value) for name, value in results.items()},
    details,
    seen['samples'].searched,
    near.get('samples'),
    nearer,
    {
      tap: frechet.Gaussian(x.mean, x.covariance)
      for tap, x in train.moments.items()
    },
  )


def _results(task, seen, train, near):
  """Returns ({name: number}, `share_nearer` of the samples or None)."""
  results, nearer = {}, None
  if {'fid', 'sfid'} & set(task.metrics):
    results |= _frechet(task.judge, train, **seen)
  for name, tail in (('samples', ''), ('heldout', '_heldout')):
    if name in seen:
      found = _of_a_set(task, seen[name], train, near.get(name))
      results |= {f'{key}{tail}': x for key, x in found.items()}
  if 'pr' in task.metrics:
    sets = (one.chosen['compared'] for one in (seen['samples'], train))
    found = precision.precision_recall(*sets, k=task.options.pr_k)
    results |= found._asdict()
  if 'heldout' in near:
    real = near['heldout'].distances[:, 0]
    nearer = neighbours.share_nearer(near['samples'].distances[:, 0], real)
    results |= {
      'nearest_share': np.mean(nearer < NEAR),
      # Among M + 1 exchangeable images, every rank is equally likely.
      'nearest_share_expected': math.ceil(NEAR * len(real)) / (len(real) + 1),
    }
  return results, nearer


def _frechet(judge, train, samples, heldout=None):
  """Distances of samples and, at equal counts, of held-out images."""
  results = {}
  for tap, name in judge.taps.items():
    real = train.moments[tap]
    results[name] = frechet.distance(samples.moments[tap], real)
    if not heldout:
      continue
    same = results[name]
    if samples.first_moments[tap].count != samples.moments[tap].count:
      same = frechet.distance(samples.first_moments[tap], real)
    floor = frechet.distance(heldout.moments[tap], real)
    results |= {f'{name}_heldout_count': same, f'{name}_floor': floor}
    # If held-out images equal the training images, it is 0 up to rounding.
    if floor > 1e-9 * np.trace(real.covariance):
      results[f'{name}_ratio'] = same / floor
  return results


def _of_a_set(task, one, train, near) -> dict:
  """Results that exist for samples and for held-out images."""
  results, options = {}, task.options
  if 'kid' in task.metrics:
    found = kid.over_subsets(
      *(x.chosen['compared'] for x in (one, train)),
      seed=options.kid_seed,
      num_subsets=options.kid_subsets,
      subset_size=options.kid_subset_size,
    )
    results |= {'kid': found.mean, 'kid_error': found.standard_error}
  if 'is' in task.metrics:
    score = inception_score.score_of(one.sums)
    results['inception_score'], results['inception_score_std'] = score
  if 'classes' in task.metrics:
    total = one.classes.sum()
    results['confident'] = one.confident / total
    # Only classes that occur in the data: labels may start at 1.
    results['smallest_class'] = one.classes[train.classes > 0].min() / total
    if one.confusion is not None:
      results['label_accuracy'] = np.trace(one.confusion) / total
  if near:
    known = set(train.hashes)
    results['identical'] = np.mean([image in known for image in one.hashes])
    results['nearest'] = np.median(near.distances[:, 0])
  return results


def _caveats(task, samples, seen, train) -> list[str]:
  """Caveats about the numbers, one line each."""
  sets = (samples, task.heldout, task.reference)
  images = [one for one in sets if isinstance(one, features.Images)]
  if not images:
    return []
  count = min(one.count for one in images)
  told = []
  if not all(isinstance(x, frechet.Moments) for x in seen.moments.values()):
    told.append('the number of samples behind the statistics is not known')
  if {'fid', 'sfid'} & set(task.metrics):
    for tap, name in task.judge.taps.items():
      fit = train.moments[tap]
      for caveat in frechet.caveats(count, len(fit.mean)):
        bias = frechet.simulated_bias(fit, count)
        told.append(
          f'{name}: {caveat}. {count} draws from the Gaussian fitted to the '
          f'reference are at distance {bias:.4g} from it'
        )
  if 'kid' in task.metrics:
    told += kid.caveats(count, task.options.kid_subset_size)
  if 'is' in task.metrics:
    sums = seen.sums
    told += inception_score.caveats(
      int(sums.count.sum()), sums.p.shape[1], task.options.is_splits
    )
  if isinstance(samples, features.Images) and len(images) > 1:
    told += noise.caveats(*images[:2])
  return told
