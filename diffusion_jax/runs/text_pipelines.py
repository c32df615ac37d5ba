"""Pipelines of Stable Diffusion as runs, and runs as such pipelines.

A folder of diffusers' `StableDiffusionPipeline` (1 and 2, in pictures or for
inpainting) or `StableDiffusionXLPipeline`:

  model_index.json  unet/  vae/  scheduler/
  text_encoder/  tokenizer/  and of SDXL  text_encoder_2/  tokenizer_2/

Networks of other kinds in it (a safety checker) are left out. Neither diffusers
nor transformers is needed, and nothing in the folder is executed.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh

from diffusion_jax import codecs, conditioning, runs
from diffusion_jax.conditioning import text, tokenizers
from diffusion_jax.configs import default
from diffusion_jax.models import NET
from diffusion_jax.runs import dataset, frozen, frozen_codec, frozen_text, texts
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import (
  autoencoders,
  coders,
  diffusers,
  pipelines,
  places,
  settings,
  stable_diffusion,
  text_encoders,
)

PLAIN, INPAINTING = 'StableDiffusionPipeline', 'StableDiffusionInpaintPipeline'
XL = 'StableDiffusionXLPipeline'
CLASSES = (PLAIN, INPAINTING, XL)
FAMILY = 'StableDiffusion'  # also of those that are not known here
CODEC = 'vae'  # the folder of the autoencoder
STEPS = 50  # diffusers' default
GUIDANCE = {XL: 5.0}
USUAL_GUIDANCE = 7.5
# What a pipeline does not need, as it is written.
NOTHING = dict.fromkeys(('safety_checker', 'feature_extractor'), (None, None))


class Pipeline(NamedTuple):
  """The content of a folder.

  Attributes:
    parts: group -> key -> value, of a run's config.
    groups: the groups of which the config has other keys than by default.
    network: the U-Net's folder.
    coder: the autoencoder's.
    kept: settings that the config does not have: 'index', 'unet', 'codec',
      'scheduler', and of each text encoder.
    sampling: how the pipeline samples, see `settings.sampling_of`.
    notes: what was taken and assumed, one line each.
  """

  parts: dict[str, dict]
  groups: dict[str, Any]
  network: stable_diffusion.Folder
  coder: autoencoders.Folder
  kept: dict[str, Any]
  sampling: dict[str, Any]
  notes: list[str]


def is_folder(path) -> bool:
  """Whether there is such a pipeline at a path, be it incomplete."""
  model = places.model_in(path)
  if model is None:
    return False
  kind = _settings(model / places.PIPELINE).get('_class_name')
  named = str(kind).startswith(FAMILY)
  return named or stable_diffusion.is_folder(path)


def read(path) -> Pipeline:
  """Reads a folder.

  Args:
    path: the folder.

  Raises:
    UserError: a part is missing, damaged or not supported, or they do not
      belong together; the message names the part or the setting.
  """
  folder = places.find(path).index.parent
  index = _settings(folder / places.PIPELINE)
  kind = index.get('_class_name')
  if not kind:
    raise UserError(
      f'{folder} has no {places.PIPELINE}: a {stable_diffusion.CLASS} needs '
      'its pipeline, with autoencoder and text encoder: give its folder'
    )
  settings.agree(folder / places.PIPELINE, '_class_name', kind, CLASSES)
  _check_parts(path, folder, kind)
  structure = frozen_text.structure_of(folder)
  network = stable_diffusion.read(path)
  latent = network.config['data']
  coder = autoencoders.of_latents(
    folder / CODEC, latent['image_size'], latent['channels']
  )
  file = folder / 'scheduler' / places.SCHEDULER
  scheduler = _settings(file)
  process = settings.process_of(scheduler, file)
  sampling, other = settings.sampling_of(_changed(scheduler, kind), file)
  guidance = GUIDANCE.get(kind, USUAL_GUIDANCE)
  there = str(files.absolute(folder))
  parts = {
    'data': coder.config['data'],
    'codec': {'path': there, 'coder': coder.config['codec']},
    'conditioning': {
      'path': there,
      **structure,
      'channels': network.doors.get('channels', 0),
    },
    'model': network.config['model'],
    'process': process['process'],
    'loss': {**network.config['loss'], **process['loss']},
    'sample': {
      **{k: x for k, x in sampling.items() if k in ('sampler', 'grid')},
      **{'num_steps': STEPS, 'guidance': guidance, 'clip': False},
      'variance': process['sample']['variance'],
    },
  }
  kept = {
    'index': index,
    'unet': network.kept,
    'codec': coder.kept,
    'scheduler': scheduler,
    **{
      part: _kept_of(folder / frozen_text.FOLDERS[part][0])
      for part in structure['encoders']
    },
  }
  groups = {'codec': default.latents(), 'conditioning': default.frozen_text()}
  _check_doors(parts, network.doors, folder)
  return Pipeline(
    parts, groups, network, coder, kept, {**sampling, 'num_steps': STEPS},
    [
      *_told_of(places.UNET, network.notes), *_told_of(CODEC, coder.notes),
      *_left_out(index), *other,
    ],
  )  # fmt: skip


def _check_parts(path, folder, kind) -> None:
  """Raises UserError unless a folder has all parts of such a pipeline."""
  encoders = [name for names in frozen_text.FOLDERS.values() for name in names]
  needed = [CODEC, 'scheduler', *(encoders if kind == XL else encoders[:2])]
  lacking = [name for name in needed if not (folder / name).is_dir()]
  if not stable_diffusion.is_folder(path):  # it may be unet_ema/
    lacking.insert(0, places.UNET)
  if lacking:
    raise UserError(
      f'{folder} has no {lacking[0]}/, which a {kind} needs: download it, too'
    )


def _changed(scheduler, kind) -> dict:
  """The settings of a scheduler as pipelines other than XL's change them."""
  if kind == XL:
    return scheduler
  changed = {'steps_offset': 1, 'clip_sample': False}
  if kind == INPAINTING:
    changed['skip_prk_steps'] = True
  return {**scheduler, **changed}


def _told_of(part, notes) -> list[str]:
  return [f'{part}/: {note}' for note in notes]


def _check_doors(parts, doors, folder) -> None:
  """Raises UserError unless the text encoders fit the network."""
  condition = {**default.frozen_text(), **parts['conditioning']}
  made = doors_of({**parts, 'conditioning': condition})
  for door in sorted(made.keys() | doors.keys()):
    here, there = made.get(door), doors.get(door)
    if here != there:
      raise UserError(
        f'{folder}: the text encoders give the U-Net {door} of {here}, but it '
        f'takes {there}: they do not belong together'
      )


def _left_out(index) -> list[str]:
  names = sorted(
    name
    for name in NOTHING
    if isinstance(index.get(name), list) and index[name][0]
  )
  return [f'{" and ".join(names)} are left out'] if names else []


def _kept_of(folder) -> dict:
  file = folder / places.SETTINGS
  return text_encoders.network_of(diffusers.read_settings(file), file)[1]


def _settings(file) -> dict:
  return diffusers.read_settings(file) if file.is_file() else {}


def params_of(found: Pipeline, config: Mapping, abstract, mesh: Mesh) -> tuple:
  """The parameters of a pipeline.

  Args:
    found: the pipeline.
    config: the run's config.
    abstract: the shapes of the network's parameters.
    mesh: the devices to load the frozen parts to.

  Returns:
    ({NET: parameters}, the same for raw ones or None, the frozen parts, the
    tokenizers).

  Raises:
    UserError: the weights do not fit the settings.
  """
  given = config['conditioning']
  own, raw = (
    tensors and {NET: diffusers.to_params(tensors, abstract, given['path'])}
    for tensors in (found.network.tensors, found.network.raw)
  )
  parts = frozen.joined(
    (
      frozen_codec.of_folder(found.coder, config, mesh),
      frozen_text.of_path(given['path'], config, mesh),
    )
  )
  return own, raw, parts, texts.of_path(given['path'], given)


# --- runs as pipelines -------------------------------------------------------


def is_one(config: Mapping) -> bool:
  """Whether a run is written as such a pipeline: in latents, with captions."""
  return codecs.is_in_latents(config) and dataset.has_captions(
    config['conditioning']
  )


def write(
  path,
  config: Mapping,
  params: Mapping,
  encoder: texts.Encoder,
  kept: Mapping | None = None,
) -> str:
  """Writes a run as a pipeline that diffusers loads.

  Args:
    path: the folder; model_index.json is written last, so that an incomplete
      folder is not a pipeline.
    config: the run's config.
    params: all parts, on the host.
    encoder: the run's tokenizers.
    kept: settings that the config does not have, if it was imported, see
      `Pipeline`.

  Returns:
    The class of the pipeline.

  Raises:
    UserError: diffusers does not support such a pipeline; nothing has been
      written.
  """
  kept, path = kept or {}, files.at(path)
  condition = config['conditioning']
  encoders = condition.get('encoders')
  if encoders is None:
    encoders = {text.PART: text.structure(condition)}
  theirs = {
    name: text_encoders.settings_of(options, kept.get(name) or {})
    for name, options in encoders.items()
  }
  latent = codecs.x0_shape(runs.image_shape(config['data']), config['codec'])
  side = latent[0] if latent[0] == latent[1] else list(latent[:2])
  in_latents = {
    **config,
    'data': {**config['data'], 'image_size': side, 'channels': latent[-1]},
  }
  doors = doors_of(config)
  stable_diffusion.settings_of(in_latents, doors, kept.get('unet'))
  scheduler = _scheduler_of(config, kept.get('scheduler'))
  part, of_codec = pipelines.coder_of(
    config, params['codec'], kept.get('codec')
  )
  index = _index_of(kept.get('index'), encoders, scheduler, config, theirs)

  autoencoders.write(
    path / CODEC,
    {'codec': config['codec']['coder'], 'data': config['data']},
    part,
    of_codec,
  )
  for name, options in encoders.items():
    of_encoder, of_tokenizer = frozen_text.FOLDERS[name]
    text_encoders.write(
      path / of_encoder, options, params[name], kept.get(name)
    )
    tokenizers.write_folder(path / of_tokenizer, encoder.each[of_tokenizer])
  stable_diffusion.write(
    path / places.UNET, in_latents, doors, params[NET], kept.get('unet')
  )
  files.write_json(path / 'scheduler' / places.SCHEDULER, scheduler)
  files.write_json(path / places.PIPELINE, index)
  return index['_class_name']


def doors_of(config: Mapping) -> dict[str, int]:
  """The doors of a run's network."""
  made = conditioning.create(
    image_shape=runs.image_shape(config['data']), **config['conditioning']
  )
  extra = config['conditioning'].get('channels')
  return {**made.doors, **({'channels': extra} if extra else {})}


def _scheduler_of(config, kept) -> dict:
  """The scheduler's settings: those that it was read with, if they hold."""
  if kept is not None:
    found = settings.process_of(kept, places.SCHEDULER)
    if all(
      config[group][key] == value
      for group in ('process', 'loss')
      for key, value in found[group].items()
    ):
      return dict(kept)
  given = settings.scheduler_of(config)
  del given['variance_type']
  return {
    **given,
    '_class_name': 'DDIMScheduler',
    'clip_sample': False,
    'set_alpha_to_one': False,
    'steps_offset': 1,
    'timestep_spacing': 'leading',
  }


def _index_of(kept, encoders, scheduler, config, theirs) -> dict:
  """The content of model_index.json."""
  kinds = {
    'scheduler': ['diffusers', scheduler['_class_name']],
    'unet': ['diffusers', stable_diffusion.CLASS],
    CODEC: ['diffusers', coders.class_of(config['codec']['coder'])],
  }
  for name in encoders:
    of_encoder, of_tokenizer = frozen_text.FOLDERS[name]
    kinds[of_encoder] = ['transformers', theirs[name]['architectures'][0]]
    kinds[of_tokenizer] = ['transformers', 'CLIPTokenizer']
  if kept is None:
    is_xl = len(encoders) > 1
    kind = INPAINTING if config['conditioning'].get('channels') else PLAIN
    own = {'_class_name': XL if is_xl else kind}
    if is_xl:
      own['force_zeros_for_empty_prompt'] = config['conditioning']['zeros']
    else:
      own['requires_safety_checker'] = False
    kept = {**own, **NOTHING}
  index = {**kept, **kinds}
  for name, value in index.items():
    if isinstance(value, list | tuple) and name not in kinds:
      index[name] = [None, None]
  if 'safety_checker' in index and 'requires_safety_checker' in index:
    index['requires_safety_checker'] = False
  return index
