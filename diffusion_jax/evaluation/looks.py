"""One pass over a set of images: all that the metrics need of it.

Sums are kept, and features of as many images as some metrics compare one by
one; so the size of a set is no matter.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from diffusion_jax.evaluation import features
from diffusion_jax.evaluation.features import Images, Judge
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
    hashes: of each image.
    classes: int64 [K], how many images are taken for each class, or None.
    confident: how many of them with a probability above 0.8.
    sums: of the Inception Score, or None.
  """

  moments: dict[str, Moments | Gaussian]
  first_moments: dict[str, Moments]
  chosen: dict[str, np.ndarray]
  hashes: list[int]
  classes: np.ndarray | None
  confident: int
  sums: inception_score.Sums | None


class Looker(NamedTuple):
  """What all passes have in common; called, it makes one.

  Attributes:
    judge: the network.
    metrics: what is wanted of the images, keys of `measure.METRICS`.
    is_splits: of the Inception Score.
    is_seed: of a permutation before the split, or None.
    batch_size: of the passes.
    mesh: over which they are divided.
    cache: folder of features, see `features.passes`.
    on_images: called with the number of images after each block.
  """

  judge: Judge
  metrics: Sequence[str]
  is_splits: int
  is_seed: int | None
  batch_size: int
  mesh: Mesh
  cache: object
  on_images: Callable

  def __call__(
    self, images, first: int = 0, on_features=lambda first, found: None
  ) -> Seen:
    """Looks at a set; `first` of its images have moments of their own."""
    if not isinstance(images, Images):
      return Seen(images, {}, {}, [], None, 0, None)
    asked = self.chosen(images.count)
    chosen = {name: [] for name in asked}
    moments, first_moments = {}, {}
    hashes, classes, confident, sums = [], None, 0, None
    if 'is' in self.metrics:
      splits = inception_score.splits_of(
        images.count,
        min(self.is_splits, images.count),
        self.is_seed,
      )
    at = 0
    for batch in features.passes(
      self.judge, images.stream(), self.batch_size, self.mesh, self.cache
    ):
      end = at + len(batch.images)
      main = batch.outputs[next(iter(self.judge.taps))]
      for tap in self.judge.taps:
        x = batch.outputs[tap]
        _add(moments, tap, x)
        _add(first_moments, tap, x[: max(first - at, 0)])
      for name, indices in asked.items():
        inside = indices[(indices >= at) & (indices < end)]
        chosen[name].append(main[inside - at])
      if 'copies' in self.metrics:
        hashes += [hash(x.tobytes()) for x in features.whole(batch.images)]
      if 'classes' in self.metrics:
        logits = batch.outputs[self.judge.logits]
        taken = np.bincount(logits.argmax(1), minlength=logits.shape[1])
        classes = taken if classes is None else classes + taken
        confident += int((_probability(logits) > CONFIDENT).sum())
      if 'is' in self.metrics:
        logits = batch.outputs[self.judge.logits]
        sums = inception_score.update(
          sums or inception_score.nothing(splits.max() + 1, logits.shape[1]),
          logits,
          splits[at:end],
        )
      on_features(at, main)
      self.on_images(len(batch.images))
      at = end
    assert at == images.count, f'{at} images in place of {images.count}'
    chosen = {name: np.concatenate(parts) for name, parts in chosen.items()}
    return Seen(
      moments, first_moments, chosen, hashes, classes, confident, sums
    )

  def chosen(self, count) -> dict[str, np.ndarray]:
    """Whose features are kept: at even distances, as sets may be sorted."""
    most = {'compared': COMPARED} if {'kid', 'pr'} & set(self.metrics) else {}
    if 'copies' in self.metrics:
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
