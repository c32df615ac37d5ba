"""Reads folders of CLIP: a text encoder and an encoder of pictures.

A `CLIPModel` of transformers, of any size:

  config.json  model.safetensors  preprocessor_config.json
  and a tokenizer, see `conditioning.tokenizers.read`

Nothing in them is executed, and transformers is not needed.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.models import text, vision
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import (
  diffusers,
  named,
  places,
  states,
  text_encoders,
)
from diffusion_jax.weights.settings import agree, shown, whole

TYPE = 'clip'
PICTURES = 'preprocessor_config.json'
VISUAL, VISUAL_PROJECTION = 'vision_model.', 'visual_projection.'
ONE_EACH = f'{VISUAL}embeddings.class_embedding'
UNUSED = (
  'logit_scale',
  'text_model.embeddings.position_ids',
  f'{VISUAL}embeddings.position_ids',
)
# Settings of vision_config -> (our option, their default).
NUMBERS = {
  'image_size': ('image_size', 224),
  'patch_size': ('patch_size', 32),
  'hidden_size': ('width', 768),
  'intermediate_size': ('inner', 3072),
  'num_hidden_layers': ('num_layers', 12),
  'num_attention_heads': ('num_heads', 12),
}
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's CLIP
STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3  # Pillow's number

_RENAMED = (
  (r'^patch/kernel$', 'embeddings/patch_embedding/kernel'),
  (r'^class/embedding$', 'embeddings/class_embedding'),
  (r'^position/embedding$', 'embeddings/position_embedding/weight'),
  (r'^blocks/', 'encoder/layers/'),
  (r'/(q|k|v)(?:uery|ey|alue)/', r'/self_attn/\1_proj/'),
  (r'/out/', '/self_attn/out_proj/'),
  (r'/norm([12])/', r'/layer_norm\1/'),
  (r'/mlp([12])/', r'/mlp/fc\1/'),
  (r'^norm_in/', 'pre_layrnorm/'),  # as they spell it
  (r'^norm_out/', 'post_layernorm/'),
  (r'^projection/', 'visual_projection/'),
  (r'/(kernel|scale)$', '/weight'),
  (r'^(?!visual_projection/)', 'vision_model/'),
  (r'/', '.'),
)


class Pictures(NamedTuple):
  """How pictures are prepared.

  Attributes:
    resized: pixels of the shorter side, by Pillow's bicubic.
    cropped: pixels per side of the centre that is kept.
    mean: per channel, of values in [0, 1].
    std: the same.
  """

  resized: int
  cropped: int
  mean: tuple[float, ...]
  std: tuple[float, ...]


class Folder(NamedTuple):
  """The content of a folder.

  Attributes:
    text: options of `models.text.create`.
    vision: options of `models.vision.create`.
    params: 'text' and 'image' -> their parameters, on the host.
    pictures: how pictures are prepared.
    sha256: the hash of the files of the weights.
    notes: what was taken and assumed, one line each.
  """

  text: dict[str, Any]
  vision: dict[str, Any]
  params: dict[str, Any]
  pictures: Pictures
  sha256: str
  notes: list[str]


def is_folder(path) -> bool:
  """Whether there are settings of transformers at a path, and no run."""
  path = files.at(path)
  if not (path / places.SETTINGS).is_file():
    return False
  # A run has a config.json, too.
  return 'model_type' in diffusers.read_settings(path / places.SETTINGS)


def read(path) -> Folder:
  """Reads a folder.

  Args:
    path: the folder.

  Raises:
    UserError: it is something else, damaged, or holds an unsupported network;
      the message names the setting.
  """
  path = files.at(path)
  where = path / places.SETTINGS
  theirs = diffusers.read_settings(where)
  words, sights = networks_of(theirs, where)
  pictures = pictures_of(path, sights['image_size'])
  state = states.read(path, ONE_EACH, states.TRANSFORMERS)
  tensors = {k: x for k, x in state.tensors.items() if k not in UNUSED}
  seen = {
    name: x
    for name, x in tensors.items()
    if name.startswith((VISUAL, VISUAL_PROJECTION))
  }
  read_ones = {name: x for name, x in tensors.items() if name not in seen}
  model = vision.create(**sights)
  abstract = jax.eval_shape(model.init, jax.random.key(0))
  params = {
    'image': named.place(seen, abstract, name_of, to_ours, str(path)),
    'text': text_encoders.to_params(read_ones, words, str(path)),
  }
  return Folder(words, sights, params, pictures, state.sha256, state.notes)


def networks_of(settings: Mapping, path) -> tuple[dict, dict]:
  """Converts settings to options of `models.text` and `models.vision`.

  Args:
    settings: the content of config.json; missing settings have transformers'
      defaults.
    path: the path of that file, for messages.

  Raises:
    UserError: it is another network; the message names the setting.
  """
  agree(path, 'model_type', settings.get('model_type'), [TYPE])
  size = whole('projection_dim', settings.get('projection_dim', 512), path)
  inner = {}
  for name in ('text_config', 'vision_config'):
    inner[name] = settings.get(name) or {}
    if not isinstance(inner[name], Mapping):
      raise UserError(f'{path}: {name} is {shown(inner[name])}: settings')
  # In transformers, settings of both have all keys of any network.
  known = {
    *text_encoders.NUMBERS,
    *('hidden_act', 'layer_norm_eps', 'eos_token_id'),
  }
  words, _ = text_encoders.network_of(
    {
      **{k: x for k, x in inner['text_config'].items() if k in known},
      'architectures': [text_encoders.PROJECTING],
      'projection_dim': size,
    },
    path,
  )
  theirs = inner['vision_config']
  options = {
    ours: whole(name, theirs.get(name, default), path)
    for name, (ours, default) in NUMBERS.items()
  }
  agree(path, 'num_channels', theirs.get('num_channels', 3), [3])
  act = theirs.get('hidden_act', 'quick_gelu')
  agree(path, 'hidden_act', act, text.ACTIVATIONS)
  epsilon = theirs.get('layer_norm_eps', 1e-5)
  if type(epsilon) not in (int, float) or not 0 < epsilon < math.inf:
    raise UserError(
      f'{path}: layer_norm_eps is {shown(epsilon)}: a number above 0'
    )
  more = {'activation': act, 'epsilon': epsilon, 'projection': size}
  return words, {**options, **more}


def pictures_of(path, image_size: int) -> Pictures:
  """How a folder says that pictures are prepared, or as OpenAI's CLIP does.

  Args:
    path: the folder.
    image_size: of the network.

  Raises:
    UserError: it is another way; the message names the setting.
  """
  where = files.at(path) / PICTURES
  theirs = diffusers.read_settings(where) if where.is_file() else {}
  for key in ('do_resize', 'do_center_crop', 'do_normalize', 'do_rescale'):
    agree(where, key, theirs.get(key, True), [True])
  factor = theirs.get('rescale_factor', 1 / 255)
  if not isinstance(factor, float) or abs(255 * factor - 1) > 1e-6:
    agree(where, 'rescale_factor', factor, [1 / 255])
  agree(where, 'resample', theirs.get('resample', BICUBIC), [BICUBIC])
  resized = _side(theirs.get('size', image_size), where, 'size')
  cropped = _side(theirs.get('crop_size', image_size), where, 'crop_size')
  agree(where, 'crop_size', cropped, [image_size])
  if resized < cropped:
    raise UserError(
      f'{where}: size is {resized}, smaller than crop_size {cropped}: '
      'supported are pictures that are not padded'
    )
  mean, std = (
    _three(theirs.get(key, default), where, key)
    for key, default in (('image_mean', MEAN), ('image_std', STD))
  )
  return Pictures(resized, cropped, mean, std)


def _side(value, path, name) -> int:
  if isinstance(value, Mapping):
    sides = {*value.values()}
    value = sides.pop() if len(sides) == 1 else value
  return whole(name, value, path)


def _three(value, path, name) -> tuple[float, ...]:
  fine = isinstance(value, list | tuple) and len(value) == 3
  if not fine or not all(type(x) in (int, float) for x in value):
    raise UserError(f'{path}: {name} is {shown(value)}: three numbers')
  if name == 'image_std' and min(value) <= 0:
    raise UserError(f'{path}: {name} is {shown(value)}: above 0')
  return tuple(map(float, value))


def name_of(name: str) -> str:
  """Our name of a parameter of `models.vision` -> the name in transformers."""
  return named.renamed(name, _RENAMED)


def to_ours(name: str, array: np.ndarray) -> np.ndarray:
  """Their array in our layout, by our name of it."""
  if name == 'class/embedding':
    return array[None]
  if name == 'patch/kernel' and array.ndim == 4:
    return array.transpose(2, 3, 1, 0)
  return array if name.endswith('/embedding') else array.T


def to_theirs(name: str, array: np.ndarray) -> np.ndarray:
  """Our array in their layout, by our name of it."""
  if name == 'class/embedding':
    return array[0]
  if name == 'patch/kernel':
    return array.transpose(3, 2, 0, 1)
  return array if name.endswith('/embedding') else array.T
