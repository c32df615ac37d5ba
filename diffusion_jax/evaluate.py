r"""Judges samples of a trained run against its data.

  python -m diffusion_jax.evaluate --workdir=runs/digits --num_samples=2000 \
    --sampler=ddim --num_steps=50
  python -m diffusion_jax.evaluate --workdir=runs/cifar10 --num_samples=50000 \
    --features=inception --metrics=fid,is --download
  python -m diffusion_jax.evaluate --compare=runs/a,runs/b

Draws what the sample store lacks, as the sampling binary does, and compares the
samples to all training images: the Frechet distance, beside that of held-out
images (the floor), and the nearest training images, beside the held-out images'
(has it copied? Then far more samples than held-out images are near to one).
Labelled data also get the classes of the samples, by a classifier that is
trained once. Leaves a metric card and a picture of the neighbours in
WORKDIR/evaluations, and WORKDIR/report.html.

--metrics=bpd, bpd_fast or bpd_ode measures bits per dimension of the held-out
images in place of all this; it draws nothing.

With --features=inception the distance is the FID; the features of images are
kept (--cache), so that what was interrupted goes on. With --follow each new
checkpoint is judged while training goes on, and the best is kept. Two sets of
images without a run: python -m diffusion_jax.fid.

Without --sampler: DDPM's own, 1000 ancestral steps, which takes its time.
"""

import numpy as np
from absl import flags

from diffusion_jax import runs, samplers
from diffusion_jax.cli import command, drawing, judging, likelihoods
from diffusion_jax.evaluation import (
  bits,
  cards,
  features,
  follow,
  summary,
  sweep,
)
from diffusion_jax.evaluation.features import Images
from diffusion_jax.reporting import page
from diffusion_jax.runs import store
from diffusion_jax.samplers import plan as plans
from diffusion_jax.system import distributed, files, terminal
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(drawing)
flags.adopt_module_key_flags(judging)
flags.adopt_module_key_flags(likelihoods)
flags.DEFINE_integer('num_samples', 1000, 'How many samples are judged.')
flags.DEFINE_enum(
  'rounding', 'float', ['float', 'round', 'truncate'],
  'Of samples before they are judged: none, as in DDPM, or to 8 bits.',
)  # fmt: skip
flags.DEFINE_bool(
  'follow', False,
  'Judge each checkpoint of the run as it comes, until training has ended.',
)  # fmt: skip
flags.DEFINE_float('poll_secs', 30.0, '--follow: between looks for a new one.')
flags.DEFINE_bool(
  'keep_samples', False, '--follow, --sweep: keep samples that are judged.'
)
flags.DEFINE_list(
  'sweep', [],
  'Judge samplers at equal numbers of evaluations, a table and a plot: names, '
  'with options after colons: ddim,ddim:eta=1,unipc:order=2:grid=logsnr.',
)  # fmt: skip
flags.DEFINE_list(
  'sweep_evaluations', ['10', '20', '50'],
  '--sweep: evaluations of the network for a sample.',
)  # fmt: skip
flags.DEFINE_list(
  'compare', [],
  'Prints metric cards of one protocol in a table and ends: files or runs, '
  'with commas between them.',
)  # fmt: skip


# Of a protocol, before its table.
HEAD = (
  *('data', 'split', 'num_reference', 'num_samples', 'features'),
  *('bits', 'num_images', 'variance', 'dequantisation', 'seed'),
)
JUDGED = 64  # images at once: a judge's maps may be larger than the images


def main():
  if drawing.listed():
    return
  distributed.initialize()
  if FLAGS.compare:
    _compare()
    return
  if FLAGS.download:
    judging.download()
    if not FLAGS.workdir:
      return
  if not FLAGS.workdir:
    raise UserError('--workdir is missing; see --help')
  drawing.check_flags(num_samples=2, poll_secs=0.1)
  if FLAGS['sweep'].present or FLAGS['sweep_evaluations'].present:
    _check_sweep()
  kinds = [name for name in FLAGS.metrics if name in bits.KINDS]
  if kinds:
    if kinds != FLAGS.metrics or FLAGS.follow:
      raise UserError(
        f'--metrics={",".join(FLAGS.metrics)}: likelihoods are measured by '
        f'themselves; ask for {",".join(kinds)} alone, without --follow'
      )
    likelihoods.check_flags(kinds)
    likelihoods.carry_out(kinds)
    return
  likelihoods.check_absent()
  judging.check_flags()
  if FLAGS.follow:
    _follow()
  elif FLAGS.sweep:
    _sweep()
  else:
    _once()


def _once():
  trained, plan, output = drawing.chosen(_dtype())
  workdir = _usable_workdir()
  task = _task(workdir, trained)
  drawn = drawing.fill(trained, plan, output, FLAGS.num_samples, _dtype())
  path = _card_path(task, workdir, trained.step, plan)
  card = _judge(task, path, trained, plan, output)
  report = workdir / 'report.html'
  terminal.report(
    {**card, 'path': str(path), 'report': str(report), 'drawn': drawn},
    f'{summary.text(card)}\n\ncard: {path}\nreport: {report}',
    FLAGS.json,
  )
  distributed.on_first(lambda: page.write(workdir, terminal.say) and None)


def _follow():
  workdir = _usable_workdir()
  for flag in ('step', 'output'):
    if FLAGS[flag].value is not None:
      raise UserError(f'--follow judges all checkpoints: leave out --{flag}')
  _check_distance('--follow', 'the best checkpoint')
  if plans.is_calibrated(FLAGS.sampler, FLAGS.grid):
    raise UserError(
      f'--follow with --sampler={FLAGS.sampler} --grid={FLAGS.grid}: each '
      'checkpoint would have to be calibrated first; use another'
    )
  samplers.options(FLAGS.sampler, **drawing.asked().options)
  follow.wait_for_first(workdir, FLAGS.poll_secs)
  trained, plan, _ = drawing.chosen(_dtype())
  task = _task(workdir, trained)

  def path_of(step):
    return _card_path(task, workdir, step, plan)

  def output_of(step):
    name = drawing.name(step, plan, _dtype())
    return workdir / 'samples' / f'followed_{name}'

  def judge(now):
    output = output_of(now.step)
    drawing.fill(now, plan, output, FLAGS.num_samples, _dtype())
    card = _judge(task, path_of(now.step), now, plan, output)
    distributed.on_first(lambda: page.write(workdir, terminal.say) and None)
    clean([now.step])
    return card

  def clean(steps):
    if not FLAGS.keep_samples:
      distributed.on_first(lambda: [files.remove(output_of(s)) for s in steps])

  result = next(iter(task.judge.taps.values()))
  # A kill may have come between a card and the end of its samples.
  judged = follow.curve_of(workdir, path_of, result)['points']
  clean([point['step'] for point in judged])
  curve = follow.follow(
    workdir, trained.at, judge, path_of, result=result,
    poll_secs=FLAGS.poll_secs,
  )  # fmt: skip
  terminal.report(curve, follow.text(curve), FLAGS.json)


def _check_distance(flag, best):
  if FLAGS.metrics and not {'fid', 'sfid'} & set(FLAGS.metrics):
    raise UserError(
      f'--metrics={",".join(FLAGS.metrics)}: {flag} takes fid too, as {best} '
      'is that of the least distance'
    )


def _check_sweep():
  if not FLAGS.sweep:
    raise UserError(
      '--sweep is empty: give samplers with commas between them, such as '
      '--sweep=ddim,unipc'
    )
  idle = ('sampler', 'num_steps', 'grid', 'clip', 'output', 'follow')
  for flag in (*idle, *drawing.OPTIONS):
    if FLAGS[flag].present:
      raise UserError(
        f'--{flag} has no part in --sweep, of which each sampler has its own '
        'options after colons: leave it out'
      )
  _check_distance('--sweep', 'the best sampler')


def _sweep():
  workdir = _usable_workdir()
  entries = [sweep.parse(text) for text in dict.fromkeys(FLAGS.sweep)]
  budgets = sweep.budgets(FLAGS.sweep_evaluations)
  step, plan_of, network = drawing.prepared()
  timesteps = runs.read_config(workdir)['process']['num_timesteps']
  planned = [
    (entry, budget, *_longest(entry, budget, plan_of, timesteps))
    for entry in entries
    for budget in budgets
  ]
  trained = network()
  task = _task(workdir, trained)
  result = next(iter(task.judge.taps.values()))
  cells = []
  for i, (entry, budget, asked, plan) in enumerate(planned):
    terminal.say(f'{i + 1} of {len(planned)}: {entry.text}, {plan.cost()}')
    path = _card_path(task, workdir, step, plan, asked)
    card = _judged(task, path, trained, plan, asked)
    cells.append({
      'sampler': entry.text, 'budget': budget, 'num_steps': plan.num_steps,
      'evaluations': plan.evaluations, 'value': card['results'][result],
      'card': path.name,
    })  # fmt: skip
  subject = {
    'workdir': str(workdir), 'step': step, 'ema': trained.ema,
    'weights_sha256': trained.weights_sha256, 'seed': FLAGS.seed,
  }  # fmt: skip
  told = {
    'result': result, 'subject': subject, 'protocol': task.protocol,
    'cells': cells, 'best': sweep.best(cells),
  }  # fmt: skip
  of = [FLAGS.sweep, budgets, FLAGS.seed, trained.weights_sha256]
  name = cards.name(
    f'step{step}', f'{result}_{FLAGS.num_samples}',
    {'sweep': of, **task.protocol},
  )  # fmt: skip
  path = workdir / 'evaluations' / 'sweeps' / f'{name}.json'
  plot = path.with_suffix('.png')
  distributed.on_first(lambda: sweep.write(path, told))
  distributed.on_first(lambda: page.write(workdir, terminal.say) and None)
  reference = task.source.description if task.source else FLAGS.reference
  terminal.report(
    {**told, 'path': str(path), 'plot': str(plot)},
    f'{FLAGS.num_samples} samples of step {step} for each number, against '
    f'{reference}\n{sweep.text(told)}\n\nplot: {plot}',
    FLAGS.json,
  )


def _longest(entry, budget, plan_of, timesteps):
  """What is asked for in a cell of a sweep, and its plan."""
  asked = drawing.Asked(
    entry.sampler, None, entry.grid, entry.clip, entry.options
  )

  def of(steps):
    return plan_of(asked._replace(num_steps=steps))

  try:
    return asked, sweep.longest(of, budget, timesteps)
  except UserError as e:
    told = f'--sweep={entry.text} of {budget} evaluations: {e}'
    raise UserError(told) from e


def _judged(task, path, trained, plan, asked) -> dict:
  """The card of a cell of a sweep, drawn and judged unless it is there."""
  card = distributed.on_first(lambda: _known(path, task, trained, plan))
  name = drawing.name(trained.step, plan, _dtype(), asked)
  output = trained.workdir / 'samples' / f'swept_{name}'
  if card is None:
    drawing.fill(trained, plan, output, FLAGS.num_samples, _dtype())
    card = _judge(task, path, trained, plan, output)
  # A kill may have come between a card and the end of its samples.
  if not FLAGS.keep_samples:
    distributed.on_first(lambda: files.remove(output))
  return card


def _known(path, task, trained, plan) -> dict | None:
  """The card, where it is there, is whole, and of the same."""

  def key(card):
    subject = {k: v for k, v in card['subject'].items() if k != 'workdir'}
    return subject, card['protocol']

  try:
    card = cards.read(path)
  except UserError:
    return None
  same = cards.create(_subject(trained, plan), task.protocol, {}, {})
  return card if key(card) == key(same) else None


def _usable_workdir():
  workdir = files.at(FLAGS.workdir).expanduser()
  runs.usable_folder('workdir', workdir)
  runs.usable_folder('workdir', workdir / 'evaluations')
  return workdir


def _dtype() -> str:
  """Of the samples on disk."""
  return 'uint8' if FLAGS.rounding == 'round' else 'float32'


def _task(workdir, trained) -> judging.Task:
  """What samples of any step are judged by: checked before any is drawn."""
  config, shape = trained.config['data'], trained.image_shape
  heldout = None
  if FLAGS.reference:
    source = judging.open_set('reference', shape[0], shape[2])
    about = {'data': 'images' if source else 'statistics'}
  else:
    source, heldout = judging.splits_of(trained.config)
    about = {
      'data': config['name'],
      'split': config['train_split'],
      'heldout_split': config['heldout_split'] if heldout else '',
    }
  samples = Images(
    FLAGS.num_samples, None, f'--num_samples={FLAGS.num_samples}'
  )
  judge = judging.judge_of(source, heldout, shape, workdir / 'evaluations')
  reference = judging.set_of('reference', source, judge, shape)
  # Of sorted held-out images the first ones would be all of a kind.
  held = heldout and features.images_of(
    heldout, min(FLAGS.num_samples, len(heldout))
  )
  usual = ['fid']
  if not FLAGS.sweep:  # whose reference is statistics after the first
    usual += ['copies'] * bool(source)
    usual += ['classes'] * ('num_classes' in judge.protocol)
  about |= {'rounding': FLAGS.rounding}
  return judging.task(
    judge, samples, reference, source, held, about=about, usual=usual
  )


def _card_path(task, workdir, step, plan, how=None):
  what = f'{task.protocol["features"]}_{task.protocol["num_samples"]}'
  name = cards.name(drawing.name(step, plan, how=how), what, task.protocol)
  return workdir / 'evaluations' / f'{name}.json'


def _subject(trained, plan, output=None) -> dict:
  return {
    'workdir': str(files.at(FLAGS.workdir).expanduser()),
    'step': trained.step,
    'ema': trained.ema,
    'weights_sha256': trained.weights_sha256,
    **plan.protocol(),
    **_cost(plan, output),
  }


def _judge(task, path, trained, plan, output) -> dict:
  """The card of samples that are drawn, which is written."""

  def stream():
    for images in store.stream(output, 0, FLAGS.num_samples, features.BLOCK):
      # None is below 0, so this cuts off what is behind the point.
      yield images.astype(np.uint8) if FLAGS.rounding == 'truncate' else images

  samples = Images(FLAGS.num_samples, stream, f'samples in {output}')
  measured = judging.carry_out(
    task, samples, min(FLAGS.batch_size, JUDGED), trained.mesh, output
  )
  subject = _subject(trained, plan, output)
  card = cards.create(
    subject, task.protocol, measured.results, measured.details
  )

  def shown(i):
    (images,) = store.stream(output, i, i + 1, 1)
    return features.whole(images[0])

  def keep():
    if FLAGS.neighbours and measured.nearest:
      judging.draw_neighbours(
        path.with_name(f'{path.stem}_neighbours.png'),
        measured, shown, task.source,
      )  # fmt: skip
    cards.write(path, card)

  distributed.on_first(keep)
  return card


def _cost(plan, output) -> dict:
  """What a sample took; on average, where the sampler chooses its steps."""
  if not plan.adaptive:
    return {'evaluations': plan.evaluations}
  took = drawing.took(output, FLAGS.num_samples)
  return {
    'evaluations': round(float(took.evaluations.mean()), 2),
    'unfinished': int((~took.finished).sum()),
  }


def _compare():
  groups = cards.compare(FLAGS.compare)
  tables = []
  for group in groups:
    protocol = group[0]['protocol']
    head = ', '.join(
      f'{name} {protocol[name]}' for name in HEAD if name in protocol
    )
    tables.append('\n'.join([head, '', *terminal.table(*cards.table(group))]))
  terminal.report({'tables': groups}, '\n\n'.join(tables), FLAGS.json)


if __name__ == '__main__':
  command.run(main, __doc__)
