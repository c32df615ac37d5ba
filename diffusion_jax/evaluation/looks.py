"""One pass over a set of images, which collects all that the metrics need.

It keeps sums, and the features of a limited number of images for metrics that
compare images one by one, so its memory does not grow with the set.
"""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from diffusion_jax.evaluation import by_class, features
from diffusion_jax.evaluation.metrics import frechet, inception_score
from diffusion_jax.evaluation.metrics.frechet import Gaussian, Moments

QUERIES = 10_000  # most images whose nearest neighbours are searched
COMPARED = 50_000  # most images of a set for KID, precision and recall
CONFIDENT = 0.8


@dataclasses.dataclass
class Seen:
  """The result of one pass over a set of images.

  Attributes:
    moments: tap -> moments of all images, or the given statistics.
    first_moments: tap -> moments of the first images only, if requested.
    by_label: label -> moments of the main features of its images, if each has
      more images than the features have dimensions; {} otherwise.
    too_few: why not, in words, or ''.
    chosen: name -> [n, D], the main features of chosen images.
    searched: [n], the indices of the images chosen as 'queries'.
    hashes: a hash of each image.
    classes: int64 [K], number of images classified as each class.
    confident: number of images classified with probability above 0.8.
    sums: sums for the Inception Score, or None.
    confusion: int64 [labels, K], number of images of each label by the class
      they are classified as; None without labels.
  """

  moments: dict[str, Moments | Gaussian]
  first_moments: dict[str, Moments] = dataclasses.field(default_factory=dict)
  by_label: dict[int, Moments] = dataclasses.field(default_factory=dict)
  too_few: str = ''
  chosen: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  searched: np.ndarray | None = None
  hashes: list[int] = dataclasses.field(default_factory=list)
  classes: np.ndarray | int = 0
  confident: int = 0
  sums: inception_score.Sums | None = None
  confusion: np.ndarray | None = None


def look(
  task,
  count: int,
  batches: Iterable[tuple[np.ndarray, dict[str, np.ndarray]]],
  *,
  first: int = 0,
  labels: np.ndarray | None = None,
  by_label: bool = False,
  on_features: Callable[[int, np.ndarray], None],
) -> Seen:
  """Passes over a set of images.

  Args:
    task: the judge and the metrics to collect for, see `measure.Task`.
    count: number of images.
    batches: the images and their outputs, see `features.passes`.
    first: number of first images to compute separate moments of.
    labels: [count], see `features.Images`.
    by_label: whether to collect moments of each label.
    on_features: called with the index of the first image of a batch, and the
      batch's main features.
  """
  judge, metrics, options = task.judge, task.metrics, task.options
  asked, at = _chosen(metrics, count), 0
  chosen = {name: [] for name in asked}
  seen = Seen({}, searched=asked.get('queries'))
  splits = inception_score.splits_of(
    count, min(options.is_splits, count), options.is_seed
  )
  for images, outputs in batches:
    end = at + len(images)
    for tap in judge.taps:
      _add(seen.moments, tap, outputs[tap])
      _add(seen.first_moments, tap, outputs[tap][: max(first - at, 0)])
    main = outputs[next(iter(judge.taps))]
    if by_label and not seen.too_few:
      by_class.add(seen, labels, at, main)
    for name, indices in asked.items():
      inside = indices[(indices >= at) & (indices < end)]
      chosen[name].append(main[inside - at])
    if 'copies' in metrics:
      seen.hashes += [hash(x.tobytes()) for x in features.whole(images)]
    logits = outputs.get(judge.logits)
    if 'classes' in metrics:
      classes, kinds = logits.argmax(1), logits.shape[1]
      seen.classes += np.bincount(classes, minlength=kinds)
      if labels is not None:
        if seen.confusion is None:
          size = max(kinds, labels.max() + 1)
          seen.confusion = np.zeros((size, kinds), np.int64)
        np.add.at(seen.confusion, (labels[at:end], classes), 1)
      seen.confident += int((_probability(logits) > CONFIDENT).sum())
    if 'is' in metrics:
      seen.sums = inception_score.update(
        seen.sums or inception_score.nothing(splits.max() + 1, logits.shape[1]),
        logits,
        splits[at:end],
      )
    on_features(at, main)
    at = end
  assert at == count, f'{at} images instead of {count}'
  seen.chosen = {name: np.concatenate(parts) for name, parts in chosen.items()}
  return seen


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
