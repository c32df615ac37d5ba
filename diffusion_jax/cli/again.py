"""Draws the sample of a picture again, by its address: `sample --like`."""

from typing import NamedTuple

import numpy as np
from absl import flags

from diffusion_jax import runs
from diffusion_jax.cli import (
  command,
  declare,
  drawing,
  guiding,
  low_rank,
  sharpening,
  steering,
)
from diffusion_jax.reporting import pictures
from diffusion_jax.runs import addresses, guided
from diffusion_jax.runs.trained import Trained, load
from diffusion_jax.samplers import guided as options
from diffusion_jax.system import distributed, files
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
declare.table(
  like=(
    str,
    'A PNG of png/: draws its sample again, by the address that it carries, '
    'into WORKDIR/samples/like or --output, and compares the pixels. The run '
    "is that of the address, or --workdir's.",
  ),
)
FOLDER = 'like'  # in samples/
# What an address names without its place.
FILES = {
  guided.GUIDE: 'WORKDIR@STEP',
  guided.CLASSIFIER: 'WORKDIR@STEP',
  'lora': 'FILE:SCALE',
  'control': 'FOLDER, and --control_image',
  'low_resolution': 'PLACE',
}
# The address gives what these flags would.
GIVEN = (
  *('step', 'ema', 'ema_profile', 'batch_size', 'sampler', 'num_steps', 'grid'),
  *('clip', 'seed', *drawing.OPTIONS, *options.OPTIONS),
  *('label', 'prompt', 'prompts', 'negative_prompt', 'guide_ema_profile'),
  'low_resolution_noise',
)


class Again(NamedTuple):
  """A sample that was drawn again.

  Attributes:
    address: the address in the picture.
    path: the new PNG.
    largest: the largest difference to the picture, of 255 levels; None if the
      picture has another size.
    share: the share of values that differ.
  """

  address: addresses.Address
  path: files.Path
  largest: int | None
  share: float | None


def draw(others: tuple[str, ...]) -> Again:
  """Draws the sample of --like again, and writes a PNG.

  Args:
    others: the names of the binary's own flags, which do not apply.

  Raises:
    UserError: the picture has no address of a sample, or the run is another
      one than when it was drawn.
  """
  command.refuse((*GIVEN, *others), 'a picture that is drawn again (--like)')
  found = addresses.read(FLAGS.like)
  picture = pictures.read(FLAGS.like)
  given = '--workdir' if FLAGS.workdir else f'--like={FLAGS.like}: workdir'
  workdir = FLAGS.workdir or found.run['workdir']
  folder = files.at(workdir).expanduser()
  config = runs.read_config(folder, given)
  output = FLAGS.output or folder / 'samples' / FOLDER
  output = files.at(output).expanduser()
  runs.usable_output(output)
  trained, small = sharpening.again(
    _network(found, workdir, config), found.facts.get('low_resolution'),
    found.how['image_size'],
  )  # fmt: skip
  how = {k: x for k, x in found.how.items() if k != 'first'}
  text = addresses.of_sample(
    drawing.protocol(trained, trained.plan(**how)), workdir,
    found.facts['index'], found.facts.get('label'), small,
  )  # fmt: skip
  addresses.check_same(found, addresses.parsed(text[addresses.KEY]))
  (image,) = trained.sample(**found.how)
  path = output / f'{found.name}.png'
  if distributed.is_first():
    files.make(output)
    pictures.save(path, image, text)
  if picture.shape != image.shape:
    return Again(found, path, None, None)
  apart = np.abs(picture.astype(int) - image)
  return Again(found, path, int(apart.max()), float((apart > 0).mean()))


def _network(found, workdir, config) -> Trained:
  """The network that drew a picture."""
  # Of a guide, and of low-rank changes, too.
  FLAGS.workdir, FLAGS.ema = workdir, found.run['ema']
  for name, how in FILES.items():
    there = found.facts.get(name)
    if there and not FLAGS[name].value:
      raise UserError(
        f'--like={FLAGS.like} was drawn with {name}={there!s:.60}: give it, as '
        f'--{name}={how}'
      )
    if FLAGS[name].value and not there:
      raise UserError(
        f'--like={FLAGS.like} was drawn without --{name}: leave it out'
      )
  others = guiding.others_of(config)
  low_rank.asked()  # before weights are read
  size = tuple(found.facts['image_shape'][:2])
  steering.asked(size)
  trained = low_rank.applied(load(**{**found.run, 'workdir': workdir}))
  trained = steering.applied(trained, size)
  return guiding.applied(trained, others)
