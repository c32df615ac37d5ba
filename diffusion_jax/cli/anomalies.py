"""`edit anomaly`: its flags, and what it does."""

from absl import flags

from diffusion_jax import runs
from diffusion_jax.cli import (
  anomaly_sets,
  command,
  declare,
  low_rank,
  run_data,
)
from diffusion_jax.evaluation import anomalies, anomaly_scores, cards
from diffusion_jax.evaluation.batches import Batches
from diffusion_jax.reporting import anomalies as writing
from diffusion_jax.samplers import plan as plans
from diffusion_jax.system import compilation, distributed, files, terminal
from diffusion_jax.system.errors import UserError

DOC = r"""Finds images that do not belong: scores how unlike the data they are.

  python -m diffusion_jax.edit anomaly --workdir=runs/digits \
    --input=pictures --reference=heldout --output=found
  python -m diffusion_jax.edit anomaly --workdir=runs/parts \
    --input=parts/test --normal=good --reference=parts/validation \
    --output=found

An image is scored by reconstruction: it is noised to several times, denoised
again by a few steps of DDIM, and compared (arXiv 2211.07740); and by the terms
of the variational bound at several times. Errors are standardised on reference
images, which are normal and, best, not those of training. Each reference image
is standardised by all others; the threshold is a rank of their scores, for a
given rate of false alarms. The noise of an image depends on its pixels and the
seed, so its scores do not depend on the other images.

Writes to the output folder scores.csv, a line an image; heat_maps, a PNG an
image, the standardised error per pixel; anomalies.png, the most and the least
anomalous images beside their maps; and, last of all, anomalies.json: protocol
and results. With --inliers or --normal also the area under the ROC curve.
Finished batches are kept in WORKDIR/anomalies, which may be deleted, and an
interrupted call resumes.
"""

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(distributed)
flags.adopt_module_key_flags(low_rank)
flags.adopt_module_key_flags(run_data)
PLACE = (
  'a folder of images, an image, a .npz or .npy of them, a sample store, '
  'tfds:NAME@SPLIT, digits, or heldout or train, those of the run'
)
declare.shared('accept_data', 'workdir', 'step', 'ema', 'ema_profile', 'json')
declare.table(
  input=(str, f'The images to score: {PLACE}.'),
  reference=(str, 'Normal images to standardise on, given like --input.'),
  inliers=(
    str,
    'Other normal images, given like --input: the AUROC is that of --input '
    'against them. Or reference: the reference images, each by all others.',
  ),
  normal=(
    [],
    'Classes of --input that are normal, with commas between, as scores.csv '
    'names them: the AUROC is that of all others against them.',
  ),
  output=(str, 'Output folder.'),
  score=(anomalies.SCORES, 'The score that decides.'),
  false_alarms=(
    0.05,
    'The share of normal images that may be above the threshold.',
  ),
  bound_times=(
    [],
    "Times of the bound's terms, with commas between; by default nine, the "
    'tenths of the schedule.',
  ),
  start_times=([], 'Times that images are noised to; by default the same.'),
  num_steps=(10, 'Steps of a reconstruction.'),
  bound_draws=(
    10,
    "Noises that each of the bound's terms is the mean over: with as many as "
    'a reconstruction has steps, both scores cost the same.',
  ),
  start_draws=(1, 'Noises that the error of a reconstruction is the mean of.'),
  clip=(bool, "Clip x0 to [-1, 1] in every step; by default the config's."),
  num_reference=(1000, 'At most so many reference images, evenly spaced.'),
  resize=(
    False,
    'Crop image files of other sizes to the centre, and resize them '
    "(Pillow's bicubic). By default they are refused.",
  ),
  batch_size=(256, 'Images per batch, over all devices.'),
  seed=(0, 'Seed of the noise.'),
  shown=(8, 'Rows of anomalies.png.'),
  heat_max=(
    float,
    'The standardised error that is the brightest colour of the heat maps; by '
    'default what one in a hundred pixels exceeds, and at least 3.',
  ),
)


def task(name: str):
  """What `edit` runs: (main, the text of --help, flags that must be given)."""
  del name
  return main, DOC, ('workdir', 'input', 'reference', 'output')


def main():
  distributed.initialize()
  config, how, output = _checked()
  compilation.keep()
  asked = ['input', 'reference']
  if FLAGS.inliers and FLAGS.inliers != anomaly_sets.REFERENCE:
    asked.append('inliers')
  sets = {flag: anomaly_sets.open_set(flag, config) for flag in asked}
  is_normal = anomaly_sets.is_normal(sets['input'])
  anomaly_sets.check_counts(sets, is_normal)
  notes = anomaly_sets.notes(sets)
  trained = low_rank.applied(declare.of_run(declare.network))
  found = _measured(trained, how, sets)
  scored, limit = anomaly_scores.judge(found, FLAGS.score, FLAGS.false_alarms)
  results, details = _results(scored, limit, how, is_normal)
  heat_max = FLAGS.heat_max or writing.usual_top(found['input'].maps)
  card = cards.create(
    cards.subject_of(trained), _protocol(sets, how), results,
    {
      **{flag: one.images.description for flag, one in sets.items()},
      'heat_max': heat_max, 'notes': notes,
      'levels': anomaly_scores.levels(found['reference']), **details,
    },
  )  # fmt: skip
  names = {flag: one.names for flag, one in sets.items()}
  classes = {flag: one.classes for flag, one in sets.items()}
  lines = writing.lines(how, scored, names, classes)
  distributed.on_first(
    lambda: writing.write(
      output, card, lines, sets['input'].images, names['input'],
      scored['input'].score(FLAGS.score), found['input'].maps, FLAGS.shown,
    )
  )  # fmt: skip
  terminal.report(
    {**card, 'output': str(output)},
    f'{writing.text(card)}\n\nin {output}',
    FLAGS.json,
  )


def _checked() -> tuple[dict, anomalies.How, files.Path]:
  """(config, settings, output) after all that needs no images is checked."""
  ones = ('num_steps', 'bound_draws', 'start_draws', 'batch_size', 'shown')
  command.at_least(num_reference=3, heat_max=1e-3, **dict.fromkeys(ones, 1))
  command.seeds('seed')
  rate = FLAGS.false_alarms
  if not 0 < rate < 1:
    raise UserError(
      f'--false_alarms={rate:g}: the share of normal images, above 0 and below '
      '1, such as 0.05'
    )
  if FLAGS.inliers and FLAGS.normal:
    raise UserError(
      '--inliers and --normal both say what is normal: give one of them'
    )
  workdir = declare.workdir()
  config = runs.read_config(workdir)
  plan = plans.for_run(config, sampler='ddim', clip=FLAGS.clip, seed=FLAGS.seed)
  steps = config['process']['num_timesteps']
  usual = anomalies.default_times(steps)
  bound, start = (
    anomalies.check_times(flag, FLAGS[flag].value or usual, least, steps)
    for flag, least in (('bound_times', 0), ('start_times', 1))
  )
  variance = config['sample'].get('variance') or 'fixedlarge'
  how = anomalies.How(
    plan.seed, bound, start, FLAGS.num_steps, variance, plan.clip,
    FLAGS.bound_draws, FLAGS.start_draws,
  )  # fmt: skip
  low_rank.asked()
  runs.usable_folder('workdir', workdir / 'anomalies')
  return config, how, _output(workdir)


def _output(workdir) -> files.Path:
  """The output folder, which is new or holds results of this task alone."""
  output = files.at(FLAGS.output).expanduser()
  runs.usable_output(output, 'anomalies', workdir)
  if files.resolved(output) == files.resolved(workdir / 'anomalies'):
    raise UserError(
      f'--output={FLAGS.output} holds what is kept of all calls: choose a '
      'folder in it'
    )
  others = files.entries(output) - writing.FILES if output.exists() else set()
  if others:
    raise UserError(
      f'--output={FLAGS.output} holds other files, such as {min(others)}: '
      'choose a new folder'
    )
  return output


def _measured(trained, how, sets) -> dict[str, anomalies.Found]:
  """Flag -> the errors of its images; those of the input with maps."""
  found, levels = {}, None
  total = sum(one.images.count for one in sets.values()) * how.evaluations
  folder = trained.workdir / 'anomalies'
  with terminal.Progress(
    'scoring', total, unit='evaluations',
    kept=lambda _: f'finished batches are kept in {folder}',
  ) as progress:  # fmt: skip
    for flag in ('reference', 'inliers', 'input'):
      if flag not in sets:
        continue
      one, maps = sets[flag], levels if flag == 'input' else None
      place = anomalies.place_of(folder, how, trained, one.sha256, maps)
      batches = Batches(
        trained, one.images, place, FLAGS.batch_size, progress.update
      )
      found[flag] = anomalies.measure(batches, how, one.numbers, maps)
      if flag == 'reference':
        levels = anomalies.levels_of_pixels(found[flag])
  return found


def _protocol(sets, how) -> dict:
  """What the scores depend on besides the network."""
  return {
    **how._asdict(),
    'sampler': 'ddim',
    'evaluations': how.evaluations,
    'score': FLAGS.score,
    'rate': FLAGS.false_alarms,
    'reference': 'each by all others',
    'inliers': FLAGS.inliers or '',
    'normal': FLAGS.normal,
    'resize': FLAGS.resize,
    **{
      f'{flag}_{name}': value
      for flag, one in sets.items()
      for name, value in (
        ('num_images', one.images.count), ('sha256', one.sha256),
      )
    },
  }  # fmt: skip


def _results(scored, limit, how, is_normal) -> tuple[dict, dict]:
  """(results, details) of the card."""
  above = scored['input'].above
  results = {'threshold': limit, 'above': int(above.sum())}
  details = {}
  group = anomaly_scores.Group
  pair = None
  if FLAGS.inliers:
    pair = (
      group(scored.get('inliers', scored['reference'])),
      group(scored['input']),
    )
  elif is_normal is not None:
    pair = [group(scored['input'], x) for x in (is_normal, ~is_normal)]
  if pair:
    more, details = anomaly_scores.compare(*pair, how)
    results |= more
  return results, details
