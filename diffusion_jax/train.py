r"""Trains a diffusion model.

  python -m diffusion_jax.train --config=configs/digits.py --workdir=runs/digits

Any value of the config can be overridden: --config.optim.lr=1e-4. Writes
config.json, checkpoints/, metrics.jsonl, TensorBoard events, and sample grids
(samples/) to the workdir. --profile adds a profile of chosen steps.

To resume from the newest checkpoint, run the same command again. Values that
change no trained number may differ, see docs/resume.md. So may optim.*,
ema.decay and batch_size: the run goes on, and starts.jsonl records what
changed.

To fine-tune, give --init_from=runs/other. It copies the other run's parameters
that match this config's network in name and shape, and starts at step 0 with a
new optimiser state. init_from.json in the workdir lists what was copied.

Ctrl-C, SIGTERM, SIGUSR1 and a closed terminal (SIGHUP) stop the run after the
current step and save it. After SIGUSR1, a Slurm job is also requeued. A second
Ctrl-C aborts at once. The exit code is 130 after Ctrl-C and 0 after the others.
"""

import contextlib
import os
import signal
import sys

import jax
from absl import flags

from diffusion_jax import data, runs
from diffusion_jax.cli import command, declare, grids
from diffusion_jax.data import broken, pipeline, resident, sources
from diffusion_jax.reporting import pictures
from diffusion_jax.runs import (
  autoencoders,
  dataset,
  finetune,
  preparation,
  programs,
  recipe,
  texts,
  upscaled,
  validation,
)
from diffusion_jax.system import (
  compilation,
  distributed,
  files,
  numerics,
  terminal,
)
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import (
  checkpoint,
  loop,
  metrics,
  preemption,
  profiling,
  saved,
  sharding,
  watchdog,
)

FLAGS = flags.FLAGS
command.define_config()
flags.adopt_module_key_flags(distributed)
declare.table(
  workdir=(str, 'Folder of the run; created if it does not exist.'),
  init_from=(str, 'Folder of a run whose parameters to start from.'),
  init_step=(int, '--init_from: the checkpoint; by default the newest.'),
  init_ema=(
    True,
    '--init_from: the averaged weights; --noinit_ema: the raw ones.',
  ),
)
flags.DEFINE_float(
  'still_secs', 300,
  'Report a step that takes longer than this many seconds, with the stack of '
  'its process.',
  lower_bound=0.1,
)  # fmt: skip
flags.DEFINE_float(
  'stop_secs', 30,
  'After a signal that stops the run: exit without saving if the step takes '
  'longer than this many seconds; ten times as long while samples are drawn or '
  'the held-out loss is computed.',
  lower_bound=1,
)  # fmt: skip
flags.DEFINE_string(
  'profile', None,
  'Profile these steps, such as 200:210, the ten steps after step 200, into '
  'profile/ in the workdir, see docs/speed.md.',
)  # fmt: skip
declare.shared('accept_data', 'json')


def main():
  distributed.initialize()
  config, workdir = FLAGS.config, files.at(FLAGS.workdir).expanduser()
  distributed.everywhere(lambda: preparation.complete(config, workdir))
  if wrong := validation.check(config, jax.devices()):
    raise UserError(wrong[0])
  splits = distributed.everywhere(lambda: data.splits(config.data))
  runs.check(workdir, config)
  profiling.check(FLAGS.profile, workdir, config.num_steps)
  how = config.data.heldout_split, FLAGS.accept_data, config.conditioning
  known = dataset.check(workdir, splits, *how)
  origin = finetune.find(
    workdir, FLAGS.init_from, FLAGS.init_step, FLAGS.init_ema
  )
  compilation.keep()
  mesh = sharding.make_mesh(**config.mesh)
  splits, parts = preparation.prepare(config, mesh, workdir, splits, origin)
  program = programs.create(config, mesh, recipe.create(config, parts))
  origin, begun = finetune.load(
    origin, program.abstract.params, FLAGS.init_step
  )

  # Nothing has been written yet: all checks come before this point.
  with contextlib.ExitStack() as stack:
    kept = distributed.on_first(
      lambda: _begin(stack, workdir, config, known, origin, begun)
    )
    preparation.keep(workdir, parts, splits, origin)
    signals = preemption.Signals(FLAGS.stop_secs, _give_up)
    checkpoints = stack.enter_context(
      checkpoint.Checkpoints(
        workdir / 'checkpoints',
        config.keep_last,
        config.keep_every,
        program.frozen,
        program.recipe.origins,
      )
    )
    stack.callback(signals.rest)
    train_state = checkpoints.restore_newest(
      program.abstract
    ) or program.create_state(mesh, begun.taken)
    start = int(train_state.step)
    if start >= config.num_steps:
      _finish(workdir, start, {})
      return
    _say_start(workdir, config, start, splits, known, origin, begun, bool(kept))
    begun.taken.clear()  # the state has copies
    train_state = _train(
      config, workdir, mesh, program, splits, train_state, checkpoints, signals
    )
  broken.say_left_out(*splits)
  at = int(train_state.step)
  if at < config.num_steps:
    if distributed.is_first():  # one process requeues the job
      terminal.say(_stopped(signals.name, at))
    return 130 * (signals.name == 'SIGINT')
  rows = metrics.read(workdir / 'metrics.jsonl')
  _finish(workdir, config.num_steps, rows[-1] if rows else {})


def _begin(stack, workdir, config, known, origin, begun) -> list[int]:
  """Locks the workdir; returns the steps that have a checkpoint."""
  stack.enter_context(runs.lock(workdir))
  if origin:
    finetune.record(workdir, origin, begun)
  if not (workdir / 'config.json').exists():
    dataset.write(workdir, known)
    runs.write_config(workdir, config)
  return saved.note_start(workdir / 'checkpoints')


def _say_start(
  workdir, config, start, splits, known, origin, begun, goes_on
) -> None:
  """Records the start in the workdir, and prints what training starts from."""

  def record():
    dataset.write(workdir, known)
    return runs.begin(workdir, config, start, goes_on, known.change)

  for line in distributed.on_first(record):
    terminal.say(line)
  source, heldout = splits
  if origin and not goes_on:
    for line in finetune.told(origin, begun, runs.to_plain(config)):
      terminal.say(line)
  elif FLAGS.init_from:
    terminal.say('--init_from was applied when this run started')
  terminal.say(f'training on {source.description}')
  if config.batch_size > len(source):
    terminal.say(
      f'batch_size={config.batch_size} is larger than the data set: each of '
      f'the {len(source)} images is used several times in a step'
    )
  terminal.say(
    f'held out: {heldout.description}'
    if heldout
    else f'there is no held-out loss: {data.not_held_out(config.data)}'
  )
  sources.say_notes(source)


def _train(
  config, workdir, mesh, program, splits, train_state, checkpoints, signals
):
  """The training loop with metrics, samples, checkpoints and the watchdog."""
  source, heldout = splits
  start = int(train_state.step)
  step_fn, batches = _feed(config, mesh, program, source, start, signals)
  first = distributed.is_first()
  writer = metrics.Writer(workdir, start) if first else metrics.Mute()
  dog = watchdog.Watchdog(
    workdir,
    distributed.index(),
    jax.process_count(),
    still_secs=FLAGS.still_secs,
    silent_secs=FLAGS.heartbeat_secs / 2,
    every_secs=min(FLAGS.heartbeat_secs / 6, 10),
    tell=terminal.say,
  )
  progress = terminal.Progress(
    'training', config.num_steps, start, begin='compiling the training step'
  )

  once = autoencoders.Watch(config.codec, terminal.say)

  def on_step(finished, row):
    dog.step()
    progress.reach(finished, f'loss {row["loss"]:.4f}' if row else '')
    once.look(finished, row)

  def draw(now, at):
    # The captions of training.
    shown = source if source.encode_fn else heldout or source
    _draw_grid(program, config, now, at, mesh, workdir, writer, shown)

  profiled = profiling.profiled(
    profiling.parse(FLAGS.profile), start, workdir, config.steps_per_dispatch
  )
  with dog, progress, profiled as wrapped:
    train_state = loop.train(
      train_state,
      step_fn=wrapped(numerics.guarded()(step_fn)),
      batches=dog.waiting(batches),
      num_steps=config.num_steps,
      batch_size=config.batch_size,
      every=loop.Every(
        config.log_every,
        config.eval_every if heldout else 0,
        config.sample_every,
        config.checkpoint_every,
      ),
      checkpoints=checkpoints,
      writer=writer,
      per_dispatch=config.steps_per_dispatch,
      eval_fn=signals.patiently(
        lambda now: _heldout_loss(program, now, heldout, config, mesh)
      ),
      sample_fn=signals.patiently(draw),
      on_step=on_step,
      # JAX agrees on a number that grows by one in every call.
      stop=lambda at: signals.reached(-(-at // config.steps_per_dispatch)),
      met=lambda: signals.error,
    )
    writer.close()
  return train_state


def _feed(config, mesh, program, source, start, signals):
  """(step_fn, batches): a call of step_fn takes the next of the batches."""
  count, on_device = config.steps_per_dispatch, config.data.on_device
  images = None
  if on_device:
    with terminal.waiting(f'placing {len(source)} images on the devices'):
      images = distributed.everywhere(lambda: resident.read(source))
    images = resident.place(images, mesh)
  one = count == 1 and not on_device
  batches = pipeline.batches(
    source,
    batch_size=config.batch_size,
    seed=config.seed,
    flip=config.data.flip,
    augmented=config.data.augment,
    start_step=start,
    end_step=config.num_steps,
    early=loop.EARLY * count if jax.process_count() > 1 else 0,
    warn=signals.warn,
    stacked=0 if one else count,
    read=not on_device,
    sharding=sharding.batch_sharding(mesh),
  )

  def step_fn(now, batch):
    if one:
      return program.step_fn(now, program.frozen, batch)
    return program.steps_fn(now, program.frozen, batch, images)

  return step_fn, batches


def _heldout_loss(program, train_state, source, config, mesh) -> dict:
  """The mean loss over the held-out images, as a device scalar."""
  params = {**program.frozen, **train_state.averaged}
  batch_size, num_images = config.batch_size, config.eval_images
  total, first = 0.0, 0
  where = sharding.batch_sharding(mesh)
  rows = pipeline.local_rows(where, batch_size)
  batches = pipeline.heldout(
    source, batch_size=batch_size, num_examples=num_images, rows=rows
  )
  while local := loop.read_together(batches):
    batch, weight = pipeline.put_rows(local, where, batch_size)
    total += program.loss_fn(params, train_state.extras, batch, weight, first)
    first += batch_size
  return {'heldout_loss': total / min(num_images or len(source), len(source))}


def _draw_grid(
  program, config, train_state, at, mesh, workdir, writer, source
) -> None:
  """Draws samples as a picture in the workdir and in TensorBoard.

  Of an autoencoder, it draws images of the source beside reconstructions; of a
  run that sharpens pictures small images, samples, and the images.
  """
  count = config.sample.num_images
  params = {**program.frozen, **train_state.averaged}
  reconstructs, originals = program.recipe.reconstructs, None
  rows = (sharding.padded_indices(count, mesh), *texts.of_grid(source, count))
  small, beside = upscaled.of_grid(config, source, count, mesh)
  if small:
    rows = (rows[0], small, *rows[2:])
  if reconstructs:
    rows = autoencoders.examples(source, count, mesh)
    originals = sharding.to_host(rows[1])
  images, is_finite = program.draw_fn(params, *rows)
  if not is_finite:
    terminal.say(f'the samples of step {at} are not finite: no grid is drawn')
    return
  images = sharding.to_host(images)
  if distributed.is_first():
    if beside:
      picture = pictures.beside(beside[0], images[:count], beside[1])
    elif reconstructs:
      picture = pictures.beside(originals, images)
    else:
      shown = images[:count]
      picture = grids.of_training(program.recipe, shown, source, workdir)
    folder = files.make(workdir / 'samples')
    pictures.save(folder / f'train_{at:08d}.png', picture)
    writer.picture(at, 'samples', picture)


def _stopped(name, at):
  by = 'Ctrl-C' if name == 'SIGINT' else name
  return f'stopped by {by} at step {at}, which is saved; {_resumes(name)}'


def _resumes(name):
  job = os.environ.get('SLURM_JOB_ID')
  if name != 'SIGUSR1' or not job:
    return 'the same command resumes'
  failed = preemption.requeue(job)
  if not failed:
    return f'Slurm job {job} is requeued'
  return (
    f'Slurm job {job} cannot be requeued ({failed}): the same command resumes'
  )


def _give_up(name, seconds):
  """Ends a process whose main thread is stuck in a step."""
  distributed.begin_to_leave()
  resumes = _resumes(name if distributed.is_first() else '')
  with contextlib.suppress(OSError):
    print(
      f'stopped by {name}, without saving: the step did not end within '
      f'{seconds:.0f} s (--stop_secs); {resumes} from the last checkpoint',
      file=sys.stderr,
      flush=True,
    )
  distributed.leave(128 + signal.Signals[name], alone=True)


def _finish(workdir, at, row):
  losses = [
    f'{name} {row[name]:.4f}'
    for name in ('loss', 'heldout_loss')
    if name in row
  ]
  terminal.report(
    {'workdir': str(workdir), 'step': at, **row},
    f'trained to step {at}'
    + (f' ({", ".join(losses)})' if losses else '')
    + f'; the run is in {workdir}',
    FLAGS.json,
  )


if __name__ == '__main__':
  command.run(main, __doc__, required=('config', 'workdir'))
