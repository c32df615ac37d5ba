r"""Draws images from a trained run.

  python -m diffusion_jax.sample --workdir=runs/digits --num_samples=64 \
    --sampler=ddim --num_steps=50

The default sampler is DDPM's own with 1000 ancestral steps, or that of the
pipeline of diffusers that the run was imported from. Images are written to a
sample store, by default a folder in WORKDIR/samples named after the settings.
An interrupted job resumes, and a larger --num_samples draws only the missing
images. The folder also gets samples.npz (`arr_0`, uint8) with all of its
images, grid.png, the pictures that flags ask for, and with --sampler=adaptive
evaluations.npy, the number of network evaluations for each image.

grid.png and the images of --png carry their addresses: run, checksum of the
weights, seed, index, prompt or label, and sampler. --like=PICTURE draws such an
image again.

--export=FILE writes the sampler itself, with the weights, in place of images: a
program that draws with JAX alone, see docs/samplers.md.
"""

import itertools

import numpy as np
from absl import flags

from diffusion_jax import runs
from diffusion_jax.cli import again, command, declare, drawing, grids
from diffusion_jax.reporting import pictures
from diffusion_jax.runs import (
  addresses,
  labels,
  standalone,
  store,
  trajectories,
  upscaled,
)
from diffusion_jax.system import compilation, distributed, files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(drawing)
flags.adopt_module_key_flags(again)
declare.shared('accept_data', 'json')
declare.table(
  num_samples=(
    64,
    'Number of images in the store, including those already drawn.',
  ),
  image_size=(
    str,
    'Size of the images in pixels, SIDE or HEIGHTxWIDTH, such as 48x64, for '
    "networks that take other sizes than the run's, which is the default.",
  ),
  grid_images=(100, 'Maximum number of images on grid.png.'),
  png=(False, 'Also write every image as png/INDEX.png.'),
  trajectory=(
    0,
    'Also write trajectory.png: this many samples at several times from noise '
    'to image.',
  ),
  progressive=(
    0,
    'Also write progressive.png: the estimates of x0 of this many samples at '
    'the same times.',
  ),
  export=(
    str,
    'Draw nothing, but write the sampler with its weights to this file of '
    'jax.export, which draws without this package; FILE.json says how.',
  ),
  interpolate=(
    0,
    'Also write interpolation.png: this many images between samples 0 and 1, 2 '
    'and 3, and so on, by interpolating their initial noises. For samplers '
    'that add no noise.',
  ),
)

# Flags that are not for --like.
OWN = (
  *('num_samples', 'image_size', 'grid_images', 'png'),
  *('trajectory', 'progressive', 'interpolate', 'export'),
)
# Flags that are not for --export; the seed is an argument of the program.
NOT_EXPORTED = (
  *('num_samples', 'grid_images', 'png', 'output', 'seed'),
  *('trajectory', 'progressive', 'interpolate'),
)
FRAMES = 10  # most times on trajectory.png and progressive.png
PAIRS = 8  # most pairs on interpolation.png


def main():
  if drawing.listed():
    return
  if FLAGS.like:
    _draw_again()
    return
  if FLAGS.export is not None:
    _export()
    return
  command.need('workdir')
  distributed.initialize()
  drawing.check_flags(
    num_samples=1, grid_images=1, trajectory=0, progressive=0, interpolate=0
  )
  for flag in ('trajectory', 'progressive'):
    if FLAGS[flag].value > min(FLAGS.num_samples, FLAGS.batch_size):
      raise UserError(
        f'--{flag}={FLAGS[flag].value}: at most --num_samples='
        f'{FLAGS.num_samples} and --batch_size={FLAGS.batch_size}'
      )
  if FLAGS.interpolate and FLAGS.num_samples < 2:
    raise UserError(
      f'--interpolate={FLAGS.interpolate} needs two samples: give '
      f'--num_samples=2 or more, not {FLAGS.num_samples}'
    )
  compilation.keep()
  trained, plan, output = drawing.chosen(
    check=_check_plan, image_size=FLAGS.image_size
  )
  drawn = drawing.fill(trained, plan, output, FLAGS.num_samples)
  protocol = drawing.protocol(trained, plan)
  if distributed.is_first():
    _write(output, plan, trained, protocol)
  for what in ('trajectory', 'progressive'):
    if FLAGS[what].value:
      _draw_way(trained, plan, output / f'{what}.png', FLAGS[what].value)
  if FLAGS.interpolate:
    _draw_interpolation(trained, plan, output / 'interpolation.png')
  cost, told = _cost(plan, output)
  terminal.report(
    {
      'output': str(output), 'num_samples': FLAGS.num_samples,
      'step': trained.step, 'drawn': drawn, **cost,
    },
    f'{FLAGS.num_samples} images from step {trained.step}, {drawn} of them '
    f'drawn now ({told}); picture: {output / "grid.png"}',
    FLAGS.json,
  )  # fmt: skip


def _check_plan(plan):
  """Raises UserError for pictures that the sampler cannot draw."""
  names = ('trajectory', 'progressive', 'interpolate')
  ways = [name for name in names if FLAGS[name].value]
  if ways and plan.adaptive:
    raise UserError(
      f'--sampler={plan.sampler} chooses its own steps: leave --'
      f'{" and --".join(ways)} out'
    )
  if FLAGS.interpolate and 'prompts' in plan.condition:
    raise UserError(
      f'--interpolate={FLAGS.interpolate} is not for runs with captions: leave '
      'it out'
    )
  if FLAGS.interpolate:
    upscaled.check_plain(runs.read_config(declare.workdir()), '--interpolate')
  if (
    FLAGS.interpolate and plan.condition and len(grids.labels_asked(plan)) != 1
  ):
    raise UserError(
      f'--interpolate={FLAGS.interpolate} of a conditional run needs one label '
      'for both ends: give one, such as --label=0'
    )
  if FLAGS.interpolate and plan.adds_noise:
    raise UserError(
      f'--interpolate={FLAGS.interpolate}: --sampler={plan.sampler} with these '
      'options adds noise on the way; give a sampler that adds none, such as '
      '--sampler=ddim'
    )


def _cost(plan, output):
  """Network evaluations per image, as JSON and in words."""
  if not plan.adaptive:
    each = f'{plan.evaluations} network evaluations each'
    cost = {'grid': plan.grid, 'evaluations': plan.evaluations}
    if plan.rows != plan.evaluations:
      each += f' of {plan.rows} rows'
      cost['network_rows'] = plan.rows
    return cost, each
  took = drawing.took(output, FLAGS.num_samples)
  evaluations = {
    'mean': float(took.evaluations.mean()),
    'least': int(took.evaluations.min()),
    'most': int(took.evaluations.max()),
  }
  unfinished = int((~took.finished).sum())
  told = (
    '{mean:.1f} network evaluations on average, {least} to {most}'
  ).format(**evaluations)
  if unfinished:
    told += f'; the budget cut {unfinished} short'
  return {'evaluations': evaluations, 'unfinished': unfinished}, told


def _write(output, plan, trained, protocol):
  """Writes the files made from the images in the store, of which many may be.

  samples.npz and evaluations.npy have all of the store, the others those asked
  for.
  """
  store.write_npz(output)
  if plan.adaptive:
    count = min(store.drawn(output), store.drawn(output / store.TOOK))
    with files.replacing(output / 'evaluations.npy') as file:
      np.save(file, drawing.took(output, count).evaluations)
  shown = min(FLAGS.grid_images, FLAGS.num_samples)
  picture = grids.of_samples(trained, plan, store.load(output, shown))
  text = addresses.of_grid(protocol, FLAGS.workdir, shown)
  pictures.save(output / 'grid.png', picture, text)
  if FLAGS.png:
    files.make(output / 'png')
    images = itertools.chain.from_iterable(
      store.stream(output, 0, FLAGS.num_samples, store.BLOCK)
    )
    own = labels.of_samples(plan, FLAGS.num_samples)
    for i, image in enumerate(images):
      label = None if own is None else own[i]
      text = addresses.of_sample(
        protocol, FLAGS.workdir, i, label, upscaled.of_sample(trained, i)
      )
      pictures.save(output / 'png' / f'{i:06d}.png', image, text)


def _draw_again():
  """Draws the sample of --like again, and says how close it is."""
  distributed.initialize()
  compilation.keep()
  made = again.draw(OWN)
  facts = made.address.facts
  if made.largest is None:
    told = f'{FLAGS.like} has another size and is not compared'
  elif made.largest == 0:
    told = f'the pixels are those of {FLAGS.like}'
  else:
    told = (
      f'{made.share:.3%} of values differ from {FLAGS.like}, by at most '
      f'{made.largest} of 255'
    )
  terminal.report(
    {
      'output': str(made.path), 'step': facts['step'], 'index': facts['index'],
      'largest_difference': made.largest, 'share_of_differences': made.share,
    },
    f'sample {facts["index"]} of step {facts["step"]}: {told}; picture: '
    f'{made.path}',
    FLAGS.json,
  )  # fmt: skip


def _export():
  """Writes the sampler as a program of its own."""
  command.need('workdir')
  command.refuse(NOT_EXPORTED, 'a sampler that is written to a file (--export)')
  command.at_least(batch_size=1)
  distributed.initialize()
  upscaled.check_plain(runs.read_config(declare.workdir()), '--export')
  standalone.check(FLAGS.export)
  compilation.keep()
  trained, plan, _ = drawing.chosen(image_size=FLAGS.image_size)
  path = files.at(FLAGS.export).expanduser()
  given = FLAGS['batch_size'].present
  written = standalone.create(
    trained, plan, path.name, FLAGS.batch_size if given else standalone.GROUP
  )
  protocol = drawing.protocol(trained, plan)
  if distributed.is_first():
    standalone.write(path, written, protocol)
  terminal.report(
    {'output': str(path), 'step': trained.step, 'bytes': len(written.content)},
    f'the sampler of step {trained.step} ({plan.cost()} an image) as a program '
    f'of {len(written.content):,} bytes: {path}; {path.name}.json says '
    'how to draw with it',
    FLAGS.json,
  )  # fmt: skip


def _draw_way(trained, plan, path, count):
  """Draws the first samples, or their x0, at times from noise to image."""
  estimates = path.stem == 'progressive'
  frames = np.linspace(0, plan.num_steps, FRAMES).astype(int)
  frames = tuple(dict.fromkeys(frames.tolist()))
  draw_fn = trained.drawer(plan, frames, estimates=estimates)
  _, kept = draw_fn(np.arange(count))
  kept = sharding.to_host(kept)[:, :count]
  if distributed.is_first():
    times = [plan.grid[frame] for frame in frames]
    pictures.save(path, pictures.trajectory(kept, times))


def _draw_interpolation(trained, plan, path):
  """Interpolates between the first samples, pair by pair."""
  trained = trained.sized(plan.image_size)
  pairs = min(FLAGS.num_samples // 2, PAIRS)
  label, *_ = plan.condition.get('label', [None])
  carry = trajectories.carrier(
    trained, plan.create(), plan.grid, clip=plan.clip,
    batch_size=FLAGS.batch_size, label=label, guidance=plan.guidance,
  )  # fmt: skip
  ends = trajectories.noises(trained, plan.seed, 2 * pairs)
  picture = pictures.interpolation(
    lambda x: trajectories.to_images(trained, carry(x)), ends, FLAGS.interpolate
  )
  if distributed.is_first():
    pictures.save(path, picture)


if __name__ == '__main__':
  command.run(main, __doc__)
