"""Folders of diffusers' unconditional pipelines, read and written without it.

A folder holds a `UNet2DModel` and the settings of a scheduler:

  model_index.json
  unet/config.json  unet/diffusion_pytorch_model.safetensors
  scheduler/scheduler_config.json

Old ones have all of it at the top, others are a `UNet2DModel` alone. What is
read is a part of a run's config, with the parameters by our names; the way back
gives the same numbers, bit by bit. Our U-Net is DDPM's, so of the many networks
that a UNet2DModel can be, those are read that are one: the google/ddpm-* ones,
and others of any width, depth and size.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import safetensors.numpy

from diffusion_jax import files
from diffusion_jax.errors import UserError
from diffusion_jax.weights import named, pytorch

INDEX = 'model_index.json'
WEIGHTS = 'diffusion_pytorch_model.safetensors'
# Beside WEIGHTS, or in place of it; read by our own reader, which runs nothing.
PICKLED = 'diffusion_pytorch_model.bin'

# Settings in which a network is DDPM's: what diffusers takes where a folder
# does not say, and what it must be.
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

# The same of a scheduler.
PROCESS = {
  'beta_schedule': ('linear', 'linear'),
  'clip_sample_range': (1.0, 1.0),
  'rescale_betas_zero_snr': (False, False),
  'thresholding': (False, False),
  'trained_betas': (None, None),
}
PREDICTIONS = {'epsilon': 'eps', 'sample': 'x0', 'v_prediction': 'v'}
# Those with DDPM's betas; how they step is a matter of sampling.
SCHEDULERS = (
  *('DDPMScheduler', 'DDIMScheduler', 'PNDMScheduler'),
  *('DPMSolverMultistepScheduler', 'DPMSolverSinglestepScheduler'),
  'UniPCMultistepScheduler',
)
PIPELINES = ('DDPMPipeline', 'DDIMPipeline', 'PNDMPipeline')
VARIANCES = {'fixed_small': 'fixedsmall', 'fixed_large': 'fixedlarge'}

LARGEST = 10**6  # of any number in a folder
LEVELS = 20

# Our names -> theirs, each applied to the result of those above it.
_RENAMED = (
  (r'^(down|up)/(\d+)/blocks', r'\1_blocks/\2/resnets'),
  (r'^(down|up)/(\d+)/attentions', r'\1_blocks/\2/attentions'),
  (r'^(down|up)/(\d+)/resample', r'\1_blocks/\2/\1samplers/0'),
  (r'^middle_attention', r'mid_block/attentions/0'),
  (r'^middle([12])', lambda m: f'mid_block/resnets/{int(m[1]) - 1}'),
  (r'^time([12])', r'time_embedding/linear_\1'),
  (r'^norm_out', r'conv_norm_out'),
  (r'(resnets/\d+)/time', r'\1/time_emb_proj'),
  (r'(resnets/\d+)/shortcut', r'\1/conv_shortcut'),
  (r'(attentions/\d+)/norm', r'\1/group_norm'),
  (r'(attentions/\d+)/(q|k|v)(?:uery|ey|alue)', r'\1/to_\2'),
  (r'(attentions/\d+)/out', r'\1/to_out/0'),
  (r'/(kernel|scale)$', r'/weight'),
  (r'/', r'.'),
)
# How attention was called before diffusers 0.14, as in published folders.
_OLD = {
  'query': 'to_q',
  'key': 'to_k',
  'value': 'to_v',
  'proj_attn': 'to_out.0',
}


class Folder(NamedTuple):
  """What a folder holds.

  Attributes:
    config: parts of a run's config: 'data' (image_size and channels only),
      'model', 'process', 'loss', and 'sample' (variance and clip only).
    tensors: by diffusers' names of today.
    sha256: of the file of weights.
  """

  config: dict
  tensors: dict[str, np.ndarray]
  sha256: str


def is_folder(path) -> bool:
  """Whether it is meant to be one: it has a model's files in it."""
  path = files.at(path)
  return (
    (path / INDEX).is_file()
    or (path / 'unet').is_dir()
    or (
      (path / 'config.json').is_file()
      and '_class_name' in _json(path / 'config.json')
    )
  )


def read(path) -> Folder:
  """Reads a folder.

  Args:
    path: of a pipeline, or of a `UNet2DModel` alone; then the scheduler is
      diffusers' default, which is DDPM's but for the small variance.

  Raises:
    UserError: it is something else, damaged, or a network that ours cannot be;
      the setting is named.
  """
  path = files.at(path)
  unet = path / 'unet' if (path / 'unet').is_dir() else path
  scheduler = path / 'scheduler' / 'scheduler_config.json'
  if not scheduler.exists():
    scheduler = path / 'scheduler_config.json'
  if (path / INDEX).exists():
    kind = _json(path / INDEX).get('_class_name')
    _agree(path / INDEX, '_class_name', kind, PIPELINES)
  settings = _json(unet / 'config.json')
  kind = settings.get('_class_name')
  _agree(unet / 'config.json', '_class_name', kind, ['UNet2DModel'])
  config = _config_of(settings, unet / 'config.json')
  process = _json(scheduler) if scheduler.exists() else {}
  config |= _process_of(process, scheduler)
  tensors, digest = _tensors(unet)
  blocks = config['model']['num_blocks'] * len(config['model']['multipliers'])
  if blocks > len(tensors):
    raise UserError(
      f'{unet}: its settings tell of {blocks} blocks, its file holds '
      f'{len(tensors)} tensors: they do not belong together'
    )
  return Folder(config, tensors, digest)


def to_params(tensors: Mapping[str, np.ndarray], abstract, what: str) -> dict:
  """Diffusers' tensors as our parameters.

  Args:
    tensors: by their names, of today or of old.
    abstract: our parameters' shapes.
    what: where they come from, for the message.

  Raises:
    UserError: some are missing, left over, or of another shape; they are named.
  """
  for name in tensors:
    if _today(name) != name and _today(name) in tensors:
      raise UserError(f'{what}: {name} is there by its name of today too')
  tensors = {_today(name): array for name, array in tensors.items()}
  return named.place(tensors, abstract, name_of, _to_ours, what)


def to_tensors(params) -> dict[str, np.ndarray]:
  """Our parameters as the state dict of a UNet2DModel, float32.

  Args:
    params: a nested dict of arrays.
  """
  return {
    name_of(name): np.ascontiguousarray(_to_theirs(name, np.asarray(leaf)))
    for name, leaf in named.items(params)
  }


def write(path, config: Mapping, params) -> None:
  """Writes a pipeline that `DDPMPipeline.from_pretrained` loads.

  Args:
    path: of the folder; model_index.json comes last, so that a folder without
      one is no pipeline.
    config: of the run.
    params: its parameters, on the host.

  Raises:
    UserError: diffusers has no such network.
  """
  unet, process = unet_settings(config), scheduler_settings(config)
  path = files.at(path)
  weights = safetensors.numpy.save(to_tensors(params), {'format': 'pt'})
  index = {
    '_class_name': 'DDPMPipeline',
    'scheduler': ['diffusers', 'DDPMScheduler'],
    'unet': ['diffusers', 'UNet2DModel'],
  }
  for name, content in (
    (f'unet/{WEIGHTS}', weights),
    ('unet/config.json', _pretty(unet)),
    ('scheduler/scheduler_config.json', _pretty(process)),
    (INDEX, _pretty(index)),
  ):
    files.make((path / name).parent)
    with files.replacing(path / name) as file:
      file.write(content)


# --- settings ----------------------------------------------------------------


def unet_settings(config: Mapping) -> dict:
  """A run's network as the config.json of a UNet2DModel.

  Raises:
    UserError: diffusers has no such network.
  """
  model, size = config['model'], config['data']['image_size']
  widths = [model['channels'] * m for m in model['multipliers']]
  attends = [
    size // 2**level in model['attention_resolutions']
    for level in range(len(widths))
  ]
  if widths[0] != model['channels']:
    raise UserError(
      f'model.multipliers={list(model["multipliers"])}: diffusers has 1 for '
      'the first level: such a network cannot be written'
    )
  heads = {width // model['num_heads'] for width in _attending(widths, attends)}
  if model['num_heads'] > 1 and len(heads) > 1:
    raise UserError(
      f'model.num_heads={model["num_heads"]}: heads of {sorted(heads)} '
      'channels at different levels, and diffusers has one width for all: '
      'such a network cannot be written'
    )
  return {
    '_class_name': 'UNet2DModel',
    'sample_size': size,
    'in_channels': config['data']['channels'],
    'out_channels': config['data']['channels'],
    'block_out_channels': widths,
    'layers_per_block': model['num_blocks'],
    'down_block_types': [
      'AttnDownBlock2D' if attend else 'DownBlock2D' for attend in attends
    ],
    'up_block_types': [
      'AttnUpBlock2D' if attend else 'UpBlock2D' for attend in attends[::-1]
    ],
    'attention_head_dim': None if model['num_heads'] == 1 else heads.pop(),
    'norm_num_groups': model['num_groups'],
    'dropout': model['dropout'],
    **{name: value for name, (_, value) in DDPM.items()},
  }


def scheduler_settings(config: Mapping) -> dict:
  """A run's process and variance as the settings of a DDPMScheduler."""
  process, sample = config['process'], config['sample']
  if process['schedule'] != 'linear':
    raise UserError(
      f'process.schedule={process["schedule"]}: only linear can be written'
    )
  theirs = {ours: name for name, ours in PREDICTIONS.items()}
  variances = {ours: name for name, ours in VARIANCES.items()}
  return {
    '_class_name': 'DDPMScheduler',
    'num_train_timesteps': process['num_timesteps'],
    'beta_start': process['beta_start'],
    'beta_end': process['beta_end'],
    'prediction_type': theirs[config['loss']['prediction']],
    'variance_type': variances[sample.get('variance', 'fixedlarge')],
    'clip_sample': sample.get('clip', True),
    **{name: value for name, (_, value) in PROCESS.items()},
  }


def _config_of(settings: dict, path) -> dict:
  """{'data', 'model'} of a config.json."""
  _must_be(settings, DDPM, path)

  def get(name, *default):
    if name not in settings and not default:
      raise UserError(f'{path} has no {name}: it is no UNet2DModel')
    return settings.get(name, *default)

  def whole(name, value):
    if type(value) is not int or not 0 < value < LARGEST:
      raise UserError(f'{path}: {name} is {_shown(value)}: a whole number')
    return value

  size = get('sample_size')
  if isinstance(size, list) and size and size.count(size[0]) == len(size):
    size = size[0]  # [32, 32]
  size = whole('sample_size', size)
  channels = whole('in_channels', get('in_channels', 3))
  _agree(path, 'out_channels', get('out_channels', 3), [channels])
  blocks = whole('layers_per_block', get('layers_per_block', 2))
  groups = whole('norm_num_groups', get('norm_num_groups', 32))
  lists = {
    name: get(name)
    for name in ('block_out_channels', 'down_block_types', 'up_block_types')
  }
  for name, value in lists.items():
    if not isinstance(value, list) or not 0 < len(value) < LEVELS:
      raise UserError(f'{path}: {name} is {_shown(value)}: a list, by level')
  widths, down, up = lists.values()
  widths = [whole('block_out_channels', width) for width in widths]
  for width in widths:
    if width % widths[0]:
      raise UserError(
        f'{path}: block_out_channels is {_shown(widths)}, and the U-Net here '
        'has multiples of the first: it is another network'
      )
  kinds = ['DownBlock2D', 'AttnDownBlock2D']
  for kind in down:
    _agree(path, 'down_block_types', kind, kinds)
  attends = [kind == kinds[1] for kind in down]
  _agree(path, 'block_out_channels', len(widths), [len(attends)])
  mirror = ['AttnUpBlock2D' if attend else 'UpBlock2D' for attend in attends]
  _agree(path, 'up_block_types', up, [mirror[::-1]])
  head = get('attention_head_dim', 8)
  heads = 1
  if head is not None:
    head = whole('attention_head_dim', head)
    found = {width / head for width in _attending(widths, attends)}
    heads = found.pop()
    if found or not heads.is_integer():
      raise UserError(
        f'{path}: attention_head_dim is {head}, and the U-Net here has one '
        'number of heads at all levels (null: 1): it is another network'
      )
  dropout = get('dropout', 0.0)
  if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
    raise UserError(f'{path}: dropout is {_shown(dropout)}: in [0, 1)')
  return {
    'data': {'image_size': size, 'channels': channels},
    'model': {
      'name': 'unet',
      'channels': widths[0],
      'multipliers': [width // widths[0] for width in widths],
      'num_blocks': blocks,
      'attention_resolutions': [
        size // 2**level for level, attend in enumerate(attends) if attend
      ],
      'num_heads': int(heads),
      'num_groups': groups,
      'dropout': float(dropout),
    },
  }


def _process_of(settings: dict, path) -> dict:
  """{'process', 'loss', 'sample'} of a scheduler_config.json."""
  _agree(path, '_class_name', settings.get('_class_name', 'DDPMScheduler'),
         SCHEDULERS)  # fmt: skip
  _must_be(settings, PROCESS, path)
  prediction = settings.get('prediction_type', 'epsilon')
  variance = settings.get('variance_type', 'fixed_small')
  _agree(path, 'prediction_type', prediction, PREDICTIONS)
  _agree(path, 'variance_type', variance, VARIANCES)
  numbers = {
    name: settings.get(name, default)
    for name, default in (
      ('num_train_timesteps', 1000), ('beta_start', 1e-4), ('beta_end', 0.02),
    )
  }  # fmt: skip
  for name, value in numbers.items():
    kinds = int if name == 'num_train_timesteps' else int | float
    if not isinstance(value, kinds) or not 0 < value < LARGEST:
      raise UserError(f'{path}: {name} is {_shown(value)}: a number above 0')
  steps, start, end = numbers.values()
  return {
    'process': {
      'schedule': 'linear',
      'num_timesteps': steps,
      'beta_start': float(start),
      'beta_end': float(end),
    },
    'loss': {'prediction': PREDICTIONS[prediction]},
    'sample': {
      'variance': VARIANCES[variance],
      'clip': bool(settings.get('clip_sample', True)),
    },
  }


def _attending(widths, attends) -> set[int]:
  """The widths at which there is attention; in the middle there always is."""
  there = {w for w, attend in zip(widths, attends, strict=True) if attend}
  return there | {widths[-1]}


def _must_be(settings, rules, path) -> None:
  for name, (default, wanted) in rules.items():
    _agree(path, name, settings.get(name, default), [wanted])


def _agree(path, name, value, allowed) -> None:
  """Raises UserError unless the value is one of those that are allowed."""
  allowed = list(allowed)  # of which any value can be asked, lists too
  if value not in allowed:
    raise UserError(
      f'{path}: {name} is {_shown(value)}, and here it must be '
      f'{" or ".join(map(_shown, allowed))}: it is another network or process'
    )


def _shown(value) -> str:
  text = json.dumps(value)
  return text if len(text) < 100 else f'{text[:97]}...'


# --- tensors -----------------------------------------------------------------


def name_of(name: str) -> str:
  """Our name of a parameter -> diffusers' of today."""
  for pattern, replacement in _RENAMED:
    name = re.sub(pattern, replacement, name)
  return name


def _today(name: str) -> str:
  """A tensor's name of old or of today -> of today."""
  found = re.fullmatch(r'(.*\.attentions\.\d+)\.(\w+)\.(weight|bias)', name)
  if found and found[2] in _OLD:
    return f'{found[1]}.{_OLD[found[2]]}.{found[3]}'
  return name


def _to_theirs(name: str, array: np.ndarray) -> np.ndarray:
  if array.ndim == 4:
    return array.transpose(3, 2, 0, 1)  # HWIO -> OIHW
  if name.endswith('shortcut/kernel'):
    return array.T[:, :, None, None]  # a 1x1 convolution there
  return array.T


def _to_ours(name: str, array: np.ndarray) -> np.ndarray:
  if name.endswith('shortcut/kernel') and array.shape[2:] == (1, 1):
    return array[:, :, 0, 0].T
  if array.ndim == 4:
    return array.transpose(2, 3, 1, 0)  # OIHW -> HWIO
  return array.T


def _tensors(unet) -> tuple[dict[str, np.ndarray], str]:
  path = next(
    (p for p in (unet / WEIGHTS, unet / PICKLED) if p.is_file()), None
  )
  if path is None:
    raise UserError(
      f'{unet} has no weights: give a folder with {WEIGHTS} (or {PICKLED}) in '
      'it'
    )
  content = path.read_bytes()
  digest = hashlib.sha256(content).hexdigest()
  if path.name == PICKLED:
    return pytorch.read(path), digest
  try:
    return safetensors.numpy.load(content), digest
  except KeyError as e:  # NumPy has no such numbers
    raise UserError(
      f'{path} holds numbers of {e.args[0]}: save it in float32, or float16'
    ) from e
  except Exception as e:  # of the file's own, and of NumPy's
    reason = ' '.join(str(e).split())[:150] or type(e).__name__
    raise UserError(
      f'{path} is no whole file of safetensors ({reason}): download it anew'
    ) from e


def _json(path) -> dict:
  try:
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
      raise ValueError('it holds no settings')
  except (OSError, ValueError, RecursionError) as e:
    reason = getattr(e, 'strerror', None) or str(e)[:100]
    raise UserError(
      f'{path} cannot be read ({reason}): give the folder of a diffusers model'
    ) from e
  return content


def _pretty(settings: dict) -> bytes:
  return json.dumps(settings, indent=2).encode() + b'\n'
