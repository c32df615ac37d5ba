"""What runs do before training: tokens, cached latents, and their scale.

Shift and scale are the mean and the deviation of each channel of the latents,
over the posteriors and over the training images, so that x0 has unit variance.
They are measured once, over at most MEASURED images, and kept in the run.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax import codecs
from diffusion_jax.codecs import latents
from diffusion_jax.data import latents as cache
from diffusion_jax.data import looks, resident
from diffusion_jax.data.sources import Source
from diffusion_jax.models.autoencoder import Coder
from diffusion_jax.runs import encoding, finetune, frozen, perceptual, texts
from diffusion_jax.runs.dataset import Splits
from diffusion_jax.system import distributed, numerics, terminal
from diffusion_jax.training import sharding

MEASURED = 50_000


def complete(config, workdir=None) -> None:
  """Adds to a config what its run has found out, or will be told, in place.

  Args:
    config: the config of a run.
    workdir: the run's folder, new or existing, or None.

  Raises:
    UserError: as for `frozen.complete`.
  """
  frozen.complete(config, workdir)
  texts.complete(config, workdir)


def keep(workdir, parts: frozen.Frozen, splits: Splits) -> None:
  """Copies frozen parts and the tokenizer into a run; see their `write`."""
  frozen.write(workdir, parts)
  texts.write(workdir, splits[0])


def prepare(
  config,
  mesh: Mesh,
  workdir,
  splits: Splits,
  origin: finetune.Origin | None = None,
) -> tuple[Splits, frozen.Frozen]:
  """What a run trains on, and with which frozen parts.

  Call it in all processes.

  Args:
    config: the run's config, completed.
    mesh: the devices.
    workdir: the run's folder, new or existing.
    splits: the training images and the held-out ones.
    origin: the origin of the initial parameters, see `texts.prepare`.

  Returns:
    The splits, with cached latents in place of images if there are any and
    with tokens of captions, and the frozen parts, with shift and scale.

  Raises:
    UserError: as for `frozen.load`, `perceptual.load`, `texts.prepare` and
      `data.latents.opened`, or they do not fit on the devices.
  """
  splits = texts.prepare(config, workdir, splits, origin)
  parts = frozen.load(config, mesh, workdir)
  if perceptual.is_used(config):
    parts = perceptual.load(config, mesh)
  if config['codec'].get('cache'):
    splits = distributed.everywhere(lambda: _cached(config, splits, parts))
  if config['data']['on_device']:
    distributed.everywhere(lambda: resident.check(splits[0]))
  if not codecs.is_in_latents(config):
    return splits, parts
  facts = parts.facts[frozen.CODEC]
  if 'scaled_by' in facts:
    return splits, parts
  coder = encoding.coder_of(config)
  count = min(len(splits[0]), MEASURED)
  with terminal.waiting(
    f'measuring the scale of the latents of {count} images'
  ):
    found = scale_of(coder, parts.params, splits[0], mesh)
  told = f'mean and deviation over {count} training images'
  part = {**parts.params[frozen.CODEC], **sharding.placed(found, mesh)}
  facts = {**facts, 'scaled_by': told}
  return splits, frozen.Frozen({frozen.CODEC: part}, {frozen.CODEC: facts})


def _cached(config, splits, parts) -> Splits:
  given = {
    'weights': encoding.fingerprint(parts.params),
    'origin': parts.origins[frozen.CODEC],
  }
  folder, (train, heldout) = config['codec']['cache'], splits
  train = cache.opened(
    folder, 'train', train, flip=config['data']['flip'], **given
  )
  if heldout:
    heldout = cache.opened(folder, 'test', heldout, flip=False, **given)
  return train, heldout


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
