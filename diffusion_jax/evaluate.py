r"""Measures how close a run's samples are to its data.

  python -m diffusion_jax.evaluate --workdir=runs/digits --num_samples=2000 \
    --sampler=ddim --num_steps=50
  python -m diffusion_jax.evaluate --workdir=runs/cifar10 --num_samples=50000 \
    --features=inception --metrics=fid,is --download
  python -m diffusion_jax.evaluate --compare=runs/a,runs/b

Draws the samples that are still missing from the sample store, and compares
them with all training images. It reports the Frechet distance, next to that of
the held-out images (the floor), and the distances to the nearest training
images: if far more samples than held-out images are very close to one, the
network copies. For labelled data it trains a classifier once and also reports
the classes of the samples. Writes a metric card and a picture of the nearest
neighbours to WORKDIR/evaluations, and WORKDIR/report.html.

The default sampler is DDPM's own with 1000 ancestral steps, which is slow. With
--features=inception the distance is the FID. Features are cached (--cache), so
an interrupted evaluation resumes.

--follow judges each new checkpoint during training and keeps the best one.
--sweep compares samplers at equal numbers of network evaluations.
Of an autoencoder's run it measures the reconstructions: their Frechet distance
to the images, PSNR, SSIM, how the codes are used, and the cost. Of a run with
captions --text_judge also measures how often a pair of encoders, a run with
loss.name=contrastive, finds a sample's prompt among all captions; of such a run
it measures how often it finds the captions of real pictures.

--metrics=bpd, bpd_fast or bpd_ode measures bits per dimension of the held-out
images instead, and draws no samples.

To compare two sets of images without a run, use python -m diffusion_jax.fid.
"""

import contextlib

from absl import flags

from diffusion_jax import codecs, runs, samplers
from diffusion_jax.cli import (
  agreeing,
  command,
  declare,
  drawing,
  judges,
  judging,
  likelihoods,
  reconstructions,
  retrieval,
  sampled,
  sharpening,
)
from diffusion_jax.evaluation import cards, follow, sweep, tables
from diffusion_jax.reporting import page, plots
from diffusion_jax.runs import pairs
from diffusion_jax.samplers import plan as plans
from diffusion_jax.system import compilation, distributed, files, terminal
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(drawing)
flags.adopt_module_key_flags(judging)
flags.adopt_module_key_flags(likelihoods)
flags.adopt_module_key_flags(sampled)
flags.adopt_module_key_flags(retrieval)
declare.shared('accept_data')
declare.table(
  num_samples=(1000, 'Number of samples to judge.'),
  rounding=(
    ('float', 'round', 'truncate'),
    'Rounding of the samples before they are judged: float does not round, as '
    'in DDPM; the others convert to 8 bits.',
  ),
  follow=(False, 'Judge each new checkpoint until training ends.'),
  poll_secs=(30.0, '--follow: seconds between checks for a new checkpoint.'),
  keep_samples=(
    False,
    '--follow, --sweep: keep the samples after judging them.',
  ),
  sweep=(
    [],
    'Compare samplers at equal numbers of network evaluations, in a table and '
    'a plot: names with options after colons, such as '
    'ddim,ddim:eta=1,unipc:order=2:grid=logsnr.',
  ),
  sweep_evaluations=(
    ['10', '20', '50'],
    '--sweep: network evaluations per sample.',
  ),
  compare=(
    [],
    'Print the metric cards of these files or runs, one table per protocol, '
    'and exit.',
  ),
)


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
  compilation.keep()
  if FLAGS['sweep'].present or FLAGS['sweep_evaluations'].present:
    _check_sweep()
  if likelihoods.are_asked():
    likelihoods.carry_out()
    return
  likelihoods.check_absent()
  judging.check_flags()
  workdir = declare.workdir()
  runs.usable_folder('workdir', workdir)
  runs.usable_folder('workdir', workdir / 'evaluations')
  # --follow may wait for a run.
  is_there = not FLAGS.follow or (workdir / 'config.json').exists()
  config = runs.read_config(workdir) if is_there else None
  for trains, judged in (
    (codecs.reconstructs, reconstructions), (pairs.trains, retrieval)
  ):  # fmt: skip
    if config and trains(config):
      judged.carry_out()
      return
  if FLAGS.jitter != retrieval.JITTER:
    raise UserError(
      f'--jitter={",".join(FLAGS.jitter)} is for runs with '
      'loss.name=contrastive: leave it out'
    )
  agreeing.check(workdir)
  if is_there:
    sharpening.of_heldout()
  if FLAGS.follow:
    _follow(workdir)
  elif FLAGS.sweep:
    _sweep(workdir)
  else:
    _once(workdir)


def _once(workdir):
  trained, plan, output = drawing.chosen(sampled.dtype())
  task = sampled.task(trained, plan)
  path = sampled.card_path(task, workdir, trained.step, plan)
  card, drawn = sampled.judge(task, path, trained, plan, output)
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
      raise UserError(f'--follow judges all checkpoints: leave --{flag} out')
  _check_distance('--follow', 'the best checkpoint')
  if plans.is_calibrated(FLAGS.sampler, FLAGS.grid):
    raise UserError(
      f'--follow with --sampler={FLAGS.sampler} --grid={FLAGS.grid}: each '
      'checkpoint would have to be calibrated first; use another'
    )
  options = {name: FLAGS[name].value for name in drawing.OPTIONS}
  samplers.options(FLAGS.sampler, **options)
  follow.wait_for_first(workdir, FLAGS.poll_secs)
  trained, plan, _ = drawing.chosen(sampled.dtype())
  task = sampled.task(trained, plan)

  def path_of(step):
    return sampled.card_path(task, workdir, step, plan)

  def output_of(step):
    name = drawing.name(step, plan, sampled.dtype())
    return workdir / 'samples' / f'followed_{name}'

  def judge(now):
    output = output_of(now.step)
    card, _ = sampled.judge(task, path_of(now.step), now, plan, output)
    page.update(workdir)
    _clean([output])
    return card

  # A killed process may have written a card but not removed its samples.
  judged = follow.curve_of(workdir, path_of, task.result)['points']
  _clean([output_of(point['step']) for point in judged])
  curve = follow.follow(
    workdir, trained.at, judge, path_of, task.result, FLAGS.poll_secs
  )
  terminal.report(curve, follow.text(curve), FLAGS.json)


def _clean(outputs):
  """Removes judged samples, unless --keep_samples is set."""
  if not FLAGS.keep_samples:
    distributed.on_first(lambda: [files.remove(path) for path in outputs])


def _check_distance(flag, best):
  if FLAGS.metrics and not {'fid', 'sfid'} & set(FLAGS.metrics):
    raise UserError(
      f'--metrics={",".join(FLAGS.metrics)}: {flag} needs fid too, because '
      f'{best} is the one with the smallest distance'
    )


def _check_sweep():
  if not FLAGS.sweep:
    raise UserError(
      '--sweep is empty: give samplers separated by commas, such as '
      '--sweep=ddim,unipc'
    )
  idle = ('sampler', 'num_steps', 'grid', 'clip', 'output', 'follow')
  command.refuse(
    (*idle, *drawing.OPTIONS, *sweep.GUIDANCE),
    '--sweep, where each sampler has its own options after colons',
  )
  _check_distance('--sweep', 'the best sampler')


def _sweep(workdir):
  own = {'ema_profile': FLAGS.ema_profile}
  entries = {text: own | sweep.parse(text) for text in FLAGS.sweep}
  budgets = sweep.budgets(FLAGS.sweep_evaluations)
  timesteps = runs.read_config(workdir)['process']['num_timesteps']

  def read(step):
    plan_of, network = drawing.prepared(step)
    planned = [
      (text, budget, sweep.longest(
        text, lambda more, how=how: plan_of(how | more), budget, timesteps
      ))
      for text, how in entries.items()
      for budget in budgets
    ]  # fmt: skip
    for how in entries.values():  # an average that is not there, or is damaged
      network(how)
    return step, planned, network

  step, planned, network = declare.of_run(read)
  trained = network(entries[planned[0][0]])
  task = sampled.task(trained, planned[0][2])
  cells = []
  for i, (text, budget, plan) in enumerate(planned, 1):
    terminal.say(f'{i} of {len(planned)}: {text}, {plan.cost()}')
    path = sampled.card_path(task, workdir, step, plan, entries[text])
    now = network(entries[text])
    card = _judged(task, path, now, plan, entries[text])
    cells.append({
      'sampler': text,
      'budget': budget,
      'num_steps': plan.num_steps,
      'evaluations': plan.evaluations,
      'network_rows': plan.rows,
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
    files.write_json(path, told)

  distributed.on_first(keep)
  page.update(workdir)
  reference = judging.described('reference', task.reference)
  terminal.report(
    {**told, 'path': str(path), 'plot': str(plot)},
    f'{FLAGS.num_samples} samples of step {step} for each number, against '
    f'{reference}\n{sweep.text(told)}\n\nplot: {plot}',
    FLAGS.json,
  )


def _judged(task, path, trained, plan, asked) -> dict:
  """The card of one cell of a sweep, measured unless it exists."""

  def known():
    with contextlib.suppress(UserError):
      card = cards.read(path)
      wanted = cards.create(
        sampled.subject(trained, plan), task.protocol, {}, {}
      )
      wanted['subject']['workdir'] = card['subject'].get('workdir')  # it moves
      if all(card[part] == wanted[part] for part in ('subject', 'protocol')):
        return card
    return None

  card = distributed.on_first(known)
  name = drawing.name(trained.step, plan, sampled.dtype(), asked)
  output = trained.workdir / 'samples' / f'swept_{name}'
  if card is None:
    card, _ = sampled.judge(task, path, trained, plan, output)
  _clean([output])  # a killed process may have left them
  return card


if __name__ == '__main__':
  command.run(main, __doc__)
