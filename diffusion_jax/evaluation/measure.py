"""What samples are worth: metrics of what one pass each has seen."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from diffusion_jax.evaluation import looks
from diffusion_jax.evaluation.features import Images, Judge
from diffusion_jax.evaluation.looks import Looker
from diffusion_jax.evaluation.metrics import (
  frechet,
  inception_score,
  kid,
  neighbours,
  precision,
)
from diffusion_jax.evaluation.metrics.frechet import Gaussian, Moments
from diffusion_jax.evaluation.metrics.neighbours import Nearest
from diffusion_jax.evaluation.statistics import Statistics
from diffusion_jax.system.errors import UserError

METRICS = {
  'fid': 'the Frechet distance, at each tap',
  'sfid': 'the same between spatial features (arXiv 2103.03841)',
  'kid': 'kernel inception distance (arXiv 1801.01401)',
  'is': 'Inception Score (arXiv 1606.03498)',
  'pr': 'precision, recall (arXiv 1904.06991), density, coverage (2002.09797)',
  'copies': 'which samples lie near to training images',
  'classes': 'what classes they are of, by a classifier',
}
# Those that statistics of a set will do for.
OF_STATISTICS = ('fid', 'sfid')

KID_SEED = 2020  # torch-fidelity's
NEAR = 0.05  # the share of held-out images that counts as near


class Options(NamedTuple):
  """What metrics leave open; the defaults are the papers'.

  Attributes:
    kid_subsets: how many, see `kid.over_subsets`.
    kid_subset_size: of each set.
    kid_seed: of the subsets.
    is_splits: of the Inception Score.
    is_seed: of a permutation before the split, or None, see
      `inception_score.splits_of`.
    pr_k: whose distance is the radius, see `precision.precision_recall`.
  """

  kid_subsets: int = kid.NUM_SUBSETS
  kid_subset_size: int = kid.SUBSET_SIZE
  kid_seed: int = KID_SEED
  is_splits: int = inception_score.NUM_SPLITS
  is_seed: int | None = None
  pr_k: int = precision.K


DEFAULTS = Options()


class Measured(NamedTuple):
  """What goes on a card, and the nearest training images.

  Attributes:
    results: name -> number.
    details: name -> what is no single number.
    searched: [Q], the samples whose nearest images were asked for.
    nearest: of those; None where not asked for.
    nearer: [Q], see `neighbours.share_nearer`; None without held-out images.
    statistics: of the reference, by tap.
  """

  results: dict
  details: dict
  searched: np.ndarray
  nearest: Nearest | None
  nearer: np.ndarray | None
  statistics: Statistics


def check(
  judge: Judge,
  samples: Images | Statistics,
  reference: Images | Statistics,
  heldout: Images | None = None,
  *,
  metrics: Sequence[str],
  options: Options = DEFAULTS,
) -> None:
  """Finds out beforehand what cannot be measured.

  Args:
    judge: the network.
    samples: what is to be judged.
    reference: what it is compared to.
    heldout: images of the reference's kind.
    metrics: keys of METRICS.
    options: of the metrics.

  Raises:
    UserError: a metric is not known, or takes what is not there.
  """
  for name in metrics:
    if name not in METRICS:
      raise UserError(
        f'the metric {name!r} is not known: use {", ".join(METRICS)}'
      )
  if not metrics:
    raise UserError(
      f'no metric is asked for: name some of {", ".join(METRICS)}'
    )
  if 'is' in metrics and not judge.logits:
    raise UserError(
      f'the Inception Score takes classes, and {judge.protocol["features"]} '
      'has none: leave the metric is out, or give another judge'
    )
  if 'classes' in metrics and 'num_classes' not in judge.protocol:
    raise UserError(
      f'the metric classes is for a classifier of the data, and not for '
      f'{judge.protocol["features"]}: leave it out'
    )
  if not (isinstance(samples, Images) or isinstance(reference, Images)):
    for tap in judge.taps:
      sizes = [len(one[tap].mean) for one in (samples, reference)]
      if sizes[0] != sizes[1]:
        raise UserError(
          f'statistics of {sizes[0]} and of {sizes[1]} dimensions: give those '
          'of one network'
        )
  least = 2
  if 'pr' in metrics:
    least = 1 + max(options.pr_k, precision.DENSITY_K)
  sets = {'samples': samples, 'reference': reference}
  for what, given in sets.items():
    if isinstance(given, Images):
      if given.count < least:
        raise UserError(
          f'{given.description}: {", ".join(metrics)} take {least} images or '
          'more'
        )
    else:
      # The Inception Score knows no reference.
      fine = (*OF_STATISTICS, *['is'] * (what == 'reference'))
      if beyond := [name for name in metrics if name not in fine]:
        raise UserError(
          f'of the {what} there are statistics, and {", ".join(beyond)} '
          f'take images: give those, or ask for {", ".join(fine)}'
        )
  if heldout and heldout.count < 2:
    raise UserError(
      f'{heldout.description}: a distance takes two held-out images or more'
    )


def protocol_of(judge: Judge, metrics: Sequence[str], options: Options) -> dict:
  """How it is measured, for the card: all that the numbers depend on.

  Args:
    judge: the network.
    metrics: keys of METRICS.
    options: those of the metrics asked for are told.
  """
  told = {**judge.protocol, 'metrics': [m for m in METRICS if m in metrics]}
  for name, value in options._asdict().items():
    if name.split('_')[0] in metrics:
      told[name] = value
  if {'kid', 'pr'} & set(metrics):
    told['num_compared'] = looks.COMPARED
  if 'pr' in metrics:
    told['density_k'] = precision.DENSITY_K
  if 'copies' in metrics:
    told['num_searched'] = looks.QUERIES
  return told


def measure(
  judge: Judge,
  samples: Images | Statistics,
  reference: Images | Statistics,
  heldout: Images | None = None,
  *,
  metrics: Sequence[str],
  options: Options = DEFAULTS,
  batch_size: int,
  mesh: Mesh,
  cache=None,
  sample_cache=None,
  num_near: int = 3,
  num_reference: int = 0,
  on_images: Callable[[int], None] = lambda count: None,
) -> Measured:
  """Judges samples beside held-out images, against the training images.

  A distance falls with the number of images, so the one that stands beside the
  held-out images' is of equally many samples, the first ones.

  Args:
    judge: the network.
    samples: the images, or statistics of them.
    reference: the training images, all of which are taken, or statistics.
    heldout: at most as many images as there are samples, or None.
    metrics: keys of METRICS, see `check`.
    options: of the metrics.
    batch_size: of the passes.
    mesh: over which the passes are divided.
    cache: folder of features, see `features.passes`.
    sample_cache: the same for those of the samples.
    num_near: how many of the nearest training images are to be found.
    num_reference: how many images the statistics are of, where that is known.
    on_images: called with the number of images after each block.
  """
  look = Looker(
    judge, metrics, options.is_splits, options.is_seed, batch_size, mesh, cache,
    on_images,
  )  # fmt: skip
  first = heldout.count if heldout else 0
  seen = {'samples': look._replace(cache=sample_cache)(samples, first=first)}
  if heldout:
    seen['heldout'] = look(heldout)
  near = {}
  if 'copies' in metrics:
    num_near = min(num_near, reference.count)
    near = {
      name: neighbours.nothing(len(one.chosen['queries']), num_near)
      for name, one in seen.items()
    }

  def search(first, found):
    for name in near:
      near[name] = neighbours.update(
        near[name], seen[name].chosen['queries'], found, first
      )

  seen['train'] = look(reference, on_features=search)
  results, details = {}, dict(judge.details)
  if {'fid', 'sfid'} & set(metrics):
    results |= _frechet(judge, seen)
  if 'kid' in metrics:
    results |= _kid(seen, options)
  if 'is' in metrics:
    results |= _inception_score(seen)
  if 'pr' in metrics:
    results |= precision.precision_recall(
      seen['samples'].chosen['compared'],
      seen['train'].chosen['compared'],
      k=options.pr_k,
    )._asdict()
  if 'classes' in metrics:
    results |= _classes(seen)
    details |= _histograms(seen)
  nearer = None
  if near:
    found, nearer = _copies(seen, near)
    results |= found
  sets = (samples, reference, heldout)
  counts = [one.count for one in sets if isinstance(one, Images)]
  counts += [num_reference] * bool(num_reference)
  if caveats := counts and _caveats(judge, min(counts), seen, metrics, options):
    details['caveats'] = caveats
  return Measured(
    {name: float(value) for name, value in results.items()},
    details,
    look.chosen(samples.count).get('queries') if near else np.arange(0),
    near.get('samples'),
    nearer,
    {
      tap: Gaussian(x.mean, x.covariance)
      for tap, x in seen['train'].moments.items()
    },
  )


def _frechet(judge, seen):
  """Samples, and where there are held-out images, equally many of both."""
  results, train = {}, seen['train'].moments
  for tap, name in judge.taps.items():
    results[name] = frechet.distance(seen['samples'].moments[tap], train[tap])
    if 'heldout' not in seen:
      continue
    same = results[name]
    if seen['samples'].first_moments[tap].count != _count(seen['samples']):
      same = frechet.distance(seen['samples'].first_moments[tap], train[tap])
    floor = frechet.distance(seen['heldout'].moments[tap], train[tap])
    results |= {f'{name}_heldout_count': same, f'{name}_floor': floor}
    # Held-out images that equal the training images are at 0 but for rounding.
    if floor > 1e-9 * np.trace(train[tap].covariance):
      results[f'{name}_ratio'] = same / floor
  return results


def _count(seen):
  return next(iter(seen.moments.values())).count


def _kid(seen, options):
  results = {}
  for name, tail in (('samples', ''), ('heldout', '_heldout')):
    if name in seen:
      found = kid.over_subsets(
        seen[name].chosen['compared'],
        seen['train'].chosen['compared'],
        seed=options.kid_seed,
        num_subsets=options.kid_subsets,
        subset_size=options.kid_subset_size,
      )
      results[f'kid{tail}'] = found.mean
      results[f'kid_error{tail}'] = found.standard_error
  return results


def _inception_score(seen):
  results = {}
  for name, tail in (('samples', ''), ('heldout', '_heldout')):
    if name in seen:
      found = inception_score.score_of(seen[name].sums)
      results[f'inception_score{tail}'] = found.mean
      results[f'inception_score_std{tail}'] = found.std
  return results


def _classes(seen):
  results, known = {}, seen['train'].classes
  for name, tail in (('samples', ''), ('heldout', '_heldout')):
    if name in seen:
      total = seen[name].classes.sum()
      results[f'confident{tail}'] = seen[name].confident / total
      # Of the classes that there are: labels may begin at 1.
      least = seen[name].classes[known > 0].min()
      results[f'smallest_class{tail}'] = least / total
  return results


def _histograms(seen):
  return {
    f'{head}class_histogram': (one.classes / one.classes.sum()).tolist()
    for head, name in (('', 'samples'), ('heldout_', 'heldout'))
    if (one := seen.get(name))
  }


def _copies(seen, near):
  """(results, share_nearer of the samples or None)."""
  distances, known = near['samples'].distances[:, 0], set(seen['train'].hashes)
  results = {
    f'identical{tail}': np.mean([image in known for image in seen[name].hashes])
    for name, tail in (('samples', ''), ('heldout', '_heldout'))
    if name in seen
  }
  results['nearest'], nearer = np.median(distances), None
  if 'heldout' in near:
    real = near['heldout'].distances[:, 0]
    nearer = neighbours.share_nearer(distances, real)
    results |= {
      'nearest_heldout': np.median(real),
      'nearest_share': np.mean(nearer < NEAR),
      # Of M + 1 images of one kind each is as likely to have any rank.
      'nearest_share_expected': math.ceil(NEAR * len(real)) / (len(real) + 1),
    }
  return results, nearer


def _caveats(judge, count, seen, metrics, options) -> list[str]:
  """What is to be told beside the numbers, a line each.

  Of the smaller set there are `count` images.
  """
  told = []
  if not isinstance(
    seen['samples'].moments.get(next(iter(judge.taps))), Moments
  ):
    told.append('of how many samples the statistics are is not known')
  if {'fid', 'sfid'} & set(metrics):
    for tap, name in judge.taps.items():
      fit = seen['train'].moments[tap]
      for caveat in frechet.caveats(count, len(fit.mean)):
        bias = frechet.simulated_bias(fit, count)
        told.append(
          f'{name}: {caveat}. {count} draws from the Gaussian fitted to the '
          f'reference lie {bias:.4g} from it'
        )
  if 'kid' in metrics:
    told += kid.caveats(count, options.kid_subset_size)
  if 'is' in metrics:
    sums = seen['samples'].sums
    told += inception_score.caveats(
      int(sums.count.sum()), sums.p.shape[1], options.is_splits
    )
  return told
