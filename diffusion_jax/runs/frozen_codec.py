"""The autoencoder of a run in latents, as one of its frozen parts.

The run copies it when it begins, see `kept_parts`; its JSON file also has
"scaled_by", what gave the shift and the scale. The config keeps the
autoencoder's structure as codec.coder.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion_jax import codecs, models, objectives, runs
from diffusion_jax.codecs import latents
from diffusion_jax.runs import kept_parts
from diffusion_jax.runs.kept_parts import SHA256, Frozen, place
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, checksum, sharding
from diffusion_jax.weights import autoencoders, diffusers, places

CODEC = 'codec'  # the part
IMPORTED = 'the settings of the imported weights'


def complete(config: ConfigDict, workdir=None) -> None:
  """Adds the structure of the autoencoder to a config in latents, in place.

  Args:
    config: the config of a run.
    workdir: the run's folder, new or existing, or None.

  Raises:
    UserError: codec.path names no autoencoder of such images.
  """
  # Validation names the keys that a choice by a flag lacks.
  if not codecs.is_in_latents(config) or config.codec.get('coder', True):
    return
  path = config.codec.path
  shape = runs.image_shape(config['data'])
  if workdir and _is_copied(workdir, config):
    found, theirs = runs.read_config(workdir), shape
  else:
    found = _config_of(path)
    theirs = runs.image_shape(found['data'])
  # Imported weights are for images of any size.
  imported = shape != theirs and (
    _folder_in(path) or runs.converted_from(place(path))
  )
  if shape[-1] != theirs[-1] or not (shape == theirs or imported):
    there, here = ('x'.join(map(str, sizes)) for sizes in (theirs, shape))
    raise UserError(
      f'codec.path={path} encodes images of {there}, but the data are '
      f'{here}: set data.image_size and data.channels to its, or give '
      'another autoencoder'
    )
  if codecs.is_in_latents(found):
    coder, decoding = (found[CODEC][name] for name in ('coder', 'decoding'))
  else:
    coder, decoding = found[CODEC], {}
  if found['loss']['name'] == objectives.DITO:
    decoding = {name: found[name] for name in ('model', 'process', 'loss')}
  # The same levels attend, whose maps are of other sizes.
  resolutions = [
    at * min(shape[:2]) // min(theirs[:2])
    for at in coder['attention_resolutions']
  ]
  with config.unlocked():
    config.codec.coder = ConfigDict(
      {**coder, 'attention_resolutions': resolutions}
    )
    config.codec.decoding = ConfigDict(decoding)


def abstract(config: Mapping) -> dict:
  """The shapes of the part: {CODEC: a tree}; {} for a run without.

  Args:
    config: a run's config, completed.
  """
  if not codecs.is_in_latents(config):
    return {}
  shape, codec = runs.image_shape(config['data']), config[CODEC]
  part = jax.eval_shape(latents.init_of(shape, codec), jax.random.key(0))
  channels = latents.coder_of(shape, codec['coder']).shape[-1]
  number = jax.ShapeDtypeStruct((channels,), jnp.float32)
  return {CODEC: {**part, 'shift': number, 'scale': number}}


def load(config: Mapping, mesh: Mesh, workdir=None) -> Frozen:
  """Loads the part for a start of a run; NONE for a run without.

  Call it in all processes. A run that has saved a checkpoint keeps its copy.

  Args:
    config: the run's config, completed.
    mesh: the devices to load it to.
    workdir: the run's folder, new or existing, or None.

  Raises:
    UserError: it is missing, damaged, of another structure, or not that which
      the run in the workdir was trained with.
  """
  if not codecs.is_in_latents(config):
    return kept_parts.NONE
  if not workdir or not kept_parts.has_saved(workdir):
    return _of_autoencoder(config, mesh)
  own = kept_parts.read(workdir, abstract(config), mesh)
  if _is_copied(workdir, config):
    return own
  found = _of_autoencoder(config, mesh)
  kept, now = (checksum.of(one.params) for one in (own, found))
  if any(kept[name] != now[name] for name in now if is_weight(name)):
    raise UserError(
      f'--workdir={workdir} was trained in the latents of '
      f'{own.origins[CODEC]}, which are not those of {found.origins[CODEC]}: '
      'give the same codec.path and codec.step, or a new workdir'
    )
  return own


def _of_autoencoder(config, mesh) -> Frozen:
  """The parts of the run or the folder that codec.path names."""
  codec = config[CODEC]
  if folder := _folder_in(codec['path']):
    _leave_out(codec, 'step', 'a folder of weights, which has no steps')
    found = autoencoders.read(folder, config['data']['image_size'])
    return of_folder(found, config, mesh)
  path, there = codec['path'], _config_of(codec['path'])
  own = {'from': str(place(path))}
  if codecs.is_in_latents(there):
    for key in ('step', 'scale'):
      _leave_out(codec, key, f'a run in latents, whose {key} is taken')
    found = kept_parts.read(
      place(path), abstract({**there, 'data': config['data']}), mesh
    )
    facts = {k: v for k, v in found.facts[CODEC].items() if k != SHA256}
    return found._replace(facts={CODEC: {**facts, **own}})
  directory = place(path) / 'checkpoints'
  wanted = abstract(config)[CODEC]
  numbers = {name: wanted.pop(name) for name in ('shift', 'scale')}
  # A DiTo's network is a part of its run, and of the codec's part here.
  net = {models.NET: wanted.pop(models.NET)} if models.NET in wanted else {}
  wanted = sharding.abstract({CODEC: wanted, **net}, mesh)

  def read(at):
    taken, left = checkpoint.load_common(directory, at, wanted)
    for row in left:
      if row['here']:
        raise UserError(
          f'codec.path={path} holds another autoencoder than its config.json '
          f'says: {row["name"]} is {row["there"] or "missing"}'
        )
    return at, taken

  step = codec['step']
  if step:
    checkpoint.find_step(directory, step, 'codec.step')
  step, taken = read(step) if step else checkpoint.read_newest(directory, read)
  part = jax.tree.structure(wanted).unflatten(
    taken[name] for name in models.names(wanted)
  )
  part = {**part.pop(CODEC), **part}
  given, scaled_by = _given_scale(codec, path)
  given = {
    name: np.array(np.broadcast_to(given[name], x.shape), x.dtype)
    for name, x in numbers.items()
  }
  facts = {**own, 'step': step, 'ema': True}
  facts |= {'scaled_by': scaled_by} if scaled_by else {}
  return Frozen(
    {CODEC: {**part, **sharding.placed(given, mesh)}}, {CODEC: facts}
  )


def of_folder(found: autoencoders.Folder, config, mesh: Mesh) -> Frozen:
  """The autoencoder of a folder of diffusers.

  Args:
    found: the content of the folder.
    config: the config of the run in its latents, completed.
    mesh: the devices to load it to.

  Raises:
    UserError: the weights do not fit the settings, or are not finite.
  """
  codec = config[CODEC]
  path = str(place(codec['path']))
  wanted = abstract(config)[CODEC]
  numbers = {name: wanted.pop(name) for name in ('shift', 'scale')}
  part = diffusers.to_params(found.tensors, wanted, path)
  if name := models.not_finite(part):
    raise UserError(
      f'{path}: the weights {name} are not finite: give an earlier checkpoint, '
      'or download it again'
    )
  scaled_by = IMPORTED
  given = {'shift': found.shift, 'scale': found.scale}
  if codec['scale']:
    given, scaled_by = _given_scale(codec, path)
  part |= {
    name: np.array(np.broadcast_to(given[name], x.shape), x.dtype)
    for name, x in numbers.items()
  }
  facts = {'from': path, 'step': 0, 'ema': True, 'scaled_by': scaled_by}
  return Frozen({CODEC: sharding.placed(part, mesh)}, {CODEC: facts})


def _leave_out(codec, key, what) -> None:
  if codec[key]:
    raise UserError(
      f'codec.{key}={codec[key]}: codec.path={codec["path"]} is {what}: leave '
      f'codec.{key} at 0'
    )


def _given_scale(codec, path) -> tuple[dict, str]:
  """Shift and scale that are not measured, and who says so; '' for nobody."""
  if codec['scale']:
    given = {name: codec[name] for name in ('shift', 'scale')}
    return given, 'codec.scale and codec.shift'
  facts = runs.conversion(place(path)) or {}
  if 'scale' in facts:
    given = {name: facts[name] for name in ('shift', 'scale')}
    return given, IMPORTED
  return {'shift': 0.0, 'scale': 1.0}, ''


def _folder_in(path):
  """The folder of an autoencoder of diffusers, be it a pipeline's, or None."""
  if not path:
    return None
  there = place(path)
  folders = (there, *(there / name for name in places.CODECS))
  return next(filter(autoencoders.is_folder, folders), None)


def _config_of(path) -> dict:
  """The config of an autoencoder's run, or of a run in its latents."""
  if not path:
    raise UserError(
      'codec.path is empty: give the folder of an autoencoder, which a run '
      "with codec.name='autoencoder' trains"
    )
  if folder := _folder_in(path):
    # As if it were an autoencoder's run.
    loss = {'name': 'autoencoding'}
    return {**autoencoders.settings_in(folder), 'loss': loss}
  config = runs.read_config(place(path), 'codec.path')
  if not (codecs.reconstructs(config) or codecs.is_in_latents(config)):
    raise UserError(
      f'codec.path={path} is a run with codec.name={config[CODEC]["name"]!r}: '
      "give one with codec.name='autoencoder'"
    )
  return config


def _is_copied(workdir, config) -> bool:
  """Whether a run was trained with the autoencoder that the config names."""
  codec = config[CODEC]
  return kept_parts.is_copied(workdir, CODEC, codec['path'], codec['step'])


def is_weight(name: str) -> bool:
  """Whether a parameter is one of the autoencoder, not shift or scale."""
  return name not in (f'{CODEC}/shift', f'{CODEC}/scale')
