"""Converts settings of diffusers' `UNet2DModel` to configs and back.

Supported are DDPM's U-Net and its variants in `models.styles`, of any width,
depth and size, with or without class labels. The tables below list the settings
that may differ and those that may not. Errors name the setting that makes a
network another one.
"""

from collections.abc import Callable, Mapping

from diffusion_jax.models import styles
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights.settings import agree, must_be, shown, whole

# Settings that may not differ: (diffusers' default, required value).
FIXED = {
  'act_fn': ('silu', 'silu'),
  'center_input_sample': (False, False),
  'class_embed_type': (None, None),
  'mid_block_scale_factor': (1, 1),
  'mid_block_type': ('UNetMidBlock2D', 'UNetMidBlock2D'),
  'time_embedding_dim': (None, None),
  'time_embedding_type': ('positional', 'positional'),
}
# Settings that are details of `styles.Style`: (field, {their value: ours}).
DETAILS = {
  'downsample_padding': ('padding', {1: 'both', 0: 'end'}),
  'flip_sin_to_cos': ('sinusoid', {True: 'cos_sin', False: 'sin_cos'}),
  'freq_shift': ('freq_shift', {0: 0, 1: 1}),
  'resnet_time_scale_shift': (
    'scale_shift', {'default': False, 'scale_shift': True},
  ),
  'add_attention': ('middle_attention', {True: True, False: False}),
}  # fmt: skip
# What their network cannot have.
DDPM_ONLY = (
  *('up_attention', 'skip_scale', 'resampled_shortcut', 'doors_at', 'vector'),
)
# diffusers' defaults of other settings.
DEFAULTS = {
  **{'in_channels': 3, 'out_channels': 3, 'layers_per_block': 2},
  **{'norm_num_groups': 32, 'attention_head_dim': 8, 'dropout': 0.0},
  **{'norm_eps': 1e-5, 'num_class_embeds': None, 'attn_norm_num_groups': None},
  **{'downsample_type': 'conv', 'upsample_type': 'conv'},
}
LISTS = ('block_out_channels', 'down_block_types', 'up_block_types')
COUNTS = ('layers_per_block', 'norm_num_groups')
TYPES = {'conv': 'conv', 'block': 'resnet'}  # of resampling
LEVELS = 20


# --- ours to theirs ----------------------------------------------------------


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
  style = style_of(model, augment=config['data'].get('augment', 0.0))
  if model.get('transformer_depths'):
    raise UserError(
      f'model.transformer_depths={list(model["transformer_depths"])}: a '
      'UNet2DModel has no transformers: such a network cannot be written'
    )
  widths = [model['channels'] * m for m in model['multipliers']]
  maps = [size // 2**level for level in range(len(widths))]
  attends = [at in model['attention_resolutions'] for at in maps]
  if widths[0] != model['channels']:
    raise UserError(
      f'model.multipliers={list(model["multipliers"])}: diffusers needs 1 for '
      'the first level: such a network cannot be written'
    )
  condition, groups = config['conditioning'], model['num_groups']
  if condition['name'] == 'text':
    raise UserError(
      "conditioning.name='text': a UNet2DModel of diffusers takes no text: "
      'such a run cannot be written'
    )
  learned = config['loss']['variance'] == 'learned'
  is_plain = style.middle_attention and not style.scale_shift
  return {
    '_class_name': 'UNet2DModel',
    'sample_size': size,
    'in_channels': config['data']['channels'],
    'out_channels': config['data']['channels'] * (1 + learned),
    'block_out_channels': widths,
    'layers_per_block': model['num_blocks'],
    'down_block_types': _kinds('Down', attends, style.resampling),
    'up_block_types': _kinds('Up', attends[::-1], style.resampling),
    'downsample_type': TYPES[style.resampling],
    'upsample_type': TYPES[style.resampling],
    'attention_head_dim': _head_dim(model, _attending(widths, attends)),
    'norm_num_groups': groups,
    'attn_norm_num_groups': None if is_plain else groups,
    'norm_eps': style.epsilon,
    'dropout': model['dropout'],
    'num_class_embeds': (
      condition['num_classes'] + 1 if condition['name'] == 'label' else None
    ),
    **{name: value for name, (_, value) in FIXED.items()},
    **{
      name: inverse(values)[getattr(style, field)]
      for name, (field, values) in DETAILS.items()
    },
  }


def style_of(
  model, kind='UNet2DModel', only=DDPM_ONLY, augment=0.0
) -> styles.Style:
  """The style of a network that diffusers supports.

  Args:
    model: the group `model` of a run's config.
    kind: diffusers' class.
    only: fields of the style in which it must be DDPM's.
    augment: the run's `data.augment`.

  Raises:
    UserError: diffusers does not support it.
  """
  if model['name'] != 'unet':
    raise UserError(
      f'model.name={model["name"]}: only a unet can be written for diffusers'
    )
  style = styles.create(model['style'], model['details'])
  wrong = [n for n in only if getattr(style, n) != getattr(styles.DDPM, n)]
  wrong += ['sinusoid'] * (style.sinusoid == 'fourier')
  if wrong:
    raise UserError(
      f'model.style={model["style"]}: a {kind} has no {wrong[0]}='
      f'{getattr(style, wrong[0])}: such a network cannot be written'
    )
  if augment:
    raise UserError(
      f'data.augment={augment}: a {kind} has no input for the transforms: '
      'such a network cannot be written'
    )
  if model['time_scale'] != 1:
    raise UserError(
      f'model.time_scale={model["time_scale"]}: a {kind} has none: such a '
      'network cannot be written'
    )
  return style


def _head_dim(model, widths: set[int]) -> int | None:
  """The channels of a head, None for one head at any width."""
  if model['head_channels']:
    return model['head_channels']
  if model['num_heads'] == 1:
    return None
  heads = {width // model['num_heads'] for width in widths}
  if len(heads) > 1:
    raise UserError(
      f'model.num_heads={model["num_heads"]}: heads of {sorted(heads)} '
      'channels at different levels, but diffusers has one width for all: '
      'such a network cannot be written'
    )
  return heads.pop()


def inverse(values: dict) -> dict:
  """Our value -> theirs."""
  return {ours: theirs for theirs, ours in values.items()}


def _kinds(way: str, attends, resampling: str) -> list[str]:
  plain = '' if resampling == 'conv' else f'Resnet{way}sample'
  return [
    f'Attn{way}Block2D' if attend else f'{plain or way}Block2D'
    for attend in attends
  ]


# --- theirs to ours ----------------------------------------------------------


def network_of(settings: dict, path) -> dict:
  """Converts UNet2DModel settings to parts of a run's config.

  Args:
    settings: the content of its config.json.
    path: the path of that file, for messages.

  Returns:
    'data' (image_size and channels only), 'model', 'conditioning', and 'loss'
    (variance only).

  Raises:
    UserError: the network is not supported; the message names the setting.
  """
  agree(path, '_class_name', settings.get('_class_name'), ['UNet2DModel'])
  must_be(settings, FIXED, path)
  for name in ('sample_size', *LISTS):
    if name not in settings:
      raise UserError(f'{path} has no {name}: it is no UNet2DModel')
  first = {name: next(iter(values)) for name, (_, values) in DETAILS.items()}
  theirs = {**DEFAULTS, **first, **settings}
  size = theirs['sample_size']
  if isinstance(size, list) and size and size.count(size[0]) == len(size):
    theirs['sample_size'] = size[0]  # [32, 32]

  size, channels, blocks, groups = (
    whole(name, theirs[name], path)
    for name in ('sample_size', 'in_channels', *COUNTS)
  )
  outputs = theirs['out_channels']
  agree(path, 'out_channels', outputs, [channels, 2 * channels])
  widths, attends = levels_of(theirs, path, _allowed)
  resampling = _resampling_of(theirs, path)
  style = _details_of(theirs, path)._replace(resampling=resampling)
  name, details = styles.described(style)
  return {
    'data': {'image_size': size, 'channels': channels},
    'conditioning': _condition_of(theirs['num_class_embeds'], path),
    'loss': {'variance': 'fixed' if outputs == channels else 'learned'},
    'model': {
      'name': 'unet',
      'style': name,
      'details': details,
      'time_scale': 1.0,
      'channels': widths[0],
      'multipliers': [width // widths[0] for width in widths],
      'num_blocks': blocks,
      'attention_resolutions': [
        size // 2**level for level, attend in enumerate(attends) if attend
      ],
      **_heads_of(theirs, _attending(widths, attends), path),
      'num_groups': groups,
      'dropout': number('dropout', theirs['dropout'], path),
    },
  }


def number(name: str, value, path) -> float:
  """A setting that must be a number in [0, 1), as `settings.whole`.

  Args:
    name: the setting.
    value: its value.
    path: the file, for the message.

  Raises:
    UserError: it is not.
  """
  if type(value) not in (int, float) or not 0 <= value < 1:
    raise UserError(f'{path}: {name} is {shown(value)}: in [0, 1)')
  return float(value)


def _details_of(theirs: dict, path) -> styles.Style:
  """The details of their network but for its resampling."""
  found = {'epsilon': number('norm_eps', theirs['norm_eps'], path)}
  for name, (field, values) in DETAILS.items():
    agree(path, name, theirs[name], values)
    found[field] = values[theirs[name]]
  # Without groups, the middle's attention has a norm in plain networks only.
  groups = [theirs['norm_num_groups']]
  if not (found['scale_shift'] and found['middle_attention']):
    groups.append(None)
  agree(path, 'attn_norm_num_groups', theirs['attn_norm_num_groups'], groups)
  return styles.Style(**found)


def _condition_of(embeddings, path) -> dict:
  """The condition; the last of their embeddings is that of no label."""
  if embeddings is None:
    return {'name': 'none'}
  count = whole('num_class_embeds', embeddings, path) - 1
  if count == 0:
    raise UserError(
      f'{path}: num_class_embeds is 1: at least 2, a class and none'
    )
  return {'name': 'label', 'num_classes': count}


def levels_of(
  theirs: dict, path, allowed: Callable[[str], list[str]]
) -> tuple[list[int], list[bool]]:
  """The width of each level, and whether it attends.

  Args:
    theirs: their settings, with all of LISTS.
    path: the path of the file, for messages.
    allowed: 'Down' or 'Up' -> the types of blocks that are supported.

  Raises:
    UserError: the levels are not supported; the message names the setting.
  """
  for name in LISTS:
    value = theirs[name]
    if not isinstance(value, list) or not 0 < len(value) < LEVELS:
      raise UserError(
        f'{path}: {name} is {shown(value)}: must be a list, one per level'
      )
  widths, down, up = (theirs[name] for name in LISTS)
  for width in widths:
    if whole('block_out_channels', width, path) % widths[0]:
      raise UserError(
        f'{path}: block_out_channels is {shown(widths)}, but the U-Net here '
        'needs multiples of the first: it is another network'
      )
  for kind in down:
    agree(path, 'down_block_types', kind, allowed('Down'))
  for kind in up:
    agree(path, 'up_block_types', kind, allowed('Up'))
  attends = ['Attn' in kind for kind in down]
  agree(path, 'block_out_channels', len(widths), [len(attends)])
  theirs_up = ['Attn' in kind for kind in up]
  if theirs_up != attends[::-1]:
    raise UserError(
      f'{path}: up_block_types is {shown(up)}, but must attend at the levels '
      f'of down_block_types {shown(down)}: it is another network'
    )
  return widths, attends


def _allowed(way: str) -> list[str]:
  return [f'{way}Block2D', f'Attn{way}Block2D', f'Resnet{way}sampleBlock2D']


def _resampling_of(theirs: dict, path) -> str:
  """How all levels but the last are resampled, which must be the same way."""
  found = set()
  for way in ('down', 'up'):
    kind = theirs[f'{way}sample_type']
    agree(path, f'{way}sample_type', kind, TYPES.values())
    for block in theirs[f'{way}_block_types'][:-1]:
      attends, is_block = block.startswith('Attn'), block.startswith('Resnet')
      found.add(kind if attends else TYPES['block' if is_block else 'conv'])
  if len(found) > 1:
    raise UserError(
      f'{path}: downsample_type, upsample_type and the block types resample '
      'some levels by conv and others by resnet: it is another network'
    )
  return inverse(TYPES)[found.pop()] if found else 'conv'


def _heads_of(theirs: dict, widths: set[int], path) -> dict:
  """Heads by number where it is the same at all levels, else by channels."""
  if theirs['attention_head_dim'] is None:
    return {'num_heads': 1, 'head_channels': 0}
  head = whole('attention_head_dim', theirs['attention_head_dim'], path)
  found = {width / head for width in widths}
  heads = found.pop()
  if found or not heads.is_integer():
    return {'num_heads': 1, 'head_channels': head}
  return {'num_heads': int(heads), 'head_channels': 0}


def _attending(widths, attends) -> set[int]:
  """The widths of levels with attention, and that of the middle."""
  there = {w for w, attend in zip(widths, attends, strict=True) if attend}
  return there | {widths[-1]}
