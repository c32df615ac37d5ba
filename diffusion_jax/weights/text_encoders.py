"""Reads and writes folders of CLIP's text encoders.

A `CLIPTextModel` or a `CLIPTextModelWithProjection` of transformers, as in
text_encoder/ and text_encoder_2/ of diffusers' pipelines, of any size:

  config.json  model.safetensors

Names of tensors begin with `text_model.`; newer files of a `CLIPTextModel` are
without that. Both are read, the older names are written. Settings that the
network does not depend on are kept as they are. transformers is not needed.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.models import text
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import diffusers, named, places, shards, states
from diffusion_jax.weights.settings import LARGEST, agree, shown, whole

PLAIN, PROJECTING = 'CLIPTextModel', 'CLIPTextModelWithProjection'
TYPE = 'clip_text_model'
OLD_EOS = 2  # of older settings, for which the end is at the highest id
PREFIX, PROJECTION = 'text_model.', 'text_projection.'
ONE_EACH = f'{PREFIX}embeddings.token_embedding.weight'
UNUSED = 'embeddings.position_ids'  # 0, 1, 2, ... in older files

# Their settings -> (our option, their default).
NUMBERS = {
  'vocab_size': ('vocabulary', 49408),
  'max_position_embeddings': ('length', 77),
  'hidden_size': ('width', 512),
  'intermediate_size': ('inner', 2048),
  'num_hidden_layers': ('num_layers', 12),
  'num_attention_heads': ('num_heads', 8),
}
OTHERS = {
  'architectures': [PLAIN],
  'model_type': TYPE,
  'hidden_act': 'quick_gelu',
  'layer_norm_eps': 1e-5,
  'eos_token_id': 49407,
  'projection_dim': 512,
}
DTYPES = ('dtype', 'torch_dtype')  # of the file: float32 is written
KEPT = (
  *('bos_token_id', 'pad_token_id', 'initializer_factor', 'initializer_range'),
  *('attention_dropout', 'dropout', 'transformers_version', '_name_or_path'),
  *('_commit_hash', 'attn_implementation', '_attn_implementation_autoset'),
  *('gradient_checkpointing', 'output_attentions', 'output_hidden_states'),
  *('return_dict', 'use_cache', 'torchscript', 'tie_word_embeddings'),
)

# Our names -> theirs; each rule is applied to the result of those above it.
_RENAMED = (
  (r'^(token|position)/embedding$', r'embeddings/\1_embedding/weight'),
  (r'^blocks/', 'encoder/layers/'),
  (r'/(q|k|v)(?:uery|ey|alue)/', r'/self_attn/\1_proj/'),
  (r'/out/', '/self_attn/out_proj/'),
  (r'/norm([12])/', r'/layer_norm\1/'),
  (r'/mlp([12])/', r'/mlp/fc\1/'),
  (r'^norm_out/', 'final_layer_norm/'),
  (r'^projection/', 'text_projection/'),
  (r'/(kernel|scale)$', '/weight'),
  (r'^(?!text_projection/)', 'text_model/'),
  (r'/', '.'),
)


class Folder(NamedTuple):
  """The content of a folder.

  Attributes:
    options: of `models.text.create`.
    kept: settings that the network does not depend on, name -> value.
    tensors: name -> array, under the older names.
    sha256: the hash of the files of `tensors`.
    names: the names of these files.
    notes: what was taken and assumed, one line each.
  """

  options: dict[str, Any]
  kept: dict[str, Any]
  tensors: dict[str, np.ndarray]
  sha256: str
  names: list[str]
  notes: list[str]


def read(path) -> Folder:
  """Reads a folder.

  Args:
    path: a folder with config.json and weights: model.safetensors, in shards
      with their index, a variant (fp16), or pytorch_model.bin.

  Raises:
    UserError: the folder is something else, damaged, or holds an unsupported
      network; the message names the setting.
  """
  path = files.at(path)
  if not (path / places.SETTINGS).is_file():
    raise UserError(
      f'{path} has no {places.SETTINGS}: give the folder of a text encoder, '
      'such as text_encoder/ of a pipeline'
    )
  theirs = diffusers.read_settings(path / places.SETTINGS)
  options, kept = network_of(theirs, path / places.SETTINGS)
  state = states.read(path, ONE_EACH, states.TRANSFORMERS)
  tensors = _of_older_names(state.tensors, str(path))
  if options['num_layers'] > len(tensors):
    raise UserError(
      f'{path}: the settings are for {options["num_layers"]} layers, but the '
      f'weights are {len(tensors)} tensors: they do not belong together'
    )
  return Folder(options, kept, tensors, state.sha256, state.names, state.notes)


def write(path, options: Mapping, params, kept: Mapping | None = None) -> None:
  """Writes a folder that transformers loads.

  Args:
    path: the folder; config.json is written last.
    options: of `models.text.create`.
    params: the parameters, on the host.
    kept: settings that `options` do not have, see `Folder`.

  Raises:
    UserError: transformers does not support such a network, or as for
      `shards.write`.
  """
  settings = settings_of(options, kept or {})
  path = files.at(path)
  shards.write(path, to_tensors(params), name=states.TRANSFORMERS[0])
  files.write_json(path / places.SETTINGS, settings)


# --- settings ----------------------------------------------------------------


def network_of(settings: Mapping, path) -> tuple[dict, dict]:
  """Converts settings to options of `models.text.create`.

  Args:
    settings: the content of config.json; missing settings have transformers'
      defaults.
    path: the path of that file, for messages.

  Returns:
    (options, settings to keep), see `Folder`.

  Raises:
    UserError: it is another network; the message names the setting.
  """
  theirs = {**OTHERS, **settings}
  agree(path, 'model_type', theirs['model_type'], [TYPE])
  agree(path, 'architectures', theirs['architectures'], [[PLAIN], [PROJECTING]])
  known = {*NUMBERS, *OTHERS, *KEPT, *DTYPES}
  if unknown := sorted(settings.keys() - known):
    raise UserError(
      f'{path}: {named.shortened(unknown)} is no known setting of a text '
      'encoder: it may be another network'
    )
  options = {
    ours: whole(name, settings.get(name, default), path)
    for name, (ours, default) in NUMBERS.items()
  }
  width, heads = options['width'], options['num_heads']
  if width % heads:
    raise UserError(
      f'{path}: num_attention_heads is {heads}, which does not divide '
      f'hidden_size {width}: the file is damaged'
    )
  agree(path, 'hidden_act', theirs['hidden_act'], text.ACTIVATIONS)
  epsilon, eos = theirs['layer_norm_eps'], theirs['eos_token_id']
  if type(epsilon) not in (int, float) or not 0 < epsilon < math.inf:
    raise UserError(
      f'{path}: layer_norm_eps is {shown(epsilon)}: a number above 0'
    )
  if type(eos) is not int or not 0 <= eos < LARGEST:
    raise UserError(f'{path}: eos_token_id is {shown(eos)}: a whole number')
  projects = theirs['architectures'] == [PROJECTING]
  options |= {
    'activation': theirs['hidden_act'],
    'epsilon': epsilon,
    'eos': text.HIGHEST if eos == OLD_EOS else eos,
    'projection': 0,
    'causal': True,
  }
  if projects:
    size = whole('projection_dim', theirs['projection_dim'], path)
    options['projection'] = size
  kept = (*KEPT, *DTYPES, *['projection_dim'] * (not projects))
  return options, {name: settings[name] for name in kept if name in settings}


def settings_of(options: Mapping, kept: Mapping) -> dict:
  """Converts options of `models.text.create` to the content of config.json.

  Args:
    options: the options; those left out have our defaults. Which layer is
      taken and in which dtype is computed is not part of the settings.
    kept: settings that `options` do not have.

  Raises:
    UserError: transformers has no such network.
  """
  defaults = inspect.signature(text.create).parameters
  options = {**{key: x.default for key, x in defaults.items()}, **options}
  if not options['causal']:
    raise UserError(
      f'causal=False: a {PLAIN} reads from left to right: such a text encoder '
      'cannot be written'
    )
  if options['eos'] == OLD_EOS:
    raise UserError(
      f'eos={OLD_EOS} stands for the highest id in settings of a {PLAIN}: such '
      'a text encoder cannot be written'
    )
  projects = options['projection'] > 0
  is_old = options['eos'] == text.HIGHEST
  settings = {
    **kept,
    **{name: options[ours] for name, (ours, _) in NUMBERS.items()},
    'architectures': [PROJECTING if projects else PLAIN],
    'model_type': TYPE,
    'hidden_act': options['activation'],
    'layer_norm_eps': options['epsilon'],
    'eos_token_id': OLD_EOS if is_old else options['eos'],
    **{name: 'float32' for name in DTYPES if name in kept},
  }
  if projects:
    settings['projection_dim'] = options['projection']
  return dict(sorted(settings.items()))


# --- tensors -----------------------------------------------------------------


def to_params(
  tensors: Mapping[str, np.ndarray], options: Mapping, what: str
) -> dict:
  """Converts tensors to our parameters.

  Args:
    tensors: name -> array, under older or newer names.
    options: of `models.text.create`.
    what: where the tensors come from, for the message.

  Raises:
    UserError: tensors are missing, left over, or of another shape; the message
      names them.
  """
  model = text.create(**options)
  abstract = jax.eval_shape(model.init, jax.random.key(0))
  tensors = _of_older_names(tensors, what)
  return named.place(tensors, abstract, name_of, to_theirs, what)


def to_tensors(params) -> dict[str, np.ndarray]:
  """Converts our parameters to a state dict under the older names, float32.

  Args:
    params: a nested dict of arrays.
  """
  return named.tensors_of(params, name_of, to_theirs)


def name_of(name: str) -> str:
  """Our name of a parameter -> the older name in transformers."""
  return named.renamed(name, _RENAMED)


def to_theirs(name: str, array: np.ndarray) -> np.ndarray:
  """Our parameter in their layout by our name of it, and the other way."""
  return array if name.endswith('/embedding') else array.T


def _of_older_names(tensors, what: str) -> dict[str, np.ndarray]:
  """Tensors under the older names, without those that nothing needs."""
  found = {}
  for name, array in tensors.items():
    if name.removeprefix(PREFIX) == UNUSED:
      continue
    if not name.startswith((PREFIX, PROJECTION)):
      name = PREFIX + name
    if name in found:
      raise UserError(f'{what}: {name} is there with and without {PREFIX}')
    found[name] = array
  return found
