"""The class labels of a data set: checked, counted, and read without images."""

from concurrent import futures

import numpy as np

from diffusion_jax.data.sources import Source
from diffusion_jax.system import terminal
from diffusion_jax.system.errors import UserError

COUNTED = 100_000  # most labels that are counted, evenly spaced in the set
THREADS = 16  # that wait for a disk


def check(train: Source, heldout: Source | None, num_classes: int) -> None:
  """Checks that images have labels that a condition of num_classes takes.

  Args:
    train: the training images.
    heldout: the held-out images, or None.
    num_classes: labels must be 0 .. num_classes - 1.

  Raises:
    UserError: images have no labels, or there are more classes.
  """
  for source in (train, heldout):
    if source is None:
      continue
    if not source.num_classes:
      whys = [x for x in source.notes if 'label' in x or 'classes' in x]
      why = f' ({"; ".join(whys)})' if whys else ''
      raise UserError(
        f"conditioning.name='label' needs one class for each image, but "
        f'{source.description}{why}: give labelled images, or set '
        "conditioning.name='none'"
      )
    if source.num_classes > num_classes:
      raise UserError(
        f'conditioning.num_classes={num_classes}, but {source.description}: '
        f'set conditioning.num_classes={source.num_classes}'
      )
  if train.num_classes < num_classes:
    terminal.say(
      f'conditioning.num_classes={num_classes}, but the data have '
      f'{train.num_classes} classes: the others are not trained'
    )


def are_quick(source: Source) -> bool:
  """Whether all labels are read in little time."""
  return bool(source.label_fn) or len(source) <= COUNTED


def of(source: Source, indices: np.ndarray) -> np.ndarray:
  """The labels of some images: int32 [n].

  Args:
    source: the images.
    indices: [n] which ones.
  """
  if not source.label_fn:
    found = [source.read_fn(int(i))[1] for i in indices]
  else:
    with futures.ThreadPoolExecutor(THREADS) as pool:
      found = list(pool.map(lambda i: source.label_fn(int(i)), indices))
  return np.array(found, np.int32)


def describe(source: Source, num_classes: int) -> dict:
  """What a run remembers of its labels: their numbers and names.

  Args:
    source: the training images, checked by `check`.
    num_classes: the number of classes of the condition.

  Returns:
    {'counts': number of images of each class, among 'counted' ones evenly
    spaced in the set; 'names': of the classes, [] if they have none}.

  Raises:
    UserError: an image has a label out of range.
  """
  count = min(len(source), COUNTED)
  indices = np.arange(count) * len(source) // count
  labels = of(source, indices)
  wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
  if len(wrong):
    raise UserError(
      f'image {indices[wrong[0]]} of {source.description} has label '
      f'{labels[wrong[0]]}: with conditioning.num_classes={num_classes} labels '
      f'are 0 to {num_classes - 1}'
    )
  return {
    'counts': np.bincount(labels, minlength=num_classes).tolist(),
    'counted': count,
    'names': list(source.class_names),
  }
