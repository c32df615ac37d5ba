"""Latents of a run's images: cached ones, and their scale.

Shift and scale are the mean and the deviation of each channel of the latents,
over the posteriors and over the training images, so that x0 has unit variance.
They are measured once, over at most MEASURED images, and kept in the run.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.codecs import latents
from diffusion_jax.data import latents as cache
from diffusion_jax.data import looks
from diffusion_jax.data.sources import Source
from diffusion_jax.models.autoencoder import Coder
from diffusion_jax.runs import encoding, frozen_codec, kept_parts
from diffusion_jax.runs.dataset import Splits
from diffusion_jax.system import numerics, terminal
from diffusion_jax.training import sharding

MEASURED = 50_000


def cached(config, splits: Splits, parts: kept_parts.Frozen) -> Splits:
  """The splits with the latents of codec.cache in place of images.

  Args:
    config: the run's config.
    splits: the training images and the held-out ones.
    parts: the frozen parts, whose latents they must be.

  Raises:
    UserError: as for `data.latents.opened`.
  """
  given = {
    'weights': encoding.fingerprint(parts.params),
    'origin': parts.origins[frozen_codec.CODEC],
  }
  folder, (train, heldout) = config['codec']['cache'], splits
  train = cache.opened(
    folder, 'train', train, flip=config['data']['flip'], **given
  )
  if heldout:
    heldout = cache.opened(folder, 'test', heldout, flip=False, **given)
  return train, heldout


def scaled(
  config, source: Source, parts: kept_parts.Frozen, mesh: Mesh
) -> kept_parts.Frozen:
  """The frozen parts with shift and scale, measured where there are none.

  Args:
    config: the run's config.
    source: the training images, or their latents.
    parts: the frozen parts.
    mesh: the devices.
  """
  facts = parts.facts[frozen_codec.CODEC]
  if 'scaled_by' in facts:
    return parts
  coder = encoding.coder_of(config)
  count = min(len(source), MEASURED)
  with terminal.waiting(
    f'measuring the scale of the latents of {count} images'
  ):
    found = scale_of(coder, parts.params, source, mesh)
  told = f'mean and deviation over {count} training images'
  part = {**parts.params[frozen_codec.CODEC], **sharding.placed(found, mesh)}
  facts = {**facts, 'scaled_by': told}
  return kept_parts.Frozen(
    {**parts.params, frozen_codec.CODEC: part},
    {**parts.facts, frozen_codec.CODEC: facts},
  )


@numerics.fixed()
def scale_of(coder: Coder, params, source: Source, mesh: Mesh) -> dict:
  """The mean and the deviation of the latents of a source, per channel.

  Args:
    coder: the autoencoder.
    params: the frozen parts.
    source: images, or their latents; at most MEASURED, evenly spaced.
    mesh: the devices.

  Returns:
    {'shift': float32 [z], 'scale': float32 [z]}, the same in every process.
  """

  @jax.jit
  def sums(params, rows, weight):
    moments = rows.get(cache.ROW)
    if moments is None:
      moments = latents.moments_of(coder, params, rows)
    each = latents.first_moments(coder, moments)
    return jnp.sum(each * weight[None, :, None], axis=1)

  indices = looks.spread(len(source), MEASURED)
  total = np.zeros((2, coder.shape[-1]))
  for rows, weight in encoding.batches(encoding.some(source, indices), mesh):
    total += sharding.to_host(sums(params, rows, weight)).astype(np.float64)
  mean, square = total / len(indices)
  deviation = np.sqrt(np.maximum(square - mean**2, 1e-12))
  return {
    'shift': mean.astype(np.float32), 'scale': deviation.astype(np.float32)
  }  # fmt: skip
