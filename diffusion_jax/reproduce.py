r"""Reproduces a paper's numbers: trains or imports, evaluates, compares.

  python -m diffusion_jax.reproduce --config=cifar10 --workdir=runs/cifar10 \
    --config.model.dtype=bfloat16 --download
  python -m diffusion_jax.reproduce --config=cifar10 --workdir=runs/cifar10 \
    --plan
  python -m diffusion_jax.reproduce --config=cifar10 --workdir=runs/imported \
    --from=PUBLISHED --download

First prints the cost: estimated from the share of a chip's peak that the
paper's own run reached, and from rates measured here. Then runs each stage as
one of the project's binaries, in its own process, and prints its command line.
During training it prints the loss next to that of a healthy run and, when the
loss leaves the healthy band, the likely causes. At the end it prints a table of
our numbers, the paper's and those of public retrains, with a verdict; if
anything differs from the published setup, it lists the differences instead.

Writes reproduction.json, table.md, curves.png, samples.png, the metric cards
and the report to WORKDIR/reproduction; weights and samples stay in the workdir.

The same command resumes after --minutes, Ctrl-C or SIGTERM and repeats no
finished stage. It runs on one host; on several, run the stages by hand.
"""

import dataclasses
import shlex
import signal
import sys
import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from diffusion_jax import codecs, runs, samplers
from diffusion_jax.cli import command, config_files, declare
from diffusion_jax.evaluation import inception
from diffusion_jax.reproduction import cost, published, stages, task, work
from diffusion_jax.runs import preparation, validation
from diffusion_jax.samplers import guided
from diffusion_jax.samplers import plan as plans
from diffusion_jax.system import files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint
from diffusion_jax.weights import inception as weights
from diffusion_jax.weights import official

FLAGS = flags.FLAGS
TAPS = ', '.join(inception.DISTANCES)
command.define_config()
declare.table(
  workdir=(str, 'Folder of the run; created if it does not exist.'),
  output=(str, 'Folder of the results; by default WORKDIR/reproduction.'),
  **{'from': (str, 'Published weights to import instead of training.')},
  features=(
    'inception',
    'Network that judges the samples: inception (its weights in the cache), a '
    'file of Inception weights, pixels or classifier.',
  ),
  taps=(['2048'], f'Feature layers of Inception: {TAPS}.'),
  download=(False, 'First fetch the published Inception weights.'),
  cache=(str, 'Folder for features and weights.'),
  data_path=(str, 'Folder of the data for evaluation.'),
  num_samples=(published.NUM_SAMPLES, 'Number of samples to judge.'),
  sampler=('ancestral', 'Sampler; sample --sampler=list lists all of them.'),
  num_steps=(int, 'Sampling steps; by default all of the schedule.'),
  guidance=(
    float,
    f"Conditional configs: {guided.WEIGHT}. By default the config's, 1.",
  ),
  bits=(True, 'Also measure bits per dimension of the held-out images.'),
  curve=(0, 'Number of earlier checkpoints to judge as well.'),
  measure=(True, 'First measure the time per training step on this machine.'),
  minutes=(0.0, 'Time limit of this call; 0 for none.'),
  train_minutes=(0.0, 'Time limit of training over all calls; 0 for none.'),
  plan=(False, 'Print the cost and the stages, and exit.'),
)
declare.shared('json')

OTHERS = ('pixels', 'classifier')  # judges other than Inception
# Flags passed on to evaluate.
JUDGING = ('features', 'taps', 'cache', 'data_path', 'download')


def main():
  start = time.monotonic()
  # Leave the devices to the stages: one process at a time can use them.
  jax.config.update('jax_platforms', 'cpu')
  asked = _task()
  whole = cost.work(asked, cost.flops_of(asked.config))
  told = '\n'.join(cost.lines(asked, whole))
  pieces = work.Pieces(asked, whole, start)
  if FLAGS.plan:
    _plan(pieces, told)
    return
  terminal.say(told)
  try:
    _carry_out(pieces)
  except stages.Failed as e:
    pieces.keep(done=False)
    if e.told:  # the stage has printed the error
      sys.exit(2)
    raise
  _report(pieces)


def _carry_out(pieces) -> None:
  """Runs stages until all are done or this call ends, and saves the results."""
  asked, made, step, stopped = pieces.task, [], None, None
  left = ['measuring', 'import' if asked.origin else 'training']
  judgements = task.judgements(asked)
  pieces.begin()
  work.catch_signals()
  try:
    pieces.measure()
    left.pop(0)
    pieces.say_measured()
    step = pieces.train()
    left.pop(0)
    if asked.origin:  # the import determines the config of the weights
      config = runs.read_config(asked.workdir)
      asked = pieces.task = dataclasses.replace(asked, config=config)
    there = checkpoint.steps(asked.workdir / 'checkpoints')
    others = task.earlier([s for s in there if s <= step], asked.curve)
    judgements = task.judgements(asked, step, others)
    while judgements:
      name, _, command = judgements[0]
      made += pieces.judged(name, command)
      judgements.pop(0)
  except (work.Cut, KeyboardInterrupt) as e:
    stopped = e
  signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the process ends soon anyway
  left += dict.fromkeys(what for _, what, _ in judgements)
  pieces.conclude(left, step, made)
  if isinstance(stopped, KeyboardInterrupt):
    raise stopped


# --- the task -----------------------------------------------------------------


def _task() -> task.Task:
  """The task that the flags describe; raises UserError for any mistake."""
  command.at_least(num_samples=2, num_steps=1, curve=0)
  command.at_least(minutes=0, train_minutes=0)
  origin = FLAGS['from'].value
  for flag in ('train_minutes', 'curve'):
    if origin and FLAGS[flag].value:
      raise UserError(f'--from trains nothing: leave --{flag} out')
  source = origin and files.at(origin).expanduser()
  if origin and not (source.exists() or official.is_checkpoint(source)):
    raise UserError(f'--from={origin}: there is no such file or folder')
  preparation.complete(FLAGS.config, declare.workdir())
  if wrong := validation.check_network(FLAGS.config):
    raise UserError(wrong[0])
  config = runs.to_plain(FLAGS.config)
  if FLAGS.sampler in (*samplers.ADAPTIVE, *samplers.CALIBRATED):
    raise UserError(
      f'--sampler={FLAGS.sampler}: its cost is not known in advance; use '
      'another, such as ddim'
    )
  how = ('sampler', 'num_steps', 'guidance')
  plan = plans.for_run(config, **{name: FLAGS[name].value for name in how})
  held = config['data']['heldout_split'] or config['data']['heldout_every']
  if FLAGS.bits and not held:
    raise UserError('the config has no held-out images: give --nobits')
  if FLAGS.bits and codecs.is_in_latents(config):
    raise UserError('latents have no bits per dimension: give --nobits')
  workdir = declare.workdir()
  output = FLAGS.output or workdir / 'reproduction'
  same = ('num_samples', 'sampler', 'bits', 'minutes', 'train_minutes', 'curve')
  metrics, is_published = _judge()
  asked = task.Task(
    config=config,
    workdir=workdir,
    directory=files.at(output).expanduser(),
    origin=origin,
    by_inception=FLAGS.features not in OTHERS,
    published_judge=is_published,
    metrics=metrics,
    judging=tuple(FLAGS[n].serialize() for n in JUDGING if FLAGS[n].value),
    sampling_steps=plan.num_steps,
    guidance=FLAGS.guidance,
    evaluations=plan.rows,
    measure=FLAGS.measure and not origin,
    **{name: FLAGS[name].value for name in same},
    **_config(),
  )
  _check_output(asked)
  _check_run(workdir, source)
  return asked


def _config() -> dict:
  """The name of the config, the shipped recipe of this name, and the flags."""
  given = config_files.given(FLAGS['config'].config_filename)
  path, colon, argument = given.partition(':')
  stem, shipped = Path(path).stem, None
  if there := config_files.shipped_config(stem):
    shipped = runs.to_plain(config_files.load(f'{there}{colon}{argument}'))
    if config_files.find_config(stem) == path:
      path = stem
  overrides = config_flags.get_override_values(FLAGS['config'])
  changed = (f'--config.{key}={value}' for key, value in overrides.items())
  return {
    'name': f'{stem}{colon}{argument}',
    'shipped': shipped,
    'config_flags': (f'--config={path}{colon}{argument}', *changed),
  }


def _check_output(asked) -> None:
  """Raises UserError unless the folder is for the results of this workdir."""
  directory, workdir = asked.directory, files.resolved(asked.workdir)
  runs.usable_output(directory, 'reproduction', workdir)
  record = work.read(directory / work.RECORD)
  there, holds = (record or {}).get('workdir', str(workdir)), ''
  if record is None and directory.exists() and files.entries(directory):
    holds = 'other files'
  elif there != str(workdir) and not asked.is_inside:
    holds = f'the results of {there}'
  if holds:
    raise UserError(f'--output={directory} holds {holds}: give a new folder')


def _check_run(workdir, source) -> None:
  """Raises UserError unless the workdir is new or belongs to this task."""
  runs.usable_folder('workdir', workdir)
  came_from = runs.converted_from(workdir)
  begun = (workdir / 'config.json').exists()
  if not source:
    if came_from:
      raise UserError(
        f'--workdir={workdir} holds weights from {came_from}: give '
        f'--from={came_from}, or another folder'
      )
    runs.check(workdir, FLAGS.config)
  elif begun and came_from != str(files.absolute(source)):
    raise UserError(
      f'--workdir={workdir} holds a run that does not come from '
      f'{FLAGS["from"].value}: give a new folder'
    )


def _judge() -> tuple[tuple[str, ...], bool]:
  """The metrics, and whether the judge is the published Inception.

  A hash tells: weights in the cache were checked when they were fetched. A .npz
  from elsewhere cannot be checked.
  """
  name = FLAGS.features
  if name in OTHERS:
    return ('fid',), False
  for tap in FLAGS.taps:
    if tap not in inception.DISTANCES:
      raise UserError(f'--taps={tap}: use some of {TAPS}')
  path = files.at(name).expanduser()
  if name == 'inception':
    path = files.cache(FLAGS.cache) / weights.NAME
    if not (path.exists() or FLAGS.download or FLAGS.plan):
      raise UserError(
        f'--features=inception: {path} is not there; --download fetches it, or '
        'give a file of the weights'
      )
  elif not path.is_file():
    raise UserError(
      f'--features={name}: there is no such file; give inception, a file of '
      'its weights, pixels or classifier'
    )
  # The Inception Score needs the logits too.
  score = '2048' in FLAGS.taps
  if path.suffix == '.npz' and path.exists():  # does it hold these layers?
    weights.read(path, (*FLAGS.taps, *[inception.LOGITS] * score))
  is_published = name == 'inception' or (
    path.suffix == '.pth' and weights.checked(path) == weights.SHA256
  )
  return ('fid', 'is') if score else ('fid',), is_published


# --- the output ---------------------------------------------------------------


def _plan(pieces, told) -> None:
  """Prints the cost and the commands of the stages."""
  asked = pieces.task
  commands = [task.measure(asked)] * asked.measure + [task.train(asked)]
  commands += [command for *_, command in task.judgements(asked)]
  lines = [f'python {shlex.join(command)}' for command in commands]
  pieces.say_measured()
  result = {'cost': pieces.whole._asdict(), 'stages': commands}
  result['differences'] = asked.differences
  terminal.report(result, '\n'.join([told, '', *lines]), FLAGS.json)


def _report(pieces) -> None:
  record, directory = pieces.record, pieces.task.directory
  lines = [*record.get('text', []), '', 'all is done']
  if left := record['left']:
    lines = [f'left: {", ".join(left)}; the same command resumes']
  lines.append(f'results: {directory}')
  for line in record.get('left_out', []):
    terminal.say(f'too large to copy: {line}')
  result = {**record, 'directory': str(directory)}
  terminal.report(result, '\n'.join(lines), FLAGS.json)


if __name__ == '__main__':
  command.run(main, __doc__, required=('config', 'workdir'))
