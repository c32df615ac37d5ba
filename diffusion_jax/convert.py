r"""Weights in and out: what others trained as a run of ours, and the way back.

  python -m diffusion_jax.convert --from=ddpm-cifar10-32 --to=runs/published
  python -m diffusion_jax.convert --from=runs/cifar10 --to=my-ddpm

--from is one of
  a folder of diffusers, a pipeline or a UNet2DModel (safetensors, or the older
    .bin, of which nothing is run). The network, the noise schedule, the
    variance and the clipping are the folder's;
  a checkpoint of DDPM's authors, .../model.ckpt-790000, with --config=cifar10
    (celebahq256, lsun:church, ...), whose network it is. TensorFlow reads it:
    pip install 'diffusion_jax[prepare]';
  the workdir of a run, whose averaged weights become a folder that
    diffusers.DDPMPipeline.from_pretrained loads.

What comes in is a workdir that sample and evaluate take, and train
--init_from; converted.json in it tells where it comes from. With --config it
has the config's data, to be judged against; without, evaluate takes
--reference.
"""

import json

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from diffusion_jax import models, runs
from diffusion_jax.cli import command, config_files
from diffusion_jax.models import NET
from diffusion_jax.runs import recipe, validation
from diffusion_jax.runs.trained import load
from diffusion_jax.system import environment, files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, sharding
from diffusion_jax.weights import diffusers, official

FLAGS = flags.FLAGS
flags.DEFINE_string('from', None, 'What is converted: a folder, a checkpoint.')
flags.DEFINE_string('to', None, 'Folder of the result, new or empty.')
command.define_config(
  "What comes in is a run of this config: its data, and of DDPM's own "
  'checkpoints its network.'
)
flags.DEFINE_integer(
  'step', None,
  'Of a run: its checkpoint, the newest by default. Of what comes in: the '
  "training step it had; of DDPM's own it stands in the name.",
  lower_bound=0,
)  # fmt: skip
flags.DEFINE_bool('ema', True, 'Of a run: its averaged weights, or the raw.')
flags.DEFINE_bool('json', False, 'Print the result as JSON.')


def main():
  source = files.at(FLAGS['from'].value).expanduser()
  target = files.at(FLAGS.to).expanduser()
  is_run = (source / 'checkpoints').is_dir()
  _check_target(source, target)
  if is_run:
    result, told = _export(source, target)
  elif diffusers.is_folder(source):
    result, told = _import_folder(source, target)
  elif official.is_checkpoint(source):
    result, told = _import_official(source, target)
  else:
    raise UserError(
      f'--from={source} is no workdir of a run, no diffusers folder (with '
      f'{diffusers.INDEX} or a config.json) and no checkpoint of TensorFlow '
      '(with a .index): nothing is downloaded, so give what is here'
    )
  terminal.report(result, f'{told}: {target}', FLAGS.json)


def _check_target(source, target) -> None:
  runs.usable_folder('to', target)
  there = files.entries(target) if target.exists() else set()
  # What a cut has left of an import: it is written anew.
  unfinished = {runs.CONVERTED} <= there <= {runs.CONVERTED, 'checkpoints'}
  if there and not unfinished:
    raise UserError(f'--to={target} is not empty: give a new folder')
  if files.resolved(source) in files.parents(files.resolved(target)):
    raise UserError(f'--to={target} is inside --from: give another folder')


def _export(source, target) -> tuple[dict, str]:
  if FLAGS.config is not None:
    raise UserError('--config is of what comes in; a run has its own')
  trained = load(source, FLAGS.step, FLAGS.ema, mesh=sharding.make_mesh())
  params = jax.tree.map(sharding.to_host, trained.params)
  diffusers.write(target, trained.config, params[NET])
  result = {
    'path': str(target),
    'step': trained.step,
    'ema': trained.ema,
    'parameters': models.count(params),
    'weights_sha256': trained.weights_sha256,
  }
  kind = 'averaged' if trained.ema else 'raw'
  return result, (
    f'{kind} weights of step {trained.step}, {result["parameters"]:,} '
    'parameters, as a DDPMPipeline'
  )


def _import_folder(source, target) -> tuple[dict, str]:
  found = diffusers.read(source)
  config = _config_with(found.config)
  params = {
    NET: diffusers.to_params(found.tensors, _abstract(config), str(source))
  }
  facts = {'format': 'diffusers', 'sha256': found.sha256}
  return _write(target, config, params, None, FLAGS.step or 0, facts)


def _import_official(source, target) -> tuple[dict, str]:
  if FLAGS.config is None:
    raise UserError(
      f'--from={source} does not tell its network: give --config=cifar10, '
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


def _config_with(parts) -> ConfigDict:
  """The config of --config, or a default one, with what a folder tells."""
  shape = runs.image_shape(parts['data'])
  if FLAGS.config is not None:
    config = FLAGS.config.copy_and_resolve_references()
    there = runs.image_shape(config.data)
    if there != shape:
      raise UserError(
        f'--config is for images of {_shown(there)}, the weights are for '
        f'{_shown(shape)}: give the config of their data, or none'
      )
  else:
    config = config_files.load(config_files.shipped_config('cifar10'))
    config.data.update({'name': '', 'heldout_split': '', 'path': ''})
  before = runs.to_plain(config)
  with config.unlocked():
    for part, values in parts.items():
      config[part].update(values)
  if FLAGS.config is not None:
    differ = runs.differences(before, runs.to_plain(config))
    for line in differ.values():
      terminal.say(f'as in {FLAGS["from"].value}, not as in --config: {line}')
  _check(config)
  return config


def _check(config) -> None:
  wrong = validation.check_network(config)
  if wrong:
    raise UserError(f'--from={FLAGS["from"].value}: {wrong[0]}')


def _shown(shape) -> str:
  return 'x'.join(map(str, shape))


def _abstract(config):
  init = recipe.create(config).init
  return jax.eval_shape(init, jax.random.key(0))[NET]


def _write(target, config, params, raw, step, facts) -> tuple[dict, str]:
  """The workdir; config.json comes last, so that a cut leaves no run."""
  facts = {
    'from': str(files.absolute(files.at(FLAGS['from'].value).expanduser())),
    **facts,
    'step': step,
    'raw': raw is not None,
    'environment': environment.describe(),
  }
  config.num_steps = max(step, 1)  # for those who follow it, it has ended
  files.make(target)
  with files.replacing(target / runs.CONVERTED) as file:
    file.write(json.dumps(facts, indent=2).encode() + b'\n')
  files.remove(target / 'checkpoints')
  checkpoint.save_params(target / 'checkpoints', step, params, raw)
  runs.write_config(target, config)
  if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
    terminal.say('warning: some of the weights are not finite')
  count = models.count(params)
  return {'path': str(target), 'step': step, 'parameters': count}, (
    f'{count:,} parameters, step {step}, as a run to sample and evaluate'
  )


if __name__ == '__main__':
  command.run(main, __doc__, required=('from', 'to'))
