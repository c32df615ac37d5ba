"""Converts settings of diffusers' autoencoders to configs and back.

Supported are `AutoencoderKL` and `VQModel`, of any width, depth and size. The
tables below list the settings that may differ and those that may not. Errors
name the setting that makes a network another one.
"""

import math
from collections.abc import Mapping

import numpy as np

from diffusion_jax.system.errors import UserError
from diffusion_jax.weights.settings import agree, must_be, shown, whole

KL, VQ = 'AutoencoderKL', 'VQModel'
KINDS = {KL: 'kl', VQ: 'vq'}  # class -> regulariser
# Settings that may not differ: (diffusers' default, required value).
FIXED = {'act_fn': ('silu', 'silu')}
FIXED_OF = {
  KL: {},
  VQ: {'norm_type': ('group', 'group'), 'lookup_from_codebook': (False, False)},
}
# diffusers' defaults of other settings.
DEFAULTS = {
  **{'in_channels': 3, 'out_channels': 3, 'block_out_channels': [64]},
  **{'down_block_types': ['DownEncoderBlock2D'], 'norm_num_groups': 32},
  **{'up_block_types': ['UpDecoderBlock2D'], 'layers_per_block': 1},
  **{'sample_size': 32, 'mid_block_add_attention': True},
}
DEFAULTS_OF = {
  KL: {
    'latent_channels': 4, 'use_quant_conv': True, 'use_post_quant_conv': True,
  },
  VQ: {'latent_channels': 3, 'num_vq_embeddings': 256, 'vq_embed_dim': None},
}  # fmt: skip
# How pipelines scale the latents, see `scaling`, and compute: kept as given.
KEPT_OF = {
  KL: {
    'scaling_factor': 0.18215, 'shift_factor': None, 'latents_mean': None,
    'latents_std': None, 'force_upcast': True,
  },
  VQ: {'scaling_factor': 0.18215, 'force_upcast': False},
}  # fmt: skip
DOWN = {'DownEncoderBlock2D': False, 'AttnDownEncoderBlock2D': True}
UP = {'UpDecoderBlock2D': False, 'AttnUpDecoderBlock2D': True}


def class_of(codec: Mapping) -> str:
  """The class of diffusers, KL or VQ, of an autoencoder.

  Args:
    codec: the group of this name of the autoencoder's config.

  Raises:
    UserError: diffusers does not support such a network.
  """
  names = {regulariser: kind for kind, regulariser in KINDS.items()}
  for key, allowed in (
    ('regulariser', [*names]),
    ('hybrid', [0]),
    ('decoder', [True]),
  ):
    if codec[key] not in allowed:
      raise UserError(
        f'codec.{key}={codec[key]} cannot be exported: diffusers only has '
        f'{" and ".join(map(str, allowed))}'
      )
  kind = names[codec['regulariser']]
  if kind == VQ and not codec['quant_conv']:
    raise UserError(
      'codec.quant_conv=False cannot be exported: a VQModel has these '
      'convolutions'
    )
  return kind


def settings_of(config: Mapping, kept: Mapping) -> dict:
  """Converts a run's autoencoder to the config.json of diffusers.

  Args:
    config: the run's config.
    kept: the settings that it was read with, or some that the config does not
      have, see KEPT_OF. Those that it was read with are returned as they are if
      they still describe it.

  Raises:
    UserError: diffusers does not support such a network.
  """
  codec, size = config['codec'], config['data']['image_size']
  kind = class_of(codec)
  widths = [codec['channels'] * m for m in codec['multipliers']]
  side = size if isinstance(size, int) else min(size)
  maps = [side // 2**level for level in range(len(widths))]
  attends = [at in codec['attention_resolutions'] for at in maps]
  colours = config['data']['channels']
  own = {
    'use_quant_conv': codec['quant_conv'],
    'use_post_quant_conv': codec['quant_conv'],
  }
  if kind == VQ:
    own = {
      'num_vq_embeddings': codec['codes'],
      'vq_embed_dim': codec['code_channels'] or None,
    }
  settings = {
    '_class_name': kind,
    'in_channels': colours,
    'out_channels': colours,
    'sample_size': size if isinstance(size, int) else list(size),
    'block_out_channels': widths,
    'layers_per_block': codec['num_blocks'],
    'down_block_types': [_kind(DOWN, attend) for attend in attends],
    'up_block_types': [_kind(UP, attend) for attend in attends[::-1]],
    'latent_channels': codec['latent_channels'],
    'norm_num_groups': codec['num_groups'],
    'mid_block_add_attention': codec['attention'],
    **own,
    **{n: value for n, (_, value) in {**FIXED, **FIXED_OF[kind]}.items()},
    **KEPT_OF[kind],
    **{name: kept[name] for name in kept if name in KEPT_OF[kind]},
  }
  if kept.get('_class_name') != kind:
    return settings
  same = {**kept}
  if network_of(kept, kind)['data'] != network_of(settings, kind)['data']:
    same['sample_size'] = settings['sample_size']
  is_same = network_of(same, kind) == network_of(settings, kind)
  return same if is_same else settings


def _kind(kinds: Mapping[str, bool], attends: bool) -> str:
  return next(name for name, does in kinds.items() if does == attends)


def network_of(settings: Mapping, path) -> dict:
  """Converts diffusers' settings to parts of a run's config.

  Args:
    settings: the content of an autoencoder's config.json.
    path: the path of that file, for messages.

  Returns:
    'data' (image_size and channels only) and 'codec', all of its keys but the
    dtype.

  Raises:
    UserError: the network is not supported; the message names the setting.
  """
  kind = settings.get('_class_name')
  agree(path, '_class_name', kind, KINDS)
  must_be(settings, {**FIXED, **FIXED_OF[kind]}, path)
  theirs = {**DEFAULTS, **DEFAULTS_OF[kind], **settings}

  def number(name):
    return whole(name, theirs[name], path)

  colours = number('in_channels')
  agree(path, 'out_channels', theirs['out_channels'], [colours])
  widths, attends = _levels_of(theirs, path)
  height, width = _size_of(theirs['sample_size'], path)
  if min(height, width) % 2 ** (len(widths) - 1):
    raise UserError(
      f'{path}: sample_size is {shown(theirs["sample_size"])}, but '
      f'{len(widths)} levels need a multiple of {2 ** (len(widths) - 1)}'
    )
  agree(
    path, 'mid_block_add_attention', theirs['mid_block_add_attention'],
    [True, False],
  )  # fmt: skip
  codec = {
    'name': 'autoencoder',
    'channels': widths[0],
    'multipliers': [width // widths[0] for width in widths],
    'num_blocks': number('layers_per_block'),
    'latent_channels': number('latent_channels'),
    'attention': theirs['mid_block_add_attention'],
    'attention_resolutions': [
      min(height, width) // 2**level
      for level, attend in enumerate(attends)
      if attend
    ],
    'num_groups': number('norm_num_groups'),
    'quant_conv': True,
    'hybrid': 0,
    'regulariser': KINDS[kind],
    'decoder': True,
  }
  if kind == KL:
    agree(path, 'use_quant_conv', theirs['use_quant_conv'], [True, False])
    agree(
      path, 'use_post_quant_conv', theirs['use_post_quant_conv'],
      [theirs['use_quant_conv']],
    )  # fmt: skip
    codec['quant_conv'] = theirs['use_quant_conv']
  else:
    codec['codes'] = number('num_vq_embeddings')
    given = theirs['vq_embed_dim'] is not None
    codec['code_channels'] = number('vq_embed_dim') if given else 0
  size = height if height == width else (height, width)
  return {'data': {'image_size': size, 'channels': colours}, 'codec': codec}


def _size_of(value, path) -> tuple[int, int]:
  sides = value if isinstance(value, list) and len(value) == 2 else [value] * 2
  height, width = (whole('sample_size', side, path) for side in sides)
  return height, width


def _levels_of(theirs: Mapping, path) -> tuple[list[int], list[bool]]:
  """The width of each level, and whether it attends."""
  names = ('block_out_channels', 'down_block_types', 'up_block_types')
  widths, down, up = (theirs[name] for name in names)
  for name in names:
    value = theirs[name]
    if not isinstance(value, list) or len(value) != len(widths) or not value:
      raise UserError(
        f'{path}: {name} is {shown(value)}: must be a list, one per level'
      )
  for width in widths:
    if whole('block_out_channels', width, path) % widths[0]:
      raise UserError(
        f'{path}: block_out_channels is {shown(widths)}, but the autoencoder '
        'here needs multiples of the first: it is another network'
      )
  for name, kinds in (('down_block_types', DOWN), ('up_block_types', UP)):
    for kind in theirs[name]:
      agree(path, name, kind, kinds)
  attends = [DOWN[kind] for kind in down]
  if [UP[kind] for kind in up] != attends[::-1]:
    raise UserError(
      f'{path}: up_block_types is {shown(up)}, but must attend at the levels '
      f'of down_block_types {shown(down)}: it is another network'
    )
  return widths, attends


def scaling(
  kept: Mapping, channels: int, path
) -> tuple[list[float], list[float]]:
  """What diffusion sees of the latents z: (z - shift) / scale, by channel.

  diffusers' pipelines compute (z - shift_factor) * scaling_factor, or, with
  latents_mean and latents_std, (z - mean) * scaling_factor / std.

  Args:
    kept: the settings, see `Folder`.
    channels: channels of the latents.
    path: the path of the file, for messages.

  Returns:
    (shift, scale), a number per channel each.

  Raises:
    UserError: the settings are no finite numbers, or scale by 0.
  """

  def numbers(name, usual):
    value = kept.get(name)
    value = usual if value is None else value
    is_list = isinstance(value, list) and name.startswith('latents_')
    values = value if is_list else [value] * channels
    if len(values) != channels or not all(
      type(x) in (int, float) and math.isfinite(x) for x in values
    ):
      raise UserError(
        f'{path}: {name} is {shown(value)}: must be a number'
        + f' for each of {channels} channels' * is_list
      )
    return np.asarray(values, np.float64)

  factor, std = numbers('scaling_factor', 1.0), numbers('latents_std', 1.0)
  if not (factor > 0).all() or not (std > 0).all():
    raise UserError(
      f'{path}: scaling_factor is {shown(kept["scaling_factor"])}, latents_std '
      f'{shown(kept.get("latents_std"))}: both must be above 0'
    )
  name = 'shift_factor' if kept.get('latents_mean') is None else 'latents_mean'
  return numbers(name, 0.0).tolist(), (std / factor).tolist()
