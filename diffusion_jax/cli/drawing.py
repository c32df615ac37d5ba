"""Draws a run's samples to disk: the sampling flags and the sample store.

Shared by the binaries that draw samples.
`flags.adopt_module_key_flags(drawing)` makes these flags a binary's own.
"""

import functools
import hashlib
import json
from collections.abc import Callable

import numpy as np
from absl import flags

from diffusion_jax import runs, samplers
from diffusion_jax.cli import (
  command,
  declare,
  guiding,
  low_rank,
  sharpening,
  steering,
)
from diffusion_jax.runs import (
  averaged,
  calibration,
  guided,
  imported,
  sizes,
  store,
)
from diffusion_jax.runs.trained import Trained
from diffusion_jax.samplers import grid
from diffusion_jax.samplers import plan as plans
from diffusion_jax.samplers.adaptive import Took
from diffusion_jax.samplers.plan import Plan
from diffusion_jax.system import distributed, files, numerics, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(distributed)
flags.adopt_module_key_flags(guiding)
flags.adopt_module_key_flags(low_rank)
flags.adopt_module_key_flags(steering)
flags.adopt_module_key_flags(sharpening)
declare.shared('workdir', 'step', 'ema', 'ema_profile')
declare.table(
  output=(
    str,
    'Folder of the samples; by default one in WORKDIR/samples, named after the '
    'settings.',
  ),
  batch_size=(256, 'Images per batch, over all devices.'),
  sampler=(
    'ancestral',
    f'One of {", ".join(samplers.SAMPLERS)}; list prints a table of them. Of '
    "a run from a pipeline of diffusers, by default the pipeline's.",
  ),
  num_steps=(int, 'Sampling steps; by default all of the schedule.'),
  grid=(
    'uniform',
    f'Times: {", ".join(grid.NAMES)}, or a literal list such as 999,500,100.',
  ),
  clip=(bool, "Clip x0 to [-1, 1] in every step; by default the config's."),
  seed=(0, 'Seed of the samples.'),
)

# Options of samplers; each sampler takes some of them.
OPTIONS = {
  'eta': 'amount of noise, from 0 (none) to 1',
  'variance': "fixedlarge, fixedsmall or learned; by default the config's",
  'order': 'order of the solver, 1 to 3',
  'variant': 'variant of the solver, see --sampler=list',
  'churn': "EDM's S_churn",
  'churn_min': "EDM's S_tmin, the smallest sigma / alpha with churn",
  'churn_max': "EDM's S_tmax, the largest sigma / alpha with churn",
  'churn_noise': "EDM's S_noise",
  'snr': 'signal-to-noise ratio of a Langevin step',
  'corrector_steps': 'Langevin steps per sampling step',
  'pixel_noise': 'limit of the last noise, in 8-bit levels on average',
  'rtol': 'relative tolerance per step',
  'atol': 'absolute tolerance per step',
  'budget': 'maximum number of network evaluations per sample',
}
for option, what in OPTIONS.items():
  taken = [name for name in samplers.SAMPLERS if option in samplers.takes(name)]
  default = samplers.defaults(taken[0])[option]
  told = f'; {default} by default' if isinstance(default, int | float) else ''
  kind = float if default is None else type(default)
  declare.table(**{option: (kind, f'{", ".join(taken)}: {what}{told}.')})


def listed() -> bool:
  """Prints the table of samplers if --sampler=list; returns whether it did."""
  if FLAGS.sampler != 'list':
    return False
  head, *rows = samplers.table()
  result = [dict(zip(head, row, strict=True)) for row in rows]
  lines = terminal.words(head, rows)
  terminal.report({'samplers': result}, '\n'.join(lines), FLAGS.json)
  return True


def asked() -> dict:
  """The flags of a plan, see `plans.for_run`; None for those not given.

  Besides, `ema_profile`, the network's average.
  """
  names = ('sampler', 'num_steps', 'grid', 'clip', 'ema_profile', *OPTIONS)
  given = {name: FLAGS[name].value for name in names}
  if FLAGS['sampler'].using_default_value:
    names = ('sampler', 'grid')
    none = {x: None for x in names if FLAGS[x].using_default_value}
    found = imported.sampling(declare.workdir(), {**given, **none})
    given |= {name: x for name, x in found.items() if x is not None}
  return {**given, **guiding.asked()}


def check_flags(**least) -> None:
  """Raises UserError for flags out of range: name = the minimum."""
  command.at_least(batch_size=1, **least)
  if FLAGS.num_samples > 10**9:
    raise UserError(f'--num_samples={FLAGS.num_samples}: at most 10**9')
  if FLAGS.output == '':
    raise UserError('--output is empty: give a folder, or leave the flag out')


def prepared(
  step: int, labelled: bool = True, image_size: str | None = None
) -> tuple[Callable[[dict], Plan], Callable[[dict], Trained]]:
  """Returns (fn from `asked` to a plan, fn from it to the loaded network).

  Plans are made before the weights are read, so that mistakes are reported at
  once.

  Args:
    step: the step of a checkpoint, see `declare.of_run`.
    labelled: whether plans choose the labels of samples.
    image_size: of the samples, see `sizes.parsed`.

  Raises:
    UserError: there is no run. The two functions raise it if the plan or the
      calibration is not possible.
  """
  workdir = declare.workdir()
  config = runs.read_config(workdir)

  low_rank.asked()  # before the weights of others are read
  steering.asked(image_size)
  others = guiding.others_of(config)
  condition = {}
  if labelled:
    condition = guiding.condition(workdir, config, others)
    condition |= sharpening.condition(image_size)

  compiled = []

  @functools.lru_cache(maxsize=1)  # of a sweep's averages one at a time
  def loaded(average):
    if compiled:
      return compiled[0].using(average)
    trained = low_rank.applied(declare.network(step, ema_profile=average))
    trained = steering.applied(trained, image_size)
    trained = sharpening.applied(trained, image_size) if labelled else trained
    trained = guiding.applied(trained, others)
    compiled.append(trained)
    return trained

  @functools.cache
  def calibrated(average, sides=None):
    # Before a calibration of damaged weights is missed.
    calibration.check_plain(loaded(average), sides)
    timesteps = config['process']['num_timesteps']
    kept = distributed.on_first(
      lambda: calibration.read(workdir, step, average or FLAGS.ema, timesteps)
    )
    return calibration.Calibration(*kept)

  def plan(how):
    how = {**how}
    average = how.pop('ema_profile', None)
    averaged.check(config['ema'], FLAGS.ema, average)
    sides = sizes.parsed(how.pop('image_size', None), config)
    facts = {name: guided.facts(one, name) for name, one in others.items()}
    made = plans.for_run(
      config, calibration=lambda: calibrated(average, sides), seed=FLAGS.seed,
      condition=condition, image_size=sides, **facts, **how,
    )  # fmt: skip
    if sides:
      sizes.check(config, sides)
    return made

  def network(how):
    average = how.get('ema_profile')
    trained = loaded(average)
    if plans.is_calibrated(how['sampler'], how['grid']):
      calibration.check(calibrated(average), trained)
    return trained

  return plan, network


def chosen(
  dtype: str = 'uint8',
  check: Callable[[Plan], None] = lambda plan: None,
  labelled: bool = True,
  image_size: str | None = None,
) -> tuple[Trained, Plan, files.Path]:
  """Returns the network, the plan and the output folder that the flags select.

  Args:
    dtype: dtype of the samples, see `draw.drawer`; only the name of the folder
      depends on it.
    check: called with the plan before the weights are read.
    labelled: whether the plan chooses the labels of samples.
    image_size: of the samples, see `sizes.parsed`.

  Raises:
    UserError: the flags are not valid; nothing has been written.
  """

  def read(step):
    plan_of, network = prepared(step, labelled, image_size)
    plan = plan_of({**asked(), 'image_size': image_size})
    check(plan)
    own = declare.workdir() / 'samples' / name(step, plan, dtype)
    output = files.at(FLAGS.output or own).expanduser()
    runs.usable_output(output)
    return network(asked()), plan, output

  runs.read_config(declare.workdir())
  return declare.of_run(read)


def fill(
  trained: Trained,
  plan: Plan,
  output: files.Path,
  num_samples: int,
  dtype: str = 'uint8',
) -> int:
  """Draws the samples that the store lacks; returns how many were drawn.

  When it returns, all processes have saved their samples.

  Args:
    trained: the network.
    plan: the sampling plan.
    output: the store's folder.
    num_samples: number of samples that the store must hold.
    dtype: dtype of the samples, see `draw.drawer`.

  Raises:
    UserError: the folder holds something else.
  """
  facts, now = protocol(trained, plan, dtype), numerics.describe()

  def begin():
    before = store.open_store(output, facts, now)
    absent = store.missing(output, num_samples)
    if plan.adaptive:
      beside = output / store.TOOK
      store.open_store(beside, {'dtype': 'int32'})
      absent = np.union1d(absent, store.missing(beside, num_samples))
    if not len(absent):
      return []
    if line := numerics.warning(before, now):
      terminal.say(line)
    return store.consecutive(absent)

  runs_of_absent = distributed.on_first(begin)
  if not runs_of_absent:
    return 0
  absent = np.concatenate([np.arange(*run) for run in runs_of_absent])
  batch_size = min(FLAGS.batch_size, len(absent))
  terminal.say(
    f'drawing {len(absent)} images with {plan.cost()} each, '
    f'{batch_size} at once, into {output}'
  )
  if plans.ignores_variance(plan, trained.config):
    terminal.say(
      f'(--sampler={plan.sampler} does not use the learned variance; '
      '--sampler=ancestral --variance=learned does)'
    )
  if FLAGS.num_steps not in (None, plan.num_steps):
    terminal.say(
      f'(--grid={FLAGS.grid} has {plan.num_steps} different times for '
      f'--num_steps={FLAGS.num_steps})'
    )
  if plan.num_steps > 500 and FLAGS.num_steps is None:
    terminal.say(
      '(--sampler=ddim --num_steps=50 would take a fraction of the time)'
    )
  draw_fn = trained.drawer(plan, dtype=dtype, took=plan.adaptive)

  def local(indices):
    if not plan.adaptive:
      return sharding.local_rows(draw_fn(indices))
    images, took = draw_fn(indices)
    rows, images = sharding.local_rows(images)
    counts = [sharding.to_host(count)[rows] for count in took]
    return rows, images, np.stack(counts, 1).astype(np.int32)

  with terminal.Progress(
    *('sampling', num_samples, num_samples - len(absent), 'images'),
    kept=lambda done: f'{done} images are kept in {output}',
  ) as progress:
    store.fill(output, absent, batch_size, local, progress.update)
  distributed.on_first(lambda: None)
  return len(absent)


def took(output: files.Path, num_samples: int) -> Took:
  """The cost of each of the first samples of an adaptive plan's store."""
  counts = store.load(output / store.TOOK, num_samples).T
  return Took(*counts[:3], counts[3].astype(bool))


def protocol(trained: Trained, plan: Plan, dtype: str = 'uint8') -> dict:
  """Everything the images depend on; default settings are omitted."""
  facts = {
    'step': trained.step,
    'ema': trained.ema,
    **{k: x for k, x in trained.average.items() if k == 'ema_profile'},
    'weights_sha256': trained.weights_sha256,
    **trained.about_changes,
    **{part: trained.config[part] for part in ('model', 'process', 'loss')},
    'image_shape': (
      *(plan.image_size or trained.image_shape[:2]),
      trained.image_shape[-1],
    ),
    **plan.protocol(),
  }
  if not plan.adaptive and plan.evaluations != plan.num_steps:
    facts['evaluations'] = plan.evaluations
  if plan.rows != plan.evaluations:
    facts['network_rows'] = plan.rows
  return facts if dtype == 'uint8' else {**facts, 'dtype': dtype}


def name(
  step: int, plan: Plan, dtype: str = 'uint8', how: dict | None = None
) -> str:
  """The name of samples and cards.

  Args:
    step: step of the checkpoint.
    plan: the plan made from `how`.
    dtype: dtype of the samples, see `draw.drawer`.
    how: a result of `asked`; by default the flags.
  """
  how = how or asked()
  given = {k: x for k, x in how.items() if k in OPTIONS and x is not None}
  steps = '' if plan.adaptive else plan.num_steps
  parts = [f'step{step}', f'{plan.sampler}{steps}']
  parts += [f'{k}{x}' for k, x in given.items()]
  parts += [how['grid']] * (how['grid'] != 'uniform')
  if plan.image_size:
    parts.append('size' + 'x'.join(map(str, plan.image_size)))
  parts += [*guiding.name(plan), *low_rank.name()]
  parts += [*steering.name(plan.image_size), *sharpening.name(plan)]
  parts += [f'seed{plan.seed}']
  parts[-1] += averaged.suffix(how.get('ema_profile') or FLAGS.ema)
  parts += ['noclip'] * (not plan.clip)
  # The plan depends on the calibration, which may differ another time.
  if plans.is_calibrated(plan.sampler, how['grid']):
    made = json.dumps([plan.grid, plan.options])
    parts += [f'by{_digest(made)[:8]}']
  whole = '_'.join(parts).replace(',', '-')
  if len(whole) > 100:  # a long literal grid
    whole = f'{whole[:80]}_{_digest(whole)[:12]}'
  return whole + '_float' * (dtype == 'float32')


def _digest(text) -> str:
  return hashlib.sha256(text.encode()).hexdigest()
