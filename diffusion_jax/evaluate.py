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

import contextlib

import numpy as np
from absl import flags

from diffusion_jax import runs, samplers
from diffusion_jax.cli import (
  command,
  declare,
  drawing,
  judges,
  judging,
  likelihoods,
  run_data,
)
from diffusion_jax.evaluation import (
  bits,
  cards,
  features,
  follow,
  sweep,
  tables,
)
from diffusion_jax.reporting import page, plots
from diffusion_jax.runs import store
from diffusion_jax.samplers import plan as plans
from diffusion_jax.system import distributed, files, terminal
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(drawing)
flags.adopt_module_key_flags(judging)
flags.adopt_module_key_flags(likelihoods)
declare.table(
  num_samples=(1000, 'How many samples are judged.'),
  rounding=(
    ('float', 'round', 'truncate'),
    'Of samples before they are judged: none, as in DDPM, or to 8 bits.',
  ),
  follow=(
    False,
    'Judge each checkpoint as it comes, until training has ended.',
  ),
  poll_secs=(30.0, '--follow: between looks for a new one.'),
  keep_samples=(False, '--follow, --sweep: keep samples that are judged.'),
  sweep=(
    [],
    'Judge samplers at equal numbers of evaluations, a table and a plot: '
    'names, options after colons: ddim,ddim:eta=1,unipc:order=2:grid=logsnr.',
  ),
  sweep_evaluations=(['10', '20', '50'], '--sweep: evaluations for a sample.'),
  compare=(
    [],
    'Prints metric cards of one protocol in a table and ends: files or runs.',
  ),
)

JUDGED = 64  # images at once: a judge's maps may be larger than the images


def main():
  if drawing.listed():
    return
  distributed.initialize()
  if FLAGS.compare:
    groups = cards.compare(FLAGS.compare)
    told = ['\n'.join(tables.lines(group)) for group in groups]
    terminal.report({'tables': groups}, '\n\n'.join(told), FLAGS.json)
    return
  if FLAGS.download:
    judges.download()
    if not FLAGS.workdir:
      return
  command.need('workdir')
  drawing.check_flags(num_samples=2, poll_secs=0.1)
  if FLAGS['sweep'].present or FLAGS['sweep_evaluations'].present:
    _check_sweep()
  if any(name in bits.KINDS for name in FLAGS.metrics):
    likelihoods.carry_out()
    return
  likelihoods.check_absent()
  judging.check_flags()
  workdir = declare.workdir()
  runs.usable_folder('workdir', workdir)
  runs.usable_folder('workdir', workdir / 'evaluations')
  if FLAGS.follow:
    _follow(workdir)
  elif FLAGS.sweep:
    _sweep(workdir)
  else:
    _once(workdir)


def _once(workdir):
  trained, plan, output = drawing.chosen(_dtype())
  task = _task(workdir, trained)
  path = _card_path(task, workdir, trained.step, plan)
  card, drawn = _judge(task, path, trained, plan, output)
  report = workdir / 'report.html'
  terminal.report(
    {**card, 'path': str(path), 'report': str(report), 'drawn': drawn},
    f'{tables.text(card)}\n\ncard: {path}\nreport: {report}',
    FLAGS.json,
  )
  page.update(workdir)


def _follow(workdir):
  for flag in ('step', 'output'):
    if FLAGS[flag].value is not None:
      raise UserError(f'--follow judges all checkpoints: leave out --{flag}')
  _check_distance('--follow', 'the best checkpoint')
  if plans.is_calibrated(FLAGS.sampler, FLAGS.grid):
    raise UserError(
      f'--follow with --sampler={FLAGS.sampler} --grid={FLAGS.grid}: each '
      'checkpoint would have to be calibrated first; use another'
    )
  options = {name: FLAGS[name].value for name in drawing.OPTIONS}
  samplers.options(FLAGS.sampler, **options)
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
    card, _ = _judge(task, path_of(now.step), now, plan, output)
    page.update(workdir)
    _clean([output])
    return card

  # A kill may have come between a card and the end of its samples.
  judged = follow.curve_of(workdir, path_of, task.result)['points']
  _clean([output_of(point['step']) for point in judged])
  curve = follow.follow(
    workdir,
    trained.at,
    judge,
    path_of,
    result=task.result,
    poll_secs=FLAGS.poll_secs,
  )
  terminal.report(curve, follow.text(curve), FLAGS.json)


def _clean(outputs):
  """Removes samples that are judged, unless they are to be kept."""
  if not FLAGS.keep_samples:
    distributed.on_first(lambda: [files.remove(path) for path in outputs])


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
  command.refuse(
    (*idle, *drawing.OPTIONS),
    '--sweep, of which each sampler has its own options after colons',
  )
  _check_distance('--sweep', 'the best sampler')


def _sweep(workdir):
  entries = {text: sweep.parse(text) for text in FLAGS.sweep}
  budgets = sweep.budgets(FLAGS.sweep_evaluations)
  step, plan_of, network = drawing.prepared()
  timesteps = runs.read_config(workdir)['process']['num_timesteps']

  def longest(text, budget):
    try:
      return sweep.longest(
        lambda steps: plan_of({**entries[text], 'num_steps': steps}),
        budget,
        timesteps,
      )
    except UserError as e:
      told = f'--sweep={text} of {budget} evaluations: {e}'
      raise UserError(told) from e

  planned = [
    (text, budget, longest(text, budget))
    for text in entries
    for budget in budgets
  ]
  trained = network()
  task = _task(workdir, trained)
  cells = []
  for i, (text, budget, plan) in enumerate(planned):
    terminal.say(f'{i + 1} of {len(planned)}: {text}, {plan.cost()}')
    path = _card_path(task, workdir, step, plan, entries[text])
    card = _judged(task, path, trained, plan, entries[text])
    cells.append({
      'sampler': text,
      'budget': budget,
      'num_steps': plan.num_steps,
      'evaluations': plan.evaluations,
      'value': card['results'][task.result],
      'card': path.name,
    })  # fmt: skip
  told = {
    'result': task.result,
    'subject': {**cards.subject_of(trained), 'seed': FLAGS.seed},
    'protocol': task.protocol,
    'cells': cells,
    'best': sweep.best(cells),
  }
  of = [FLAGS.sweep, budgets, FLAGS.seed, trained.weights_sha256]
  what = f'{task.result}_{FLAGS.num_samples}'
  name = cards.name(f'step{step}', what, {'sweep': of, **task.protocol})
  path = workdir / 'evaluations' / 'sweeps' / f'{name}.json'
  plot = path.with_suffix('.png')

  def keep():
    plots.sweep(plot, told)
    cards.write(path, told)

  distributed.on_first(keep)
  page.update(workdir)
  terminal.report(
    {**told, 'path': str(path), 'plot': str(plot)},
    f'{FLAGS.num_samples} samples of step {step} for each number, against '
    f'{task.reference}\n{sweep.text(told)}\n\nplot: {plot}',
    FLAGS.json,
  )


def _judged(task, path, trained, plan, asked) -> dict:
  """The card of a cell of a sweep, drawn and judged unless it is there."""

  def known():
    with contextlib.suppress(UserError):
      card = cards.read(path)
      wanted = cards.create(_subject(trained, plan), task.protocol, {}, {})
      wanted['subject']['workdir'] = card['subject'].get('workdir')  # it moves
      if all(card[part] == wanted[part] for part in ('subject', 'protocol')):
        return card
    return None

  card = distributed.on_first(known)
  name = drawing.name(trained.step, plan, _dtype(), asked)
  output = trained.workdir / 'samples' / f'swept_{name}'
  if card is None:
    card, _ = _judge(task, path, trained, plan, output)
  _clean([output])  # a kill may have left them beside a card
  return card


def _dtype() -> str:
  """Of the samples on disk."""
  return 'uint8' if FLAGS.rounding == 'round' else 'float32'


def _task(workdir, trained) -> judging.Task:
  """What samples of any step are judged by: checked before any is drawn."""
  config, shape = trained.config['data'], trained.image_shape
  heldout = None
  if FLAGS.reference:
    source = judging.open_set('reference', shape[:2], shape[2])
    about = {'data': 'images' if source else 'statistics'}
  else:
    source, heldout = run_data.splits(trained.config)
    about = {
      'data': config['name'],
      'split': config['train_split'],
      'heldout_split': config['heldout_split'] if heldout else '',
    }
  count = FLAGS.num_samples
  samples = features.Images(count, None, f'--num_samples={count}')
  judge = judges.judge_of(source, heldout, shape, workdir / 'evaluations')
  reference = judging.set_of('reference', source, judge, shape)
  # Of sorted held-out images the first ones would be all of a kind.
  held = heldout and features.images_of(heldout, min(count, len(heldout)))
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
  subject = {**cards.subject_of(trained), **plan.protocol()}
  if not plan.adaptive:
    return {**subject, 'evaluations': plan.evaluations}
  took = drawing.took(output, FLAGS.num_samples)  # the sampler chose its steps
  return {
    **subject,
    'evaluations': round(float(took.evaluations.mean()), 2),
    'unfinished': int((~took.finished).sum()),
  }


def _judge(task, path, trained, plan, output) -> tuple[dict, int]:
  """Draws what is missing, and judges: (the card, how many were drawn)."""
  count = FLAGS.num_samples
  drawn = drawing.fill(trained, plan, output, count, _dtype())

  def stream():
    for images in store.stream(output, 0, count, features.BLOCK):
      # None is below 0, so this cuts off what is behind the point.
      yield images.astype(np.uint8) if FLAGS.rounding == 'truncate' else images

  def shown(i):
    (images,) = store.stream(output, i, i + 1, 1)
    return features.whole(images[0])

  samples = features.Images(count, stream, f'samples in {output}')
  card = judging.carry_out(
    task,
    samples,
    _subject(trained, plan, output),
    path,
    shown,
    batch_size=min(FLAGS.batch_size, JUDGED),
    mesh=trained.mesh,
    sample_cache=output,
  )
  return card, drawn


if __name__ == '__main__':
  command.run(main, __doc__)
