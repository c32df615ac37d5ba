r"""Draws images from a trained run.

  python -m diffusion_jax.sample --workdir=runs/digits --num_samples=64 \
    --sampler=ddim --num_steps=50

Without --sampler: DDPM's own, 1000 ancestral steps. Images go to a sample store
(by default a folder in WORKDIR/samples named after what was asked); a job that
was interrupted goes on, one that asks for more draws the rest. The folder gets
samples.npz (`arr_0`, uint8), grid.png, and what else is asked for.
"""

import hashlib
from pathlib import Path

import jax
import numpy as np
from absl import flags

from diffusion_jax import cli, models, pictures, runs, samplers
from diffusion_jax.errors import UserError
from diffusion_jax.process import schedules
from diffusion_jax.samplers import draw, grid, store
from diffusion_jax.training import checkpoint, sharding

FLAGS = flags.FLAGS
flags.DEFINE_string('workdir', None, 'Folder of the run.')
flags.DEFINE_string('output', None, 'Folder of the samples.')
flags.DEFINE_integer('num_samples', 64, 'How many images are to be there.')
flags.DEFINE_integer('batch_size', 256, 'Images drawn at once.')
flags.DEFINE_string(
  'sampler', 'ancestral', f'One of {", ".join(samplers.SAMPLERS)}.'
)
flags.DEFINE_integer(
  'num_steps', None, 'Sampling steps; all of the schedule by default.'
)
flags.DEFINE_string(
  'grid', 'uniform',
  f'Times: {", ".join(grid.GRIDS)}, or a literal list such as 999,500,100.',
)  # fmt: skip
flags.DEFINE_float('eta', None, 'ddim: noise, from 0 (none, the default) to 1.')
flags.DEFINE_string(
  'variance', None, 'ancestral: fixedlarge (the default) or fixedsmall.'
)
flags.DEFINE_bool('clip', True, 'Clip the estimate of x0 in every step.')
flags.DEFINE_bool('ema', True, 'Averaged weights, or the raw ones.')
flags.DEFINE_integer('step', None, 'Checkpoint; the newest by default.')
flags.DEFINE_integer('seed', 0, 'Of the samples.')
flags.DEFINE_integer('grid_images', 100, 'At most so many on grid.png.')
flags.DEFINE_bool('png', False, 'Also write every image as png/INDEX.png.')
flags.DEFINE_integer(
  'trajectory', 0,
  'Also write trajectory.png: the way of so many images out of the noise.',
)  # fmt: skip
flags.DEFINE_bool('json', False, 'Print the result as JSON.')

TRAJECTORY_FRAMES = 10


def main():
  workdir = Path(FLAGS.workdir).expanduser()
  config = runs.read_config(workdir)
  _check_flags()
  sampler = samplers.create(
    FLAGS.sampler, eta=FLAGS.eta, variance=FLAGS.variance
  )
  num_timesteps = config['process']['num_timesteps']
  steps = FLAGS.num_steps if FLAGS.num_steps is not None else num_timesteps
  times = grid.create(FLAGS.grid, num_timesteps, steps)
  if FLAGS.num_steps not in (None, len(times) - 1):
    raise UserError(
      f'--num_steps={FLAGS.num_steps}: the literal grid has {len(times) - 1} '
      'steps, leave the flag out'
    )
  directory = workdir / 'checkpoints'
  at = checkpoint.find_step(directory, FLAGS.step)
  output = Path(
    FLAGS.output or workdir / 'samples' / _name(at, len(times) - 1)
  ).expanduser()
  runs.usable_output(output)

  mesh = sharding.make_mesh()
  image_shape = runs.image_shape(config['data'])
  model = models.create(image_shape=image_shape, **config['model'])
  schedule = schedules.create(**config['process'])
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  params = checkpoint.load_params(
    directory, at, sharding.abstract(shapes, mesh), ema=FLAGS.ema
  )
  store.open_store(output, _protocol(config, at, times, params))

  def drawer(frames=()):
    return jax.jit(
      draw.drawer(
        sharding.gathering(model.apply, mesh), schedule,
        config['loss']['prediction'], sampler, times, image_shape,
        seed=FLAGS.seed, clip=FLAGS.clip, frames=frames,
      )
    )  # fmt: skip

  draw_fn = drawer()

  def draw_batch(indices):
    images = draw_fn(params, sharding.padded_indices(indices, mesh))
    return sharding.to_host(images)[: len(indices)]

  missing = len(store.missing(output, FLAGS.num_samples))
  batch_size = min(FLAGS.batch_size, max(missing, 1))
  if missing:
    cli.say(
      f'drawing {missing} images of {len(times) - 1} steps each, {batch_size} '
      f'at once, into {output}'
    )
  with cli.Progress(
    'sampling', FLAGS.num_samples, FLAGS.num_samples - missing, 'images'
  ) as progress:
    store.fill(
      output, FLAGS.num_samples, batch_size, draw_batch, progress.update
    )

  images = store.load(output, FLAGS.num_samples)
  store.write_npz(output, images)
  grid_path = output / 'grid.png'
  pictures.save(grid_path, pictures.grid(images[: FLAGS.grid_images]))
  if FLAGS.png:
    (output / 'png').mkdir(exist_ok=True)
    for i, image in enumerate(images):
      pictures.save(output / 'png' / f'{i:06d}.png', image)
  if FLAGS.trajectory:
    _draw_trajectory(drawer, params, mesh, times, output)
  cli.report(
    {
      'output': str(output), 'num_samples': FLAGS.num_samples, 'step': at,
      'drawn': missing, 'grid': times,
    },
    f'{FLAGS.num_samples} images of step {at}, {missing} of them drawn now '
    f'({len(times) - 1} network evaluations each); the grid is {grid_path}',
    FLAGS.json,
  )  # fmt: skip


def _draw_trajectory(drawer, params, mesh, times, output):
  """The first samples, at some of the times between noise and image."""
  frames = np.linspace(0, len(times) - 1, TRAJECTORY_FRAMES).astype(int)
  frames = tuple(dict.fromkeys(frames.tolist()))
  _, kept = drawer(frames)(
    params, sharding.padded_indices(FLAGS.trajectory, mesh)
  )
  pictures.save(
    output / 'trajectory.png',
    pictures.trajectory(
      sharding.to_host(kept)[:, : FLAGS.trajectory],
      [times[frame] for frame in frames],
    ),
  )


def _check_flags():
  """Raises UserError for numbers out of range."""
  for name, least in (
    ('num_samples', 1), ('batch_size', 1), ('grid_images', 1),
    ('trajectory', 0), ('seed', 0),
  ):  # fmt: skip
    if FLAGS[name].value < least:
      raise UserError(f'--{name}={FLAGS[name].value}: at least {least}')
  if FLAGS.seed >= 2**32:
    raise UserError(f'--seed={FLAGS.seed}: below 2**32')
  if FLAGS.num_samples > 10**9:
    raise UserError(f'--num_samples={FLAGS.num_samples}: at most 10**9')
  if FLAGS.trajectory > min(FLAGS.num_samples, FLAGS.batch_size):
    raise UserError(
      f'--trajectory={FLAGS.trajectory}: at most --num_samples='
      f'{FLAGS.num_samples} and --batch_size={FLAGS.batch_size}'
    )
  if FLAGS.output == '':
    raise UserError('--output is empty: give a folder, or leave the flag out')


def _name(at, steps):
  options = [
    f'{name}{FLAGS[name].value}'
    for name in ('eta', 'variance')
    if FLAGS[name].value is not None
  ]
  grid_name = [FLAGS.grid] if FLAGS.grid != 'uniform' else []
  parts = [f'step{at}', f'{FLAGS.sampler}{steps}', *options, *grid_name]
  parts += [f'seed{FLAGS.seed}']
  parts += ['raw'] * (not FLAGS.ema) + ['noclip'] * (not FLAGS.clip)
  name = '_'.join(parts).replace(',', '-')
  if len(name) > 100:  # a long literal grid
    name = f'{name[:80]}_{hashlib.sha256(name.encode()).hexdigest()[:12]}'
  return name


def _protocol(config, at, times, params) -> dict:
  """All that the images depend on."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    digest.update(np.ascontiguousarray(sharding.to_host(leaf)).tobytes())
  return {
    'step': at,
    'ema': FLAGS.ema,
    'weights_sha256': digest.hexdigest(),
    'model': config['model'],
    'process': config['process'],
    'loss': config['loss'],
    'image_shape': runs.image_shape(config['data']),
    'sampler': FLAGS.sampler,
    **samplers.options(FLAGS.sampler, eta=FLAGS.eta, variance=FLAGS.variance),
    'clip': FLAGS.clip,
    'seed': FLAGS.seed,
    'grid': times,
  }


if __name__ == '__main__':
  cli.run(main, __doc__, required=('workdir',))
