r"""Measures a network's error at each time, once per checkpoint.

  python -m diffusion_jax.calibrate --workdir=runs/digits

Makes one pass over training images, each at all times of the schedule, and
writes the mean squared errors to WORKDIR/calibration. The samplers
analytic_ddpm and analytic_ddim compute their variances from them, and
--grid=optimal its times. An interrupted pass resumes.
"""

import json

from absl import flags

from diffusion_jax import runs
from diffusion_jax.cli import command, declare, run_data
from diffusion_jax.evaluation import calibration as passes
from diffusion_jax.evaluation import features
from diffusion_jax.evaluation.batches import Batches
from diffusion_jax.runs import calibration
from diffusion_jax.system import compilation, distributed, files, terminal
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(distributed)
flags.adopt_module_key_flags(run_data)
declare.shared('accept_data', 'workdir', 'step', 'ema', 'ema_profile', 'json')
declare.table(
  num_images=(
    256,
    'Number of training images, evenly spaced in the set; all if it has fewer.',
  ),
  batch_size=(256, 'Images per batch, over all devices.'),
  seed=(0, 'Seed of the noise.'),
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
  compilation.keep()
  images = run_data.images(config, 'train', FLAGS.num_images)
  trained = declare.network(FLAGS.step)
  place = calibration.path(workdir, trained.step, trained.weights)
  about = {
    'images': images.description,
    **features.facts_of(images),
    **run_data.of_conditions(config),
    'seed': FLAGS.seed,
  }
  found = _kept(place, about, trained) or _pass(trained, images, about, place)
  last = trained.schedule.num_timesteps - 1
  rows = [
    [str(t), f'{found.mse[t]:.4g}', f'{found.clipped_mse[t]:.4g}']
    for t in sorted({round(i * last / SHOWN) for i in range(SHOWN + 1)})
  ]
  terminal.report(
    {**about, 'step': trained.step, 'path': str(place)},
    '\n'.join([
      f'step {trained.step}, {images.count} images: {images.description}',
      '', *terminal.table(['t', 'squared error of x0', 'clipped'], rows),
      '', f'saved in {place}',
    ]),
    FLAGS.json,
  )  # fmt: skip


def _kept(place, about, trained):
  """The result of an earlier pass with the same settings, or None."""

  def read():
    try:
      found = calibration.read(
        trained.workdir, trained.step, trained.weights,
        trained.schedule.num_timesteps,
      )  # fmt: skip
    except UserError:
      return None  # missing or damaged
    told = json.loads(place.read_text())
    same = all(told.get(name) == value for name, value in about.items())
    return found if same else None

  found = distributed.on_first(read)
  if found is None or found[-1] != trained.weights_sha256:
    return None
  return calibration.Calibration(*found)


def _pass(trained, images, about, place):
  """Measures the errors and saves them."""
  hashes = [x[:8] for name, x in about.items() if name.endswith('_sha256')]
  parts = place.parent / '_'.join([
    place.stem, trained.weights_sha256[:8], *hashes, f'seed{FLAGS.seed}',
  ])  # fmt: skip
  work = images.count * trained.schedule.num_timesteps
  with terminal.Progress(
    *('calibrating', work),
    unit='evaluations',
    kept=lambda _: f'finished batches are kept in {parts}',
  ) as progress:
    found = passes.measure(
      Batches(trained, images, parts, FLAGS.batch_size, progress.update),
      FLAGS.seed,
    )

  def keep():
    calibration.write(place, found, about)
    files.remove(parts)

  distributed.on_first(keep)
  return found


if __name__ == '__main__':
  command.run(main, __doc__, required=['workdir'])
