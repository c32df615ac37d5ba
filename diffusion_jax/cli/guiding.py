"""The condition and guidance of samples: their flags.

`flags.adopt_module_key_flags(guiding)` makes these flags a binary's own.
"""

import functools

from absl import flags

from diffusion_jax import runs
from diffusion_jax.cli import declare
from diffusion_jax.runs import guided, labels
from diffusion_jax.runs.trained import Trained, load
from diffusion_jax.samplers import guided as options
from diffusion_jax.samplers.plan import Plan
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
declare.table(
  label=(
    str,
    'Conditional runs: the class, as a number or a name; several with commas '
    'between, which samples get in turn; or all. By default a random one, as '
    'often as in the training images.',
  ),
  guidance=(
    float,
    f"Conditional runs: {options.WEIGHT}. By default the config's, 1.",
  ),
  guidance_interval=(
    str,
    '--guidance only at LO <= log-SNR < HI, given as LO,HI; the conditional '
    'model elsewhere.',
  ),
  guidance_rescale=(
    float,
    '--guidance: how far the deviation of the guided prediction is brought '
    'back to that of the conditional one, from 0 to 1 (arXiv 2305.08891).',
  ),
  guide=(
    str,
    'Another network as the u of --guidance: a run or WORKDIR@STEP, such as an '
    'earlier checkpoint (arXiv 2406.02507).',
  ),
)


def asked() -> dict:
  """The flags of a plan's guidance, see `plans.for_run`."""
  return {name: FLAGS[name].value for name in options.OPTIONS}


def condition(workdir, config: dict) -> dict:
  """The condition that --label asks for, see `labels.condition`."""
  return labels.condition(workdir, config, FLAGS.label)


def name(plan: Plan) -> list[str]:
  """The parts of a name of samples that say how they are guided."""
  asked, how = plan.condition.get('label', 'data'), plan.guidance
  parts = []
  if asked != 'data':
    every = asked == list(range(len(asked))) and len(asked) > 1
    parts.append('label' + (labels.ALL if every else '-'.join(map(str, asked))))
  if how:
    parts.append(f'guidance{how["guidance"]:g}')
  if 'guidance_interval' in how:
    parts.append('from{:g}to{:g}'.format(*how['guidance_interval']))
  if 'guidance_rescale' in how:
    parts.append(f'rescale{how["guidance_rescale"]:g}')
  if 'guide' in how:
    parts.append(f'guide{how["guide_sha256"][:8]}')
  return parts


@functools.cache
def _load(text: str) -> Trained:
  workdir, step = _parsed(text)
  return load(workdir, step, FLAGS.ema)


def guide(config: dict) -> Trained | None:
  """The network that --guide names.

  Args:
    config: the run's config.

  Raises:
    UserError: there is no such network, or it is of other data.
  """
  if FLAGS.guide is None:
    return None
  workdir, _ = _parsed(FLAGS.guide)
  guided.check(config, runs.read_config(workdir, '--guide'), workdir)
  return _load(FLAGS.guide)


def _parsed(text: str) -> tuple[files.Path, int | None]:
  """WORKDIR or WORKDIR@STEP -> the folder, and the step or None."""
  workdir, at, step = text.rpartition('@')
  if not at or files.at(text).expanduser().exists():
    workdir, step = text, None
  elif not step.isdecimal():
    raise UserError(
      f'--guide={text}: the step after @ must be a number, as in WORKDIR@1000'
    )
  return files.at(workdir).expanduser(), step and int(step)
