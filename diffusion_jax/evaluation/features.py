"""Networks that judge images, and the passes of images through them.

A judge is interchangeable: a function from uint8 images to features and, if it
classifies, to probabilities. Its name and the hash of its weights go on the
card, since a distance means nothing without them.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.data import Source, pipeline
from diffusion_jax.evaluation import frechet
from diffusion_jax.evaluation.frechet import Moments
from diffusion_jax.training import sharding

PIXELS = 16  # larger images are averaged down to at most this size


class Judge(NamedTuple):
  """A network that judges images.

  Attributes:
    apply: (params, uint8 [B, H, W, C]) -> (features [B, D] float32,
      probabilities [B, K] or None).
    params: its weights.
    protocol: what a number of this judge depends on, for the card.
    details: what else is worth knowing, for the card.
  """

  apply: Callable
  params: dict
  protocol: dict
  details: dict


class Batch(NamedTuple):
  """Images and what a judge says of them.

  Attributes:
    images: uint8 [n, H, W, C].
    features: float32 [n, D].
    probabilities: float32 [n, K], or None.
  """

  images: np.ndarray
  features: np.ndarray
  probabilities: np.ndarray | None


class Summary(NamedTuple):
  """What a judge makes of a set of images; summaries can be added up.

  Attributes:
    moments: of the features.
    classes: int64 [K], how many images it takes for each class, or None.
    confident: how many of them with a probability above 0.8, or None.
  """

  moments: Moments
  classes: np.ndarray | None
  confident: int | None


CONFIDENT = 0.8


def pixels(image_shape: tuple[int, int, int]) -> Judge:
  """The images themselves, in [-1, 1], averaged down to 16x16 at most.

  Args:
    image_shape: (H, W, C).
  """
  height, width, channels = image_shape
  factor = -(-max(height, width) // PIXELS)
  while height % factor or width % factor:
    factor += 1

  def apply(params, images):
    del params
    x = images.astype(jnp.float32) / 127.5 - 1.0
    x = x.reshape(
      -1, height // factor, factor, width // factor, factor, channels
    )
    return x.mean((2, 4)).reshape(len(images), -1), None

  resize = 'none' if factor == 1 else f'mean over {factor}x{factor}'
  protocol = {'features': 'pixels', 'features_sha256': '', 'resize': resize}
  return Judge(apply, {}, protocol, {})


def passes(
  judge: Judge, batches: Iterable[np.ndarray], batch_size: int, mesh: Mesh
) -> Iterator[Batch]:
  """Runs images through a judge, divided over the mesh.

  Args:
    judge: the network.
    batches: uint8 [n, H, W, C] each, n <= batch_size.
    batch_size: what every batch is filled up to, so that one program serves.
    mesh: the devices.

  Returns:
    an iterator of a Batch for each, of just the images given.
  """
  apply = jax.jit(judge.apply)
  params = jax.device_put(judge.params, sharding.replicated(mesh))
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  size = -(-batch_size // parts) * parts
  for images in batches:
    assert len(images) <= batch_size
    padded = images[np.resize(np.arange(len(images)), size)]
    out = apply(params, sharding.put_batch(padded, mesh))
    features, probabilities = jax.tree.map(sharding.to_host, out)
    if probabilities is not None:
      probabilities = probabilities[: len(images)]
    yield Batch(images, features[: len(images)], probabilities)


def summarise(batches: Iterable[Batch]) -> Summary:
  """The summary of what `passes` yields, in float64, one batch at a time.

  Args:
    batches: at least one.
  """
  total = None
  for batch in batches:
    one = Summary(frechet.moments_of(batch.features), None, None)
    if batch.probabilities is not None:
      num_classes = batch.probabilities.shape[1]
      taken = batch.probabilities.argmax(1)
      one = one._replace(
        classes=np.bincount(taken, minlength=num_classes),
        confident=int((batch.probabilities.max(1) > CONFIDENT).sum()),
      )
    total = merge(total, one)
  return total


def merge(a: Summary | None, b: Summary) -> Summary:
  """The summary of both sets together; None is the empty one."""
  if a is None:
    return b
  both = frechet.merge(a.moments, b.moments)
  if a.classes is None:
    return Summary(both, None, None)
  return Summary(both, a.classes + b.classes, a.confident + b.confident)


def images_of(source: Source, batch_size: int) -> Iterator[np.ndarray]:
  """All images of a source, in order; uint8 [n, H, W, C], n <= batch_size."""
  for batch, weight in pipeline.heldout(source, batch_size=batch_size):
    yield batch['image'][weight > 0]
