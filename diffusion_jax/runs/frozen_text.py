"""The text encoders of a run with conditioning.name='frozen_text'.

They come from a folder as diffusers' pipelines have them, with text_encoder/
and tokenizer/, and of SDXL text_encoder_2/ and tokenizer_2/, or from another
run with captions. The run copies them when it begins, see `kept_parts`; the
config keeps their structure as conditioning.encoders.
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion_jax import models, runs
from diffusion_jax.conditioning import frozen_text, text, tokenizers
from diffusion_jax.runs import kept_parts
from diffusion_jax.runs.kept_parts import Frozen, place
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, checksum, sharding
from diffusion_jax.weights import diffusers, places, text_encoders

# Part -> the folders of its encoder and of its tokenizer.
FOLDERS = {
  text.PART: ('text_encoder', 'tokenizer'),
  f'{text.PART}_2': ('text_encoder_2', 'tokenizer_2'),
}
NAME = 'frozen_text'
# Keys of the config that are found out.
FOUND = ('encoders', 'ids', 'masked', 'zeros', 'size_features')


def is_used(config: Mapping) -> bool:
  """Whether a run has text encoders that are not trained."""
  return config['conditioning']['name'] == NAME


def complete(config: ConfigDict, workdir=None) -> None:
  """Adds the structure of the text encoders to a config, in place.

  Args:
    config: the config of a run.
    workdir: the run's folder, new or existing, or None.

  Raises:
    UserError: conditioning.path names no text encoder.
  """
  # Validation names the keys that a choice by a flag lacks.
  if not is_used(config) or config.conditioning.get('encoders', True):
    return
  path = config.conditioning.path
  if workdir and kept_parts.is_copied(workdir, text.PART, path):
    found = runs.read_config(workdir)['conditioning']
  else:
    found = structure_of(path)
  with config.unlocked():
    for name in FOUND:
      value = found[name]
      is_group = isinstance(value, Mapping)
      config.conditioning[name] = ConfigDict(value) if is_group else value


def structure_of(path) -> dict:
  """What a folder or a run says of its text encoders: the keys FOUND.

  Args:
    path: of the folder or the run.

  Raises:
    UserError: there are none, or others than are known here.
  """
  if not path:
    raise UserError(
      'conditioning.path is empty: give a folder with text_encoder/ and '
      'tokenizer/, or a run with captions'
    )
  if not _is_pipeline(path):
    return _of_run(path)
  return _of_pipeline(place(path))


def _of_pipeline(folder) -> dict:
  """The keys FOUND, of a folder with text encoders."""
  index = _settings(folder / places.PIPELINE)
  unet = _settings(folder / places.UNET / places.SETTINGS)
  second = FOLDERS[f'{text.PART}_2'][0]
  is_xl = (folder / second).is_dir()
  # SDXL takes the input of the last layer of both encoders.
  layer = {'skip': int(is_xl), 'final_norm': not is_xl}
  encoders, ids = {}, {}
  for name, (of_encoder, _) in FOLDERS.items():
    file = folder / of_encoder / places.SETTINGS
    if not file.is_file():
      continue
    options, _ = text_encoders.network_of(diffusers.read_settings(file), file)
    encoders[name] = {**options, **layer}
    made = tokenizer_of(folder, name, options)
    ids[name] = {'bos': made.bos, 'eos': made.eos, 'pad': made.pad}
  if len({one['length'] for one in encoders.values()}) > 1:
    raise UserError(
      f'{folder}: max_position_embeddings of the text encoders differ, but '
      'their tokens are joined: it is another pipeline'
    )
  features = unet.get('addition_time_embed_dim')
  return {
    'encoders': encoders,
    'ids': ids,
    'masked': False,
    'zeros': bool(index.get('force_zeros_for_empty_prompt', is_xl)),
    'size_features': features if unet.get('addition_embed_type') else 0,
  }


def _settings(file) -> dict:
  return diffusers.read_settings(file) if file.is_file() else {}


def _of_run(path) -> dict:
  own = runs.read_config(place(path), 'conditioning.path')['conditioning']
  if own['name'] == NAME:
    return {name: own[name] for name in FOUND}
  if own['name'] != text.PART:
    raise UserError(
      f'conditioning.path={path} is a run with conditioning.name='
      f"{own['name']!r}: give one with 'text' or {NAME!r}, or a folder with "
      'text_encoder/ and tokenizer/'
    )
  return {
    'encoders': {text.PART: text.structure(own)},
    'ids': {text.PART: text.ids_of(own)},
    'masked': True,
    'zeros': False,
    'size_features': 0,
  }


def abstract(config: Mapping) -> dict:
  """The shapes of the parts: name -> a tree; {} for a run without.

  Args:
    config: a run's config, completed.
  """
  if not is_used(config):
    return {}
  made = frozen_text.networks(config['conditioning']['encoders'])
  return {
    name: jax.eval_shape(one.init, jax.random.key(0))
    for name, one in made.items()
  }


def load(config: Mapping, mesh: Mesh, workdir=None) -> Frozen:
  """Loads the parts for a start of a run; NONE for a run without.

  Call it in all processes. A run that has saved a checkpoint keeps its copies.

  Args:
    config: the run's config, completed.
    mesh: the devices to load them to.
    workdir: the run's folder, new or existing, or None.

  Raises:
    UserError: they are missing, damaged, of another structure, or not those
      that the run in the workdir was trained with.
  """
  if not is_used(config):
    return kept_parts.NONE
  path = config['conditioning']['path']
  if not workdir or not kept_parts.has_saved(workdir):
    return of_path(path, config, mesh)
  own = kept_parts.read(workdir, abstract(config), mesh)
  if kept_parts.is_copied(workdir, text.PART, path):
    return own
  found = of_path(path, config, mesh)
  if checksum.of(own.params) != checksum.of(found.params):
    raise UserError(
      f'--workdir={workdir} was trained with the text encoders of '
      f'{own.origins[text.PART]}, which are not those of '
      f'{found.origins[text.PART]}: give the same conditioning.path, or a new '
      'workdir'
    )
  return own


def of_path(path, config: Mapping, mesh: Mesh) -> Frozen:
  """The text encoders of a folder or a run.

  Args:
    path: the folder, or the run.
    config: the config of the run that uses them, completed.
    mesh: the devices to load them to.

  Raises:
    UserError: the weights do not fit the settings, or are not finite.
  """
  wanted = abstract(config)
  if not _is_pipeline(path):
    return _load_run(path, wanted, mesh)
  facts = {'from': str(place(path)), 'step': 0, 'ema': True}
  params = {}
  for name in wanted:
    folder = place(path) / FOLDERS[name][0]
    found = text_encoders.read(folder)
    part = text_encoders.to_params(found.tensors, found.options, str(folder))
    if bad := models.not_finite(part):
      raise UserError(
        f'{folder}: the weights {bad} are not finite: download it again'
      )
    params[name] = sharding.placed(
      jax.tree.map(lambda x: np.asarray(x, np.float32), part), mesh
    )
  return Frozen(params, {name: {**facts} for name in params})


def _load_run(path, wanted, mesh) -> Frozen:
  there = place(path)
  config = runs.read_config(there, 'conditioning.path')
  if is_used(config):
    found = kept_parts.read(there, wanted, mesh)
    facts = {
      name: {k: x for k, x in one.items() if k != kept_parts.SHA256}
      for name, one in found.facts.items()
    }
    own = {'from': str(there)}
    return found._replace(facts={n: {**x, **own} for n, x in facts.items()})
  directory = there / 'checkpoints'
  shapes = sharding.abstract(wanted, mesh)

  def read(step):
    return step, *checkpoint.load_common(directory, step, shapes)

  step, taken, left = checkpoint.read_newest(directory, read)
  for row in left:
    if row['here']:
      raise UserError(
        f'conditioning.path={path} holds another text encoder than its '
        f'config.json says: {row["name"]} is {row["there"] or "missing"}'
      )
  params = jax.tree.structure(shapes).unflatten(
    taken[name] for name in models.names(shapes)
  )
  facts = {'from': str(there), 'step': step, 'ema': True}
  return Frozen(params, {text.PART: facts})


def tokenizer_of(path, name: str, encoder: Mapping) -> tokenizers.Tokenizer:
  """The tokenizer of a part, of a folder or a run.

  Args:
    path: the folder, or the run.
    name: the part.
    encoder: the options of its text encoder.

  Raises:
    UserError: there is none, or it has ids that the encoder has not.
  """
  own = FOLDERS[name][1]
  there = place(path) / own
  if not _is_pipeline(path):
    there = place(path) / kept_parts.FOLDER / f'{own}.json'
  made = tokenizers.read(there, encoder['length'])
  if made.size > encoder['vocabulary']:
    raise UserError(
      f'{there} has {made.size} ids, but its text encoder '
      f'{encoder["vocabulary"]}: they do not belong together'
    )
  return made


def _is_pipeline(path) -> bool:
  """Whether there is a folder of diffusers with a text encoder at a path."""
  first = FOLDERS[text.PART][0]
  return bool(path) and (place(path) / first / places.SETTINGS).is_file()
