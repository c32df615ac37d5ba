r"""Imports published weights as a run, and exports a run's weights.

  python -m diffusion_jax.convert --from=ddpm-cifar10-32 --to=runs/published
  python -m diffusion_jax.convert --from=runs/cifar10 --to=my-ddpm

--from is one of
  a diffusers folder, of a pipeline, a UNet2DModel or a training checkpoint, as
    safetensors or the older .bin (no code in it is executed), or a file of
    weights in it. It sets the network, the noise schedule, the variance and the
    clipping, and of an LDMPipeline also the autoencoder;
  a folder of Stable Diffusion 1, 2 or XL, or of its inpainting: U-Net,
    autoencoder, text encoders, tokenizers and scheduler become one run, which
    `sample --prompt="a red apple"` takes;
  a checkpoint of DDPM's authors, such as .../model.ckpt-790000. Give the config
    of its network: --config=cifar10, celebahq256, lsun:church, ... It is read
    with TensorFlow: pip install 'diffusion_jax[prepare]';
  the folder of an autoencoder of diffusers, AutoencoderKL or VQModel, such as
    the vae/ of Stable Diffusion. The images are of the folder's sample_size,
    or of the size in --config;
  the workdir of a run. Its averaged weights are written as a folder that
    diffusers loads: a DDPMPipeline; of a run in latents an LDMPipeline, or a
    StableDiffusionPipeline if it has frozen text encoders; of an autoencoder an
    AutoencoderKL or a VQModel. A run with LoRA becomes a file of its low-rank
    changes, pytorch_lora_weights.safetensors, or with --merged such a folder.

An import writes a workdir for sample, evaluate and train --init_from; its
converted.json says where the weights come from. With --config the workdir has
the config's data, and evaluate compares samples with them; without it,
evaluate needs --reference.
"""

import functools

import jax
from absl import flags
from ml_collections import ConfigDict

from diffusion_jax import models, runs
from diffusion_jax.cli import command, config_files, declare
from diffusion_jax.codecs import latents
from diffusion_jax.configs import default
from diffusion_jax.models import NET
from diffusion_jax.runs import (
  exports,
  folder,
  frozen_codec,
  kept_parts,
  licences,
  recipe,
  text_pipelines,
  texts,
  validation,
)
from diffusion_jax.runs.frozen_codec import CODEC
from diffusion_jax.system import environment, files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, sharding
from diffusion_jax.weights import autoencoders, diffusers, official

FLAGS = flags.FLAGS
flags.DEFINE_string('from', None, 'Folder, file or checkpoint to convert.')
flags.DEFINE_string(
  'to', None, 'Output folder, new or with nothing but logs and notes in it.'
)
command.define_config(
  "Import: the config whose data the run gets and, for DDPM's own "
  'checkpoints, whose network they hold.'
)
flags.DEFINE_integer(
  'step', None,
  'Export: the checkpoint; by default the newest. Import: the training step '
  "of the weights; by default 0, or the one in the name of DDPM's own or of "
  'checkpoint-N.',
  lower_bound=0,
)  # fmt: skip
flags.DEFINE_bool(
  'ema', True, 'Export: the averaged weights; --noema: the raw ones.'
)
declare.shared('ema_profile')
flags.DEFINE_bool(
  'merged',
  False,
  'Export of a run with LoRA: the whole network, with the changes in it.',
)
flags.DEFINE_bool('json', False, 'Print the result as JSON.')


def main():
  source = files.at(FLAGS['from'].value).expanduser()
  target = files.at(FLAGS.to).expanduser()
  # A folder of diffusers may have a folder checkpoints, too.
  is_run = not diffusers.is_folder(source) and _is_run(source)
  _check_target(source, target)
  if is_run:
    result, told = _export(source, target)
  elif text_pipelines.is_folder(source):
    result, told = _import_text_pipeline(source, target)
  elif autoencoders.is_folder(source):
    result, told = _import_autoencoder(source, target)
  elif diffusers.is_folder(source):
    result, told = _import_folder(source, target)
  elif official.is_checkpoint(source):
    result, told = _import_official(source, target)
  else:
    raise UserError(
      f'--from={source} is neither the workdir of a run, nor a diffusers '
      f'folder (with {diffusers.INDEX} or a config.json), nor a file of its '
      'weights, nor a TensorFlow checkpoint (with a .index): give one that is '
      'on this machine, as nothing is downloaded'
    )
  terminal.report(result, f'{told}: {target}', FLAGS.json)


def _is_run(source) -> bool:
  """Whether a path is a run, be it one that has lost its checkpoints."""
  notes = (source / name for name in (runs.STARTS, runs.CONVERTED))
  return (source / 'checkpoints').is_dir() or any(x.is_file() for x in notes)


def _check_target(source, target) -> None:
  runs.usable_folder('to', target)
  there = folder.foreign(target)
  # The remains of an interrupted import are overwritten.
  ours = {runs.CONVERTED, 'checkpoints', kept_parts.FOLDER}
  ours.add(licences.FOLDER)
  unfinished = {runs.CONVERTED} <= there <= ours
  if there and not unfinished:
    raise UserError(
      f'--to={target} is not empty (in the way: {min(there)}): give a new '
      'folder'
    )
  if files.resolved(source) in files.parents(files.resolved(target)):
    raise UserError(f'--to={target} is inside --from: give another folder')


def _export(source, target) -> tuple[dict, str]:
  if FLAGS.config is not None:
    raise UserError(
      '--config is for imports; a run has its own: leave --config out'
    )
  return exports.write(
    source, target, FLAGS.step, FLAGS.ema, FLAGS.ema_profile, FLAGS.merged
  )


def _import_folder(source, target) -> tuple[dict, str]:
  found = diffusers.read(source)
  parts, assumed = _assumed(found)
  coder = None
  if found.codec:
    latent = found.config['data']
    coder = autoencoders.of_latents(
      found.codec, latent['image_size'], latent['channels']
    )
    codec = {
      'path': str(files.absolute(source)),
      'coder': coder.config['codec'],
    }
    parts = {**parts, 'data': coder.config['data'], 'codec': codec}
  config = _config_with(parts, {'codec': default.latents()} if coder else {})
  abstract = _abstract(config)
  params, raw = (
    tensors and {NET: diffusers.to_params(tensors, abstract, str(source))}
    for tensors in (found.tensors, found.raw)
  )
  notes = [*found.notes, *assumed]
  for note in notes:
    terminal.say(f'{source}: {note}')
  step = found.step or 0 if FLAGS.step is None else FLAGS.step
  facts = {
    'format': 'diffusers',
    'sha256': found.sha256,
    'files': found.names,
    'notes': notes,
  }
  if coder:
    facts |= {'codec_sha256': coder.sha256, 'settings': coder.kept}
  if not coder:
    return _write(target, config, params, raw, step, facts)
  codec = frozen_codec.of_folder(coder, config, sharding.make_mesh())
  copy = functools.partial(kept_parts.write, target, codec)
  return _write(target, config, params, raw, step, facts, copy)


def _import_text_pipeline(source, target) -> tuple[dict, str]:
  found = text_pipelines.read(source)
  config = _config_with(found.parts, found.groups)
  own, raw, parts, encoder = text_pipelines.params_of(
    found, config, _abstract(config), sharding.make_mesh()
  )
  with config.unlocked():
    config.conditioning.sha256 = encoder.sha256
  for note in found.notes:
    terminal.say(f'{source}: {note}')
  step = FLAGS.step or 0
  facts = {
    'format': 'diffusers',
    'sha256': found.network.sha256,
    'files': found.network.names,
    'notes': found.notes,
    'settings': found.kept,
    'sampling': found.sampling,
  }

  def beside():
    kept_parts.write(target, parts)
    texts.save(target, encoder)

  return _write(target, config, own, raw, step, facts, beside)


def _import_autoencoder(source, target) -> tuple[dict, str]:
  size = FLAGS.config and FLAGS.config.data.image_size
  found = autoencoders.read(source, size)
  config = _config_with(
    {**found.config, 'loss': {'critic_weight': 0.0}},
    {'codec': default.autoencoder(), 'loss': default.autoencoding()},
  )
  coder = latents.coder_of(runs.image_shape(config.data), config.codec)
  abstract = jax.eval_shape(coder.init, jax.random.key(0))
  params, raw = (
    tensors and {CODEC: diffusers.to_params(tensors, abstract, str(source))}
    for tensors in (found.tensors, found.raw)
  )
  for note in found.notes:
    terminal.say(f'{source}: {note}')
  facts = {
    'format': 'diffusers',
    'sha256': found.sha256,
    'files': found.names,
    'notes': found.notes,
    'settings': found.kept,
    'shift': found.shift,
    'scale': found.scale,
  }
  return _write(target, config, params, raw, FLAGS.step or 0, facts)


def _assumed(found) -> tuple[dict, list[str]]:
  """The folder's parts of the config, and what is assumed of the others."""
  if found.has_scheduler:
    return found.config, []
  told = 'there is no scheduler, so the noise schedule and the prediction are'
  if FLAGS.config is not None:
    parts = {
      part: found.config[part] for part in ('data', 'model', 'conditioning')
    }
    parts['loss'] = {'variance': found.config['loss']['variance']}
    return parts, [f'{told} those of --config']
  process, sample = found.config['process'], found.config['sample']
  return found.config, [
    f'{told} assumed: linear betas from {process["beta_start"]} to '
    f'{process["beta_end"]} in {process["num_timesteps"]} steps, '
    f'{found.config["loss"]["prediction"]}, variance {sample["variance"]}; '
    '--config=NAME --config.process.beta_end=... sets others'
  ]


def _import_official(source, target) -> tuple[dict, str]:
  if FLAGS.config is None:
    raise UserError(
      f'--from={source} does not describe its network: give --config=cifar10, '
      'celebahq256 or lsun:church (:bedroom, :cat)'
    )
  config = FLAGS.config.copy_and_resolve_references()
  _check(config)
  found, abstract = official.read(source), _abstract(config)
  params, raw = (
    tensors and {NET: official.to_params(tensors, abstract, str(source))}
    for tensors in (found.average, found.raw)
  )
  step = found.step or 0 if FLAGS.step is None else FLAGS.step
  return _write(target, config, params, raw or None, step, {'format': 'DDPM'})


def _config_with(parts, groups=()) -> ConfigDict:
  """--config, or a default config, updated with the folder's settings.

  Args:
    parts: group -> key -> value of the folder.
    groups: name -> the group to take where the config's is another choice.
  """
  shape = runs.image_shape(parts['data'])
  if FLAGS.config is not None:
    config = FLAGS.config.copy_and_resolve_references()
    if (there := runs.image_shape(config.data)) != shape:
      raise UserError(
        f'--config is for images of {_shown(there)}, the weights are for '
        f'{_shown(shape)}: give the config of their data, or none'
      )
  else:
    config = config_files.load(config_files.shipped_config('cifar10'))
    config.data.update({'name': '', 'heldout_split': '', 'path': ''})
  with config.unlocked():
    for name, group in dict(groups).items():
      if config[name].name != group.name:
        config[name] = group
  before = runs.to_plain(config)
  # The size of images may be a pair.
  with config.unlocked(), config.ignore_type():
    config.model.details = ConfigDict()
    for part, values in parts.items():
      config[part].update(values)
  if FLAGS.config is not None:
    for line in runs.differences(before, runs.to_plain(config)).values():
      terminal.say(f'{FLAGS["from"].value} overrides --config: {line}')
  _check(config)
  return config


def _check(config) -> None:
  if wrong := validation.check_network(config):
    raise UserError(f'--from={FLAGS["from"].value}: {wrong[0]}')


def _shown(shape) -> str:
  return 'x'.join(map(str, shape))


def _abstract(config):
  init = recipe.create(config).init
  return jax.eval_shape(init, jax.random.key(0))[NET]


def _write(
  target, config, params, raw, step, facts, beside=lambda: None
) -> tuple[dict, str]:
  """Writes the workdir; config.json comes last and makes it a run.

  Args:
    target: the folder.
    config: its config.
    params: the parameters.
    raw: raw ones next to averaged ones, or None.
    step: their training step.
    facts: of converted.json.
    beside: writes what else the run has.
  """
  facts = {
    'from': str(files.absolute(files.at(FLAGS['from'].value).expanduser())),
    **facts,
    'step': step,
    'raw': raw is not None,
    'environment': environment.describe(),
  }
  if name := models.not_finite(params) or models.not_finite(raw or {}):
    raise UserError(
      f'--from={FLAGS["from"].value}: the weights {name} are not finite: give '
      'an earlier checkpoint, or download it again'
    )
  config.num_steps = max(step, 1)  # marks training as finished
  found = licences.of(FLAGS['from'].value)
  files.write_json(target / runs.CONVERTED, facts)
  for name in ('checkpoints', kept_parts.FOLDER, licences.FOLDER):
    files.remove(target / name)
  beside()
  licences.write(target / licences.FOLDER, found)
  checkpoint.save_params(target / 'checkpoints', step, params, raw)
  runs.write_config(target, config)
  count = models.count(params)
  return {'path': str(target), 'step': step, 'parameters': count}, (
    f'{count:,} parameters, step {step}, as a run to sample and evaluate'
  )


if __name__ == '__main__':
  command.run(main, __doc__, required=('from', 'to'))
