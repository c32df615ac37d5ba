"""The tasks of `edit` that answer what is known of a picture."""

import functools
from collections.abc import Callable

from absl import flags

from diffusion_jax import runs
from diffusion_jax.cli import (
  command,
  declare,
  edit_inputs,
  edit_results,
  edit_tasks,
  guiding,
  low_rank,
)
from diffusion_jax.editing import methods
from diffusion_jax.runs import edit_plans
from diffusion_jax.samplers import grid as grids
from diffusion_jax.system import compilation, distributed, files, terminal
from diffusion_jax.system.errors import UserError, one_of

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(distributed)
flags.adopt_module_key_flags(edit_inputs)
flags.adopt_module_key_flags(guiding)
flags.adopt_module_key_flags(low_rank)
declare.shared('workdir', 'step', 'ema', 'ema_profile', 'json')
declare.table(
  output=(str, 'Folder of the answers.'),
  samples=(int, 'Answers for each picture; by default 1, of vary 4.'),
  batch_size=(64, 'Answers per batch, over all devices.'),
  num_steps=(int, "Sampling steps; by default the method's."),
  grid=(
    str,
    f'Times: {", ".join(grids.NAMES)}, or a literal list such as 999,500,100; '
    "by default the method's.",
  ),
  clip=(bool, "Clip x0 to [-1, 1] in every step; by default the config's."),
  seed=(0, 'Seed of the answers.'),
)
# Options of methods; each method takes some of them.
OPTIONS = {
  'eta': 'amount of noise in the steps, from 0 to 1',
  'eta_b': 'how much the picture decides in steps that it does',
  'zeta': 'length of the step of guidance',
  'data_std': 'standard deviation of the data, in units of [-1, 1]; 0 for none',
  'jump_length': 'steps of the grid to go up at a time',
  'jump_n_sample': 'how often to go down each part of the way',
  'ode_steps': 'evaluations per level',
  'iterations': 'of conjugate gradients',
}
for option, what in OPTIONS.items():
  taken = [x for x in methods.ABOUT if option in methods.defaults(x)]
  kind = methods.RANGES[option][0]
  declare.table(**{option: (kind, f'{", ".join(taken)}: {what}.')})


def task(name: str) -> tuple[Callable, str, tuple[str, ...]]:
  """A task: what runs it, its help, and the flags that it needs.

  Args:
    name: its name.
  """
  edit_tasks.declare_own(name)
  flags.adopt_module_key_flags(edit_tasks)
  able = edit_plans.able(edit_tasks.KINDS[name])
  small, large = edit_plans.BEST[edit_tasks.KINDS[name]]
  usual = small
  if large != small:
    usual += f' of runs up to {edit_plans.SMALL} pixels, {large} of others'
  declare.table(
    method=(
      str,
      f'One of {", ".join(able)}; by default {usual}{_elsewhere(name)}. list '
      'prints a table of all methods.',
    )
  )
  return functools.partial(main, name), edit_tasks.DOCS[name], ()


def _elsewhere(name: str) -> str:
  """The usual methods of runs that differ from others."""
  found = '; dps in latents' if edit_tasks.KINDS[name] else ''
  if name == 'upscale':
    found += '; trained of runs that were trained for it'
  return found


def main(name: str) -> None:
  """Answers the pictures of --input into --output.

  Args:
    name: the task.

  Raises:
    UserError: a flag, a picture or the run does not fit.
  """
  if FLAGS.method == 'list':
    head, *rows = methods.table()
    found = [dict(zip(head, row, strict=True)) for row in rows]
    lines = terminal.words(head, rows)
    terminal.report({'methods': found}, '\n'.join(lines), FLAGS.json)
    return
  command.need('workdir', 'input', 'output')
  distributed.initialize()
  command.at_least(samples=1, batch_size=1, tile=1)
  command.seeds('seed')
  if FLAGS.samples is None:
    FLAGS.samples = 4 if name == 'vary' else 1
  workdir = declare.workdir()
  config = runs.read_config(workdir)
  output = files.at(FLAGS.output).expanduser()
  runs.usable_output(output, 'edits')
  if files.resolved(FLAGS.input) in (files.resolved(output), *files.parents(
    files.resolved(output)
  )):  # fmt: skip
    raise UserError(
      f'--output={FLAGS.output} is inside of --input={FLAGS.input}, whose '
      'pictures its answers would become: choose a folder outside'
    )
  able = edit_plans.able(edit_tasks.KINDS[name])
  method = one_of('method', FLAGS.method or able[0], able)
  if method == edit_plans.MEAN and FLAGS.samples > 1:
    raise UserError(
      f'--samples={FLAGS.samples}: the mean is one answer; samples are those '
      'of --method=denoise'
    )
  low_rank.asked()
  others = guiding.others_of(config)
  asked = edit_inputs.asked(name, config)
  compilation.keep()

  def read(step):
    trained = low_rank.applied(declare.network(step))
    trained = guiding.applied(trained, others)
    return trained, edit_inputs.groups(asked, _plan_of(trained))

  trained, groups = declare.of_run(read)
  shown = edit_results.fill(trained, name, groups, output)
  result = distributed.on_first(
    lambda: edit_results.write(trained, name, groups, output, shown)
  )
  terminal.report(result, edit_results.text(result), FLAGS.json)


def _plan_of(trained) -> Callable:
  """(kind, image shape, tile, overlap) -> the edit that the flags ask for."""
  names = ('num_steps', 'grid', 'clip', 'seed', 'label', 'negative_prompt')
  how = {
    **{name: FLAGS[name].value for name in (*names, *OPTIONS)},
    **guiding.asked(), 'prompts': guiding.prompts_asked(),
  }  # fmt: skip
  return functools.partial(edit_plans.plan, trained, method=FLAGS.method, **how)
