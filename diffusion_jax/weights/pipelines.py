"""Writes runs in latents as folders of diffusers' `LDMPipeline`.

A folder holds the pipeline of a `UNet2DModel`, see `diffusers`, and vqvae/ with
an autoencoder, see `autoencoders`. Both are read by these two modules.
"""

from collections.abc import Mapping

import jax
import numpy as np

from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import autoencoders, coders, diffusers, places

UPCAST, FACTOR = 'force_upcast', 'scaling_factor'


def write(
  path, config: Mapping, params: Mapping, kept: Mapping | None = None
) -> None:
  """Writes a pipeline of a run in latents that `LDMPipeline` loads.

  Args:
    path: the folder.
    config: the run's config.
    params: 'net' and 'codec', on the host.
    kept: the autoencoder's settings that the config does not have, if it was
      imported.

  Raises:
    UserError: diffusers does not support such a pipeline.
  """
  coder, image = config['codec']['coder'], config['data']
  part, of_coder = coder_of(config, params['codec'], kept)
  # Of others there is no setting in an LDMPipeline's autoencoder.
  usual = coders.KEPT_OF[coders.class_of(coder)]
  names = (UPCAST, FACTOR)
  of_coder = {name: of_coder.get(name, usual[name]) for name in names}
  size, channels = image['image_size'], len(params['codec']['scale'])
  if isinstance(size, int):  # of others diffusers has no pipeline
    size //= 2 ** (len(coder['multipliers']) - 1)
  latents = {'image_size': size, 'channels': channels}
  in_latents = {**config, 'data': {**image, **latents}}
  diffusers.settings_of(in_latents)  # raises before anything is written
  autoencoders.write(
    files.at(path) / places.CODECS[0],
    {'codec': coder, 'data': image},
    part,
    of_coder,
  )
  diffusers.write(
    path,
    in_latents,
    params['net'],
    diffusers.IN_LATENTS,
    {places.CODECS[0]: coders.class_of(coder)},
  )


def coder_of(
  config: Mapping, part: Mapping, kept: Mapping | None = None
) -> tuple[dict, dict]:
  """The autoencoder of a run in latents, as diffusers has it.

  Args:
    config: the run's config.
    part: the parameters 'codec'.
    kept: the settings that it was imported with, if it was.

  Returns:
    (its parameters, its settings besides the config's), see
    `autoencoders.write`.

  Raises:
    UserError: as for `unscaled`.
  """
  coder, kept = config['codec']['coder'], kept or {}
  own, factor = unscaled(part, coder)
  # Files may leave it out.
  usual = (
    coders.KEPT_OF[coders.class_of(coder)] if '_class_name' in kept else {}
  )
  given = kept.get(FACTOR, usual.get(FACTOR)) or 1.0
  if np.float32(1 / given) != np.float32(1 / factor):
    return own, {**kept, FACTOR: factor}
  # Without the rounding of the scale.
  return own, {**kept} if usual else {**kept, FACTOR: given}


def unscaled(part: Mapping, coder: Mapping) -> tuple[dict, float]:
  """An autoencoder whose latents have one scaling_factor, and no shift.

  A scale and a shift of each channel become part of the 1x1 convolutions around
  the latents: of mean and log variance before them, and of z after them.

  Args:
    part: its parameters, 'shift' and 'scale'.
    coder: the config's options of the autoencoder.

  Returns:
    (its parameters without the two, the scaling_factor).

  Raises:
    UserError: it has no such convolutions, or a codebook.
  """
  rest = {k: v for k, v in part.items() if k not in ('shift', 'scale')}
  shift, scale = (np.asarray(part[k], np.float64) for k in ('shift', 'scale'))
  if not shift.any() and (scale == scale[0]).all():
    return rest, float(1 / scale[0])
  if coder['regulariser'] != coders.KINDS[coders.KL] or not coder['quant_conv']:
    raise UserError(
      'the latents have a shift and a scale for each channel, which an '
      'LDMPipeline has only for codec.regulariser=kl with '
      'codec.quant_conv=True: train with one scale, such as '
      '--config.codec.scale=1.0'
    )
  before = rest['encoder']['quant_conv']
  after = rest['decoder']['post_quant_conv']
  one = np.ones_like(scale)
  factor = np.concatenate([1 / scale, one])
  moved = np.concatenate([-shift / scale, -2 * np.log(scale)])
  kernel = np.asarray(after['kernel'], np.float64)
  changed = {
    'encoder': {
      'quant_conv': {
        'kernel': before['kernel'] * factor,
        'bias': before['bias'] * factor + moved,
      }
    },
    'decoder': {
      'post_quant_conv': {
        'kernel': scale[:, None] * kernel,
        'bias': after['bias'] + shift @ kernel,
      }
    },
  }
  changed = jax.tree.map(lambda x: x.astype(np.float32), changed)
  return {name: {**rest[name], **changed.get(name, {})} for name in rest}, 1.0
