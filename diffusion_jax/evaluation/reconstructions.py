"""Measures what an autoencoder loses: PSNR, SSIM, and the use of its codes."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from diffusion_jax.evaluation.features import Images
from diffusion_jax.models import bottleneck
from diffusion_jax.objectives import similarity
from diffusion_jax.runs import autoencoders
from diffusion_jax.runs.trained import Trained
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

KEPT = 2**26  # bytes of reconstructions, which are not decoded again


class Coding(NamedTuple):
  """The compiled functions of an autoencoder.

  Attributes:
    reconstruct: (indices [N], images uint8 [N, H, W, C]) -> the same of the
      reconstructions.
    counts: images -> how often each code is used, [codes]; None without codes.
  """

  reconstruct: Callable
  counts: Callable | None


def coding(trained: Trained, batch_size: int, seed: int = 0) -> Coding:
  """The functions of a trained autoencoder, on its mesh.

  Args:
    trained: the run.
    batch_size: images at once, over all devices.
    seed: of the noise of a decoder that needs any.

  Returns:
    The functions; `reconstruct` raises a UserError where latents are not
    finite.
  """
  mesh, params = trained.mesh, trained.params
  reconstruct_fn = jax.jit(
    autoencoders.reconstructor(trained.codec, mesh, seed)
  )
  counts_fn = autoencoders.counter(trained.config)
  counts_fn = counts_fn and jax.jit(counts_fn)
  size = sharding.rounded(batch_size, mesh)

  def pieces(indices, images) -> Iterator[tuple]:
    for first in range(0, len(images), size):
      rows = indices[first : first + size], images[first : first + size]
      count = len(rows[0])
      fill = np.arange(size) % count
      yield count, sharding.put_batch(tuple(x[fill] for x in rows), mesh)

  def reconstruct(indices, images):
    found = []
    for count, rows in pieces(indices, images):
      seen, is_finite = reconstruct_fn(params, *rows)
      if not is_finite:
        raise UserError(
          'the reconstructions are not finite: use another checkpoint (--step)'
        )
      found.append(sharding.to_host(seen)[:count])
    return np.concatenate(found)

  def counts(images):
    indices = np.arange(len(images), dtype=np.uint32)
    return sum(
      sharding.to_host(
        counts_fn(params, rows[1], np.arange(size) < count)
      ).astype(float)
      for count, rows in pieces(indices, images)
    )

  return Coding(reconstruct, counts if counts_fn else None)


def reconstructed(images: Images, made: Coding) -> Images:
  """The reconstructions of a set of images, as a set.

  The noise of an image depends on its number in the set. The first ones are
  kept, since a set is read more than once and decoders can be slow.
  """
  kept = {}

  def stream():
    first = 0
    for batch in images.stream():
      seen = kept.get(first)
      if seen is None:
        indices = np.arange(first, first + len(batch), dtype=np.uint32)
        seen = made.reconstruct(indices, batch)
        if sum(x.nbytes for x in kept.values()) + seen.nbytes <= KEPT:
          kept[first] = seen
      yield seen
      first += len(batch)

  def image(i):
    return made.reconstruct(np.uint32([i]), images.image(i)[None])[0]

  what = f'reconstructions of {images.description}'
  return Images(images.count, stream, what, image)


def measure(
  images: Images, made: Coding, on_images: Callable[[int], None]
) -> dict[str, float]:
  """PSNR, SSIM and L1 of reconstructions, and the use of the codes.

  Args:
    images: the images.
    made: the autoencoder.
    on_images: called with the number of images after each block.

  Returns:
    name -> number: means over the images. 'perplexity' and 'codes_used' are of
    all codes of all images; they are missing without a codebook.
  """
  found, counts = [], 0
  for batch, seen in zip(
    images.stream(), reconstructed(images, made).stream(), strict=True
  ):
    a, b = (np.asarray(x, np.float64) for x in (batch, seen))
    found.append(
      [
        similarity.psnr(a, b, 255.0, np),
        similarity.ssim(a, b, 255.0, np),
        np.abs(a - b).mean(axis=(1, 2, 3)) / 127.5,
      ]
    )
    if made.counts:
      counts = counts + made.counts(batch)
    on_images(len(batch))
  means = np.concatenate(found, axis=1).mean(axis=1)
  results = dict(zip(('psnr', 'ssim', 'l1'), map(float, means), strict=True))
  if made.counts:
    used = bottleneck.use_of(counts)
    results |= {name: float(x) for name, x in used.items()}
  return results
