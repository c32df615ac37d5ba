"""What samples are worth: one pass each of samples, training and held-out."""

import collections
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from diffusion_jax.data import Source
from diffusion_jax.evaluation import features, frechet, neighbours
from diffusion_jax.evaluation.features import Judge
from diffusion_jax.evaluation.neighbours import Nearest

QUERIES = 10_000  # of at most so many images the nearest ones are found
NEAR = 0.05  # the share of held-out images that counts as near


class Measured(NamedTuple):
  """What goes on a card, and the nearest training images.

  Attributes:
    protocol: what was compared with what.
    results: name -> number.
    details: name -> what is no single number.
    nearest: of the first samples, at most QUERIES.
    nearer: [Q], see `neighbours.share_nearer`; None without held-out images.
  """

  protocol: dict
  results: dict
  details: dict
  nearest: Nearest
  nearer: np.ndarray | None


def measure(
  judge: Judge,
  sample_fn: Callable[[int, int], Iterator[np.ndarray]],
  num_samples: int,
  reference: Source,
  heldout: Source | None,
  *,
  batch_size: int,
  mesh: Mesh,
  num_near: int = 3,
  on_images: Callable[[int], None] = lambda count: None,
) -> Measured:
  """Judges samples beside held-out images, against the training images.

  The distance falls with the number of images, so the one that stands beside
  the held-out images' is of equally many samples: the first ones, and held-out
  images at even distances, where there are more of those.

  Args:
    judge: the network.
    sample_fn: (first, end) -> uint8 batches of the samples first .. end - 1.
    num_samples: at least 2.
    reference: the training images, all of which are taken.
    heldout: the held-out images, or None.
    batch_size: of the passes.
    mesh: over which the passes are divided.
    num_near: how many of the nearest training images are to be found.
    on_images: called with the number of images after each batch.
  """
  count = min(num_samples, len(heldout)) if heldout else num_samples
  batch_size = min(batch_size, max(num_samples, len(reference)))
  # Features of these are searched for: the first samples, and held-out images
  # at even distances, as a set may be sorted.
  asked = {
    'samples': np.arange(min(num_samples, QUERIES)),
    'heldout': np.arange(min(count, QUERIES)) * count // min(count, QUERIES),
  }
  kept = {name: [] for name in asked}
  hashes = {'reference': hashlib.sha256(), 'heldout': hashlib.sha256()}
  seen = collections.defaultdict(list)  # of every image, to find equal ones

  def judged(batches, name=None, first=0):
    for batch in features.passes(judge, batches, batch_size, mesh):
      if name:
        end = first + len(batch.images)
        chosen = asked[name][(asked[name] >= first) & (asked[name] < end)]
        kept[name].append(batch.features[chosen - first])
        first = end
      seen[name or 'train'] += [hash(x.tobytes()) for x in batch.images]
      on_images(len(batch.images))
      yield batch

  def hashed(batches, name):
    for images in batches:
      hashes[name].update(np.ascontiguousarray(images))
      yield images

  summaries = {}
  parts = [(0, count), (count, num_samples)] if heldout else [(0, num_samples)]
  for first, end in parts:
    if first < end:
      part = features.summarise(judged(sample_fn(first, end), 'samples', first))
      summaries.setdefault('samples at held-out count', part)
      summaries['samples'] = features.merge(summaries.get('samples'), part)
  if heldout:
    images = features.images_of(_evenly(heldout, count), batch_size)
    summaries['heldout'] = features.summarise(
      judged(hashed(images, 'heldout'), 'heldout')
    )

  queries = {name: np.concatenate(x) for name, x in kept.items() if x}
  num_near = min(num_near, len(reference))
  near = {
    name: neighbours.nothing(len(x), num_near) for name, x in queries.items()
  }

  def searched(batches):
    first = 0
    for batch in batches:
      for name, x in queries.items():
        near[name] = neighbours.update(near[name], x, batch.features, first)
      first += len(batch.images)
      yield batch

  images = hashed(features.images_of(reference, batch_size), 'reference')
  summaries['train'] = features.summarise(searched(judged(images)))
  protocol = {
    'num_reference': len(reference),
    'reference_sha256': hashes['reference'].hexdigest(),
    'num_samples': num_samples,
    'num_heldout': count if heldout else 0,
    'num_searched': len(queries['samples']),
    'heldout_sha256': hashes['heldout'].hexdigest() if heldout else '',
    **judge.protocol,
    'rounding': 'nearest',
  }
  distances, known = near['samples'].distances[:, 0], set(seen['train'])
  results = {
    f'identical{head}': np.mean([image in known for image in seen[name]])
    for name, head in (('samples', ''), ('heldout', '_heldout'))
    if name in summaries
  }
  results['nearest'], nearer = np.median(distances), None
  if heldout:
    real = near['heldout'].distances[:, 0]
    nearer = neighbours.share_nearer(distances, real)
    results |= {
      'nearest_heldout': np.median(real),
      'nearest_share': np.mean(nearer < NEAR),
      # Of M + 1 images of one kind each is as likely to have any rank.
      'nearest_share_expected': math.ceil(NEAR * len(real)) / (len(real) + 1),
    }
  results = {**_frechet(summaries), **_classes(summaries), **results}
  details = {
    'reference': reference.description,
    **judge.details,
    **_histograms(summaries),
  }
  return Measured(
    protocol,
    {name: float(value) for name, value in results.items()},
    details,
    near['samples'],
    nearer,
  )


def _frechet(summaries):
  """Samples, and where there are held-out images, equally many of both."""
  distances = {
    name: frechet.distance(summary.moments, summaries['train'].moments)
    for name, summary in summaries.items()
    if name != 'train'
  }
  results = {'frechet': distances['samples']}
  if 'heldout' in summaries:
    same, floor = distances['samples at held-out count'], distances['heldout']
    results |= {'frechet_heldout_count': same, 'frechet_floor': floor}
    # Held-out images that equal the training images are at 0 but for rounding.
    if floor > 1e-9 * np.trace(summaries['train'].moments.covariance):
      results['frechet_ratio'] = same / floor
  return results


def _classes(summaries):
  results, known = {}, summaries['train'].classes
  for name, head in (('samples', ''), ('heldout', '_heldout')):
    if name in summaries and summaries[name].classes is not None:
      classes, total = summaries[name].classes, summaries[name].moments.count
      results['confident' + head] = summaries[name].confident / total
      # Of the classes that there are: labels may begin at 1.
      results['smallest_class' + head] = classes[known > 0].min() / total
  return results


def _histograms(summaries):
  return {
    f'{head}class_histogram': (
      summaries[name].classes / summaries[name].moments.count
    ).tolist()
    for name, head in (('samples', ''), ('heldout', 'heldout_'))
    if name in summaries and summaries[name].classes is not None
  }


def _evenly(source, count):
  """`count` images of a source, at even distances."""
  chosen = np.arange(count) * len(source) // count
  return dataclasses.replace(
    source, num_images=count, read_fn=lambda i: source.read_fn(int(chosen[i]))
  )
