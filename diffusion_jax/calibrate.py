r"""Finds out how far a network errs at each time, once for a checkpoint.

  python -m diffusion_jax.calibrate --workdir=runs/digits

One pass over training images, each at all times of the schedule. What comes out
lies in WORKDIR/calibration, beside the checkpoints. It is what the samplers
analytic_ddpm and analytic_ddim add noise by, and what --grid=optimal is chosen
by. What was interrupted goes on.
"""

import json

from absl import flags

from diffusion_jax import runs
from diffusion_jax.cli import command, declare, run_data
from diffusion_jax.evaluation import calibration as passes
from diffusion_jax.evaluation import features
from diffusion_jax.runs import calibration
from diffusion_jax.runs.trained import load
from diffusion_jax.system import distributed, files, terminal
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(distributed)
flags.adopt_module_key_flags(run_data)
declare.shared('workdir', 'step', 'ema', 'json')
declare.table(
  num_images=(256, 'Training images, at even distances; all, if fewer.'),
  batch_size=(256, 'Images at once.'),
  seed=(0, 'Of the noise.'),
)

SHOWN = 10  # rows of the table


def main():
  distributed.initialize()
  command.at_least(num_images=1, batch_size=1)
  command.seeds('seed')
  workdir = declare.workdir()
  config = runs.read_config(workdir)
  folder = workdir / 'calibration'
  runs.usable_folder('workdir', folder)
  images = run_data.images(config, 'train', FLAGS.num_images)
  trained = load(workdir, FLAGS.step, FLAGS.ema)
  place = calibration.path(workdir, trained.step, trained.ema)
  about = {
    'images': images.description,
    'num_images': images.count,
    'images_sha256': features.sha256_of(images),
    'seed': FLAGS.seed,
  }
  found = _kept(place, about, trained)
  if found is None:
    found = _pass(trained, images, about, place)
  last = trained.schedule.num_timesteps - 1
  rows = [
    [str(t), f'{found.mse[t]:.4g}', f'{found.clipped_mse[t]:.4g}']
    for t in sorted({round(i * last / SHOWN) for i in range(SHOWN + 1)})
  ]
  terminal.report(
    {**about, 'step': trained.step, 'path': str(place)},
    '\n'.join([
      f'{images.count} images of step {trained.step}: {images.description}',
      '', *terminal.table(['t', 'squared error of x0', 'clipped'], rows),
      '', f'kept in {place}',
    ]),
    FLAGS.json,
  )  # fmt: skip


def _kept(place, about, trained):
  """What an earlier pass has found of the same; None where there is none."""

  def read():
    try:
      found = calibration.read(
        trained.workdir, trained.step, trained.ema,
        trained.schedule.num_timesteps,
      )  # fmt: skip
    except UserError:
      return None  # it is not there, or damaged
    told = json.loads(place.read_text())
    same = all(told.get(name) == value for name, value in about.items())
    return found if same else None

  found = distributed.on_first(read)
  if found is None or found[-1] != trained.weights_sha256:
    return None
  return calibration.Calibration(*found)


def _pass(trained, images, about, place):
  """Finds it and keeps it."""
  parts = '_'.join([
    place.stem, trained.weights_sha256[:8], about['images_sha256'][:8],
    f'seed{FLAGS.seed}',
  ])  # fmt: skip
  parts = place.parent / parts
  work = images.count * trained.schedule.num_timesteps
  with terminal.Progress('calibrating', work, unit='evaluations') as progress:
    found = passes.measure(
      trained, images, FLAGS.seed, parts, FLAGS.batch_size, progress.update
    )

  def keep():
    calibration.write(place, found, about)
    files.remove(parts)

  distributed.on_first(keep)
  return found


if __name__ == '__main__':
  command.run(main, __doc__, required=['workdir'])
