"""Reads and writes folders of diffusers' unconditional pipelines.

A folder holds a `UNet2DModel` and the settings of a scheduler:

  model_index.json
  unet/config.json  unet/diffusion_pytorch_model.safetensors
  scheduler/scheduler_config.json

Older folders have all files at the top level; others hold only a `UNet2DModel`,
or unet_ema/ with its averaged weights. `places` finds the parts, and `states`
reads the weights.

A folder is read as parts of a run's config, and parameters that are renamed to
ours; writing them again gives bitwise the same numbers. `unets` defines which
networks can be read: the google/ddpm-* ones and their variants, of any width,
depth and size, with or without class labels. diffusers is not needed.

Autoencoders are read by `autoencoders`; names and layouts of the tensors of
both are here.
"""

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import (
  named,
  places,
  settings,
  shards,
  states,
  unets,
)

INDEX = places.PIPELINE
IN_LATENTS = 'LDMPipeline'
PIPELINES = ('DDPMPipeline', 'DDIMPipeline', 'PNDMPipeline', IN_LATENTS)

# Our names -> theirs; each rule is applied to the result of those above it.
_RENAMED = (
  (r'^(?:en|de)coder/((?:post_)?quant_conv)', r'\1'),
  (r'^quantize/codebook$', r'quantize/embedding/weight'),
  (r'\b(down|up)/(\d+)/blocks', r'\1_blocks/\2/resnets'),
  (r'\b(down|up)/(\d+)/attentions', r'\1_blocks/\2/attentions'),
  (r'\b(down|up)/(\d+)/resample', r'\1_blocks/\2/\1samplers/0'),
  (r'\bmiddle_attention', r'mid_block/attentions/0'),
  (r'\bmiddle([12])', lambda m: f'mid_block/resnets/{int(m[1]) - 1}'),
  (r'^time([12])', r'time_embedding/linear_\1'),
  (r'\bnorm_out', r'conv_norm_out'),
  (r'((?:resnets|samplers)/\d+)/time', r'\1/time_emb_proj'),
  (r'((?:resnets|samplers)/\d+)/shortcut', r'\1/conv_shortcut'),
  (r'(attentions/\d+)/norm/', r'\1/group_norm/'),
  (r'(attentions/\d+)/(q|k|v)(?:uery|ey|alue)', r'\1/to_\2'),
  (r'(attentions/\d+)/out', r'\1/to_out/0'),
  (r'^vector([12])', r'add_embedding/linear_\1'),
  (r'^label/embedding$', r'class_embedding/weight'),
  # Transformers.
  (r'(attentions/\d+)/norm_in', r'\1/norm'),
  (r'(attentions/\d+)/blocks', r'\1/transformer_blocks'),
  (r'(blocks/\d+)/attention/', r'\1/attn1/'),
  (r'(blocks/\d+)/cross/', r'\1/attn2/'),
  (r'(attn\d)/(q|k|v)(?:uery|ey|alue)', r'\1/to_\2'),
  (r'(attn\d)/out', r'\1/to_out/0'),
  (r'(blocks/\d+)/mlp1', r'\1/ff/net/0/proj'),
  (r'(blocks/\d+)/mlp2', r'\1/ff/net/2'),
  (r'/(kernel|scale)$', r'/weight'),
  (r'/', r'.'),
)
# Attention's names before diffusers 0.14, as in published folders.
_OLD = {
  'query': 'to_q',
  'key': 'to_k',
  'value': 'to_v',
  'proj_attn': 'to_out.0',
}
_TODAY = [
  (rf'(\.attentions\.\d+)\.{old}\.(weight|bias)$', rf'\1.{new}.\2')
  for old, new in _OLD.items()
]
# Tables, whose rows are not transposed.
_TABLE = re.compile(r'.*/(embedding|codebook)')
# Dense layers here. diffusers has the second as 1x1 convolutions, and folders
# from elsewhere may have the first as such.
_DENSE = re.compile(r'.*/(query|key|value|out|proj_in|proj_out)/kernel')
_POINTWISE = re.compile(r'.*/(shortcut|(post_)?quant_conv)/kernel')


class Folder(NamedTuple):
  """The content of a folder.

  Attributes:
    config: parts of a run's config: 'data' (image_size and channels only),
      'model', 'conditioning', 'process', 'loss', and 'sample' (variance and
      clip only). With a codec the data are its latents.
    codec: the folder of the autoencoder, see `autoencoders.read`, or None.
    tensors: name in the file -> array: the averaged weights, or the only ones.
    raw: the same for raw weights next to averaged ones; None without.
    sha256: the hash of the files of `tensors`.
    names: the names of those files.
    has_scheduler: whether the folder has a scheduler; if not, 'process', 'loss'
      and 'sample' are diffusers' defaults: DDPM's, but the small variance.
    step: the training step in the folder's name, or None.
    notes: what was taken and assumed, one line each.
  """

  config: dict
  codec: files.Path | None
  tensors: dict[str, np.ndarray]
  raw: dict[str, np.ndarray] | None
  sha256: str
  names: list[str]
  has_scheduler: bool
  step: int | None
  notes: list[str]


def is_folder(path) -> bool:
  """Whether `read` finds a diffusers model at a path."""
  return places.model_in(path) is not None


def read(path) -> Folder:
  """Reads a folder.

  Args:
    path: the folder of a pipeline or of a `UNet2DModel`, a file of weights, or
      a folder around a model, see `places.model_in`.

  Raises:
    UserError: the folder is something else, damaged, or holds an unsupported
      network; the message names the setting.
  """
  place = places.find(path)
  if place.index.exists():
    kind = read_settings(place.index).get('_class_name')
    settings.agree(place.index, '_class_name', kind, PIPELINES)
    if kind == IN_LATENTS and not place.codec:
      raise UserError(
        f'{place.index} is an {kind} without its {places.CODECS[0]}/ next to '
        f'{place.network.name}/: download it, too'
      )
  config = _network(place.network)
  process = read_settings(place.scheduler) if place.scheduler else {}
  process = settings.process_of(process, place.scheduler)
  config |= {**process, 'loss': {**config['loss'], **process['loss']}}
  state = states.read(place.weights)
  raw, notes = state.raw, [*place.notes, *state.notes]
  if classes := config['conditioning'].get('num_classes'):
    notes.append(
      f'the last of {classes + 1} class embeddings is used as that of no label'
    )
  if place.raw:
    if _network(place.raw) != _network(place.network):
      raise UserError(
        f'{place.raw} and {place.network} have settings of different networks: '
        'give the one that you mean'
      )
    other = states.read(place.raw)
    raw, notes = other.tensors, [*notes, *other.notes]
  blocks = config['model']['num_blocks'] * len(config['model']['multipliers'])
  if blocks > len(state.tensors):
    raise UserError(
      f'{place.network}: the settings are for {blocks} blocks, but the file '
      f'holds {len(state.tensors)} tensors: they do not belong together'
    )
  return Folder(
    config,
    place.codec,
    state.tensors,
    raw,
    state.sha256,
    state.names,
    place.scheduler is not None,
    place.step,
    list(dict.fromkeys(notes)),
  )


def _network(folder) -> dict:
  """The settings of a network, as parts of a run's config."""
  path = folder / places.SETTINGS
  return unets.network_of(read_settings(path), path)


def settings_of(config: Mapping) -> tuple[dict, dict]:
  """The settings of a run's U-Net and scheduler.

  Args:
    config: the run's config.

  Raises:
    UserError: diffusers does not support such a network or process.
  """
  return unets.unet_of(config), settings.scheduler_of(config)


def write(
  path,
  config: Mapping,
  params,
  pipeline: str = 'DDPMPipeline',
  others: Mapping[str, str] = MappingProxyType({}),
) -> None:
  """Writes a pipeline that diffusers loads, such as a `DDPMPipeline`.

  Args:
    path: the folder; model_index.json is written last, so that an incomplete
      folder is not a pipeline.
    config: the run's config.
    params: the network's parameters, on the host.
    pipeline: the class of the pipeline.
    others: name -> class of other networks, which are there already.

  Raises:
    UserError: diffusers does not support such a network, or as for
      `shards.write`.
  """
  unet, process = settings_of(config)
  path = files.at(path)
  shards.write(path / 'unet', to_tensors(params))
  files.write_json(path / 'unet' / 'config.json', unet)
  files.write_json(path / 'scheduler' / 'scheduler_config.json', process)
  index = {
    '_class_name': pipeline,
    'scheduler': ['diffusers', 'DDPMScheduler'],
    'unet': ['diffusers', 'UNet2DModel'],
    **{name: ['diffusers', kind] for name, kind in others.items()},
  }
  files.write_json(path / INDEX, index)


def read_settings(path) -> dict:
  """The settings in a JSON file; UserError if it holds none."""
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


# --- tensors -----------------------------------------------------------------


def to_params(tensors: Mapping[str, np.ndarray], abstract, what: str) -> dict:
  """Converts diffusers' tensors to our parameters.

  Args:
    tensors: name -> array, with current or old names of attention, whose
      layers may be linear or 1x1 convolutions.
    abstract: our parameters' shapes.
    what: where the tensors come from, for the message.

  Raises:
    UserError: tensors are missing, left over, or of another shape; the message
      names them.
  """
  tensors = of_today(tensors, what)
  return named.place(tensors, abstract, name_of, to_ours, what)


def of_today(tensors: Mapping[str, np.ndarray], what: str) -> dict:
  """Tensors under diffusers' current names.

  Args:
    tensors: name -> array, with current or old names of attention.
    what: where the tensors come from, for the message.

  Raises:
    UserError: a tensor is there under both names.
  """
  today = {name: named.renamed(name, _TODAY) for name in tensors}
  for name, new in today.items():
    if new != name and new in tensors:
      raise UserError(f'{what}: {name} also exists under its current name')
  return {today[name]: array for name, array in tensors.items()}


def to_tensors(params) -> dict[str, np.ndarray]:
  """Converts our parameters to diffusers' state dict, float32.

  Args:
    params: a nested dict of arrays.
  """
  return named.tensors_of(params, name_of, to_theirs)


def name_of(name: str) -> str:
  """Our name of a parameter -> diffusers' current name."""
  return named.renamed(name, _RENAMED)


def to_theirs(name: str, array: np.ndarray) -> np.ndarray:
  """Our parameter in diffusers' layout, by our name of it."""
  if array.ndim == 4:
    return array.transpose(3, 2, 0, 1)  # HWIO -> OIHW
  if _POINTWISE.fullmatch(name):
    return array.T[:, :, None, None]
  return array if _TABLE.fullmatch(name) else array.T


def to_ours(name: str, array: np.ndarray) -> np.ndarray:
  """A tensor of diffusers in our layout, by our name of it."""
  if _TABLE.fullmatch(name):
    return array
  dense = _DENSE.fullmatch(name) or _POINTWISE.fullmatch(name)
  if dense and array.shape[2:] == (1, 1):
    return array[:, :, 0, 0].T
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
