"""Finds samples that are near-copies of training images.

A sample is one if fewer than a share of new images, such as 5%, are as near to
their nearest training image as it is: `metrics.neighbours.share_nearer`. New
images are held-out ones or, without these, each training image, of which the
nearest other one counts. So of samples that copy no more than new images do,
this share is taken for copies, too.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from diffusion_jax.evaluation import features, looks
from diffusion_jax.evaluation.metrics import neighbours
from diffusion_jax.system.errors import UserError

MOST = 20  # times as many candidates as are wanted, at most
SPARE = 1.2  # the first ones are this many times as many


class Ruler(NamedTuple):
  """What samples are compared with.

  Attributes:
    judge: the network whose first features are compared.
    train: the training images.
    new: float64 [M], the distances of new images to their nearest training
      images, ascending.
    basis: what the new images are, in words.
    hashes: the hashes of the training images.
    batch_size: images per call of the network.
    mesh: the devices.
  """

  judge: features.Judge
  train: features.Images
  new: np.ndarray
  basis: str
  hashes: frozenset
  batch_size: int
  mesh: Mesh


class Verdict(NamedTuple):
  """How near samples are to the training images.

  Attributes:
    distances: [Q], to the nearest training image.
    nearest: [Q], the index of that image.
    shares: [Q], the share of new images that are nearer to theirs.
    identical: bool [Q], whether it is a training image, pixel by pixel.
  """

  distances: np.ndarray
  nearest: np.ndarray
  shares: np.ndarray
  identical: np.ndarray


def ruler(
  judge: features.Judge,
  train: features.Images,
  heldout: features.Images | None,
  batch_size: int,
  mesh: Mesh,
) -> Ruler:
  """Measures how near new images are to the training images.

  Args:
    judge: the network.
    train: the training images, at least two.
    heldout: held-out images, of which at most `looks.QUERIES` are compared.
    batch_size: images per call of the network.
    mesh: the devices.

  Raises:
    UserError: there are too few images.
  """
  if train.count < 2:
    raise UserError(f'{train.description}: at least 2 training images')
  made = Ruler(
    judge, train, np.zeros(0), '', frozenset(), batch_size, mesh
  )  # fmt: skip
  hashes = set()
  whose, k = heldout, 1
  if heldout is None or not heldout.count:
    whose, k = train, 2
  count = min(whose.count, looks.QUERIES)
  at, first, queries = np.arange(count) * whose.count // count, 0, []
  for block, found in _passed(made, whose):
    inside = at[(at >= first) & (at < first + len(block))] - first
    queries.append(found[inside])
    first += len(block)
  near = _search(made, np.concatenate(queries), k, hashes)
  if whose is train:
    # The nearest one is the image itself, or an equal one before it.
    own = near.indices[:, 0] == at
    distances = np.where(own, near.distances[:, 1], near.distances[:, 0])
    basis = 'training images, each without itself'
  else:
    distances, basis = near.distances[:, 0], 'held-out images'
  return made._replace(
    new=np.sort(distances), basis=basis, hashes=frozenset(hashes)
  )


def judged(made: Ruler, images: np.ndarray) -> Verdict:
  """Compares samples with the training images.

  Args:
    made: the result of `ruler`.
    images: uint8 [Q, H, W, C].
  """
  passed = features.passes(
    made.judge, [images], made.batch_size, made.mesh
  )  # fmt: skip
  tap = next(iter(made.judge.taps))
  found = np.concatenate([outputs[tap] for _, outputs in passed])
  near = _search(made, found, 1)
  distances = near.distances[:, 0]
  same = [hash(image.tobytes()) in made.hashes for image in images]
  shares = neighbours.share_nearer(distances, made.new)
  return Verdict(distances, near.indices[:, 0], shares, np.array(same))


def threshold(made: Ruler, near: float) -> float:
  """The distance to a training image up to which samples are left out."""
  if not near:
    return 0.0
  return float(made.new[math.ceil(near * len(made.new)) - 1])


def _passed(made: Ruler, images: features.Images):
  """(images, their main features), block by block."""
  tap = next(iter(made.judge.taps))
  for block, outputs in features.passes(
    made.judge, images.stream(), made.batch_size, made.mesh
  ):
    yield block, outputs[tap]


def _search(made: Ruler, queries, k: int, hashes: set | None = None):
  """The k nearest training images of queries; adds the hashes of all."""
  near, first = neighbours.nothing(len(queries), k), 0
  for block, found in _passed(made, made.train):
    near = neighbours.update(near, queries, found, first)
    first += len(block)
    if hashes is not None:
      hashes.update(hash(image.tobytes()) for image in features.whole(block))
  return near


class Chosen(NamedTuple):
  """The samples of a balanced set.

  Attributes:
    images: uint8 [N, H, W, C].
    indices: int64 [N], ascending: their indices among the candidates.
    looked_at: class -> number of candidates that were looked at.
    near: class -> number left out as near-copies.
    identical: class -> number left out as equal to a training image.
  """

  images: np.ndarray
  indices: np.ndarray
  looked_at: dict[int, int]
  near: dict[int, int]
  identical: dict[int, int]


def choose(
  made: Ruler,
  candidates_fn: Callable[[int, int], np.ndarray],
  labels: Sequence[int],
  per_class: int,
  near: float,
) -> Chosen:
  """Takes the first samples of each class that are no near-copies.

  Which are taken does not depend on how many are drawn at once, and those of a
  smaller set are among those of a larger one.

  Args:
    made: the result of `ruler`.
    candidates_fn: (first index, last index + 1) -> uint8 images [n, H, W, C].
    labels: the classes, which candidates have in turn by index.
    per_class: images of each class.
    near: samples are left out if their share, see `Verdict`, is below this.

  Raises:
    UserError: of MOST * per_class candidates of a class too few are taken.
  """
  width, drawn, most = len(labels), 0, MOST * per_class
  taken = {label: [] for label in labels}
  counts = [dict.fromkeys(labels, 0) for _ in range(3)]
  looked_at, nears, identicals = counts
  while lacks := max(per_class - len(found) for found in taken.values()):
    if drawn == most * width:
      short = min(labels, key=lambda label: len(taken[label]))
      raise UserError(
        f'of {most} candidates of class {short}, {len(taken[short])} are no '
        f'near-copies of training images, too few for per_class={per_class}: '
        'give a lower --near, or an earlier checkpoint'
      )
    end = min(drawn + width * math.ceil(SPARE * lacks), most * width)
    images = candidates_fn(drawn, end)
    verdict = judged(made, images)
    for i, image in enumerate(images):
      label = labels[(drawn + i) % width]
      if len(taken[label]) == per_class:
        continue
      looked_at[label] += 1
      if verdict.identical[i]:
        identicals[label] += 1
      elif verdict.shares[i] < near:
        nears[label] += 1
      else:
        taken[label].append((drawn + i, image))
    drawn = end
  found = sorted(
    (one for some in taken.values() for one in some), key=lambda one: one[0]
  )
  return Chosen(
    np.stack([image for _, image in found]),
    np.array([index for index, _ in found]),
    *counts,
  )
