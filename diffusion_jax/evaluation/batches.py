"""Results for a set of images, computed and saved batch by batch.

An interrupted pass resumes, provided that the batch size is the same.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from diffusion_jax.evaluation import features, kept
from diffusion_jax.evaluation.features import Images
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

VERSION = 'v1'  # of the files; to be changed when the numbers change
CHUNK = 50  # steps of a grid between two reports of progress


def chunks(count: int) -> list[np.ndarray]:
  """0 .. count - 1 in order, in pieces of CHUNK."""
  return np.split(np.arange(count), range(CHUNK, count, CHUNK))


class Batches(NamedTuple):
  """Images in batches, with the results of each batch on disk.

  Attributes:
    mesh: the devices that a batch is split over.
    images: uint8 images.
    folder: folder of the results.
    batch_size: images per batch, over all devices.
    on_work: called with the amount of work just done.
    infinite: what is not finite, and the remedy, for the error message.
  """

  mesh: Mesh
  images: Images
  folder: files.Path
  batch_size: int
  on_work: Callable[[int], None]
  infinite: str

  def each(
    self, name: str, compute: Callable, work: int
  ) -> dict[str, np.ndarray]:
    """Runs a function on each batch whose result is not yet in the folder.

    Args:
      name: name of the results in the folder.
      compute: (images, numbers, tell) -> {key: [..., B]}. The first two are
        global arrays sharded over the mesh, padded with repeats; tell(done)
        reports how much work per image has just been done.
      work: work per image.

    Returns:
      the results without the repeats, joined along the last axis.

    Raises:
      UserError: a number is not finite.
    """
    parts = self.mesh.shape['data'] * self.mesh.shape['fsdp']
    batch = min(self.batch_size, self.images.count)
    size = -(-batch // parts) * parts
    place = files.at(self.folder) / f'{name}_{size}_{VERSION}'
    found, first = [], 0
    for images in features.blocks(self.images.stream(), size):
      numbers = np.arange(first, first + len(images))
      path = place / f'{numbers[0]:09d}-{numbers[-1]:09d}.npz'
      one, is_kept = kept.once(
        functools.partial(kept.read, path),
        functools.partial(kept.write, path),
        functools.partial(self._computed, compute, images, numbers, size),
      )
      if is_kept:
        self.on_work(work * len(images))
      found.append(one)
      first += len(images)
    return {
      key: np.concatenate([one[key] for one in found], axis=-1)
      for key in found[0]
    }

  def _computed(self, compute, images, numbers, size):
    count = len(images)
    chosen = np.resize(np.arange(count), size)
    given = images[chosen], numbers[chosen].astype(np.uint32)
    found = compute(
      *sharding.put_batch(given, self.mesh),
      lambda done: self.on_work(done * count),
    )
    found = {key: np.asarray(x)[..., :count] for key, x in found.items()}
    for x in found.values():
      if not np.isfinite(x).all():
        raise UserError(
          f'images {numbers[0]} to {numbers[-1]} have {self.infinite}'
        )
    return found
