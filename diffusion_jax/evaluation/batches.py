"""Results for a set of images, computed and saved batch by batch.

An interrupted pass resumes, provided that the batch size is the same.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.evaluation import features, kept
from diffusion_jax.runs.labels import check_null
from diffusion_jax.runs.trained import Trained
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

VERSION = 'v1'  # of the files; to be changed when the numbers change
REMEDY = 'a run that was trained with conditioning.drop=0.1'
CHUNK = 50  # steps of a grid between two reports of progress


class Batches(NamedTuple):
  """Images in batches, with the results of each batch on disk.

  Attributes:
    trained: the network.
    images: uint8 images.
    folder: folder of the results.
    batch_size: images per batch, over all devices.
    on_work: called with the amount of work just done.
  """

  trained: Trained
  images: features.Images
  folder: files.Path
  batch_size: int
  on_work: Callable[[int], None] = lambda count: None

  def program(
    self, fn: Callable, *, seed: int, stream: int, dtype: str
  ) -> Callable:
    """Compiles a function of clean data, with a key for each image.

    Args:
      fn: (params, cond, x0 [B, ...], keys [B], *rest) -> a tree of arrays,
        where cond is the condition of the images, see `Conditioner`; the
        null condition for images without labels.
      seed: seed of the keys; a key depends only on it and the image's index.
      stream: separates the keys from those of other uses of the seed. Training
        uses 0, sampling 1 (see `runs.draw`), likelihoods 2, calibration 3.
      dtype: the dtype in which images are encoded.

    Returns:
      (images, numbers, *rest) -> a tree of NumPy arrays.

    Raises:
      UserError: the images have no labels, and the run was trained with
        conditioning.drop=0.
    """
    trained, labels = self.trained, self.images.labels
    if labels is None:
      check_null(trained.recipe.conditioner, REMEDY)

    @jax.jit
    def run(params, images, numbers, *rest):
      root = jax.random.fold_in(jax.random.key(seed), stream)
      keys = jax.vmap(lambda number: jax.random.fold_in(root, number))(numbers)
      rows = {'image': images.astype(dtype)}
      if labels is not None:
        rows['label'] = jnp.asarray(labels)[numbers]
      whole = sharding.gather_fsdp(params, trained.mesh)
      cond = trained.recipe.conditioner.condition(whole, rows, None)
      x0 = trained.codec.encode(whole, rows, keys)
      return fn(params, cond, x0, keys, *rest)

    def call(*given):
      return jax.tree.map(sharding.to_host, run(trained.params, *given))

    return call

  def each(
    self, name: str, compute: Callable, work: int, infinite: str
  ) -> dict[str, np.ndarray]:
    """Runs a function on each batch whose result is not yet in the folder.

    Args:
      name: name of the results in the folder.
      compute: (images, numbers, tell) -> {key: [..., B]}. The first two are
        global arrays sharded over the mesh, padded with repeats; tell(done)
        reports how much work per image has just been done.
      work: work per image.
      infinite: what is not finite, and the remedy, for the error message.

    Returns:
      the results without the repeats, joined along the last axis.

    Raises:
      UserError: a number is not finite.
    """
    mesh, found, first = self.trained.mesh, [], 0
    size = sharding.rounded(min(self.batch_size, self.images.count), mesh)
    place = files.at(self.folder) / f'{name}_{size}_{VERSION}'

    def computed(images, numbers):
      count = len(images)
      one = compute(
        *sharding.put_padded((images, numbers), size, mesh),
        lambda done: self.on_work(done * count),
      )
      one = {key: np.asarray(x)[..., :count] for key, x in one.items()}
      if not all(np.isfinite(x).all() for x in one.values()):
        raise UserError(f'images {numbers[0]} to {numbers[-1]} have {infinite}')
      return one

    for images in features.blocks(self.images.stream(), size):
      numbers = np.arange(first, first + len(images), dtype=np.uint32)
      path = place / f'{numbers[0]:09d}-{numbers[-1]:09d}.npz'
      one, is_kept = kept.once(
        path, functools.partial(computed, images, numbers)
      )
      if is_kept:
        self.on_work(work * len(images))
      found.append(one)
      first += len(images)
    return {
      key: np.concatenate([one[key] for one in found], axis=-1)
      for key in found[0]
    }


def by_steps(program: Callable, count: int) -> Callable:
  """Computes a grid's steps in pieces, to report progress in between.

  Args:
    program: (images, numbers, indices of steps [k]) -> a tree of arrays
      [k, B].
    count: number of steps.

  Returns:
    (images, numbers, tell) -> the tree of arrays [count, B], see
    `Batches.each`.
  """

  def compute(images, numbers, tell):
    found = []
    for which in np.split(np.arange(count), range(CHUNK, count, CHUNK)):
      found.append(program(images, numbers, which))
      tell(len(which))
    return jax.tree.map(lambda *x: np.concatenate(x), *found)

  return compute
