"""One pass over a set of images, which collects all that the metrics need.

It keeps sums, and the features of a limited number of images for metrics that
compare images one by one, so its memory does not grow with the set.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from diffusion_jax.evaluation import features
from diffusion_jax.evaluation.metrics import frechet, inception_score
from diffusion_jax.evaluation.metrics.frechet import Gaussian, Moments

QUERIES = 10_000  # most images whose nearest neighbours are searched
COMPARED = 50_000  # most images of a set for KID, precision and recall
CONFIDENT = 0.8


class Seen(NamedTuple):
  """The result of one pass over a set of images.

  Attributes:
    moments: tap -> moments of all images, or the given statistics.
    first_moments: tap -> moments of the first images only, if requested.
    chosen: name -> [n, D], the main features of chosen images.
    searched: [n], the indices of the images chosen as 'queries'.
    hashes: a hash of each image.
    classes: int64 [K], number of images classified as each class.
    confident: number of images classified with probability above 0.8.
    sums: sums for the Inception Score, or None.
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
    metrics: the metrics to collect for, keys of `measure.METRICS`.
    options: options of the metrics, see `measure.Options`.
    images: the set; statistics are returned unchanged.
    batch_size: images per call of the network.
    mesh: the devices to shard over.
    cache: folder of features, see `features.passes`.
    first: number of first images to compute separate moments of.
    on_images: called with the number of images after each block.
    on_features: called with the index of the first image of a block, and the
      block's main features.
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
  assert at == count, f'{at} images instead of {count}'
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
  """Indices of images to keep features of; evenly spaced, for sorted sets."""
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
  """The probability of the most likely class."""
  z = np.asarray(logits, np.float64)
  return 1 / np.exp(z - z.max(1, keepdims=True)).sum(1)
