"""What is measured of each class: how often it occurs, and its distance."""

from collections.abc import Sequence

import numpy as np

from diffusion_jax.evaluation.metrics import frechet


def is_measured(task, samples, of_statistics: Sequence[str]) -> bool:
  """Whether the Frechet distance is measured of each label, too.

  Args:
    task: a `measure.Task`.
    samples: the set to judge.
    of_statistics: metrics for which the reference's images may be replaced by
      their statistics, which have no labels.
  """
  return (
    'fid' in task.metrics
    and bool(set(task.metrics) - {*of_statistics, 'is'})
    and all(
      getattr(one, 'labels', None) is not None
      for one in (samples, task.reference)
    )
  )


def add(seen, labels: np.ndarray, at: int, x: np.ndarray) -> None:
  """Adds features to the moments of their labels.

  Nothing is collected if a label has no more images than the features have
  dimensions, because its covariance would be singular.

  Args:
    seen: the `looks.Seen` to add to.
    labels: the labels of the whole set.
    at: the number of the first image of the batch; batches come in order.
    x: [n, D], the features of a batch.
  """
  if not at:
    seen.too_few = _too_few(np.bincount(labels), x.shape[1])
  if seen.too_few:
    return
  own = labels[at : at + len(x)]
  for label in np.unique(own).tolist():
    seen.by_label[label] = frechet.merge(
      seen.by_label.get(label), frechet.moments_of(x[own == label])
    )


def _too_few(counts, dim) -> str:
  least = min(np.flatnonzero(counts), key=lambda label: counts[label])
  if counts[least] > dim:
    return ''
  return (
    f'class {least} has {counts[least]}, and features of {dim} dimensions need '
    f'more than {dim}'
  )


def distances(samples, train) -> tuple[dict, list[str]]:
  """The distance of the samples of each label to the images of that label.

  Args:
    samples: the `looks.Seen` of the samples.
    train: that of the reference.

  Returns:
    ({'frechet_by_class': {label: distance}}, []), or ({}, [why there is none]).
  """
  for what, one in (('samples', samples), ('training images', train)):
    if one.too_few:
      return {}, [f'no distance by class: of the {what}, {one.too_few}']
  found = {
    str(label): frechet.distance(moments, train.by_label[label])
    for label, moments in sorted(samples.by_label.items())
    if label in train.by_label
  }
  return {'frechet_by_class': found}, []


def details(task, seen: dict) -> dict:
  """How often each class occurs, and by label if there are labels.

  Args:
    task: a `measure.Task`.
    seen: 'samples' and 'heldout' -> their `looks.Seen`.
  """
  found = {}
  if 'classes' not in task.metrics:
    return found
  for name, head in (('samples', ''), ('heldout', 'heldout_')):
    if one := seen.get(name):
      shares = one.classes / one.classes.sum()
      found[f'{head}class_histogram'] = shares.tolist()
      if one.confusion is not None:
        found[f'{head}confusion'] = one.confusion.tolist()
  return found
