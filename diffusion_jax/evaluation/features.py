"""Networks that judge images, and passes of images through them.

A judge is interchangeable: a function from images to features and, if it
classifies, to logits. Its name and the hash of its weights are on the card,
because a distance means nothing without them.

Features of a large network are cached on disk, block by block, under the hash
of their images. An interrupted pass therefore resumes, and images that two runs
share, above all the training images, pass through the network only once.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.codecs.pixels import to_float
from diffusion_jax.data import Source, labels, pipeline
from diffusion_jax.evaluation import kept
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

PIXELS = 16  # larger images are averaged down to at most this size
BLOCK = 256  # images per file of the cache

# Of the cache: to be changed when the same network gives other numbers.
VERSION = 'v1'


class Judge(NamedTuple):
  """A network that judges images.

  Attributes:
    apply: (params, images [B, H, W, C], uint8 or float32 in [0, 255]) ->
      {output: [B, D] float32}.
    params: its weights.
    taps: output -> the name of the Frechet distance between such features; all
      other metrics compare the first output.
    logits: the output with the logits, or ''.
    protocol: the facts that the judge's numbers depend on, for the card.
    details: other facts for the card.
    keys: output -> its name in the cache; other outputs are not cached.
  """

  apply: Callable
  params: dict
  taps: dict[str, str]
  logits: str
  protocol: dict
  details: dict
  keys: dict[str, str] = {}  # noqa: RUF012

  def about(self, tap: str) -> dict[str, str]:
    """What the numbers of one tap depend on, whatever the other taps."""
    known = ('features', 'convention', 'resize')
    key = self.keys.get(tap, self.protocol.get('features_sha256', ''))
    return {
      **{name: self.protocol[name] for name in known if name in self.protocol},
      'tap': tap,
      'weights': key.rpartition('_')[2][:16],
      'version': VERSION,
    }


def pixels(image_shape: tuple[int, int, int]) -> Judge:
  """A judge whose features are the pixels in [-1, 1], averaged to <= 16x16.

  Args:
    image_shape: (H, W, C).
  """
  height, width, channels = image_shape
  factor = -(-max(height, width) // PIXELS)
  while height % factor or width % factor:
    factor += 1

  def apply(params, images):
    del params
    x = to_float(images).reshape(
      -1, height // factor, factor, width // factor, factor, channels
    )
    return {'pixels': x.mean((2, 4)).reshape(len(images), -1)}

  resize = 'none' if factor == 1 else f'mean over {factor}x{factor}'
  protocol = {'features': 'pixels', 'features_sha256': '', 'resize': resize}
  return Judge(apply, {}, {'pixels': 'frechet'}, '', protocol, {})


def passes(
  judge: Judge,
  batches: Iterable[np.ndarray],
  batch_size: int,
  mesh: Mesh,
  cache=None,
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
  """Runs images through a judge, sharded over the mesh.

  Args:
    judge: the network.
    batches: images [n, H, W, C] each, uint8 or float32 in [0, 255].
    batch_size: images per call of the network.
    mesh: the devices.
    cache: folder of the cache, for outputs that have a key; None for no cache.

  Returns:
    an iterator of (images as given, {output: float32 [n, D]}), one for each
    BLOCK images; the last may be shorter. Cached features are not computed
    again.

  Raises:
    UserError: pixels or features are not finite.
  """
  params = jax.device_put(judge.params, sharding.replicated(mesh))
  apply = functools.partial(jax.jit(judge.apply), params)
  size = sharding.rounded(min(batch_size, BLOCK), mesh)

  def compute(images):
    outputs = sharding.in_batches(apply, images, size, mesh)
    # A distance computed from them would be meaningless.
    if not all(np.isfinite(x).all() for x in outputs.values()):
      cause = 'it has pixels that are not finite; was training healthy?'
      if np.isfinite(images).all():
        cause = 'the network fails on it'
      raise UserError(f'an image has features that are not finite: {cause}')
    return outputs

  for images in blocks(batches):
    if not cache or not judge.keys:
      yield images, compute(images)
      continue
    outputs, _ = kept.once(
      _paths(judge, images, cache),
      functools.partial(compute, images),
      functools.partial(_read, len(images)),
      _write,
    )
    yield images, outputs


def whole(images: np.ndarray) -> np.ndarray:
  """Images in [0, 255], rounded to uint8 as files hold them."""
  return np.round(images).astype(np.uint8)


def blocks(
  batches: Iterable[np.ndarray], size: int = BLOCK
) -> Iterator[np.ndarray]:
  """The same images in blocks of one size; the last may be shorter."""
  left = []
  for images in batches:
    left.append(images)
    while sum(map(len, left)) >= size:
      joined = np.concatenate(left)
      yield joined[:size]
      left = [joined[size:]]
  if sum(map(len, left)):
    yield np.concatenate(left)


def _paths(judge, images, cache) -> dict[str, files.Path]:
  """The cache files of these images' outputs."""
  digest = hashlib.sha256(f'{images.dtype} {images.shape} '.encode())
  digest.update(np.ascontiguousarray(images))
  name = f'{digest.hexdigest()[:32]}.npy'
  return {
    output: files.at(cache) / 'features' / VERSION / key / name
    for output, key in judge.keys.items()
  }


def _read(count, paths) -> dict[str, np.ndarray]:
  found = {name: np.array(files.mapped(path)) for name, path in paths.items()}
  for x in found.values():
    if x.dtype != np.float32 or x.ndim != 2 or len(x) != count:
      raise ValueError(f'{x.dtype} {x.shape}')
  return found


def _write(paths, outputs):
  for name, path in paths.items():
    files.make(path.parent)
    with files.replacing(path) as file:
      np.save(file, outputs[name], allow_pickle=False)


class Images(NamedTuple):
  """A set of images in order.

  Attributes:
    count: number of images.
    stream: () -> batches [n, H, W, C], uint8 or float32 in [0, 255].
    description: one line.
    image: index -> uint8 [H, W, C], for pictures.
    labels: int32 [count], the class of each image, or the one that was asked
      for; None if there are none, or they do not matter.
    text: index -> the caption of an image, or the prompt of a sample, for
      pictures; None if there are none.
  """

  count: int
  stream: Callable[[], Iterable[np.ndarray]]
  description: str
  image: Callable[[int], np.ndarray] | None = None
  labels: np.ndarray | None = None
  text: Callable[[int], str] | None = None


def images_of(
  source: Source, count: int | None = None, labelled: bool = False
) -> Images:
  """All images of a source in order, or some of them, evenly spaced.

  Args:
    source: the images.
    count: number of images, at most all; None for all.
    labelled: whether to read their labels.
  """
  count = len(source) if count is None else count
  chosen = np.arange(count) * len(source) // count
  picked = dataclasses.replace(
    source,
    num_images=count,
    read_fn=lambda i: source.read_fn(int(chosen[i])),
    label_fn=source.label_fn and (lambda i: source.label_fn(int(chosen[i]))),
    caption_fn=None,
    encode_fn=None,
  )

  def stream():
    for batch, weight in pipeline.heldout(picked, batch_size=BLOCK):
      yield batch['image'][weight > 0]

  found = labels.of(picked, np.arange(count)) if labelled else None
  text = source.caption_fn and (lambda i: source.caption_fn(int(chosen[i]))[0])
  return Images(
    count, stream, source.description, lambda i: picked[i]['image'], found, text
  )


def facts_of(images: Images) -> dict[str, str | int]:
  """What results of a set depend on, for protocols; the set is read once.

  With labels also their hash: the same images may be labelled anew.
  """
  told = {'num_images': images.count, 'images_sha256': sha256_of(images)}
  if images.labels is None:
    return told
  labels = np.ascontiguousarray(images.labels, np.int32)
  return {**told, 'labels_sha256': hashlib.sha256(labels).hexdigest()}


def sha256_of(images: Images) -> str:
  """The hash of all images in order, 64 hexadecimal digits.

  Args:
    images: the set, which is read once.
  """
  digest = hashlib.sha256()
  for i, batch in enumerate(images.stream()):
    if i == 0:
      digest.update(f'{batch.dtype} {batch.shape[1:]} '.encode())
    digest.update(np.ascontiguousarray(batch))
  return digest.hexdigest()
