r"""Encodes images or captions of a data set once, for training with them.

  python -m diffusion_jax.encode --workdir=runs/autoencoder \
      --config=configs/emoji_ldm.py --output=latents

Reads the images that the config's `data` names, training and held-out ones, and
writes what the autoencoder's encoder gives for each: with data.flip also for
its mirror image. Training reads them in place of images with
--config.codec.cache=latents, and trains the same network as without, but for
rounding.

An interrupted job goes on when it is run again. Run again after it is
complete, it checks the hash of each file and encodes those that are damaged.
A broken image ends the job, also with data.skip_broken.

  python -m diffusion_jax.encode --captions --config=configs/sd15_finetune.py \
      --output=captions

With --captions it writes what frozen text encoders (conditioning.name
'frozen_text') make of the captions, which training reads with
--config.conditioning.cache=captions.
"""

import dataclasses

from absl import flags

from diffusion_jax import data, runs
from diffusion_jax.cli import command, declare
from diffusion_jax.configs import default
from diffusion_jax.data import captions, images, sources
from diffusion_jax.runs import (
  encoded_texts,
  encoding,
  frozen_codec,
  frozen_text,
  texts,
)
from diffusion_jax.system import compilation, distributed, files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

FLAGS = flags.FLAGS
command.define_config('Config whose data are encoded, such as that of the run.')
flags.adopt_module_key_flags(distributed)
declare.table(
  workdir=(str, "Folder of the autoencoder's run."),
  output=(str, 'Folder to write; created if it does not exist.'),
  step=(int, 'Checkpoint of the autoencoder; by default the newest.'),
  batch_size=(encoding.BATCH, 'Images per batch, over all devices.'),
  captions=(
    False,
    'Encode captions in place of images, with the text encoders of --config.',
  ),
)
declare.shared('json')

# Flags that are not for --captions.
OF_IMAGES = ('workdir', 'step', 'batch_size')


def main():
  distributed.initialize()
  command.at_least(batch_size=1)
  output = files.at(FLAGS.output).expanduser()
  if FLAGS.captions:
    _captions(FLAGS.config, output)
  else:
    command.need('workdir')
    _images(FLAGS.config, output)


def _captions(config, output):
  command.refuse(OF_IMAGES, '--captions')
  if not frozen_text.is_used(config):
    raise UserError(
      f'--captions with conditioning.name={config.conditioning.name!r}: only '
      "encoders that are not trained, 'frozen_text', encode captions before"
    )
  distributed.everywhere(lambda: frozen_text.complete(config))
  runs.usable_folder('output', output)
  splits = distributed.everywhere(lambda: _captioned(config.data))
  sources.say_notes(splits[0])
  compilation.keep()
  mesh = sharding.make_mesh()
  parts = frozen_text.load(config, mesh)
  splits = texts.prepare(config, None, splits)
  tokens = encoded_texts.tokens_of(splits)
  count = len(tokens)
  with terminal.Progress(
    *('encoding', count),
    unit='captions',
    begin='compiling the text encoders',
    kept=lambda _: f'finished files are kept in {output}',
  ) as progress:
    done = encoded_texts.write(
      config, splits, tokens, parts, mesh, output, progress.update
    )
  told = f'{count} captions are encoded in {output}'
  if not done:
    told = f'{output} is complete: {count} captions'
  terminal.report(
    {'output': str(output), 'captions': count, 'files_written': done},
    f'{told}; train with --config.conditioning.cache={output}',
    FLAGS.json,
  )


def _images(config, output):
  with config.unlocked():
    config.codec = default.latents()
    config.codec.path, config.codec.step = FLAGS.workdir, FLAGS.step or 0
  distributed.everywhere(lambda: frozen_codec.complete(config))
  runs.usable_folder('output', output)
  splits = distributed.everywhere(lambda: _opened(config.data))
  compilation.keep()
  mesh = sharding.make_mesh()
  parts = frozen_codec.load(config, mesh)
  sources.say_notes(splits[0])
  count = sum(map(len, filter(None, splits)))
  with terminal.Progress(
    *('encoding', count),
    unit='images',
    begin='compiling the encoder',
    kept=lambda _: f'finished files are kept in {output}',
  ) as progress:
    done = encoding.write(
      config, splits, parts, mesh, output, FLAGS.batch_size, progress.update
    )
  told = f'{count} images are encoded in {output}'
  if not done:
    told = f'{output} is complete: the latents of {count} images'
  terminal.report(
    {'output': str(output), 'images': count, 'files_written': done},
    f'{told}; train with --config.codec.cache={output}',
    FLAGS.json,
  )


def _captioned(config):
  """The images of a config's data, each of which must have a caption."""
  splits = data.both(config)
  captions.check(*splits)
  return splits


def _opened(config):
  """The images of a config's data; broken ones are refused, not left out.

  Labels and captions are read without the images, so that the latents of a
  stand-in would get those of the broken image.
  """
  train, heldout = (one and _whole(one) for one in data.both(config))
  train[0]  # fails early if the first image is damaged
  return train, heldout


def _whole(source):
  def read(index):
    try:
      return source.read_fn(index)
    except images.Broken as error:
      raise UserError(
        f'{error}, and encode into a new folder: only a run without '
        'codec.cache can leave it out, with data.skip_broken=True'
      ) from error

  return dataclasses.replace(source, read_fn=read)


if __name__ == '__main__':
  command.run(main, __doc__, required=('config', 'output'))
