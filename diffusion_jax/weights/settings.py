"""Converts settings of diffusers' networks and schedulers to configs and back.

A `UNet2DModel` can be many networks; only DDPM's is supported, of any width,
depth and size. The tables below list the settings that it needs. Errors name
the setting that makes a network another one.
"""

import json
from collections.abc import Mapping

from diffusion_jax.system.errors import UserError

# Settings of DDPM's network: (diffusers' default, required value).
DDPM = {
  'act_fn': ('silu', 'silu'),
  'add_attention': (True, True),
  'attn_norm_num_groups': (None, None),
  'center_input_sample': (False, False),
  'class_embed_type': (None, None),
  'downsample_padding': (1, 0),  # 0 stands for TensorFlow's (0, 1)
  'downsample_type': ('conv', 'conv'),
  'flip_sin_to_cos': (True, False),
  'freq_shift': (0, 1),
  'mid_block_scale_factor': (1, 1),
  'mid_block_type': ('UNetMidBlock2D', 'UNetMidBlock2D'),
  'norm_eps': (1e-5, 1e-6),
  'num_class_embeds': (None, None),
  'resnet_time_scale_shift': ('default', 'default'),
  'time_embedding_dim': (None, None),
  'time_embedding_type': ('positional', 'positional'),
  'upsample_type': ('conv', 'conv'),
}
# diffusers' defaults of other settings.
DEFAULTS = {
  **{'in_channels': 3, 'out_channels': 3, 'layers_per_block': 2},
  **{'norm_num_groups': 32, 'attention_head_dim': 8, 'dropout': 0.0},
}
LISTS = ('block_out_channels', 'down_block_types', 'up_block_types')

# The same for a scheduler: (diffusers' default, required value).
PROCESS = {
  'beta_schedule': ('linear', 'linear'),
  'clip_sample_range': (1.0, 1.0),
  'rescale_betas_zero_snr': (False, False),
  'thresholding': (False, False),
  'trained_betas': (None, None),
}
NUMBERS = {'num_train_timesteps': 1000, 'beta_start': 1e-4, 'beta_end': 0.02}
PREDICTIONS = {'epsilon': 'eps', 'sample': 'x0', 'v_prediction': 'v'}
# Schedulers with DDPM's betas; their sampling method does not matter here.
SCHEDULERS = (
  *('DDPMScheduler', 'DDIMScheduler', 'PNDMScheduler'),
  *('DPMSolverMultistepScheduler', 'DPMSolverSinglestepScheduler'),
  'UniPCMultistepScheduler',
)
VARIANCES = {'fixed_small': 'fixedsmall', 'fixed_large': 'fixedlarge'}

LARGEST = 10**6  # bound on any number in a folder
LEVELS = 20


def unet_of(config: Mapping) -> dict:
  """Converts a run's network to the config.json of a UNet2DModel.

  Args:
    config: the run's config.

  Raises:
    UserError: diffusers does not support such a network.
  """
  model, size = config['model'], config['data']['image_size']
  if not isinstance(size, int):
    raise UserError(
      f'data.image_size={list(size)}: DDPMPipeline only supports squares'
    )
  widths = [model['channels'] * m for m in model['multipliers']]
  maps = [size // 2**level for level in range(len(widths))]
  attends = [at in model['attention_resolutions'] for at in maps]
  if widths[0] != model['channels']:
    raise UserError(
      f'model.multipliers={list(model["multipliers"])}: diffusers needs 1 for '
      'the first level: such a network cannot be written'
    )
  heads = {width // model['num_heads'] for width in _attending(widths, attends)}
  if model['num_heads'] > 1 and len(heads) > 1:
    raise UserError(
      f'model.num_heads={model["num_heads"]}: heads of {sorted(heads)} '
      'channels at different levels, but diffusers has one width for all: '
      'such a network cannot be written'
    )
  return {
    '_class_name': 'UNet2DModel',
    'sample_size': size,
    'in_channels': config['data']['channels'],
    'out_channels': config['data']['channels'],
    'block_out_channels': widths,
    'layers_per_block': model['num_blocks'],
    'down_block_types': _kinds('Down', attends),
    'up_block_types': _kinds('Up', attends[::-1]),
    'attention_head_dim': None if model['num_heads'] == 1 else heads.pop(),
    'norm_num_groups': model['num_groups'],
    'dropout': model['dropout'],
    **{name: value for name, (_, value) in DDPM.items()},
  }


def scheduler_of(config: Mapping) -> dict:
  """Converts a run's process and variance to DDPMScheduler settings.

  Args:
    config: the run's config.

  Raises:
    UserError: the run's betas are not linear.
  """
  process, sample = config['process'], config['sample']
  if process['schedule'] != 'linear':
    raise UserError(
      f'process.schedule={process["schedule"]}: only linear can be written'
    )
  predictions = {ours: name for name, ours in PREDICTIONS.items()}
  variances = {ours: name for name, ours in VARIANCES.items()}
  return {
    '_class_name': 'DDPMScheduler',
    'num_train_timesteps': process['num_timesteps'],
    'beta_start': process['beta_start'],
    'beta_end': process['beta_end'],
    'prediction_type': predictions[config['loss']['prediction']],
    'variance_type': variances[sample['variance']],
    'clip_sample': sample['clip'],
    **{name: value for name, (_, value) in PROCESS.items()},
  }


def network_of(settings: dict, path) -> dict:
  """Converts UNet2DModel settings to parts of a run's config.

  Args:
    settings: the content of its config.json.
    path: the path of that file, for messages.

  Returns:
    'data' (image_size and channels only) and 'model'.

  Raises:
    UserError: the network is not supported; the message names the setting.
  """
  agree(path, '_class_name', settings.get('_class_name'), ['UNet2DModel'])
  _must_be(settings, DDPM, path)
  for name in ('sample_size', *LISTS):
    if name not in settings:
      raise UserError(f'{path} has no {name}: it is no UNet2DModel')
  theirs = {**DEFAULTS, **settings}
  size = theirs['sample_size']
  if isinstance(size, list) and size and size.count(size[0]) == len(size):
    theirs['sample_size'] = size[0]  # [32, 32]

  def whole(name):
    return _whole(name, theirs[name], path)

  size, channels = whole('sample_size'), whole('in_channels')
  agree(path, 'out_channels', theirs['out_channels'], [channels])
  widths, attends = _levels_of(theirs, path)
  dropout = theirs['dropout']
  if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
    raise UserError(f'{path}: dropout is {_shown(dropout)}: in [0, 1)')
  return {
    'data': {'image_size': size, 'channels': channels},
    'model': {
      'name': 'unet',
      'channels': widths[0],
      'multipliers': [width // widths[0] for width in widths],
      'num_blocks': whole('layers_per_block'),
      'attention_resolutions': [
        size // 2**level for level, attend in enumerate(attends) if attend
      ],
      'num_heads': _heads_of(theirs, widths, attends, path),
      'num_groups': whole('norm_num_groups'),
      'dropout': float(dropout),
    },
  }


def _levels_of(theirs: dict, path) -> tuple[list[int], list[bool]]:
  """The width of each level, and whether it has attention."""
  for name in LISTS:
    value = theirs[name]
    if not isinstance(value, list) or not 0 < len(value) < LEVELS:
      raise UserError(
        f'{path}: {name} is {_shown(value)}: must be a list, one per level'
      )
  widths, down, up = (theirs[name] for name in LISTS)
  for width in widths:
    if _whole('block_out_channels', width, path) % widths[0]:
      raise UserError(
        f'{path}: block_out_channels is {_shown(widths)}, but the U-Net here '
        'needs multiples of the first: it is another network'
      )
  for kind in down:
    agree(path, 'down_block_types', kind, _kinds('Down', [False, True]))
  attends = [kind.startswith('Attn') for kind in down]
  agree(path, 'block_out_channels', len(widths), [len(attends)])
  agree(path, 'up_block_types', up, [_kinds('Up', attends[::-1])])
  return widths, attends


def _heads_of(theirs: dict, widths, attends, path) -> int:
  """The number of attention heads, which must be the same at all levels."""
  if theirs['attention_head_dim'] is None:
    return 1
  head = _whole('attention_head_dim', theirs['attention_head_dim'], path)
  found = {width / head for width in _attending(widths, attends)}
  heads = found.pop()
  if found or not heads.is_integer():
    raise UserError(
      f'{path}: attention_head_dim is {head}, but the U-Net here needs the '
      'same number of heads at all levels (null: 1): it is another network'
    )
  return int(heads)


def _kinds(way: str, attends) -> list[str]:
  return [f'{"Attn" * attend}{way}Block2D' for attend in attends]


def _whole(name: str, value, path) -> int:
  if type(value) is not int or not 0 < value < LARGEST:
    raise UserError(f'{path}: {name} is {_shown(value)}: a whole number')
  return value


def process_of(settings: dict, path) -> dict:
  """Converts scheduler settings to parts of a run's config.

  Args:
    settings: the content of its scheduler_config.json; missing settings have
      diffusers' defaults.
    path: the path of that file, for messages.

  Returns:
    'process', 'loss', and 'sample' (variance and clip only).

  Raises:
    UserError: the process is not supported; the message names the setting.
  """
  kind = settings.get('_class_name', 'DDPMScheduler')
  agree(path, '_class_name', kind, SCHEDULERS)
  _must_be(settings, PROCESS, path)
  prediction = settings.get('prediction_type', 'epsilon')
  variance = settings.get('variance_type', 'fixed_small')
  agree(path, 'prediction_type', prediction, PREDICTIONS)
  agree(path, 'variance_type', variance, VARIANCES)

  def number(name, kinds):
    value = settings.get(name, NUMBERS[name])
    if not isinstance(value, kinds) or not 0 < value < LARGEST:
      raise UserError(f'{path}: {name} is {_shown(value)}: a number above 0')
    return value

  return {
    'process': {
      'schedule': 'linear',
      'num_timesteps': number('num_train_timesteps', int),
      'beta_start': float(number('beta_start', int | float)),
      'beta_end': float(number('beta_end', int | float)),
    },
    'loss': {'prediction': PREDICTIONS[prediction]},
    'sample': {
      'variance': VARIANCES[variance],
      'clip': bool(settings.get('clip_sample', True)),
    },
  }


def _attending(widths, attends) -> set[int]:
  """The widths of levels with attention; the middle always has attention."""
  there = {w for w, attend in zip(widths, attends, strict=True) if attend}
  return there | {widths[-1]}


def _must_be(settings, rules, path) -> None:
  for name, (default, wanted) in rules.items():
    agree(path, name, settings.get(name, default), [wanted])


def agree(path, name, value, allowed) -> None:
  """Raises UserError unless a setting has one of the allowed values.

  Args:
    path: the path of the file, for the message.
    name: the name of the setting.
    value: the value in the file.
    allowed: allowed values, of any type.
  """
  allowed = list(allowed)  # supports `in` for values of any type, even lists
  if value not in allowed:
    raise UserError(
      f'{path}: {name} is {_shown(value)}, but must be '
      f'{" or ".join(map(_shown, allowed))}: it is another network or process'
    )


def _shown(value) -> str:
  text = json.dumps(value)
  return text if len(text) < 100 else f'{text[:97]}...'
