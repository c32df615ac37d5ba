"""One pass over a set of images: all that the metrics need of it.

Sums are kept, and features of as many images as some metrics compare one by
one; so the size of a set is no matter.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from diffusion_jax.evaluation import features
from diffusion_jax.evaluation.metrics import frechet, inception_score
from diffusion_jax.evaluation.metrics.frechet import Gaussian, Moments

QUERIES = 10_000  # of at most so many images the nearest ones are found
COMPARED = 50_000  # at most so many of a set go into KID, precision and recall
CONFIDENT = 0.8


class Seen(NamedTuple):
  """What one pass over a set of images has left.

  Attributes:
    moments: tap -> of all images, or the statistics that were given.
    first_moments: tap -> of the first images only, as many as asked for.
    chosen: name -> [n, D], the main features of chosen images.
    searched: [n], the numbers of the images chosen as 'queries'.
    hashes: of each image.
    classes: int64 [K], how many images are taken for each class.
    confident: how many of them with a probability above 0.8.
    sums: of the Inception Score, or None.
  """

  moments: dict[str, Moments | Gaussian]
  first_moments: dict[str, Moments] = {}  # noqa: RUF012
  chosen: dict[str, np.ndarray] = {}  # noqa: RUF012
  searched: np.ndarray = np.arange(0)
  hashes: Sequence[int] = ()
  classes: np.ndarray | int = 0
  confident: int = 0
  sums: inception_score.Sums | None = None


def look(
  judge: features.Judge,
  metrics: Sequence[str],
  options,
  images,
  *,
  batch_size: int,
  mesh: Mesh,
  cache=None,
  first: int = 0,
  on_images: Callable[[int], None] = lambda count: None,
  on_features: Callable = lambda first, found: None,
) -> Seen:
  """Passes over a set of images.

  Args:
    judge: the network.
    metrics: what is wanted of the images, keys of `measure.METRICS`.
    options: of the metrics, see `measure.Options`.
    images: the set; statistics are left as they are.
    batch_size: of the pass.
    mesh: over which it is divided.
    cache: folder of features, see `features.passes`.
    first: so many images have moments of their own.
    on_images: called with the number of images after each block.
    on_features: called with the number of the first image of a block, and its
      main features.
  """
  if not isinstance(images, features.Images):
    return Seen(images)
  count, at = images.count, 0
  asked = _chosen(metrics, count)
  chosen = {name: [] for name in asked}
  moments, first_moments = {}, {}
  hashes, classes, confident, sums = [], 0, 0, None
  splits = inception_score.splits_of(
    count, min(options.is_splits, count), options.is_seed
  )
  for batch in features.passes(judge, images.stream(), batch_size, mesh, cache):
    end = at + len(batch.images)
    for tap in judge.taps:
      x = batch.outputs[tap]
      _add(moments, tap, x)
      _add(first_moments, tap, x[: max(first - at, 0)])
    main = batch.outputs[next(iter(judge.taps))]
    for name, indices in asked.items():
      inside = indices[(indices >= at) & (indices < end)]
      chosen[name].append(main[inside - at])
    if 'copies' in metrics:
      hashes += [hash(x.tobytes()) for x in features.whole(batch.images)]
    if 'classes' in metrics:
      logits = batch.outputs[judge.logits]
      classes += np.bincount(logits.argmax(1), minlength=logits.shape[1])
      confident += int((_probability(logits) > CONFIDENT).sum())
    if 'is' in metrics:
      logits = batch.outputs[judge.logits]
      sums = inception_score.update(
        sums or inception_score.nothing(splits.max() + 1, logits.shape[1]),
        logits,
        splits[at:end],
      )
    on_features(at, main)
    on_images(len(batch.images))
    at = end
  assert at == count, f'{at} images in place of {count}'
  return Seen(
    moments,
    first_moments,
    {name: np.concatenate(parts) for name, parts in chosen.items()},
    asked.get('queries', np.arange(0)),
    hashes,
    classes,
    confident,
    sums,
  )


def _chosen(metrics, count) -> dict[str, np.ndarray]:
  """Whose features are kept: at even distances, as sets may be sorted."""
  most = {'compared': COMPARED} if {'kid', 'pr'} & set(metrics) else {}
  if 'copies' in metrics:
    most['queries'] = QUERIES
  return {
    name: np.arange(min(count, limit)) * count // min(count, limit)
    for name, limit in most.items()
  }


def _add(moments, tap, x):
  if len(x):
    moments[tap] = frechet.merge(moments.get(tap), frechet.moments_of(x))


def _probability(logits):
  """Of the likeliest class."""
  z = np.asarray(logits, np.float64)
  return 1 / np.exp(z - z.max(1, keepdims=True)).sum(1)
