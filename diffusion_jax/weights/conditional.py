"""Converts settings of diffusers' `UNet2DConditionModel` to configs and back.

That is the U-Net of Stable Diffusion 1 and 2, of SDXL, and of those that take
further channels, such as the inpainting one. The tables below list the settings
that may differ and those that may not. `stable_diffusion`
reads and writes the folders.
"""

from collections.abc import Mapping

from diffusion_jax.models import styles
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import unets
from diffusion_jax.weights.settings import agree, must_be, shown, whole

CLASS = 'UNet2DConditionModel'
# Settings that may not differ: (diffusers' default, required value).
FIXED = {
  'act_fn': ('silu', 'silu'),
  'attention_type': ('default', 'default'),
  'center_input_sample': (False, False),
  'class_embed_type': (None, None),
  'class_embeddings_concat': (False, False),
  'conv_in_kernel': (3, 3),
  'conv_out_kernel': (3, 3),
  'cross_attention_norm': (None, None),
  'dual_cross_attention': (False, False),
  'encoder_hid_dim': (None, None),
  'encoder_hid_dim_type': (None, None),
  'mid_block_scale_factor': (1, 1),
  'num_attention_heads': (None, None),
  'num_class_embeds': (None, None),
  'only_cross_attention': (False, False),
  'resnet_out_scale_factor': (1, 1),
  'resnet_skip_time_act': (False, False),
  'reverse_transformer_layers_per_block': (None, None),
  'time_cond_proj_dim': (None, None),
  'time_embedding_act_fn': (None, None),
  'time_embedding_dim': (None, None),
  'time_embedding_type': ('positional', 'positional'),
  'timestep_post_act': (None, None),
}
# Settings that are details of `styles.Style`, as in `unets`.
DETAILS = {
  name: value
  for name, value in unets.DETAILS.items()
  if name != 'add_attention'
}
# Settings that do not change the network's function: (diffusers' default,
# allowed values; None = any).
KEPT = {
  'use_linear_projection': (False, (False, True)),  # a layout of weights
  'upcast_attention': (False, (False, True, None)),  # ours is float32 anyway
  'mid_block_only_cross_attention': (None, (None, False)),
  'addition_embed_type_num_heads': (64, None),  # of another addition
}
# diffusers' defaults of other settings.
DEFAULTS = {
  **{'sample_size': None, 'in_channels': 4, 'out_channels': 4},
  **{'block_out_channels': [320, 640, 1280, 1280], 'layers_per_block': 2},
  'down_block_types': [*['CrossAttnDownBlock2D'] * 3, 'DownBlock2D'],
  'up_block_types': ['UpBlock2D', *['CrossAttnUpBlock2D'] * 3],
  'mid_block_type': 'UNetMidBlock2DCrossAttn',
  **{'norm_num_groups': 32, 'norm_eps': 1e-5, 'dropout': 0.0},
  **{'attention_head_dim': 8, 'cross_attention_dim': 1280},
  'transformer_layers_per_block': 1,
  **{'addition_embed_type': None, 'addition_time_embed_dim': None},
  'projection_class_embeddings_input_dim': None,
}
MIDDLES = {'UNetMidBlock2DCrossAttn': True, 'UNetMidBlock2D': False}
ADDITION = 'text_time'  # of a pooled text and of sizes
SIZES = 6  # numbers that SDXL's sizes are
FEATURES = 256  # of each of these numbers, in SDXL
# What their network cannot have.
NO_DETAILS = (
  *('up_attention', 'skip_scale', 'resampled_shortcut', 'doors_at'),
  *('resampling', 'middle_attention'),
)
# What configs do not have, but files.
OF_FILES = (*KEPT, 'addition_time_embed_dim', '_diffusers_version')
KNOWN = {*FIXED, *DETAILS, *KEPT, *DEFAULTS}


# --- theirs to ours ----------------------------------------------------------


def network_of(settings: Mapping, path) -> dict:
  """Converts UNet2DConditionModel settings to parts of a run's config.

  Args:
    settings: the content of its config.json.
    path: the path of that file, for messages.

  Returns:
    'data' (image_size and channels of what is diffused), 'model', 'loss'
    (variance only), and 'doors': the network's conditions, see `models.create`.

  Raises:
    UserError: the network is not supported; the message names the setting.
  """
  agree(path, '_class_name', settings.get('_class_name'), [CLASS])
  for name, value in settings.items():
    if name not in KNOWN and not name.startswith('_') and value is not None:
      raise UserError(
        f'{path}: {name[:100]} is {shown(value)}, which is not known here: it '
        'is another network'
      )
  must_be(settings, FIXED, path)
  for name, (default, allowed) in KEPT.items():
    if allowed:
      agree(path, name, settings.get(name, default), allowed)
  first = {name: next(iter(values)) for name, (_, values) in DETAILS.items()}
  theirs = {**DEFAULTS, **first, **settings}
  inputs, outputs, groups = (
    whole(name, theirs[name], path)
    for name in ('in_channels', 'out_channels', 'norm_num_groups')
  )
  if inputs < outputs:
    raise UserError(
      f'{path}: in_channels is {inputs}, but out_channels {outputs}: inputs '
      'are the noised data and further channels'
    )
  widths, depths = _levels_of(theirs, path)
  name, details = styles.described(_style_of(theirs, path))
  doors = {
    'tokens': _same('cross_attention_dim', theirs, len(widths), path),
    'vector': _vector_of(theirs, path),
    'channels': inputs - outputs,
  }
  return {
    'data': {'image_size': _size_of(theirs, path), 'channels': outputs},
    'loss': {'variance': 'fixed'},
    'doors': {door: size for door, size in doors.items() if size},
    'model': {
      'name': 'unet',
      'style': name,
      'details': details,
      'time_scale': 1.0,
      'channels': widths[0],
      'multipliers': [width // widths[0] for width in widths],
      'num_blocks': _same('layers_per_block', theirs, len(widths), path),
      'transformer_depths': depths,
      **_heads_of(theirs, widths, depths, path),
      'num_groups': groups,
      'dropout': unets.number('dropout', theirs['dropout'], path),
    },
  }


def _size_of(theirs, path) -> int | list[int]:
  """The size of what is diffused, of which only squares are a number."""
  size = theirs['sample_size']
  if isinstance(size, list) and len(size) == 2:
    height, width = (whole('sample_size', side, path) for side in size)
    return height if height == width else size
  return whole('sample_size', size, path)


def _style_of(theirs, path) -> styles.Style:
  found = {'epsilon': unets.number('norm_eps', theirs['norm_eps'], path)}
  for name, (field, values) in DETAILS.items():
    agree(path, name, theirs[name], values)
    found[field] = values[theirs[name]]
  vector = 'mlp' if theirs['addition_embed_type'] else 'linear'
  return styles.Style(**found, vector=vector)


def _same(name: str, theirs, levels: int, path) -> int:
  """A setting that must be the same number at all levels."""
  found = {*_each(name, theirs, levels, path)}
  if len(found) > 1:
    raise UserError(
      f'{path}: {name} is {shown(theirs[name])}, but must be the same at all '
      'levels: it is another network'
    )
  return found.pop()


def _each(name: str, theirs, levels: int, path) -> list[int]:
  """A setting for each level, which may be one number for all."""
  value = theirs[name]
  values = value if isinstance(value, list) else [value] * levels
  if len(values) != levels:
    raise UserError(
      f'{path}: {name} is {shown(value)}: a number, or one for each of '
      f'{levels} levels'
    )
  return [whole(name, number, path) for number in values]


def _levels_of(theirs, path) -> tuple[list[int], list[int]]:
  """The width of each level, and the depths as our networks take them."""
  widths, attends = unets.levels_of(
    theirs, path, lambda way: [f'{way}Block2D', f'CrossAttn{way}Block2D']
  )
  middle = theirs['mid_block_type']
  agree(path, 'mid_block_type', middle, MIDDLES)
  name = 'transformer_layers_per_block'
  depths = _each(name, theirs, len(widths), path)
  there = [*attends, MIDDLES[middle]]
  if not any(there):
    raise UserError(
      f'{path}: no level of down_block_types has attention: it is another '
      'network'
    )
  depths = zip([*depths, depths[-1]], there, strict=True)
  return widths, [depth * attend for depth, attend in depths]


def _heads_of(theirs, widths, depths, path) -> dict:
  """Heads by number where it is the same at all levels, else by channels.

  `attention_head_dim` is the number of heads: its name is a known mistake.
  """
  heads = _each('attention_head_dim', theirs, len(widths), path)
  pairs = zip([*widths, widths[-1]], [*heads, heads[-1]], depths, strict=True)
  pairs = [(width, number) for width, number, depth in pairs if depth]
  numbers = {number for _, number in pairs}
  sizes = {width / number for width, number in pairs}
  if not all(size.is_integer() for size in sizes):
    raise UserError(
      f'{path}: attention_head_dim is {shown(theirs["attention_head_dim"])}, '
      'the number of heads, which must divide block_out_channels'
    )
  if len(numbers) == 1:
    return {'num_heads': numbers.pop(), 'head_channels': 0}
  if len(sizes) == 1:
    return {'num_heads': 1, 'head_channels': int(sizes.pop())}
  raise UserError(
    f'{path}: attention_head_dim is {shown(theirs["attention_head_dim"])}: the '
    'number of heads or their channels must be the same at all levels'
  )


def _vector_of(theirs, path) -> int:
  """The width of the door `vector`, 0 = there is none."""
  kind = theirs['addition_embed_type']
  agree(path, 'addition_embed_type', kind, [None, ADDITION])
  names = 'addition_time_embed_dim', 'projection_class_embeddings_input_dim'
  if not kind:
    must_be(theirs, dict.fromkeys(names, (None, None)), path)
    return 0
  # As of the time; `doors.of_sizes` has no other.
  must_be(theirs, {'flip_sin_to_cos': (True, True), 'freq_shift': (0, 0)}, path)
  of_size, width = (whole(name, theirs[name], path) for name in names)
  if of_size % 2:
    raise UserError(f'{path}: {names[0]} is {of_size}: an even number')
  if width <= SIZES * of_size:
    raise UserError(
      f'{path}: {names[1]} is {width}: more than {SIZES} x {of_size}, which '
      f'the sizes need of it ({names[0]})'
    )
  return width


# --- ours to theirs ----------------------------------------------------------


def unet_of(
  config: Mapping, doors: Mapping[str, int], kept: Mapping | None = None
) -> dict:
  """Converts a network to the config.json of a UNet2DConditionModel.

  Args:
    config: 'data' (image_size and channels of what is diffused) and 'model' of
      a run's config.
    doors: the network's conditions, see `models.create`.
    kept: the settings that the network was read with: they are returned as they
      are if they still describe it.

  Raises:
    UserError: diffusers does not support such a network.
  """
  model, data = config['model'], config['data']
  style = unets.style_of(model, CLASS, NO_DETAILS)
  lacking = {'tokens'} - doors.keys()
  if lacking or doors.keys() - {'tokens', 'vector', 'channels'}:
    raise UserError(
      f'the condition has {" and ".join(doors) or "no door"}, but a {CLASS} '
      'needs tokens and can have vector and channels: such a network cannot be '
      'written'
    )
  size, widths = data['image_size'], _widths_of(model)
  size = size if isinstance(size, int) else list(size)
  *attends, middle = (depth > 0 for depth in model['transformer_depths'])
  settings = {
    '_class_name': CLASS,
    'sample_size': size,
    'in_channels': data['channels'] + doors.get('channels', 0),
    'out_channels': data['channels'],
    'block_out_channels': widths,
    'layers_per_block': model['num_blocks'],
    'down_block_types': _kinds('Down', attends),
    'mid_block_type': unets.inverse(MIDDLES)[middle],
    'up_block_types': _kinds('Up', attends[::-1]),
    'transformer_layers_per_block': _depths_of(model),
    'attention_head_dim': _number_of_heads(model, widths),
    'cross_attention_dim': doors['tokens'],
    'norm_num_groups': model['num_groups'],
    'norm_eps': style.epsilon,
    'dropout': model['dropout'],
    **{name: value for name, (_, value) in FIXED.items()},
    **{
      name: unets.inverse(values)[getattr(style, field)]
      for name, (field, values) in DETAILS.items()
    },
    **_addition_of(style, doors),
    'use_linear_projection': True,
  }
  if kept:
    settings |= {name: kept[name] for name in OF_FILES if name in kept}
  if kept and network_of(kept, CLASS) == network_of(settings, CLASS):
    return dict(kept)
  network_of(settings, CLASS)  # raises where theirs would
  return settings


def _widths_of(model) -> list[int]:
  """The channels of each level; checks that there are as many depths."""
  multipliers, depths = model['multipliers'], model['transformer_depths']
  if multipliers[0] != 1 or len(depths) != len(multipliers) + 1:
    raise UserError(
      f'model.multipliers={list(multipliers)} with model.transformer_depths='
      f'{list(depths)}: a {CLASS} needs 1 for the first level, and a depth for '
      'each level and the middle: such a network cannot be written'
    )
  return [model['channels'] * multiplier for multiplier in multipliers]


def _kinds(way: str, attends) -> list[str]:
  return [f'{"CrossAttn" * attend}{way}Block2D' for attend in attends]


def _depths_of(model) -> int | list[int]:
  """The depth of each level, the last of which is also the middle's."""
  *depths, middle = model['transformer_depths']
  if depths[-1] and middle and depths[-1] != middle:
    raise UserError(
      f'model.transformer_depths={[*depths, middle]}: in a {CLASS}, the middle '
      'has the depth of the last level: such a network cannot be written'
    )
  depths[-1] = depths[-1] or middle
  # Levels without attention need a number, too, which is not used.
  depths = [depth or 1 for depth in depths]
  return depths[0] if len({*depths}) == 1 else depths


def _number_of_heads(model, widths) -> int | list[int]:
  if not model['head_channels']:
    return model['num_heads']
  return [max(1, width // model['head_channels']) for width in widths]


def _addition_of(style, doors) -> dict:
  if 'vector' not in doors:
    return {'addition_embed_type': None}
  if style.vector != 'mlp':
    raise UserError(
      f'model.details.vector={style.vector}: a {CLASS} has two layers for '
      'it, mlp: such a network cannot be written'
    )
  return {
    'addition_embed_type': ADDITION,
    'addition_time_embed_dim': FEATURES,
    'projection_class_embeddings_input_dim': doors['vector'],
  }
