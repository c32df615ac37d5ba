r"""Inverts images of a run into noise, and draws them again from that noise.

  python -m diffusion_jax.invert --workdir=runs/digits --num_images=8 \
    --num_steps=100 --iterations=3 --interpolate=7

Takes evenly spaced held-out images of the run, carries them up a grid of times
by inverted DDIM and down the same grid by DDIM, and reports the error of each
image. Writes inversion.json, noises.npy (float32, the noise of each image),
inversion.png, and with --interpolate interpolation.png, which interpolates
between the noises of images 0 and 1, 2 and 3, and so on.

Unlike in sampling, x0 is not clipped: a step that clips maps many x to one and
cannot be inverted. --clip clips in both directions.
"""

import functools
import hashlib
import math

import numpy as np
from absl import flags

from diffusion_jax import conditioning, runs
from diffusion_jax.cli import command, declare, low_rank, run_data
from diffusion_jax.codecs import pixels
from diffusion_jax.evaluation import cards, features
from diffusion_jax.reporting import pictures
from diffusion_jax.runs import (
  averaged,
  dataset,
  labels,
  trajectories,
  upscaled,
)
from diffusion_jax.samplers import grid as grids
from diffusion_jax.samplers import inversion
from diffusion_jax.samplers import plan as plans
from diffusion_jax.system import compilation, distributed, files, terminal
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(distributed)
flags.adopt_module_key_flags(low_rank)
flags.adopt_module_key_flags(run_data)
declare.shared('accept_data', 'workdir', 'step', 'ema', 'ema_profile', 'json')
declare.table(
  split=(('heldout', 'train'), 'Images of the run to invert.'),
  output=(str, 'Output folder; by default a new one in WORKDIR/inversions.'),
  num_images=(8, 'Number of images, evenly spaced in the set.'),
  batch_size=(64, 'Images per batch, over all devices.'),
  num_steps=(int, 'Steps in each direction; by default all of the schedule.'),
  grid=(
    'uniform',
    f'Times: {", ".join(grids.GRIDS)}, or a literal list such as 999,500,100.',
  ),
  iterations=(
    3,
    'Network evaluations per step of the inversion: 1 is usual, more are more '
    'exact.',
  ),
  interpolate=(
    0,
    'Number of images to interpolate between two neighbouring images.',
  ),
  clip=(False, 'Clip x0 to [-1, 1] in every step, in both directions.'),
  label=(
    str,
    'Conditional runs: the class to invert and draw all images as, a number or '
    'a name; several with commas between, for images in turn; or own, the '
    "class of each image. By default none, the run's unconditional model.",
  ),
)

OWN = 'own'  # of --label: the class of each image
MOST_SEEN = 100  # the largest factor that brightens the error picture


def main():
  distributed.initialize()
  command.at_least(num_images=1, batch_size=1, iterations=1, interpolate=0)
  if FLAGS.output == '':
    raise UserError('--output is empty: give a folder, or leave the flag out')
  if FLAGS.interpolate and FLAGS.num_images < 2:
    raise UserError(
      f'--interpolate={FLAGS.interpolate} needs two images: give '
      f'--num_images=2 or more, not {FLAGS.num_images}'
    )
  workdir = declare.workdir()
  config = runs.read_config(workdir)
  how = {name: FLAGS[name].value for name in ('num_steps', 'grid', 'clip')}
  upscaled.check_plain(config, 'inversion')
  plan = plans.for_run(config, sampler='ddim', **how)
  asked = _label(workdir, config)
  low_rank.asked()
  compilation.keep()

  def read(step):
    output = FLAGS.output or workdir / 'inversions' / _name(step, plan)
    output = files.at(output).expanduser()
    runs.usable_output(output, 'inversions')
    images = run_data.images(
      config, FLAGS.split, FLAGS.num_images, at_most=False
    )
    label = _labels(asked, images)
    trained = low_rank.applied(declare.network(step))
    return trained, plan, images, label, output

  _invert(*declare.of_run(read))


def _label(workdir, config) -> list[int] | str | None:
  """The labels that images get in turn, OWN, or None for the null label."""
  if FLAGS.label is None:
    remedy = f'--label, such as --label={OWN}'
    if dataset.has_captions(config['conditioning']):
      remedy = 'a run that was trained with conditioning.drop=0.1'
    labels.check_null(conditioning.create(**config['conditioning']), remedy)
    return None
  if FLAGS.label == OWN and dataset.num_classes(config['conditioning']):
    return OWN
  return labels.condition(workdir, config, FLAGS.label)['label']


def _labels(asked, images) -> np.ndarray | None:
  """The label of each image: int32 [N], or None."""
  if asked is None:
    return None
  found = images.labels
  if asked != OWN:
    found = np.resize(np.int32(asked), images.count)
  if FLAGS.interpolate and len(set(found.tolist())) > 1:
    raise UserError(
      f'--interpolate={FLAGS.interpolate} needs one label for all images: give '
      'one, such as --label=0'
    )
  return found


def _name(step, plan) -> str:
  """The folder name of an inversion with these flags."""
  grid = FLAGS.grid
  if grid not in grids.GRIDS:  # a literal list may be long
    grid = hashlib.sha256(str(plan.grid).encode()).hexdigest()[:12]
  parts = [f'step{step}', f'ddim{plan.num_steps}']
  parts += [grid] * (grid != 'uniform')
  parts += [f'iterations{FLAGS.iterations}', f'{FLAGS.split}{FLAGS.num_images}']
  if FLAGS.label is not None:
    parts += ['label' + FLAGS.label.replace(',', '-').replace(' ', '')]
  parts += low_rank.name()
  which = averaged.suffix(FLAGS.ema_profile or FLAGS.ema)
  return '_'.join(parts) + which + '_clip' * plan.clip


def _invert(trained, plan, images, label, output):
  """Inverts, draws again, writes the results and reports them."""
  shown = np.concatenate(list(images.stream()))
  x0 = trajectories.to_x0(trained, shown)
  one = label is not None and len(set(label.tolist())) == 1
  how = {'clip': plan.clip, 'batch_size': FLAGS.batch_size}
  how['label'] = int(label[0]) if one else label  # one for any number of images
  up, sampler = plan.grid[::-1], inversion.ddim_inversion(FLAGS.iterations)
  evaluations = sampler.evaluations(up)
  terminal.say(
    f'inverting {images.count} images in {evaluations} evaluations each, and '
    f'drawing them again in {plan.evaluations}'
  )
  noises = trajectories.carrier(trained, sampler, up, **how)(x0)
  draw_fn = trajectories.carrier(trained, plan.create(), plan.grid, **how)
  again = draw_fn(noises)
  if not np.isfinite(again).all():
    raise UserError("the network's output is not finite: was training healthy?")
  to_images = functools.partial(trajectories.to_images, trained)
  begun, ended = x0, again
  if trained.codec.levels is None:  # latents: how they differ once decoded
    begun, ended = (pixels.to_float(to_images(x)) for x in (x0, again))
  result = {
    **cards.subject_of(trained),
    'split': FLAGS.split,
    'num_images': images.count,
    'images_sha256': features.sha256_of(images),
    'iterations': FLAGS.iterations,
    'clip': plan.clip,
    **({} if label is None else {'label': label.tolist()}),
    'grid': plan.grid,
    'evaluations': {'inversion': evaluations, 'drawing': plan.evaluations},
    **_measured(begun, noises, ended),
  }
  seen = shown, to_images(noises), to_images(again)
  drawn = {'inversion.png': _picture(*seen, ended - begun)}
  if FLAGS.interpolate:
    drawn['interpolation.png'] = pictures.interpolation(
      lambda x: to_images(draw_fn(x)), noises, FLAGS.interpolate
    )

  def keep():
    files.make(output)
    for name, picture in drawn.items():
      pictures.save(output / name, picture)
    with files.replacing(output / 'noises.npy') as file:
      np.save(file, noises, allow_pickle=False)
    files.write_json(output / 'inversion.json', result)

  distributed.on_first(keep)
  terminal.report(
    {**result, 'output': str(output)},
    f'{_text(result, images)}\n\nin {output}',
    FLAGS.json,
  )


def _measured(x0, noises, again) -> dict:
  """Errors of the round trip, in units of [-1, 1] and of 255 levels.

  Also the root mean square of each noise, which is near 1 for Gaussian noise.
  """

  def rms(values):
    return np.sqrt(np.mean(np.square(values, dtype=np.float64), (1, 2, 3)))

  def errors(root, largest):
    return {
      'rms': float(root), 'max': float(largest),
      'rms_255': 127.5 * float(root), 'max_255': 127.5 * float(largest),
    }  # fmt: skip

  off = np.asarray(again, np.float64) - x0
  roots, most = rms(off), np.abs(off).max((1, 2, 3))
  return {
    'error': errors(np.sqrt(np.mean(roots**2)), most.max()),
    'images': [
      {**errors(*one), 'noise_rms': float(noise)}
      for *one, noise in zip(roots, most, rms(noises), strict=True)
    ],
  }


def _picture(shown, noises, again, error) -> np.ndarray:
  """One row per image: the image, its noise, the redrawn image, the error."""
  off = np.abs(error) * 127.5
  # Brightened by the largest power of 10 that clips no value.
  factor = 10 ** math.floor(math.log10(255 / max(off.max(), 1e-9)))
  factor = min(max(factor, 1), MOST_SEEN)
  seen = np.clip(np.round(off * factor), 0, 255).astype(np.uint8)
  return pictures.columns(
    np.stack([shown, noises, again, seen]),
    ['image', 'noise', 'again', f'error x{factor}'],
  )


def _text(result, images) -> str:
  """The result as a table for people."""

  def row(name, errors, noise):
    keys = ('rms', 'max', 'rms_255', 'max_255')
    return (name, *(f'{errors[key]:.3g}' for key in keys), noise)

  each = result['images']
  rows = [row(str(i), x, f'{x["noise_rms"]:.3f}') for i, x in enumerate(each)]
  noise = np.sqrt(np.mean([errors['noise_rms'] ** 2 for errors in each]))
  steps, count = len(result['grid']) - 1, result['iterations']
  rows.append(row('all', result['error'], f'{noise:.3f}'))
  heads = ['image', 'rms', 'max', 'rms of 255', 'max of 255', 'rms of noise']
  return '\n'.join([
    f'{len(each)} images of {images.description}',
    f'inverted with step {result["step"]} in {steps} steps of {count} '
    f'evaluation{"s" * (count > 1)}, and drawn again by DDIM in {steps}',
    '', *terminal.table(heads, rows),
  ])  # fmt: skip


if __name__ == '__main__':
  command.run(main, __doc__, required=('workdir',))
